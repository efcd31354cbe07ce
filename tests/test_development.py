"""What people run while they change this project: the Makefile, the hooks of pre-commit, and the CI's matrix."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOOKS = ROOT / ".pre-commit-config.yaml"
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="this machine has no make")


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make; nothing of a make that runs these tests has a say."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def recipe(*arguments: str) -> str:
    """Return what make would run."""
    done = run_make("-n", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_tests_are_run_with_coverage() -> None:
    """Without arguments the whole suite has to reach the coverage that pyproject.toml asks for."""
    assert " -m pytest --cov " in recipe("test", "PYTEST_ARGS=")


def test_one_file_is_tested_without_coverage() -> None:
    """A file that is named is tested alone, and not for what it does not cover."""
    assert recipe("test", "PYTEST_ARGS=tests/test_errors.py -x").rstrip().endswith(" -m pytest tests/test_errors.py -x")


def test_a_python_without_venv_gets_advice_and_nothing_else(tmp_path: Path) -> None:
    """Where Python lacks what makes a virtual environment, as Debian's does, the advice says so, with no traceback."""
    (tmp_path / "ensurepip.py").write_text("raise ModuleNotFoundError('No module named ensurepip')")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

    tried = subprocess.run(
        ["make", "install", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert tried.returncode == 2
    assert "apt install python3-venv" in tried.stdout
    assert "Traceback" not in tried.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(not HOOKS.exists(), reason="the source distribution has no hooks")
def test_the_hooks_need_no_activated_environment() -> None:
    """Each of pre-commit's hooks is a target of the Makefile, which names its tools by their place."""
    config = HOOKS.read_text(encoding="utf-8")
    entries = [line.split("entry: ")[1] for line in config.splitlines() if "entry: " in line]
    assert [entry.split()[:2] for entry in entries] == [["make", "--silent"]] * 2
    for entry in entries:
        commands = [line for line in recipe(entry.split()[-1]).splitlines() if "ruff" in line or "mypy" in line]
        assert commands
        assert all(command.split()[0].endswith("/bin/python") for command in commands)


def test_a_python_without_its_venv_module_gets_advice_alone(tmp_path: Path) -> None:
    """Where Debian's python3 comes without python3-venv, make says what to install, and no traceback comes with it."""
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: ensurepip' >&2\nexit 1\n", encoding="ascii")
    python.chmod(0o755)
    done = run_make("test", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")

    assert done.returncode != 0
    assert done.stdout.splitlines() == [
        f"{python} must be Python 3.9 or later, with its venv module (on Debian and Ubuntu: apt install python3-venv).",
        "To use another one: make PYTHON=/path/to/python3",
    ]
    assert len(done.stderr.splitlines()) == 1  # make's own, that the target failed


@pytest.mark.skipif(not WORKFLOW.exists(), reason="the source distribution has no workflows")
def test_continuous_integration_runs_every_python_that_is_promised() -> None:
    """Its matrix has each version that a classifier names, and a free-threaded build."""
    (matrix,) = re.findall(r"python-version: \[(.*)\]", WORKFLOW.read_text(encoding="utf-8"))
    versions = re.findall(r'"(.*?)"', matrix)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    assert set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)) <= set(versions)
    assert any(version.endswith("t") for version in versions)
