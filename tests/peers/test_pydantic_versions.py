"""The package installed beside pydantic 1 and beside pydantic 2: it depends on neither, and gets along with both."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.peers.venvs import install_project, venv

# Each statement of {body} runs in a coroutine, with `execute` bound to an action that returns its params.
PROGRAM = """
import asyncio
import functools
from datetime import date
from decimal import Decimal

import pydantic
from zamp_sdk import ActionExecutor
from zamp_sdk.local_platform import LocalPlatform


class Invoice(pydantic.BaseModel):
    number: str
    due: date
    total: Decimal


invoice = Invoice(number="A-1", due=date(2025, 1, 31), total=Decimal("9.90"))
platform = LocalPlatform()


@platform.action
def echo(params):
    return params


async def main():
    execute = functools.partial(
        ActionExecutor.execute, "echo", base_url=platform.base_url, auth_token=platform.auth_token
    )
{body}


with platform:
    asyncio.run(main())
"""


def run(python: Path, body: str) -> list[str]:
    """Run the program with this body, and return the lines that it printed."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-W", "error", "-c", PROGRAM.replace("{body}", lines)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def pydantic_1() -> Path:
    """The Python of an environment with the package and pydantic 1."""
    python = venv("pydantic1", "pydantic<2")
    install_project(python)
    return python


@pytest.fixture(scope="module")
def pydantic_2() -> Path:
    """The Python of an environment with the package and pydantic 2."""
    python = venv("pydantic2", "pydantic>=2,<3")
    install_project(python)
    return python


@pytest.mark.parametrize("version", [1, 2])
def test_installs_beside(version: int, request: pytest.FixtureRequest) -> None:
    """With either version, `pip check` finds nothing wrong."""
    python: Path = request.getfixturevalue(f"pydantic_{version}")

    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "check"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout.strip()) == (0, "No broken requirements found."), done.stderr
    (found,) = run(python, "print(pydantic.VERSION)")
    assert found.split(".")[0] == str(version)


def test_models_of_pydantic_2(pydantic_2: Path) -> None:
    """A model of pydantic 2 is sent as JSON, also from inside of other values, and return_type makes it anew."""
    body = """
print(await execute(invoice, return_type=Invoice) == invoice)
print(await execute({"all": [invoice]}))
"""

    assert run(pydantic_2, body) == [
        "True",
        "{'all': [{'number': 'A-1', 'due': '2025-01-31', 'total': '9.90'}]}",
    ]


def test_models_of_pydantic_1(pydantic_1: Path) -> None:
    """A model of pydantic 1 has no model_validate, so the result stays as it came; its ``dict()`` can be sent."""
    body = """
print(await execute(invoice.dict(), return_type=Invoice))
print(Invoice.parse_obj(await execute(invoice.dict())) == invoice)
"""

    assert run(pydantic_1, body) == ["{'number': 'A-1', 'due': '2025-01-31', 'total': '9.90'}", "True"]


def test_sending_a_model_of_pydantic_1(pydantic_1: Path) -> None:
    """A model of pydantic 1 itself, which has no model_dump, is refused by its place before anything is sent."""
    body = """
try:
    await execute({"all": [invoice]})
except TypeError as exc:
    print(exc, len(platform.requests))
"""

    assert run(pydantic_1, body) == ["params.all[0]: cannot send a __main__.Invoice as JSON 0"]
