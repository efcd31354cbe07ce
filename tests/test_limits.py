"""Many actions at once on platforms that limit how fast they are asked: a real one on loopback for each kind of limit.

What each of them does for hours, and at what rate, is simulated in ``test_pacing.py``.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Callable

import pytest

from zamp_sdk import ActionExecutor, ActionTimeoutError, HttpClientError
from zamp_sdk.action_executor import executor, pacing
from zamp_sdk.action_executor.pacing import pace_of
from zamp_sdk.local_platform import LocalPlatform

from .conftest import PROMPT, execute, handle_at, pool_is_at_rest, pool_state, run_script, start
from .limiting_platform import LimitingPlatform
from .servers import TOKEN, eventually

ACTIONS = 40


async def execute_all(base_url: str, numbers: range) -> None:
    """Execute actions at once, and check that each brings its own result."""
    results = await asyncio.wait_for(asyncio.gather(*(execute(base_url, number) for number in numbers)), 60)
    assert results == [f"result of {number}" for number in numbers]


BUCKET = {"rate": 40, "burst": 15}  # requests a second
SLOW = {"rate": 60, "burst": 5}

LIMITS = {
    "a token bucket with Retry-After": lambda: LimitingPlatform(BUCKET, retry_after=0.5),
    "a token bucket without": lambda: LimitingPlatform(BUCKET),
    "so many in each second": lambda: LimitingPlatform({"count": 38, "seconds": 1}, retry_after="rest"),
    "so many in flight, 503": lambda: LimitingPlatform({"at_once": 24}, retry_after=0, refusal=503, reply=(0.5, 0.5)),
    "everything is refused for a moment": lambda: LimitingPlatform({"until": 0.3, "refuses": "all"}, {}),
    "slow for good": lambda: LimitingPlatform({"until": 0.2}, SLOW, retry_after=0.2),
}


SAYS = r"{url} limits how fast it is asked(; it takes about \d+ requests a second from this process)?; waiting: \d+"


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in LIMITS.items()])
async def test_all_come_back_whatever_the_limit(
    make: Callable[[], LimitingPlatform], caplog: pytest.LogCaptureFixture
) -> None:
    """Of many actions each has its result and was started once; more is taken than refused; people are told once."""
    with make() as platform:
        await execute_all(platform.url, range(ACTIONS))
        await eventually(lambda: bool(caplog.messages))

    assert platform.starts == dict.fromkeys(range(ACTIONS), 1)
    assert 0 < platform.refused < platform.taken
    assert pool_is_at_rest()
    assert len(caplog.messages) == 1
    assert re.fullmatch(SAYS.format(url=platform.url), caplog.messages[0])


async def test_all_of_two_processes_with_one_token_come_back() -> None:
    """Processes that know nothing of each other share one limit: each gets all its results, and none starts twice."""
    script = """
import asyncio, sys
from zamp_sdk import ActionExecutor

async def main(url, numbers):
    calls = (ActionExecutor.execute("act", number, base_url=url) for number in numbers)
    assert await asyncio.gather(*calls) == [f"result of {number}" for number in numbers]

asyncio.run(main(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[3]))))
"""
    halves = (0, ACTIONS // 2), (ACTIONS // 2, ACTIONS)
    with LimitingPlatform({"rate": 40, "burst": 35}) as platform:
        runs = (asyncio.to_thread(run_script, script, platform.url, *half) for half in halves)
        done = await asyncio.gather(*runs)

    assert [run.returncode for run in done] == [0, 0], [run.stderr for run in done]
    assert platform.starts == dict.fromkeys(range(ACTIONS), 1)
    assert platform.refused < platform.taken


async def test_nobody_waits_where_nothing_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Where a platform takes everything there is no line to join, and not a word of one."""
    caplog.set_level(logging.DEBUG, "zamp_sdk")
    with LimitingPlatform({}) as platform:
        await execute_all(platform.url, range(ACTIONS))

    pace = pace_of(platform.url, TOKEN)
    assert (pace.is_limiting, pace.waiting, pace._last_ticket) == (False, 0, 0)
    assert "waiting" not in caplog.text


async def test_people_are_told_when_a_limit_begins_and_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning says that a platform limits how fast it is asked, and one that nobody has had to wait for long."""
    monkeypatch.setattr(executor, "SOON", 0.01)
    monkeypatch.setattr(pacing, "QUIET", 0.2)
    platform = LocalPlatform()
    platform.action("act")(lambda params: params)
    with platform:

        async def run() -> None:
            await ActionExecutor.execute("act", 0, base_url=platform.base_url, auth_token=platform.auth_token)

        platform.fail_next(429)
        await run()
        await eventually(lambda: "limits how fast" in caplog.text)
        await asyncio.sleep(0.25)
        await run()
        await run()
    began, ended = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "limits how fast it is asked; waiting: " in began
    assert ended.endswith("no longer limits how fast it is asked")


# --- while they wait --------------------------------------------------------------------------------------------------


@pytest.fixture
def closed() -> Iterator[LimitingPlatform]:
    """A platform that asks everybody to come back in a minute."""
    with LimitingPlatform({"refuses": "all"}, retry_after=60) as platform:
        yield platform


async def start_many(platform: LimitingPlatform) -> list[asyncio.Task[str]]:
    """Start actions, of which the first has been refused and the others were never sent, when all of them wait."""
    pace = pace_of(platform.url, TOKEN)
    first = asyncio.ensure_future(start(platform.url, 0))
    await eventually(lambda: pace.waiting == 1)
    others = [asyncio.ensure_future(start(platform.url, number)) for number in range(1, ACTIONS)]
    await eventually(lambda: pace.waiting == ACTIONS)
    return [first, *others]


async def test_who_waits_holds_neither_a_connection_nor_a_thread(closed: LimitingPlatform) -> None:
    """While many starts wait their turn, other work finds every connection and the only thread free."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    tasks = await start_many(closed)

    assert pool_is_at_rest()
    assert pool_state().idle <= 1
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), PROMPT) == "done"
    with LimitingPlatform({}) as another:
        await asyncio.wait_for(execute_all(another.url, range(ACTIONS)), PROMPT)

    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_cancelling_who_waits_ends_it_at_once(closed: LimitingPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """A start that is cancelled in the line ends, leaves its place, and knows whether it was refused or never sent."""
    tasks = await start_many(closed)
    for task in tasks:
        task.cancel()
    done, _ = await asyncio.wait(tasks, timeout=PROMPT)

    assert done == set(tasks)
    assert all(task.cancelled() for task in tasks)
    assert pace_of(closed.url, TOKEN).waiting == 0
    assert (closed.refused, closed.taken) == (1, 0)
    assert "may have started" not in caplog.text
    if sys.version_info >= (3, 11):
        notes = [await note_of(task) for task in tasks]
        assert notes[0] == "cancelled while starting action 'act': it was refused, so it has not started"
        assert set(notes[1:]) == {"cancelled while starting action 'act': nothing was sent, so it has not started"}


async def note_of(task: asyncio.Task[str]) -> str:
    """Return the note of a cancelled task's CancelledError."""
    try:
        await task
    except asyncio.CancelledError as exc:
        return "; ".join(getattr(exc, "__notes__", []))
    raise AssertionError("it was not cancelled")


async def test_a_timeout_holds_in_the_line(closed: LimitingPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers that wait no longer than a moment for a result are told so then, and leave the line."""
    monkeypatch.setattr(executor, "GRACE", 0.1)
    with pytest.raises(HttpClientError, match="429"):
        await handle_at(closed.url).status()
    moment = timedelta(seconds=0.1)
    results = asyncio.gather(
        *(handle_at(closed.url).result(timeout=moment) for _ in range(ACTIONS)), return_exceptions=True
    )
    errors = await asyncio.wait_for(results, PROMPT)

    assert {type(error) for error in errors} == {ActionTimeoutError}
    assert pace_of(closed.url, TOKEN).waiting == 0
    assert closed.refused == 1
