"""`make layer`: what is in the AWS Lambda layer, and that the same sources give the same bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.pythons import older_python

ROOT = Path(__file__).resolve().parent.parent
BUILDER = Path(".ci", "layer.py")


def build(checkout: Path) -> Path:
    """Build the layer of a checkout and return the file."""
    subprocess.run([sys.executable, BUILDER], cwd=checkout, check=True, capture_output=True)
    return checkout / "dist" / "zamp-sdk-layer.zip"


def check_out(destination: Path) -> Path:
    """Copy what the layer is built from."""
    shutil.copytree(ROOT / "zamp_sdk", destination / "zamp_sdk", ignore=shutil.ignore_patterns("__pycache__"))
    (destination / BUILDER).parent.mkdir()
    shutil.copyfile(ROOT / BUILDER, destination / BUILDER)
    shutil.copyfile(ROOT / "LICENSE", destination / "LICENSE")
    return destination


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layer of this checkout."""
    return build(check_out(tmp_path_factory.mktemp("checkout") / "a"))


def test_two_checkouts_give_the_same_bytes(layer: Path, tmp_path: Path) -> None:
    """Neither the place, the times, the permissions nor compiled files change a byte of the layer."""
    other = check_out(tmp_path / "b")
    for path in other.rglob("*.py"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o600)
    cache = other / "zamp_sdk" / "__pycache__"
    cache.mkdir()
    (cache / "errors.cpython-39.pyc").write_bytes(b"compiled")

    assert build(other).read_bytes() == layer.read_bytes()


def test_holds_the_package_and_its_licence(layer: Path) -> None:
    """Every module, py.typed and the licence lie under python/zamp_sdk, and nothing else is there."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "zamp_sdk").rglob("*.py")}
    expected = {f"python/{name}" for name in {*modules, "zamp_sdk/py.typed", "zamp_sdk/LICENSE"}}

    with zipfile.ZipFile(layer) as archive:
        assert archive.testzip() is None
        assert set(archive.namelist()) == expected
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o100644}


def test_can_be_imported_once_unpacked(layer: Path, tmp_path: Path) -> None:
    """With the layer's python folder on the path and no site-packages, `import zamp_sdk` finds the layer's copy."""
    with zipfile.ZipFile(layer) as archive:
        archive.extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import zamp_sdk; print(zamp_sdk.__file__)"

    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, tmp_path / "python"], check=True, capture_output=True, text=True
    )

    assert Path(found.stdout.strip()) == tmp_path / "python" / "zamp_sdk" / "__init__.py"


def test_an_older_python_is_told_what_is_needed(layer: Path, tmp_path: Path) -> None:
    """A function whose Python is too old for the layer says in its log which one the layer needs."""
    python = older_python("3.8")
    if python is None:
        pytest.skip("this machine has no Python 3.8")
    with zipfile.ZipFile(layer) as archive:
        archive.extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import zamp_sdk"

    tried = subprocess.run(
        [python, "-I", "-S", "-B", "-c", code, tmp_path / "python"], check=False, capture_output=True, text=True
    )

    assert tried.stderr.endswith("ImportError: zamp_sdk needs Python 3.9 or later; this is 3.8\n")
