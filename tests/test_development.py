"""What people run while they change this project: the Makefile's test target, and the hooks of pre-commit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOOKS = ROOT / ".pre-commit-config.yaml"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="this machine has no make")


def recipe(*arguments: str) -> str:
    """Return what make would run; nothing of a make that runs these tests has a say."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


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
