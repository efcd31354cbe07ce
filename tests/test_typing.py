"""What type checkers make of the public calls (tests/data/typing_cases.py has the cases), and programs at run time."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = Path("tests", "data", "typing_cases.py")


def check(*arguments: str | Path) -> tuple[int, str]:
    """Run mypy with the project's strict settings; return its exit status and what it says of the file itself."""
    pytest.importorskip("mypy", reason="mypy is among the tools for linting, which are not installed for every Python")
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


PUBLIC_MODULES = [
    "zamp_sdk",
    "zamp_sdk.action_executor",
    "zamp_sdk.action_executor.executor",
    "zamp_sdk.action_executor.models",
    "zamp_sdk.action_executor.utils",
    "zamp_sdk.cli",
    "zamp_sdk.errors",
    "zamp_sdk.local_platform",
]


def annotated(module: object) -> Iterator[tuple[str, object]]:
    """Yield the public functions and classes of a module that are this package's, and the classes' public methods."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) not in PUBLIC_MODULES:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value
        if inspect.isclass(value):
            for member, raw in vars(value).items():
                method = raw.fget if isinstance(raw, property) else getattr(value, member)
                if inspect.isroutine(method) and (member == "__init__" or not member.startswith("_")):
                    yield f"{name}.{member}", method


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_hints_can_be_resolved_at_run_time(name: str) -> None:
    """``typing.get_type_hints``, by which other libraries look at functions, works on everything public."""
    found = dict(annotated(importlib.import_module(name)))

    assert found
    for place, value in found.items():
        assert typing.get_type_hints(value) is not None, place


def test_hints_say_what_is_optional() -> None:
    """What may be left out, or be None, is so at run time, too, in the words of the oldest Python."""
    hints = typing.get_type_hints(importlib.import_module("zamp_sdk.errors").HttpClientError.__init__)

    assert hints["status_code"] == typing.Optional[int]
