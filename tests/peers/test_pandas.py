"""Values of real pandas, numpy, pendulum, arrow and attrs as params: sent as what they mean, or refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.peers.venvs import install_project, venv

# Prints what becomes of each case's value: its JSON, or why it is refused.
PROGRAM = """
import json, sys
import arrow, attrs, numpy, pandas, pendulum
from zamp_sdk.action_executor import params

@attrs.define
class Line:
    price: int = 1

for case in json.loads(sys.argv[1]):
    try:
        request = params.start_call("a", {"due": eval(case)}, summary=None, retry_policy=None,
                                     start_to_close_timeout=None, idempotency_key="k")
        print(json.dumps(json.loads(request.body)["params"]["due"]))
    except (TypeError, ValueError) as exc:
        print(f"{type(exc).__name__}: {exc}")
"""

CASES = {
    "pandas.Timestamp('2026-01-02T03:04:05Z')": '"2026-01-02T03:04:05+00:00"',
    "pandas.Timestamp('2026-01-02T03:04:05.000000001Z')": '"2026-01-02T03:04:05.000000001+00:00"',
    "pandas.Timedelta(90, 's')": '"PT1M30S"',
    "numpy.float64(1.5)": "1.5",
    "numpy.str_('x')": '"x"',
    "pendulum.datetime(2026, 1, 2)": '"2026-01-02T00:00:00+00:00"',
    "pendulum.duration(days=1, hours=25)": '"P2DT1H"',
    "pendulum.duration(seconds=-90)": '"-PT1M30S"',
    "pendulum.datetime(2025, 1, 1) - pendulum.datetime(2026, 1, 2)": '"-P366D"',
    "pandas.NaT": "ValueError: params.due: cannot send NaT as JSON: it is no date or time in ISO 8601",
    "pandas.Timedelta(1, 'ns')": (
        "ValueError: params.due: cannot send Timedelta('0 days 00:00:00.000000001') as JSON: "
        "it is no whole number of microseconds"
    ),
    "numpy.float64('nan')": "ValueError: params.due: cannot send nan as JSON",
    "numpy.int64(1)": "TypeError: params.due: cannot send a numpy.int64 as JSON",
    "numpy.array([1])": "TypeError: params.due: cannot send a numpy.ndarray as JSON",
    "arrow.get(0)": "TypeError: params.due: cannot send an arrow.arrow.Arrow as JSON",
    "Line()": "TypeError: params.due: cannot send a __main__.Line as JSON",
}


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with the package and all of them."""
    python = venv("values", "arrow", "attrs", "numpy", "pandas", "pendulum")
    install_project(python)
    return python


def run(python: Path, *cases: str) -> list[str]:
    """Return what becomes of each case's value."""
    done = subprocess.run(
        [python, "-c", PROGRAM, json.dumps(cases)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_values_are_sent_as_what_they_mean_or_refused(python: Path) -> None:
    """What is no date, no duration of whole microseconds and no type of JSON is refused; the rest is ISO 8601."""
    assert dict(zip(CASES, run(python, *CASES))) == CASES


def test_a_numpy_bool_is_named_as_one(python: Path) -> None:
    """A bool of numpy's is told apart from Python's by its module, whatever numpy 1 and 2 call it."""
    assert run(python, "numpy.bool_(True)")[0] in {
        "TypeError: params.due: cannot send a numpy.bool_ as JSON",
        "TypeError: params.due: cannot send a numpy.bool as JSON",
    }
