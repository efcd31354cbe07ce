"""What type checkers make of the public calls; tests/data/typing_cases.py has the cases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is among the tools for linting, which are not installed for every Python")

ROOT = Path(__file__).resolve().parent.parent
CASES = Path("tests", "data", "typing_cases.py")


def check(*arguments: str | Path) -> tuple[int, str]:
    """Run mypy with the project's strict settings; return its exit status and what it says of the file itself."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_inferred_types() -> None:
    """Mypy infers every type as the cases say, and refuses every line that they mark as wrong."""
    status, report = check(CASES)

    assert status == 0, report


def test_cases_can_fail(tmp_path: Path) -> None:
    """A case that says another type than is inferred, and a mark on a line that is right, are both reported."""
    cases = (ROOT / CASES).read_text(encoding="utf-8")
    wrong = tmp_path / "wrong_cases.py"
    wrong.write_text(
        cases.replace(
            'execute("a", {}, return_type=Invoice), Invoice)', 'execute("a", {}, return_type=Invoice), str)'
        ).replace("handle.result(timeout=5)", "handle.result(timeout=timedelta(5))")
    )

    status, report = check(wrong)

    assert status == 1
    assert 'Expression is of type "Invoice", not "str"  [assert-type]' in report
    assert 'Unused "type: ignore" comment  [unused-ignore]' in report
    assert "Found 2 errors in 1 file" in report
