"""Params that take long to encode are encoded beside the event loop, and what is wrong with them is said first."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest

from tests.servers import TOKEN, Server, eventually
from zamp_sdk import ActionExecutor, transport
from zamp_sdk.local_platform import LocalPlatform

ROWS = [{"id": number, "name": f"Invoice {number}"} for number in range(1_000)]


@pytest.fixture
def platform() -> Iterator[LocalPlatform]:
    """A running platform with the action `echo`."""
    platform = LocalPlatform()
    platform.action("echo")(lambda params: params)
    with platform:
        yield platform


async def execute(platform: LocalPlatform, params: Any) -> Any:
    """Execute `echo`."""
    return await ActionExecutor.execute("echo", params, base_url=platform.base_url, auth_token=platform.auth_token)


class Slow:
    """A model whose dump takes until the event loop has done something else."""

    def __init__(self) -> None:
        self.dumping = threading.Event()
        self.go_on = threading.Event()

    def model_dump(self) -> Any:
        self.dumping.set()
        return {"in time": self.go_on.wait(5)}


async def test_the_loop_goes_on_while_params_are_encoded(platform: LocalPlatform) -> None:
    """What a model does in its dump holds nobody up."""
    slow = Slow()
    executing = asyncio.ensure_future(execute(platform, [slow]))
    await eventually(slow.dumping.is_set)
    slow.go_on.set()
    assert await executing == [{"in time": True}]


class Row:
    """One of many models, each of which takes a moment."""

    dumped = 0
    on_tenth: Callable[[], object]

    def model_dump(self) -> Any:
        time.sleep(0.002)
        Row.dumped += 1
        if Row.dumped == 10:
            Row.on_tenth()
        return {}


async def start_six(server: Server) -> None:
    """Start six actions with many rows each, which never comes to an end."""
    start = (
        ActionExecutor.start("a", [Row() for _ in range(1_000)], base_url=server.url, auth_token=TOKEN)
        for _ in range(6)
    )
    await asyncio.gather(*start)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> type[Row]:
    """The rows' class, which has counted none."""
    monkeypatch.setattr(Row, "dumped", 0)
    return Row


def test_a_program_that_ends_while_six_starts_encode_sends_nothing(rows: type[Row]) -> None:
    """Where `asyncio.run` cancels starts whose params are being encoded, their threads stop, and nothing is sent."""

    async def main() -> None:
        enough = asyncio.Event()
        loop = asyncio.get_running_loop()
        rows.on_tenth = staticmethod(lambda: loop.call_soon_threadsafe(enough.set))
        starting = asyncio.ensure_future(start_six(server))
        await enough.wait()
        assert not starting.done()

    with Server() as server:
        asyncio.run(main())  # which waits for its threads
        assert rows.dumped < 3_000
        assert server.connections == 0


def test_ctrl_c_while_six_starts_encode_sends_nothing(rows: type[Row]) -> None:
    """Ctrl-C ends a program whose params are being encoded, before they are, and nothing is sent."""
    rows.on_tenth = staticmethod(lambda: signal.raise_signal(signal.SIGINT))
    with Server() as server:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(start_six(server))
        assert rows.dumped < 3_000
        assert server.connections == 0


@pytest.mark.parametrize("error", [RuntimeError("no session"), NotImplementedError()])
@pytest.mark.parametrize("size", [1, 100_000])
async def test_a_model_that_refuses_a_result_is_asked_once(
    error: Exception, size: int, platform: LocalPlatform
) -> None:
    """Whatever model_validate raises is the user's own, and it is not called again because of it."""
    calls = []

    class Strict:
        @classmethod
        def model_validate(cls, value: Any) -> Strict:
            calls.append(value)
            raise error

    started = await ActionExecutor.start(
        "echo", "x" * size, base_url=platform.base_url, auth_token=platform.auth_token, return_type=Strict
    )
    with pytest.raises(type(error)) as caught:
        await started.result()
    assert caught.value is error
    assert len(calls) == 1


async def test_large_params_arrive_as_they_are(platform: LocalPlatform) -> None:
    """Rows that are encoded in a thread are the same rows."""
    assert await execute(platform, ROWS) == ROWS


async def test_large_params_that_cannot_be_sent_open_no_connection() -> None:
    """Bad input deep inside large params is refused by its place before anything is connected or sent."""
    with Server() as server:
        with pytest.raises(TypeError, match=r"^params\[1000\]\.due: cannot send a set as JSON"):
            await ActionExecutor.execute("echo", [*ROWS, {"due": {1}}], base_url=server.url, auth_token=TOKEN)
        assert server.requests == []
        assert server.connections == 0


async def test_without_a_thread_the_work_is_done_all_the_same() -> None:
    """Where the default executor is shut down, what would have held the event loop up for a moment does so."""
    await asyncio.get_running_loop().shutdown_default_executor()
    assert await transport.in_thread(lambda: 7) == 7


async def test_what_the_work_raises_is_raised() -> None:
    """A RuntimeError of a user's model is not taken for a thread that is missing."""

    def dump() -> None:
        raise RuntimeError("not attached to a session")

    with pytest.raises(RuntimeError, match="not attached to a session"):
        await transport.in_thread(dump)


async def test_an_executor_that_drops_its_work_cancels_nobody() -> None:
    """Where the application cancels what its executor has queued, the work is done all the same."""
    busy, go_on = threading.Event(), threading.Event()
    pool = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(pool)

    def occupy() -> None:
        busy.set()
        go_on.wait(5)

    pool.submit(occupy)
    assert busy.wait(5)
    working = asyncio.ensure_future(transport.in_thread(lambda: 7))
    await asyncio.sleep(0.01)
    pool.shutdown(wait=False, cancel_futures=True)
    assert await working == 7
    go_on.set()


async def test_a_caller_who_is_cancelled_is_cancelled() -> None:
    """A cancellation while params are encoded is the caller's own, and comes at once."""
    slow = Slow()
    working = asyncio.ensure_future(transport.in_thread(slow.model_dump))
    await eventually(slow.dumping.is_set)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    slow.go_on.set()
