"""The package as it is taken along: renamed, in a zip, frozen, on a read-only file system, under Python's switches.

Each test runs actions in a process of its own, against a LocalPlatform of the same copy. Nothing may be written to
stderr there, with the development mode on and warnings turned into errors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipapp
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.pythons import older_python
from zamp_sdk import __version__

PACKAGE = Path(__file__).resolve().parent.parent / "zamp_sdk"
STRICT = ("-X", "dev", "-W", "error")

# {package} is what the copy under test is called. The development mode's reports of slow callbacks would only tell
# how busy the machine is.
PROGRAM = """
import asyncio

from {package} import ActionExecutor, ActionFailedError
from {package}.local_platform import LocalPlatform

platform = LocalPlatform()


@platform.action
def double(params):
    return params["n"] * 2


@platform.action
def fail(params):
    raise ValueError("no funds")


async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    access = dict(base_url=platform.base_url, auth_token=platform.auth_token)
    handle = await ActionExecutor.start("double", dict(n=4), **access)
    collected = await ActionExecutor.get_handle(handle.id, **access).result()
    print("{package}:", await ActionExecutor.execute("double", dict(n=21), **access), collected)
    try:
        await ActionExecutor.execute("fail", None, **access)
    except ActionFailedError as exc:
        print("{package}:", str(exc).partition(" ")[2].replace(exc.action_id, "ID"))


with platform:
    asyncio.run(main())
"""


def program(package: str = "zamp_sdk") -> str:
    """A program that runs three actions with the package of this name."""
    return PROGRAM.replace("{package}", package)


def printed(package: str = "zamp_sdk") -> list[str]:
    """What that program prints."""
    return [f"{package}: 42 8", f"{package}: ID (fail) ended as FAILED: ValueError: no funds"]


def run(
    arguments: Sequence[str | Path],
    *,
    path: Path | None = None,
    cwd: Path,
    prefix: Sequence[str] = (),
    options: Sequence[str] = STRICT,
    extra_env: Mapping[str, str] | None = None,
) -> list[str]:
    """Run Python and return the lines that it printed; ``path`` goes in front of its module search path."""
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith(("PYTHON", "ZAMP", "COV"))}
    env.update(extra_env or {})
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [*prefix, sys.executable, *options, *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


def copy_package(destination: Path) -> Path:
    """Copy the package, without compiled files, and return where it is now."""
    return shutil.copytree(PACKAGE, destination, ignore=shutil.ignore_patterns("__pycache__"))


def zip_package(archive: Path) -> Path:
    """Write a zip file with the package at its top level, and return it."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for source in sorted(PACKAGE.rglob("*.py")):
            target.write(source, source.relative_to(PACKAGE.parent))
    return archive


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    """A search path with the copy ``acme._vendor.zee``, and another version that is installed as ``zamp_sdk``."""
    site = tmp_path / "site"
    vendor = site / "acme" / "_vendor"
    vendor.mkdir(parents=True)
    (site / "acme" / "__init__.py").touch()
    (vendor / "__init__.py").touch()
    copy_package(vendor / "zee")
    module = copy_package(site / "zamp_sdk") / "__init__.py"
    module.write_text(module.read_text(encoding="utf-8").replace(__version__, "0.0.1"), encoding="utf-8")
    return site


def test_a_renamed_copy_does_not_see_an_installed_one(vendored: Path) -> None:
    """Actions run through acme._vendor.zee import nothing of the zamp_sdk that is installed beside it."""
    code = program("acme._vendor.zee") + "import sys; print([name for name in sys.modules if 'zamp_sdk' in name])"

    assert run(["-c", code], path=vendored, cwd=vendored) == [*printed("acme._vendor.zee"), "[]"]


def test_an_installed_one_does_not_see_a_renamed_copy(vendored: Path) -> None:
    """Actions run through the installed zamp_sdk import nothing of the copy in acme."""
    code = program() + "import sys; print([name for name in sys.modules if 'acme' in name])"

    assert run(["-c", code], path=vendored, cwd=vendored) == [*printed(), "[]"]


def test_a_renamed_copy_and_an_installed_one_work_in_one_process(vendored: Path) -> None:
    """Both run actions in one process, each has its own version, and neither's exceptions are the other's."""
    code = "\n".join(
        [
            program("acme._vendor.zee"),
            program(),
            "import zamp_sdk, acme._vendor.zee as zee",
            "print(zamp_sdk.__version__, zamp_sdk.__version__ == zee.__version__)",
            "print(issubclass(zee.HttpClientError, zamp_sdk.ZampError), zee.RetryPolicy is zamp_sdk.RetryPolicy)",
        ]
    )

    lines = run(["-c", code], path=vendored, cwd=vendored)

    assert lines == [*printed("acme._vendor.zee"), *printed(), "0.0.1 False", "False False"]


def test_runs_from_inside_a_zip(tmp_path: Path) -> None:
    """Imported from a zip file on the search path, the package runs actions."""
    archive = zip_package(tmp_path / "packages.zip")
    code = program() + "import zamp_sdk; print(zamp_sdk.__spec__.origin)"

    lines = run(["-c", code], path=archive, cwd=tmp_path)

    assert lines == [*printed(), str(archive / "zamp_sdk" / "__init__.py")]


def test_the_command_line_of_a_renamed_copy(vendored: Path) -> None:
    """`python -m acme._vendor.zee` is the copy's own command line, whatever is installed beside it."""
    assert run(["-m", "acme._vendor.zee", "--version"], path=vendored, cwd=vendored) == [f"zamp-sdk {__version__}"]
    assert run(["-m", "zamp_sdk", "--version"], path=vendored, cwd=vendored) == ["zamp-sdk 0.0.1"]


def test_the_demo_runs_from_inside_a_zip(tmp_path: Path) -> None:
    """`python -m zamp_sdk demo` works in a zip file, without docstrings for its help."""
    archive = zip_package(tmp_path / "packages.zip")

    # Not in the development mode: it reports on stderr when the machine is slow.
    lines = run(["-m", "zamp_sdk", "demo"], path=archive, cwd=tmp_path, options=["-W", "error", "-OO"])

    assert '{"sent": true, "invoice_id": "inv_123"}' in lines


def test_runs_in_a_zipapp(tmp_path: Path) -> None:
    """An application packed with the package by zipapp runs actions, with no site-packages."""
    copy_package(tmp_path / "source" / "zamp_sdk")
    (tmp_path / "source" / "__main__.py").write_text(program())
    zipapp.create_archive(tmp_path / "source", tmp_path / "app.pyz", compressed=True)

    assert run([tmp_path / "app.pyz"], cwd=tmp_path, options=[*STRICT, "-I", "-S"]) == printed()


def test_a_module_in_a_zip_is_never_seen_half_imported(tmp_path: Path) -> None:
    """While one thread imports a module of the package, another that wants it waits (Python 3.9 needs help there)."""
    package = copy_package(tmp_path / "source" / "zamp_sdk")
    for module in package.rglob("*.py"):
        future = "from __future__ import annotations\n"
        slowly = f"{future}import time as _time\n_time.sleep(0.1)\n"  # so that another thread looks at it meanwhile
        module.write_text(module.read_text().replace(future, slowly))
    (tmp_path / "source" / "__main__.py").write_text(program())
    zipapp.create_archive(tmp_path / "source", tmp_path / "app.pyz")

    assert run([tmp_path / "app.pyz"], cwd=tmp_path, options=["-I", "-S"]) == printed()


def test_runs_without_files(tmp_path: Path) -> None:
    """The package runs actions when its modules come from memory, without ``__file__``, as in a frozen program."""
    archive = zip_package(tmp_path / "packages.zip")
    importer = """
import importlib.abc, importlib.util, sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as archive:
    sources = {name: archive.read(name) for name in archive.namelist()}


class Memory(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "zamp_sdk":
            return importlib.util.spec_from_loader(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname):
        return fullname.replace(".", "/") + "/__init__.py" in sources

    def get_source(self, fullname):
        return sources[fullname.replace(".", "/") + ("/__init__.py" if self.is_package(fullname) else ".py")].decode()


sys.meta_path.insert(0, Memory())
"""
    code = importer + program() + "print([m for m in sys.modules.values() if 'zamp_sdk' in getattr(m, '__file__', '')])"

    assert run(["-c", code, archive], cwd=tmp_path) == [*printed(), "[]"]


@pytest.mark.parametrize("switches", [["-I"], ["-S"], ["-O"], ["-OO"], ["-B"], ["-I", "-S", "-OO"]], ids=" ".join)
def test_runs_under_the_switch(switches: list[str], tmp_path: Path) -> None:
    """The package runs actions without site-packages, the environment, assertions, docstrings or compiled files."""
    copy = copy_package(tmp_path / "zamp_sdk")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program()}print(sys.modules['zamp_sdk'].__file__)"

    lines = run(["-c", code], cwd=tmp_path, options=[*STRICT, *switches])

    assert lines == [*printed(), str(copy / "__init__.py")]


def without_privileges(read_only: Path) -> list[str]:
    """Return what to put in front of a command so that it can't write to a folder that has no write permission."""
    prefix = []
    if os.geteuid() == 0:  # permissions mean nothing to root, but for these capabilities
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
        if shutil.which("setpriv") is None:
            pytest.skip("root can write everywhere, and there is no setpriv to take that from it")
    probe = [*prefix, sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", str(read_only / "probe")]
    if b"PermissionError" not in subprocess.run(probe, capture_output=True, check=False).stderr:
        pytest.skip("this user can write to a read-only folder")
    return prefix


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such permissions")
def test_runs_on_a_read_only_file_system(tmp_path: Path) -> None:
    """Where nothing can be written, neither compiled files nor temporary ones, the package runs actions."""
    root = tmp_path / "root"
    copy_package(root / "zamp_sdk")
    before = sorted(root.rglob("*"))
    folders = [root, *(path for path in before if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        prefix = without_privileges(root)
        everywhere = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(root))
        lines = run(["-c", program()], path=root, cwd=root, prefix=prefix, extra_env=everywhere)
    finally:
        for folder in folders:
            folder.chmod(0o755)

    assert lines == printed()
    assert sorted(root.rglob("*")) == before


def refusal(command: Sequence[str | Path], cwd: Path, **extra_env: str) -> str:
    """Run a program that must end with a traceback, and return the last line of it."""
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith(("PYTHON", "COV"))}
    env.update(extra_env)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8"])
@pytest.mark.parametrize("arguments", [["-c", "import zee"], ["-m", "zee", "demo"]], ids=["import", "command"])
def test_an_older_python_is_told_what_is_needed(version: str, arguments: list[str], tmp_path: Path) -> None:
    """Where nothing has checked the version of Python, a copy says which one it needs, from a folder and from a zip."""
    python = older_python(version)
    if python is None:
        pytest.skip(f"this machine has no Python {version}")
    sentence = f"ImportError: zamp_sdk needs Python 3.9 or later; this is {version}"
    copy = copy_package(tmp_path / "zee")
    assert refusal([python, "-B", *arguments], tmp_path) == sentence

    with zipfile.ZipFile(tmp_path / "packages.zip", "w") as archive:
        for source in copy.rglob("*.py"):
            archive.write(source, source.relative_to(tmp_path))
    shutil.rmtree(copy)
    assert refusal([python, "-B", *arguments], tmp_path, PYTHONPATH="packages.zip") == sentence


def test_a_python_that_calls_itself_older_is_told_so(tmp_path: Path) -> None:
    """The sentence needs no older Python to be shown: one that calls itself 3.8 does not get further either."""
    copy_package(tmp_path / "zamp_sdk")
    program = "import sys; sys.version_info = (3, 8, 18, 'final', 0); import zamp_sdk"

    said = refusal([sys.executable, "-B", "-c", program], tmp_path)

    assert said == "ImportError: zamp_sdk needs Python 3.9 or later; this is 3.8"
