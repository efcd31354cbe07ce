"""What ends a request early, wherever it is: its deadline, a cancellation, Ctrl-C, a loop that was blocked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest

from tests.conftest import (
    PROMPT,
    ROOT,
    CheckNoToken,
    Pace,
    execute,
    handle_at,
    pool_is_at_rest,
    pool_state,
    posix_only,
    request_to,
    start,
    wait_until,
)
from tests.servers import (
    ACTION_ID,
    CONNECT,
    RESULT,
    TOKEN,
    Server,
    Wire,
    deaf,
    drip,
    eventually,
    hanging_port,
    http_reply,
    reply,
    silent,
    stall_after,
)
from zamp_sdk import ActionExecutor, HttpClientError
from zamp_sdk.transport import Exchange, Reply, hops, reading, send, sending

# --- everywhere where a request may hang ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stuck:
    """A start that goes no further than one phase."""

    url: str
    reached: Callable[[], bool]
    sent: bool
    params: Any = None
    proxy: str | None = None
    settle: float = 0.3
    """Seconds from ``reached`` until it is really stuck."""


@contextlib.contextmanager
def stuck_in_connect(_: ssl.SSLContext) -> Iterator[Stuck]:
    with hanging_port() as port:
        # Nobody but the client sees that it connects.
        yield Stuck(f"http://127.0.0.1:{port}", lambda: True, sent=False, settle=0.4)


@contextlib.contextmanager
def stuck_in_handshake(tls: ssl.SSLContext) -> Iterator[Stuck]:
    with Server(tls) as server:
        server.always(CONNECT, silent)
        yield Stuck(server.url, lambda: server.connections > 0, sent=False)


@contextlib.contextmanager
def stuck_in_proxy(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as proxy:
        proxy.always("CONNECT", silent)
        yield Stuck("https://platform.test", lambda: proxy.count("CONNECT") > 0, sent=False, proxy=proxy.url)


@contextlib.contextmanager
def stuck_in_send(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as server:
        server.always(CONNECT, deaf)
        yield Stuck(server.url, lambda: server.connections > 0, sent=True, params="x" * (32 << 20))


@contextlib.contextmanager
def stuck_in_send_over_tls(tls: ssl.SSLContext) -> Iterator[Stuck]:
    def deaf_after_handshake(wire: Wire) -> bool:
        wire.socket = tls.wrap_socket(wire.socket, server_side=True)
        wire.server.replace_socket(wire)
        return deaf(wire)

    with Server(tls) as server:
        server.always(CONNECT, deaf_after_handshake)
        yield Stuck(server.url, lambda: server.connections > 0, sent=True, params="x" * (32 << 20))


@contextlib.contextmanager
def stuck_in_wait(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as server:
        server.always("POST", silent)
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


@contextlib.contextmanager
def stuck_in_wait_over_tls(tls: ssl.SSLContext) -> Iterator[Stuck]:
    with Server(tls) as server:
        server.always("POST", silent)
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


_SLOW = http_reply(200, {"id": "x" * 1000})


@contextlib.contextmanager
def stuck_in_headers(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as server:
        server.always("POST", drip(_SLOW))
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


@contextlib.contextmanager
def stuck_in_body(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as server:
        server.always("POST", drip(_SLOW, at_once=len(_SLOW) - 900))
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


@contextlib.contextmanager
def stuck_in_body_over_tls(tls: ssl.SSLContext) -> Iterator[Stuck]:
    with Server(tls) as server:
        server.always("POST", drip(_SLOW, at_once=len(_SLOW) - 900))
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


Phase = Callable[[ssl.SSLContext], contextlib.AbstractContextManager[Stuck]]

PHASES: list[Phase] = [
    stuck_in_connect,
    stuck_in_proxy,
    stuck_in_handshake,
    stuck_in_send,
    stuck_in_send_over_tls,
    stuck_in_wait,
    stuck_in_wait_over_tls,
    stuck_in_headers,
    stuck_in_body,
    stuck_in_body_over_tls,
]


@pytest.fixture(params=PHASES, ids=lambda phase: phase.__name__)
def stuck(request: pytest.FixtureRequest, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    """Each phase in turn."""
    phase: Phase = request.param
    with phase(tls) as stuck:
        if stuck.proxy:
            monkeypatch.setenv("HTTPS_PROXY", stuck.proxy)
        yield stuck


def threads_of_executors() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncio_")]


def test_one_deadline_holds_for_all_phases_together(stuck: Stuck, pace: Pace, assert_no_token: CheckNoToken) -> None:
    """Wherever a request hangs, it ends when its time is over, and knows whether anything was sent."""
    pace.hurry("POST", 10, 0.5 if stuck.sent else 0.1)  # before it ends, a busy machine has to have sent something
    began = time.monotonic()
    with pytest.raises(HttpClientError, match="timed out") as caught:
        asyncio.run(start(stuck.url, stuck.params))
    assert time.monotonic() - began < PROMPT
    assert_no_token(caught.value)
    assert caught.value.may_have_started == stuck.sent
    assert pool_is_at_rest()
    assert not threads_of_executors()


def test_cancelling_frees_thread_and_socket_at_once(stuck: Stuck, pace: Pace, assert_no_token: CheckNoToken) -> None:
    """Wherever a task is when it is cancelled, asyncio.run returns promptly, and neither thread nor socket is left."""

    async def main() -> None:
        task = asyncio.ensure_future(start(stuck.url, stuck.params))
        await eventually(lambda: pool_state().rooms_taken > 0 and stuck.reached())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert_no_token(caught.value)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < PROMPT
    assert pool_is_at_rest()
    assert not threads_of_executors()


INTERRUPTED = """
import asyncio, signal, sys
from zamp_sdk import ActionExecutor
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have had it ignored
print("ready", flush=True)
asyncio.run(ActionExecutor.execute("act", "x" * int(sys.argv[2]), base_url=sys.argv[1]))
"""


@posix_only
def test_ctrl_c_ends_the_program_at_once(stuck: Stuck) -> None:
    """Wherever a request hangs, Ctrl-C ends asyncio.run promptly, and nothing is reported but KeyboardInterrupt."""
    size = len(stuck.params or "")
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", INTERRUPTED, stuck.url, str(size)],
        cwd=ROOT,
        env={**os.environ, "ZAMP_AUTH_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until(stuck.reached)
        time.sleep(stuck.settle)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=PROMPT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert stderr.splitlines()[-1] == "KeyboardInterrupt"
    for unwanted in (TOKEN, "Warning", "never retrieved", "was destroyed", "Exception ignored"):
        assert unwanted not in stderr
    assert process.returncode == -signal.SIGINT


# --- cancellations ----------------------------------------------------------------------------------------------------


async def test_cancelling_at_any_moment_leaves_everything_in_order(pace: Pace) -> None:
    """Whichever step a cancellation hits, no connection is left leased, and the next start is not affected."""
    with Server() as server:
        for number in range(40):
            task = asyncio.ensure_future(execute(server.url))
            await asyncio.sleep(number * 0.0001)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await task == RESULT
        await eventually(pool_is_at_rest)
        assert await execute(server.url) == RESULT


@contextlib.contextmanager
def held(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Hold the first call of a function of the transport; what is given tells that it has begun, and lets it go on."""
    really = getattr(owner, name)
    has_begun, may_go_on = threading.Event(), threading.Event()

    def hold(*args: Any, **kwargs: Any) -> Any:
        has_begun.set()
        assert may_go_on.wait(10)
        return really(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, hold)
        try:
            yield has_begun, may_go_on
        finally:
            may_go_on.set()


async def test_cancelling_while_a_thread_is_at_work_closes_nothing_under_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled start whose reply a thread reads ends when that has been read, and what it says is there."""
    with held(monkeypatch, reading.ReplyReader, "_reply") as (has_begun, may_go_on):
        exchange = Exchange(request_to(server.url, "POST"), 10.0)
        task = asyncio.ensure_future(send(exchange))
        await eventually(has_begun.is_set)
        task.cancel()
        await asyncio.sleep(0.02)
        assert not task.done()
        assert (pool_state().rooms_taken, pool_state().idle) == (1, 0)
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert exchange.answer.status_code == 200
    assert pool_is_at_rest()
    assert await start(server.url) == ACTION_ID
    assert (server.count("POST"), server.connections) == (2, 1)


async def test_cancelling_twice_leaves_the_thread_to_itself(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not wait for the thread knows only that it may send; the connection is closed when it has ended."""
    with held(monkeypatch, sending, "open_request") as (has_begun, may_go_on):
        exchange = Exchange(request_to(server.url, "POST"), 10.0)
        task = asyncio.ensure_future(send(exchange))
        await eventually(has_begun.is_set)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert exchange.may_have_left
        assert (pool_state().rooms_taken, pool_state().idle) == (1, 0)
        may_go_on.set()
        await eventually(lambda: pool_is_at_rest() and server.open_connections == 0)
    assert pool_state().idle == 0


async def test_a_start_that_is_cancelled_before_it_was_sent_has_not_left(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread has begun to send, a cancellation ends the request, and nothing is sent later."""
    await start(server.url)
    executor = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(executor)
    release = threading.Event()
    executor.submit(release.wait, 10)
    exchange = Exchange(request_to(server.url, "POST"), 10.0)
    task = asyncio.ensure_future(send(exchange))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (exchange.may_have_left, exchange.answer) == (False, None)
    assert pool_is_at_rest()
    release.set()
    await asyncio.to_thread(threading.get_ident)  # whatever was queued before has been done
    await eventually(lambda: server.open_connections == 0)
    assert server.count("POST") == 1


async def test_a_start_that_is_cancelled_while_it_waits_may_have_left(server: Server) -> None:
    """Where no reply has come, or half of one, a cancellation tells that the request has left, and no more."""
    for act in (silent, stall_after(http_reply(200, {"id": ACTION_ID})[:-1])):
        server.on("POST", act)
        sent = server.count("POST")
        exchange = Exchange(request_to(server.url, "POST"), 10.0)
        task = asyncio.ensure_future(send(exchange))
        await eventually(lambda: server.count("POST") == sent + 1)  # noqa: B023  # it is waited for here
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (exchange.may_have_left, exchange.answer) == (True, None)
        await eventually(lambda: pool_is_at_rest() and server.open_connections == 0)


def test_a_loop_that_ends_ends_its_requests(server: Server) -> None:
    """What is under way when asyncio.run ends is cancelled, and leaves nothing behind."""
    server.always("POST", silent)
    exchanges = [Exchange(request_to(server.url, "POST"), 10.0) for _ in range(5)]
    tasks: list[asyncio.Future[Any]] = []

    async def main() -> None:
        tasks.extend(asyncio.ensure_future(send(exchange)) for exchange in exchanges)
        await eventually(lambda: server.count("POST") == 5)

    asyncio.run(main())
    assert all(task.cancelled() for task in tasks)
    assert all(exchange.may_have_left for exchange in exchanges)
    assert pool_is_at_rest()
    wait_until(lambda: server.open_connections == 0)


# --- loops that were blocked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_reply_that_came_while_the_loop_was_blocked_is_read(method: str, server: Server, pace: Pace) -> None:
    """A deadline that passes while the application blocks the event loop costs nothing that has come meanwhile."""
    await execute(server.url)  # so that everything is imported
    done = server.count(method)
    answer = {"id": ACTION_ID, "status": "COMPLETED", "result": RESULT}
    server.always(method, reply(200, answer, delay=0.2))
    pace.hurry(method, 1, 0.4)
    call: Any = start(server.url) if method == "POST" else handle_at(server.url).result()
    task = asyncio.ensure_future(call)
    await eventually(lambda: server.count(method) == done + 1)
    time.sleep(0.6)
    assert await task == (ACTION_ID if method == "POST" else RESULT)
    assert server.count(method) == done + 1


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_blocked_event_loop_finds_requests_over(method: str, pace: Pace) -> None:
    """A loop that was blocked beyond the deadline gives the error of a request that timed out."""
    with Server() as server:
        await execute(server.url)
        server.always(method, silent)
        pace.hurry(method, 1, 0.6)
        if method == "POST":
            task: asyncio.Future[Any] = asyncio.ensure_future(start(server.url))
        else:
            handle: Any = ActionExecutor.get_handle(ACTION_ID, base_url=server.url, auth_token=TOKEN)
            task = asyncio.ensure_future(handle.status())
        await eventually(lambda: server.count(method) == 2)
        time.sleep(0.8)
        with pytest.raises(HttpClientError, match="timed out") as caught:
            await task
        assert caught.value.may_have_started == (method == "POST")
        assert caught.value.action_id == (None if method == "POST" else ACTION_ID)


async def test_a_cancellation_that_a_blocked_loop_brings_loses_no_reply_that_has_come(server: Server) -> None:
    """A start's reply that waits in the socket when its request is cancelled is read: nobody can ask for it again."""
    server.on("POST", reply(200, {"id": ACTION_ID}, delay=0.05))
    exchange = Exchange(request_to(server.url, "POST"), 10.0)
    task = asyncio.ensure_future(send(exchange))
    await eventually(lambda: server.count("POST") == 1)
    time.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert exchange.may_have_left
    assert exchange.answer.status_code == 200
    assert pool_is_at_rest()
    assert await start(server.url) == ACTION_ID
    assert server.connections == 1


async def test_a_cancellation_that_a_blocked_loop_brings_loses_no_reply_that_was_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start's reply that a thread has read while the loop was blocked is there after the cancellation."""
    monkeypatch.setattr(hops, "PATIENCE", 5.0)
    was_read = threading.Event()

    def read(_: Reply) -> str:
        was_read.set()
        return "read"

    await start(server.url)  # so that TLS has nothing else to say
    exchange = Exchange(dataclasses.replace(request_to(server.url, "POST"), read=read), 10.0)
    with held(monkeypatch, sending, "open_request") as (has_begun, may_go_on):
        task = asyncio.ensure_future(send(exchange))
        await eventually(has_begun.is_set)
        may_go_on.set()
        assert was_read.wait(10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (exchange.may_have_left, exchange.answer) == (True, "read")


async def test_a_time_limit_that_a_blocked_loop_brings_loses_no_reply(server: Server) -> None:
    """So it is where the cancellation is a wait_for's, whose time was over while the loop was blocked."""
    server.on("POST", reply(200, {"id": ACTION_ID}, delay=0.05))
    exchange = Exchange(request_to(server.url, "POST"), 10.0)
    task = asyncio.ensure_future(asyncio.wait_for(send(exchange), 0.4))
    await eventually(lambda: server.count("POST") == 1)
    time.sleep(0.6)
    with contextlib.suppress(asyncio.TimeoutError):
        assert (await task).status_code == 200
    assert exchange.answer.status_code == 200
