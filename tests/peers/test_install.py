"""Installing with pip, from the package index's point of view: beside the official SDK, which has the same name there.

What is built gets its build tools from the index, too, as it does on a user's machine.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import official_sdk
from tests.peers.conftest import absent
from tests.peers.venvs import ROOT, venv
from tests.test_readme import INSTALLING, Sample, check_out, commands, environment, run_script
from zamp_sdk import __version__

__all__ = ["environment"]  # a fixture


class Sources(NamedTuple):
    """What this package can be installed from."""

    wheel: Path
    repository: str


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A wheel, and a git repository with the commit to take."""
    if shutil.which("git") is None:
        absent("git is not installed: apt-get install git")
    folder = tmp_path_factory.mktemp("sources")
    clone = check_out(folder / "clone")
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main")
    for command in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message=All of it")):
        subprocess.run([*git, *command], cwd=clone, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True).stdout
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return Sources(wheel, f"git+{clone.as_uri()}@{commit.strip()}")


@pytest.fixture(scope="module")
def official() -> official_sdk.Official:
    """The newest official SDK on the index, and a Python that it supports."""
    try:
        return official_sdk.find()
    except LookupError as exc:
        absent(str(exc))


def pip(python: Path, *arguments: str | Path) -> str:
    """Run pip quietly, and return what it prints."""
    done = subprocess.run([python, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed(python: Path) -> tuple[str, str]:
    """Return the version that `pip show zamp-sdk` tells, and whose package it is."""
    shown = pip(python, "show", "--files", "zamp-sdk")
    version = next(line.partition(": ")[2] for line in shown.splitlines() if line.startswith("Version: "))
    return version, "this" if "zamp_sdk/local_platform/" in shown else "official"  # which has no such module


# 1.1.0 is a number that this package has had, too.
@pytest.mark.parametrize("which", ["1.1.0", "newest"])
@pytest.mark.parametrize("source", ["wheel", "URL of a wheel", "git"])
def test_it_replaces_an_installed_official_one(
    which: str, source: str, official: official_sdk.Official, sources: Sources
) -> None:
    """`pip install` of a wheel, of a wheel's URL or of a git repository replaces an installed official SDK."""
    python = venv("install", "pip>=24", interpreter=official.python)
    other = official.version if which == "newest" else which
    pip(python, "install", "--quiet", "--force-reinstall", "--no-deps", f"zamp-sdk=={other}")
    assert installed(python) == (other, "official")
    wanted: dict[str, str | Path] = {
        "wheel": sources.wheel,
        "URL of a wheel": f"zamp-sdk @ {sources.wheel.as_uri()}",
        "git": sources.repository,
    }

    pip(python, "install", "--quiet", wanted[source])

    assert installed(python) == (__version__, "this")


def test_an_upgrade_by_name_brings_the_official_one_back(official: official_sdk.Official, sources: Sources) -> None:
    """What README warns of: `pip install -U zamp-sdk` means the official SDK, and a requirement with a URL does not."""
    python = venv("install", "pip>=24", interpreter=official.python)
    pip(python, "install", "--quiet", "--force-reinstall", sources.wheel)

    pip(python, "install", "--quiet", "--upgrade", f"zamp-sdk @ {sources.wheel.as_uri()}")
    assert installed(python) == (__version__, "this")

    pip(python, "install", "--quiet", "--upgrade", "--no-deps", "zamp-sdk")
    assert installed(python) == (official.version, "official")


@pytest.mark.parametrize("sample", INSTALLING, ids=lambda sample: sample.place)
def test_the_commands_that_install_can_be_typed_as_they_stand(
    sample: Sample, environment: Mapping[str, str], tmp_path: Path
) -> None:
    """What the documents show for installing succeeds in a clone, and what it installs works."""
    outside = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    script = f"{commands(sample)}\ncd /\nzamp-sdk execute send_invoice\npython -m zamp_sdk --version"

    printed = run_script(script, check_out(tmp_path / "clone"), outside, seconds=300)

    assert printed.endswith(f"{{}}\nzamp-sdk {__version__}\n")
