"""What is shipped: the wheel and the source distribution as they are built, and what the package may import."""

from __future__ import annotations

import ast
import configparser
import email
import email.message
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import zamp_sdk

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "zamp_sdk").rglob("*.py"))


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it; no network is needed."""
    folder = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    """The one wheel."""
    (found,) = distributions.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> email.message.Message:
    """The wheel's core metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"zamp_sdk-{zamp_sdk.__version__}.dist-info/METADATA"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """The wheel has every module, py.typed and the licence, and neither tests nor tools."""
    info = f"zamp_sdk-{zamp_sdk.__version__}.dist-info"
    expected = {path.relative_to(ROOT).as_posix() for path in MODULES} | {
        "zamp_sdk/py.typed",
        f"{info}/METADATA",
        f"{info}/RECORD",
        f"{info}/WHEEL",
        f"{info}/entry_points.txt",
        f"{info}/licenses/LICENSE",
    }

    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == expected


def test_wheel_runs_on_any_python_from_3_9_on_and_needs_nothing_else(metadata: email.message.Message) -> None:
    """The metadata names no dependency and no upper bound of Python's version."""
    assert metadata.get_all("Requires-Dist") is None
    assert metadata.get_all("Provides-Extra") is None
    assert metadata["Requires-Python"] == ">=3.9"
    assert metadata["License-Expression"] == "MIT"


def test_an_index_takes_the_distributions_and_shows_their_readme(distributions: Path) -> None:
    """`twine check --strict` has nothing to say about the wheel and the source distribution."""
    pytest.importorskip("twine", reason="only the development tools of `make install` have it")
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *distributions.iterdir()],
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("PASSED") == 2


def test_the_metadata_says_what_this_is(metadata: email.message.Message) -> None:
    """The wheel's metadata has a summary, README, authors, keywords, Pythons and operating systems."""
    classifiers = metadata.get_all("Classifier", [])

    assert "standard library" in metadata["Summary"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    assert metadata["Author"]
    assert "zero-dependency" in metadata["Keywords"].split(",")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 16)} <= set(classifiers)
    assert "Programming Language :: Python :: Free Threading" in classifiers
    assert len([each for each in classifiers if each.startswith("Operating System :: ")]) == 3


def test_no_link_leads_to_the_official_sdks_repository(metadata: email.message.Message) -> None:
    """The official SDK's repository is not this package's home: neither the metadata nor a document leads there."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests" / "benchmarks" / "README.md"]

    assert metadata.get_all("Project-URL") is None
    assert metadata["Home-page"] is None
    assert len(documents) >= 6
    assert [path.name for path in documents if "zampfi" in path.read_text(encoding="utf-8").lower()] == []


def test_the_version_is_one_that_the_official_sdk_never_has(metadata: email.message.Message) -> None:
    """The metadata has the package's own version; its local label (PEP 440) is one that no index takes."""
    assert metadata["Version"] == zamp_sdk.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+\+stdlib", zamp_sdk.__version__)


def test_the_only_command_installed_is_zamp_sdk(wheel: Path) -> None:
    """The only command that is installed is zamp-sdk, and it is the same as `python -m zamp_sdk`."""
    entry_points = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        entry_points.read_string(archive.read(f"zamp_sdk-{zamp_sdk.__version__}.dist-info/entry_points.txt").decode())

    assert entry_points.sections() == ["console_scripts"]
    assert dict(entry_points["console_scripts"]) == {"zamp-sdk": "zamp_sdk.cli:main"}


def test_source_distribution_can_be_tested(distributions: Path) -> None:
    """The source distribution holds the tests, the documents and the licence, and nothing that tools leave behind."""
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}

    documents = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md", "docs/troubleshooting.md"} <= documents
    assert {*documents, "LICENSE", "Makefile", "pyproject.toml", "tests/test_packaging.py", ".ci/layer.py"} <= names
    assert {name.split("/")[0] for name in names} <= {
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "PKG-INFO",
        "README.md",
        "SECURITY.md",
        "docs",
        "pyproject.toml",
        "tests",
        "zamp_sdk",
    }
    assert not [name for name in names if "__pycache__" in name]


def absolute_imports(module: Path) -> set[str]:
    """The dotted names of the modules that a module imports, at any level of nesting, other than relatively."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from a import b` may import the module a.b.
            names.update(name for alias in node.names for name in (f"{node.module}", f"{node.module}.{alias.name}"))
    return names


each_module = pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())


@each_module
def test_modules_can_be_copied_anywhere(module: Path) -> None:
    """A module names the package only relatively, and asks neither for its own path nor for installed metadata."""
    imported = absolute_imports(module)

    assert not imported & {"importlib.metadata", "importlib.resources", "pkg_resources", "pkgutil"}
    assert not [name for name in imported if name.split(".")[0] == "zamp_sdk"]
    assert "__file__" not in module.read_text(encoding="utf-8")


@each_module
def test_modules_import_only_the_standard_library(module: Path) -> None:
    """What a module imports is the package's own, or comes with Python."""
    if sys.version_info < (3, 10):
        pytest.skip("sys.stdlib_module_names is new in Python 3.10")

    assert {name.split(".")[0] for name in absolute_imports(module)} <= sys.stdlib_module_names


def test_no_file_names_a_place_outside_the_checkout() -> None:
    """No tracked file has a path of the machine that it was written on."""
    if shutil.which("git") is None:
        pytest.skip("git, which knows the tracked files, is not installed")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    outside = re.compile(rb"(?<![\w.])/(?:home|root|Users|work)/\w|\.\./shared")

    tracked = [ROOT / name for name in listing.stdout.split("\0") if name]

    assert [str(path) for path in tracked if path.is_file() and outside.search(path.read_bytes())] == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name)
def test_every_test_says_what_it_shows(path: Path) -> None:
    """A test module and each test in it has a docstring, which states one behaviour."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    ]
    assert ast.get_docstring(tree)
    assert [test.name for test in tests if not ast.get_docstring(test)] == []
