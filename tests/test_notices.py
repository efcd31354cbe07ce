"""What people are told beside results and exceptions: every id, and never a flood."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import run_script
from zamp_sdk.action_executor import notices
from zamp_sdk.action_executor.notices import Notice, warn, warn_now_and_then

COLLECT = "collect({})"


def left(number: int) -> Notice:
    """An action that nobody waits for any more."""
    return Notice("no longer waiting for {}, which may go on", f"action act-{number}", COLLECT, f"act-{number}")


def doubtful(name: str) -> Notice:
    """A start that may have happened."""
    return Notice("cancelled while starting {}", f"action {name!r}")


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a person who has not set logging up has seen."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@contextmanager
def handler_that_raises() -> Iterator[None]:
    """A logging handler with a fault."""

    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("disk full")

    handler = Raises()
    notices.logger.addHandler(handler)
    try:
        yield
    finally:
        notices.logger.removeHandler(handler)


FIRST = "no longer waiting for action act-0, which may go on; to collect its result: collect('act-0')"


async def test_the_first_is_told_at_once_and_the_others_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """What one moment ends is two lines, whatever the number, and the next moment begins anew."""
    for number in range(4):
        warn(left(number))
    assert logged(caplog) == [FIRST]
    await asyncio.sleep(0)  # it had to end a request first
    warn(left(4))
    await asyncio.sleep(2 * notices.MOMENT)
    ids = "action act-1, action act-2, action act-3, action act-4"
    others = f"4 more: {ids}, which may go on; to collect a result: collect(ID)"
    assert logged(caplog) == [FIRST, f"no longer waiting for {others}"]
    warn(left(0))
    assert logged(caplog)[2:] == [FIRST]


async def test_each_fate_has_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Actions that started and starts in doubt are told apart."""
    for notice in (left(0), doubtful("a"), left(1), doubtful("b")):
        warn(notice)
    await asyncio.sleep(2 * notices.MOMENT)
    assert logged(caplog) == [
        FIRST,
        "cancelled while starting 2 more: action 'a', action 'b'",
        "no longer waiting for 1 more: action act-1, which may go on; to collect a result: collect(ID)",
    ]


def test_without_an_event_loop_each_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A coroutine that is thrown away after its loop has ended still tells its id."""
    warn(left(0))
    warn(left(0))
    assert logged(caplog) == [FIRST, FIRST]


def test_a_loop_that_is_closed_before_it_told_all_loses_none(caplog: pytest.LogCaptureFixture) -> None:
    """What a loop has still to tell is told when it is closed, be it the last one of the process."""

    async def leave_two() -> None:
        warn(left(0))
        warn(left(1))
        raise KeyboardInterrupt

    loop = asyncio.new_event_loop()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(leave_two())
    assert logged(caplog) == [FIRST]
    loop.close()
    others = "1 more: action act-1, which may go on; to collect a result: collect(ID)"
    assert logged(caplog) == [FIRST, f"no longer waiting for {others}"]


STOPPED = """
import asyncio
from zamp_sdk.action_executor.notices import Notice, warn

async def leave():
    for name in ("act-0", "act-1", "act-2"):
        warn(Notice("no longer waiting for {}", name))
    raise KeyboardInterrupt

loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(leave())
except KeyboardInterrupt:
    loop.stop()
"""


def test_what_no_loop_has_told_is_told_at_the_processes_end() -> None:
    """A loop that is neither run again nor closed loses nothing either."""
    done = run_script(STOPPED)
    told = [line for line in done.stderr.splitlines() if line.startswith("no longer waiting")]
    assert told == ["no longer waiting for act-0", "no longer waiting for 2 more: act-1, act-2"]


async def test_a_handler_that_raises_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A fault of a logging handler reaches nobody who is being told something else."""
    with handler_that_raises():
        warn(left(0))
        warn(left(1))
        await asyncio.sleep(2 * notices.MOMENT)
    caplog.clear()
    warn(left(0))
    assert logged(caplog) == [FIRST]


def test_what_many_meet_is_a_warning_once_in_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning of each subject stands for all of its minute; the others are there for who debugs."""
    caplog.set_level(logging.DEBUG, "zamp_sdk")
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for text in ("a", "b"):
        warn_now_and_then("subject", text)
    warn_now_and_then("another", "c")
    now += 60.0
    warn_now_and_then("subject", "d")
    assert logged(caplog) == ["a", "c", "d"]
    assert [record.getMessage() for record in caplog.records] == ["a", "b", "c", "d"]
