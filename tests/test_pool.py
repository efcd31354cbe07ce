"""Who has which connection: reuse, idle ones, the line, and how much room there is."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest

from tests.conftest import (
    OUT_OF_DESCRIPTORS,
    PROMPT,
    Pace,
    execute,
    pool_is_at_rest,
    pool_state,
    posix_only,
    request_to,
    run_script,
    start,
    wait_until,
)
from tests.servers import (
    ACTION_ID,
    RESULT,
    TOKEN,
    Server,
    eventually,
    reply,
    running,
    silent,
    started,
    started_after,
    then_close,
)
from zamp_sdk import ActionExecutor
from zamp_sdk.transport import (
    Exchange,
    connections,
    pool,
    send,
)
from zamp_sdk.transport.connections import Route

# --- reuse ------------------------------------------------------------------------------------------------------------


async def test_one_connection_serves_a_whole_execute(server: Server, pace: Pace) -> None:
    """The start and all polls go over one connection."""
    server.on("GET", *[running] * 5)
    assert await execute(server.url) == RESULT
    assert (server.count("POST"), server.count("GET"), server.connections) == (1, 6, 1)


async def test_a_dead_connection_does_not_cost_a_start(pace: Pace) -> None:
    """A kept connection that the server has closed is not used again, for a start on it would be lost."""
    with Server() as server:
        server.always("POST", then_close(started))
        for number in range(1, 5):
            assert await start(server.url) == ACTION_ID
            await eventually(lambda: server.open_connections == 0)
            assert (server.count("POST"), server.connections) == (number, number)


async def test_a_start_takes_no_connection_that_was_idle_for_long(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll may use an older connection than a start, which cannot be sent again."""
    assert pool.MAX_IDLE_FOR_START <= 1
    monkeypatch.setattr(pool, "MAX_IDLE_FOR_START", 0.05)
    with Server() as server:
        handle = await ActionExecutor.start("act", {}, base_url=server.url, auth_token=TOKEN)
        await asyncio.sleep(0.1)
        await handle.result()
        assert server.connections == 1
        await asyncio.sleep(0.1)
        await start(server.url)
        assert server.connections == 2


async def test_a_connection_that_was_idle_for_very_long_is_dropped(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing uses a connection whose end a frozen process may have slept through; it is closed."""
    assert pool.MAX_IDLE <= 10
    with Server() as server:
        handle = await ActionExecutor.start("act", {}, base_url=server.url, auth_token=TOKEN)
        monkeypatch.setattr(pool, "MAX_IDLE", 0.05)
        await asyncio.sleep(0.1)
        await handle.result()
        assert server.connections == 2
        await eventually(lambda: server.open_connections == 1)


async def test_idle_connections_close_by_themselves(
    server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to send another request for what is idle too long to be closed."""
    monkeypatch.setattr(pool, "MAX_IDLE", 0.1)
    server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.02))
    await asyncio.gather(*(execute(server.url) for _ in range(5)))
    assert server.open_connections > 1
    await eventually(lambda: server.open_connections == 0)
    assert pool_is_at_rest()


def test_a_connection_is_given_back_where_no_loop_runs(pace: Pace) -> None:
    """A request whose loop is gone gives its connection back in a thread, say, and others use it."""
    shared = pool.shared_pool()
    with Server() as server:
        asyncio.run(start(server.url))
        asyncio.run(shared.enter())
        connection = shared.take(Route(is_tls=False, authority=f"127.0.0.1:{server.port}"), for_start=True)
        assert connection is not None
        shared.leave(connection, may_keep=True)
        assert pool_is_at_rest()
        asyncio.run(start(server.url))
        assert server.connections == 1


def test_what_one_loop_left_idle_another_one_closes(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that has ended closes nothing any more; the next one that uses the transport does."""
    monkeypatch.setattr(pool, "MAX_IDLE", 0.2)
    with Server() as first, Server() as second:
        asyncio.run(execute(first.url))

        async def main() -> None:
            await execute(second.url)
            await eventually(lambda: first.open_connections + second.open_connections == 0)

        asyncio.run(main())


IDLE_GIVE_WAY = (
    OUT_OF_DESCRIPTORS
    + """
async def main(first, second, pause):
    await asyncio.gather(*(start(first) for _ in range(15)))
    leave(0)
    await asyncio.sleep(float(pause))
    print(await asyncio.gather(*(start(second) for _ in range(10))))
asyncio.run(main(*sys.argv[1:]))
"""
)


@posix_only
@pytest.mark.parametrize("pause", ["0", "1.1"])
def test_idle_connections_give_way_when_descriptors_run_out(pause: str) -> None:
    """Where no descriptor is left, idle connections are closed for starts that may not use them."""
    with Server() as first, Server() as other:
        for each in (first, other):
            each.always("POST", reply(200, {"id": ACTION_ID}, delay=0.1))
        second = other if pause == "0" else first
        done = run_script(IDLE_GIVE_WAY, first.url, second.url, pause)
        assert (done.stdout, done.stderr) == (f"{[ACTION_ID] * 10}\n", "")
        assert first.count("POST") + other.count("POST") == 25


async def test_a_socket_that_fails_to_close_keeps_no_room(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room comes back whatever happens to the connection."""

    def fail(self: connections.Connection) -> None:
        really_close(self)
        raise OSError(errno.EIO, "Input/output error")

    really_close = connections.Connection.close
    monkeypatch.setattr(connections.Connection, "close", fail)
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, {"Connection": "close"}))
        with contextlib.suppress(OSError):
            await start(server.url)
    await eventually(pool_is_at_rest)


# --- the line ---------------------------------------------------------------------------------------------------------


def test_event_loops_in_threads_wait_in_one_line(pace: Pace, few_rooms: Callable[[int], None]) -> None:
    """Whoever asks first for a connection gets it first, whichever event loop it runs in."""
    few_rooms(1)
    with Server() as server, ThreadPoolExecutor(8) as threads:
        answer = threading.Event()
        server.on("POST", started_after(answer))
        first = threads.submit(asyncio.run, start(server.url))
        wait_until(lambda: server.count("POST") == 1)
        waiting = []
        for number in range(6):
            waiting.append(threads.submit(asyncio.run, start(server.url, number)))
            wait_until(lambda: pool_state().in_line == len(waiting))
        answer.set()
        assert [each.result() for each in [first, *waiting]] == [ACTION_ID] * 7
        numbers = [json.loads(request.body)["params"] for request in server.requests if request.method == "POST"]
        assert numbers == [None, *range(6)]


async def test_waiting_in_the_line_is_not_part_of_a_requests_time(pace: Pace, few_rooms: Callable[[int], None]) -> None:
    """A request that queues behind others still has all of its seconds."""
    few_rooms(1)
    pace.hurry("POST", 5, 1.0)
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.3))
        assert await asyncio.gather(*(start(server.url) for _ in range(5))) == [ACTION_ID] * 5
        assert (server.count("POST"), server.connections) == (5, 1)


async def test_a_cancelled_request_gives_its_room_back(pace: Pace, few_rooms: Callable[[int], None]) -> None:
    """Neither a request that is cancelled under way nor one that is cancelled in the line keeps room."""
    few_rooms(1)
    with Server() as server:
        server.on("POST", silent)
        under_way = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 1)
        queued = asyncio.ensure_future(start(server.url))
        await asyncio.sleep(0.01)
        for task in (queued, under_way):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await asyncio.wait_for(start(server.url), PROMPT) == ACTION_ID
        assert server.count("POST") == 2


async def test_a_start_that_is_cancelled_in_the_line_was_not_sent(pace: Pace, few_rooms: Callable[[int], None]) -> None:
    """Who gives up waiting for room knows that nothing has left, and who waits behind is not affected."""
    few_rooms(1)
    with Server() as server:
        server.on("POST", silent)
        hanging = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 1)
        exchange = Exchange(request_to(server.url, "POST"), 30.0)
        waiting = asyncio.ensure_future(send(exchange))
        behind = asyncio.ensure_future(start(server.url))
        await eventually(lambda: pool_state().in_line == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (exchange.may_have_left, exchange.answer) == (False, None)
        hanging.cancel()
        assert await asyncio.wait_for(behind, PROMPT) == ACTION_ID
        assert server.count("POST") == 2


def test_room_that_comes_free_while_a_request_joins_the_line_is_its_own(
    few_rooms: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector may end forgotten requests at any moment, also between a look for room and the line."""
    few_rooms(1)
    shared = pool.shared_pool()
    really_make = pool._Waiter

    def make(loop: asyncio.AbstractEventLoop) -> Any:
        shared.leave()
        return really_make(loop)

    async def main() -> None:
        await shared.enter()
        with monkeypatch.context() as patch:
            patch.setattr(pool, "_Waiter", make)
            await asyncio.wait_for(shared.enter(), PROMPT)
        shared.leave()

    asyncio.run(main())
    assert pool_is_at_rest()


async def test_room_that_is_given_to_a_request_just_cancelled_comes_back(few_rooms: Callable[[int], None]) -> None:
    """Who is cancelled at the moment that room is given to it passes it on."""
    few_rooms(1)
    shared = pool.shared_pool()
    await shared.enter()
    cancelled, behind = asyncio.ensure_future(shared.enter()), asyncio.ensure_future(shared.enter())
    await asyncio.sleep(0)
    shared.leave()
    cancelled.cancel()
    await asyncio.wait_for(behind, PROMPT)
    assert cancelled.cancelled()
    shared.leave()
    assert pool_is_at_rest()


async def test_within_one_loop_room_is_passed_on_without_waking_it(
    few_rooms: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that gives room to a request of its own is awake: to wake it would cost two system calls a request."""
    few_rooms(1)
    shared = pool.shared_pool()
    await shared.enter()
    behind = asyncio.ensure_future(shared.enter())
    await asyncio.sleep(0)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", None)
        shared.leave()
        await behind
    shared.leave()
    assert pool_is_at_rest()


def test_nobody_waits_behind_a_loop_that_was_closed(few_rooms: Callable[[int], None]) -> None:
    """Room is not given to a request whose loop was closed over it, although its task is still there."""
    few_rooms(1)
    shared = pool.shared_pool()
    closed = asyncio.new_event_loop()
    closed.run_until_complete(shared.enter())
    forgotten = closed.create_task(shared.enter())
    closed.run_until_complete(asyncio.sleep(0))
    closed.close()

    async def wait_behind() -> None:
        waiting = asyncio.ensure_future(shared.enter())
        await asyncio.sleep(0)
        shared.leave()
        await asyncio.wait_for(waiting, PROMPT)
        shared.leave()

    asyncio.run(wait_behind())
    assert pool_is_at_rest()
    assert not forgotten.done()
    forgotten._log_destroy_pending = False  # type: ignore[attr-defined]  # its loop cannot end it any more


# --- how much room there is -------------------------------------------------------------------------------------------


async def test_slow_replies_are_given_more_connections(pace: Pace) -> None:
    """Where each reply takes 100 ms, 64 connections would make 200 requests wait, so there come to be more."""
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.1))
        assert await asyncio.gather(*(start(server.url) for _ in range(200))) == [ACTION_ID] * 200
        assert server.count("POST") == 200
        assert 64 < server.most_open_connections <= 256


async def test_room_follows_the_quickest_of_the_last_replies(pace: Pace) -> None:
    """Slow replies make room up to 256; a quick one among the last 64 says that it is our own load that is slow."""
    shared = pool.shared_pool()
    assert pool_state().rooms == 64
    for _ in range(15):
        shared.learn(30.0)
    assert pool_state().rooms == 64
    shared.learn(0.01)
    for _ in range(63):
        shared.learn(0.075)
    assert pool_state().rooms == 64
    shared.learn(0.075)
    assert pool_state().rooms == 160
    for _ in range(64):
        shared.learn(30.0)
    assert pool_state().rooms == 256
    shared.learn(0.001)
    assert pool_state().rooms == 64


async def test_the_first_slow_replies_make_no_room(pace: Pace) -> None:
    """A platform that has slept, or a process that has just begun, may take long for its first reply."""
    for _ in range(15):
        pool.shared_pool().learn(30.0)
    assert pool_state().rooms == 64
    pool.shared_pool().learn(30.0)
    assert pool_state().rooms == 256


async def test_who_waits_in_the_line_is_given_the_new_room(pace: Pace) -> None:
    """Room that slow replies make is not only for those who come later."""
    with Server() as server:
        server.always("POST", silent)
        tasks = [asyncio.ensure_future(start(server.url)) for _ in range(70)]
        await eventually(lambda: server.count("POST") == 64)
        assert pool_state()[:3] == (64, 64, 6)
        for _ in range(16):
            pool.shared_pool().learn(0.1)
        await eventually(lambda: server.count("POST") == 70)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert pool_is_at_rest()


async def test_a_quick_reply_that_comes_within_the_hop_counts(pace: Pace) -> None:
    """Requests that come alone, and get their replies at once, take back the room that slow replies made."""
    for _ in range(64):
        pool.shared_pool().learn(0.2)
    assert pool_state().rooms == 256
    with Server() as server:
        for _ in range(3):
            await start(server.url)
    assert pool_state().rooms == 64


@posix_only
@pytest.mark.parametrize(("descriptors", "most"), [(1024, 256), (400, 100), (128, 64)])
def test_connections_take_a_quarter_of_the_descriptors_at_most(descriptors: int, most: int) -> None:
    """However slow replies are, three quarters of what the process may open is left to it; 64 there are always."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    try:
        pool._start_afresh()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for _ in range(64):
        pool.shared_pool().learn(30.0)
    assert pool_state().rooms == most


def test_event_loops_in_threads_share_the_room(pace: Pace, few_rooms: Callable[[int], None]) -> None:
    """The limit is the process's: several event loops at once have no more connections than one."""
    few_rooms(8)
    with Server() as server, ThreadPoolExecutor(3) as threads:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.05))

        async def many() -> list[Any]:
            return await asyncio.gather(*(execute(server.url) for _ in range(16)))

        assert list(threads.map(lambda _: asyncio.run(many()), range(3))) == [[RESULT] * 16] * 3
        assert server.count("POST") == 48
        assert server.most_open_connections == 8


async def test_idle_connections_of_one_platform_give_way_to_another(
    pace: Pace, few_rooms: Callable[[int], None]
) -> None:
    """Idle connections count: where they take all the room, a new one of another platform closes the oldest."""
    few_rooms(2)
    with Server() as first, Server() as second:
        first.always("POST", reply(200, {"id": ACTION_ID}, delay=0.05))
        await asyncio.gather(start(first.url), start(first.url))
        assert pool_state()[-2:] == (0, 2)
        assert await start(second.url) == ACTION_ID
        assert pool_state()[-2:] == (0, 2)
        await eventually(lambda: first.open_connections == 1)
        assert second.connections == 1
