"""The two ways to wait: a hop, from its boarding to its landing, and what becomes of it where there is no thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import functools
import gc
import select
import socket
import ssl
import sysconfig
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest

from tests.conftest import (
    PROMPT,
    Pace,
    execute,
    handle_at,
    pool_is_at_rest,
    pool_state,
    request_to,
    start,
)
from tests.servers import (
    ACTION_ID,
    CONNECT,
    RESULT,
    Act,
    Server,
    Wire,
    deaf,
    eventually,
    hanging_port,
    http_reply,
    proceed,
    running,
    silent,
    stall_after,
    started_after,
)
from zamp_sdk import transport
from zamp_sdk.transport import (
    Exchange,
    Failure,
    hops,
    send,
    sending,
)

# --- a hop, from its boarding to its landing --------------------------------------------------------------------------


class Gate:
    """A hop that says when it has begun, and ends when it may."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()
        self.has_ended = False

    def __call__(self) -> str:
        self.has_begun.set()
        assert self.may_end.wait(10)
        self.has_ended = True
        return "through"


@contextlib.contextmanager
def busy_executor(threads: int = 1) -> Iterator[Callable[[], None]]:
    """Keep every thread of the loop's executor busy; what is given sets them free before the end."""
    executor = ThreadPoolExecutor(threads)
    asyncio.get_running_loop().set_default_executor(executor)
    gates = [Gate() for _ in range(threads)]
    for gate in gates:
        executor.submit(gate)
        assert gate.has_begun.wait(10)

    def release() -> None:
        for gate in gates:
            gate.may_end.set()

    try:
        yield release
    finally:
        release()


async def test_a_hop_that_is_given_up_before_its_trip_never_begins() -> None:
    """A request that is cancelled while its hop waits for a thread ends at once, and the thread passes the hop over."""
    calls: list[int] = []
    hop = hops.Hops(10.0)
    with busy_executor() as release:
        task = asyncio.ensure_future(hop.run(lambda: calls.append(1)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 0.9)  # less than what a hop without a thread waits for
        assert hop.is_at_rest
        release()
        await asyncio.to_thread(threading.get_ident)  # whatever was queued before has been done
    assert calls == []


async def test_a_hop_that_is_given_up_during_its_trip_is_waited_for() -> None:
    """A request that is cancelled while its hop is at work is cancelled when that has ended, and not before."""
    hop, gate, closed = hops.Hops(10.0), Gate(), threading.Event()
    task = asyncio.ensure_future(hop.run(gate))
    await eventually(gate.has_begun.is_set)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()
    assert not hop.is_at_rest
    gate.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.has_ended
    assert hop.is_at_rest
    hop.when_at_rest(closed.set)
    assert closed.is_set()


async def test_a_hop_that_is_given_up_after_its_trip_has_done_its_work() -> None:
    """A request that is cancelled when its hop is back ends at once; what the hop has done stays done."""
    hop, gate = hops.Hops(10.0), Gate()
    task = asyncio.ensure_future(hop.run(gate))
    await eventually(gate.has_begun.is_set)
    gate.may_end.set()
    while not hop.is_at_rest:
        time.sleep(0.001)  # the loop has no chance to see that it is back
    task.cancel()
    await asyncio.sleep(0)
    assert task.cancelled()
    assert gate.has_ended


async def test_a_hop_whose_request_is_gone_closes_after_itself() -> None:
    """Where the request does not wait for its hop (a second cancellation, say), what it works on is closed after it."""
    hop, gate, closed = hops.Hops(10.0), Gate(), threading.Event()
    task = asyncio.ensure_future(hop.run(gate))
    await eventually(gate.has_begun.is_set)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    hop.when_at_rest(closed.set)
    assert not hop.is_at_rest
    await asyncio.sleep(0.01)
    assert not closed.is_set()
    gate.may_end.set()
    await eventually(closed.is_set)
    assert gate.has_ended


async def test_hops_that_are_wanted_at_the_same_moment_cross_together() -> None:
    """One thread does them, one after the other; what one returns, raises or sets is its own."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
    whose = contextvars.ContextVar[int]("whose")
    threads: set[int] = set()

    def work(number: int) -> int:
        threads.add(threading.get_ident())
        assert whose.get() == number
        whose.set(-1)
        if number % 2:
            raise ValueError(number)
        return number

    async def request(number: int) -> int:
        whose.set(number)
        try:
            return await hops.Hops(10.0).run(functools.partial(work, number))
        finally:
            assert whose.get() == number

    outcomes = await asyncio.gather(*(request(number) for number in range(20)), return_exceptions=True)
    assert outcomes[::2] == list(range(0, 20, 2))
    assert [(type(outcome), str(outcome)) for outcome in outcomes[1::2]] == [
        (ValueError, str(number)) for number in range(1, 20, 2)
    ]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_a_slow_hop_holds_others_up_for_a_moment_only() -> None:
    """Who crosses with a hop that takes long lands if it is done, and crosses again if it has not begun."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    slow = Gate()

    def run(function: Callable[[], Any]) -> asyncio.Future[Any]:
        return asyncio.ensure_future(hops.Hops(10.0).run(function))

    quick: Callable[[], Any] = threading.get_ident
    before, late, *behind = (run(hop) for hop in (quick, slow, quick, quick, quick))
    await asyncio.sleep(0)
    afterwards = run(quick)
    others = await asyncio.wait_for(asyncio.gather(before, *behind, afterwards), PROMPT)
    assert not late.done()
    assert others[0] not in others[1:]
    assert threading.get_ident() not in others
    slow.may_end.set()
    assert await late == "through"


async def test_only_a_hop_that_crosses_alone_may_wait_for_its_peer() -> None:
    """The patience with a peer that answers at once is for nobody who holds others up."""
    alone, one, two = hops.Hops(10.0), hops.Hops(10.0), hops.Hops(10.0)
    assert await alone.run(lambda: alone.patience) == hops.PATIENCE
    together = await asyncio.gather(one.run(lambda: one.patience), two.run(lambda: two.patience))
    assert list(together) == [0.0, 0.0]


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("has_begun", [True, False])
async def test_whoever_cancels_every_task_does_not_cancel_a_crossing(number: int, has_begun: bool) -> None:
    """Tasks of the transport's own may be cancelled by anybody; hops are done all the same, and once."""
    calls: list[int] = []

    def work() -> int:
        if has_begun:
            time.sleep(0.02)
        calls.append(1)
        return 7

    with contextlib.nullcontext() if has_begun else busy_executor():
        ours = [asyncio.ensure_future(hops.Hops(10.0).run(work)) for _ in range(number)]
        await asyncio.sleep(0.01)
        for task in asyncio.all_tasks() - {asyncio.current_task(), *ours}:
            task.cancel()
        assert await asyncio.wait_for(asyncio.gather(*ours), PROMPT) == [7] * number
    await asyncio.to_thread(threading.get_ident)  # whatever was queued before has been done
    assert len(calls) == number


async def test_in_thread_returns_what_the_function_returns() -> None:
    """A function in a thread has its caller's context; what it returns or raises is its own."""
    whose = contextvars.ContextVar("whose", default="nobody's")
    whose.set("mine")
    assert await transport.in_thread(whose.get) == "mine"
    assert await transport.in_thread(threading.get_ident) != threading.get_ident()
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="can't start new thread"):
        await transport.in_thread(fail)
    assert calls == [1]  # it was not taken for a thread that is missing


async def test_in_thread_does_nothing_for_a_caller_that_has_gone() -> None:
    """Cancelled before the function has begun, it never begins; later, its caller does not wait for it."""
    calls: list[int] = []
    with busy_executor() as release:
        task = asyncio.ensure_future(transport.in_thread(lambda: calls.append(1)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release()
        await asyncio.to_thread(threading.get_ident)  # whatever was queued before has been done
    assert calls == []
    gate = Gate()
    going_on = asyncio.ensure_future(transport.in_thread(gate))
    await eventually(gate.has_begun.is_set)
    going_on.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going_on
    gate.may_end.set()
    await eventually(lambda: gate.has_ended)


# --- no thread waits for a peer ---------------------------------------------------------------------------------------

STALLED = 6  # requests: as many as asyncio's default executor has threads on two cores
MANY_MB = "x" * 20_000_000  # far more than sockets buffer


def stall_in_send(wire: Wire) -> bool:
    """Shake hands if there is TLS, and read nothing then."""
    return proceed(wire) and deaf(wire)


_BEGUN = http_reply(200, {"id": ACTION_ID})

STALLS = {
    "nothing": ("POST", silent),
    "first byte": ("POST", stall_after(b"H")),
    "status line": ("POST", stall_after(b"HTTP/1.1 200")),
    "header": ("POST", stall_after(b"HTTP/1.1 200 OK\r\nContent-Le")),
    "body": ("POST", stall_after(_BEGUN[:-5])),
    "chunk size": ("POST", stall_after(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2")),
    "chunk": ("POST", stall_after(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{")),
    "send": (CONNECT, stall_in_send),
}


async def others_go_on_beside(url: str, all_are_stuck: Callable[[], bool], params: Any = None) -> None:
    """Start what stalls at this URL, on two threads, and see whether an action elsewhere and to_thread go on."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    with Server() as healthy:
        tasks = [asyncio.ensure_future(start(url, params)) for _ in range(STALLED)]
        await eventually(all_are_stuck)
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(execute(healthy.url), PROMPT) == RESULT
        assert await asyncio.wait_for(asyncio.to_thread(len, "abc"), PROMPT) == 3
        assert not [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    await eventually(pool_is_at_rest)


@pytest.mark.parametrize("phase", STALLS)
async def test_a_stalled_reply_delays_nobody_else(phase: str, server: Server, pace: Pace) -> None:
    """Wherever a peer stalls, in the request or in its reply, no thread waits for it."""
    event, act = STALLS[phase]
    server.always(event, act)
    if event == "POST":
        await others_go_on_beside(server.url, lambda: server.count("POST") == STALLED)
    else:
        await others_go_on_beside(server.url, lambda: server.connections == STALLED, MANY_MB)


async def test_a_stalled_connect_delays_nobody_else(pace: Pace) -> None:
    """No thread waits for an address that does not answer."""
    with hanging_port() as port:
        await others_go_on_beside(f"http://127.0.0.1:{port}", lambda: pool_state().rooms_taken == STALLED)


async def test_a_stalled_tls_handshake_delays_nobody_else(pace: Pace, tls: ssl.SSLContext) -> None:
    """No thread waits for a server that does not shake hands."""
    with Server(tls) as server:
        server.always(CONNECT, silent)
        await others_go_on_beside(server.url, lambda: server.connections == STALLED)


@pytest.mark.parametrize("act", [silent, stall_after(b"HTTP/1.1 200 OK\r\nVia: x")])
async def test_a_stalled_proxy_delays_nobody_else(act: Act, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread waits for a proxy that does not answer CONNECT, or only half."""
    with Server() as proxy:
        proxy.always("CONNECT", act)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        await others_go_on_beside("https://platform.test", lambda: proxy.count("CONNECT") == STALLED)


@pytest.mark.parametrize("has_poll", [True, False])
def test_whether_a_socket_is_ready_is_known_with_poll_or_without(
    has_poll: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no poll; select says the same of one socket or of several, for either event or for both."""
    if not has_poll:
        monkeypatch.delattr(select, "poll", raising=False)
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        idle.listen()
        assert hops.is_ready([ours], hops.WRITE)
        assert not hops.is_ready([ours, idle], hops.READ, 0.01)
        assert hops.is_ready([ours], hops.READ + hops.WRITE)
        theirs.sendall(b"x")
        assert hops.is_ready([idle, ours], hops.READ)
        assert not hops.is_ready([idle], hops.READ)


async def test_what_a_loop_fails_to_watch_it_watches_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a loop can watch a socket one way only (a full epoll, say), nothing stays registered."""
    loop = asyncio.get_running_loop()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "add_writer", fail)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))  # until it takes no more
        with pytest.raises(OSError, match="No space"):
            await hops.Hops(1.0).until_ready(ours, events=hops.READ + hops.WRITE)
        assert not loop.remove_reader(ours)


async def test_what_is_ready_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come while others crossed is seen by one look: to have the loop watch costs several times as much."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x")
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "add_reader", None)
            assert await hops.Hops(1.0).until_ready(ours, events=hops.READ)


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="free-threaded builds leave more to their collector"
)
async def test_a_hop_that_is_waited_for_twice_leaves_nothing_to_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that takes so long that the loop looks whether a thread has begun it goes when it is over, too."""
    monkeypatch.setattr(hops, "WITHOUT_THREAD", 0.02)
    request, gate = hops.Hops(10.0), Gate()
    gc.collect()
    gc.disable()
    try:
        task = asyncio.ensure_future(request.run(gate))
        await eventually(gate.has_begun.is_set)
        hop = weakref.ref(request._hop)
        await asyncio.sleep(0.1)
        gate.may_end.set()
        await task
        await eventually(lambda: hop() is None)
    finally:
        gc.enable()


# --- where there is no thread, the loop does it -----------------------------------------------------------------------


@contextlib.contextmanager
def full_executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have every thread busy for as long as it takes."""
    monkeypatch.setattr(hops, "WITHOUT_THREAD", 0.05)
    with busy_executor(2):
        yield


@contextlib.contextmanager
def executor_that_was_shut_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have an executor that takes no more work."""
    executor = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(executor)
    executor.shutdown()
    yield


@contextlib.contextmanager
def executor_that_drops_its_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have an executor that is shut down a moment later, and what was queued in it is cancelled."""
    with busy_executor():
        executor: Any = asyncio.get_running_loop()._default_executor  # type: ignore[attr-defined]  # there is no other way to it
        drop = functools.partial(executor.shutdown, wait=False, cancel_futures=True)
        asyncio.get_running_loop().call_later(0.05, drop)
        yield


@contextlib.contextmanager
def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have one busy thread, and a machine that gives no other: the work is queued, and an error raised."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
    really_start = threading.Thread.start
    gate = Gate()

    def start_thread(thread: threading.Thread) -> None:
        if "asyncio" in thread.name or "ThreadPoolExecutor" in thread.name:
            raise RuntimeError("can't start new thread")
        really_start(thread)

    working = asyncio.get_running_loop().run_in_executor(None, gate)
    assert gate.has_begun.wait(10)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_thread)
        try:
            yield
        finally:
            gate.may_end.set()
    assert not working.cancelled()


WITHOUT_THREADS = [full_executor, executor_that_was_shut_down, executor_that_drops_its_work, no_more_threads]
WithoutThreads = Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[None]]


@pytest.mark.parametrize("without_threads", WITHOUT_THREADS)
async def test_without_a_thread_the_loop_does_the_hop(
    without_threads: WithoutThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hops are done in the loop, and not a second time by whatever takes them out of the executor's queue later."""
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        return threading.get_ident()

    with without_threads(monkeypatch):
        several = asyncio.gather(*(hops.Hops(10.0).run(work) for _ in range(3)))
        assert await asyncio.wait_for(several, PROMPT) == [threading.get_ident()] * 3
        assert await asyncio.wait_for(transport.in_thread(work), PROMPT) == threading.get_ident()
    with contextlib.suppress(RuntimeError):  # some of them take no more work
        await asyncio.to_thread(threading.get_ident)  # whatever was queued before has been done
    assert len(calls) == 4


@pytest.mark.parametrize("without_threads", WITHOUT_THREADS)
async def test_without_a_thread_an_action_goes_on(
    without_threads: WithoutThreads, server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start is sent once, and polls bring the result, as if nothing were the matter."""
    server.on("GET", running)
    with without_threads(monkeypatch):
        assert await asyncio.wait_for(execute(server.url), PROMPT) == RESULT
    assert (server.count("POST"), server.count("GET")) == (1, 2)
    assert pool_is_at_rest()


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_an_executor_that_throws_work_away_cancels_no_task(method: str, pace: Pace) -> None:
    """An executor that the application shuts down with what is queued in it is no cancellation: the loop does it."""
    with Server() as server:
        await execute(server.url)
        with busy_executor():
            call: Any = start(server.url) if method == "POST" else handle_at(server.url).result()
            task = asyncio.ensure_future(call)
            await asyncio.sleep(0.05)
            executor: Any = asyncio.get_running_loop()._default_executor  # type: ignore[attr-defined]  # there is no other way to it
            executor.shutdown(wait=False, cancel_futures=True)
            assert await asyncio.wait_for(task, PROMPT) == (ACTION_ID if method == "POST" else RESULT)
        assert (server.count("POST"), server.count("GET")) == ((2, 1) if method == "POST" else (1, 2))
    assert pool_is_at_rest()


async def test_a_start_that_finds_a_thread_too_late_is_not_sent(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose time is over before anybody could send it is not sent any more."""
    with Server() as server:
        await start(server.url)
        with full_executor(monkeypatch):
            monkeypatch.setattr(hops, "WITHOUT_THREAD", 0.2)
            outcome = await send(Exchange(request_to(server.url, "POST"), 0.1))
        assert isinstance(outcome, Failure)
        assert (outcome.may_have_left, outcome.may_retry) == (False, True)
        assert "timed out" in outcome.message
        assert server.count("POST") == 1


async def test_a_reply_that_no_thread_takes_in_time_is_read_all_the_same(pace: Pace) -> None:
    """A start's reply that has come is not lost because other work keeps every thread busy."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    pace.hurry("POST", 10, 0.5)
    release, answer = threading.Event(), threading.Event()
    with Server() as server:
        server.always("POST", started_after(answer))
        task = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 1)
        blocking = threading.Event()

        def block() -> None:
            blocking.set()
            release.wait(10)

        blocker = loop.run_in_executor(None, block)
        await eventually(blocking.is_set)
        answer.set()
        try:
            assert await task == ACTION_ID
        finally:
            release.set()
        await blocker
        assert server.count("POST") == 1


class Meddling(ThreadPoolExecutor):
    """An executor that queues the work, and fails all the same."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        super().submit(*args, **kwargs)
        time.sleep(0.05)  # it has begun by now
        raise RuntimeError("instrumentation failed")


async def cancel_hops() -> None:
    """Cancel whatever task waits for a thread."""
    while True:
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__name__", "") == "to_thread":
                task.cancel()
        await asyncio.sleep(0)


@pytest.mark.parametrize("meddler", ["executor", "task"])
async def test_what_a_thread_has_done_counts_whatever_became_of_its_task(
    meddler: str, server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that was sent is told by the thread that sent it, not by those who wait for the thread."""
    really_open = sending.open_request

    def slowly(*args: Any) -> Any:
        try:
            return really_open(*args)
        finally:
            time.sleep(0.1)

    monkeypatch.setattr(sending, "open_request", slowly)
    assert await start(server.url) == ACTION_ID
    cancelling = None
    if meddler == "executor":
        asyncio.get_running_loop().set_default_executor(Meddling(2))
    else:

        async def when_it_works() -> None:
            await asyncio.sleep(0.05)
            await cancel_hops()

        cancelling = asyncio.ensure_future(when_it_works())
    assert await start(server.url) == ACTION_ID
    assert server.count("POST") == 2
    if cancelling is not None:
        cancelling.cancel()
    assert pool_is_at_rest()
