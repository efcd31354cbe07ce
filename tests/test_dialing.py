"""From a host's name to a connected socket: addresses that are dead, slow, many, or of no use here."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import (
    OUT_OF_DESCRIPTORS,
    PROMPT,
    Pace,
    Resolver,
    execute,
    pool_is_at_rest,
    pool_state,
    posix_only,
    request_to,
    run_script,
    start,
)
from tests.servers import (
    ACTION_ID,
    RESULT,
    Server,
    closed_port,
    eventually,
    hanging_port,
    http_reply,
    reply,
)
from zamp_sdk import HttpClientError
from zamp_sdk.transport import (
    Exchange,
    Failure,
    dialing,
    hops,
    send,
)


def resolve_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Give every host these ports of 127.0.0.1 as its addresses."""
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)


async def test_each_address_of_a_host_is_tried(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that refuses, or of a family that this machine does not have, is passed over for the next one."""
    with Server() as server:
        unknown_family = 9999
        addresses = [
            (unknown_family, socket.SOCK_STREAM, 0, "", ("::1", server.port)),
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("255.255.255.255", server.port)),  # refused by the system
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", closed_port())),
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        assert await start("http://platform.test") == ACTION_ID


@pytest.mark.parametrize("dead", [1, 2, 3])
async def test_dead_addresses_cost_a_moment(dead: int, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that drop packets are not waited for before the next one is tried."""
    with Server() as server, hanging_port() as port:
        resolve_to(monkeypatch, *[port] * dead, server.port)
        assert await asyncio.wait_for(execute("http://platform.test"), PROMPT) == RESULT
        assert (server.count("POST"), server.connections) == (1, 1)


async def test_an_attempt_goes_on_where_there_is_no_socket_for_another(
    pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors that run out at the second address do not end the attempt at the first."""
    monkeypatch.setattr(dialing, "ATTEMPT_DELAY", 0.02)
    really_begin = dialing._begin_to_connect
    begun: list[Any] = []

    def begin(address: Any) -> socket.socket:
        begun.append(address)
        if len(begun) > 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return really_begin(address)

    really_until_ready = hops.Hops.until_ready

    async def until_ready(self: hops.Hops, *sockets: socket.socket, events: int, **kwargs: Any) -> bool:
        if events == hops.WRITE and not begun[1:]:
            return False  # the first one takes its time
        return await really_until_ready(self, *sockets, events=events, **kwargs)

    monkeypatch.setattr(dialing, "_begin_to_connect", begin)
    monkeypatch.setattr(hops.Hops, "until_ready", until_ready)
    monkeypatch.setattr(dialing, "is_ready", lambda sockets, events: len(begun) > 1 and hops.is_ready(sockets, events))
    with Server() as server:
        resolve_to(monkeypatch, server.port, server.port)
        assert await start("http://platform.test") == ACTION_ID


async def test_descriptors_that_run_out_are_not_hidden_by_another_address(
    pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one address finds no descriptor and the next one is of no use, idle connections still give way."""
    really_begin = dialing._begin_to_connect
    begun: list[Any] = []

    def begin(address: Any) -> socket.socket:
        begun.append(address)
        if len(begun) == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return really_begin(address)

    with Server() as server, Server() as other:
        await start(other.url)
        assert pool_state().idle == 1
        unknown_family = 9999
        addresses = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.port)),
            (unknown_family, socket.SOCK_STREAM, 0, "", ("::1", server.port)),
        ]
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
            patch.setattr(dialing, "_begin_to_connect", begin)
            outcome = await send(Exchange(request_to("http://platform.test", "POST"), 10.0))
        assert outcome.status_code == 200
        await eventually(lambda: other.open_connections == 0)


async def test_a_slow_address_may_still_answer(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address goes on being tried while later ones fail."""
    monkeypatch.setattr(dialing, "ATTEMPT_DELAY", 0.05)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [stack.enter_context(socket.socket()) for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        resolve_to(monkeypatch, listener.getsockname()[1], stack.enter_context(hanging_port()))
        task = asyncio.ensure_future(start("http://platform.test"))
        await asyncio.sleep(0.3)
        for filler in fillers:
            filler.close()

        def answer() -> None:
            while True:  # first come the fillers
                sock, _ = listener.accept()
                with sock:
                    if sock.recv(65536):
                        sock.sendall(http_reply(200, {"id": ACTION_ID}))
                        return

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        assert await asyncio.wait_for(task, 9.0) == ACTION_ID
        thread.join()


async def test_many_dead_addresses_are_given_up_in_time(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many addresses a host has, no more of them are tried than the time to connect allows."""
    monkeypatch.setattr(dialing, "ATTEMPT_DELAY", 0.02)
    monkeypatch.setattr(dialing, "CONNECT_TIMEOUT", 0.1)
    tried = []
    really_begin = dialing._begin_to_connect

    def begin(address: Any) -> socket.socket:
        tried.append(address)
        return really_begin(address)

    monkeypatch.setattr(dialing, "_begin_to_connect", begin)
    with hanging_port() as port:
        resolve_to(monkeypatch, *[port] * 200)
        outcome = await send(Exchange(request_to("http://platform.test"), 30.0))
    assert isinstance(outcome, Failure)
    assert "timed out" in outcome.message
    assert len(tried) < 20


def test_address_families_take_turns() -> None:
    """The families alternate, in the order in which the first of each came (RFC 8305, 4)."""
    v6, v4 = socket.AF_INET6, socket.AF_INET
    addresses = [(v6, 1), (v6, 2), (v6, 3), (v4, 4), (v4, 5)]
    assert list(dialing._interleaved(addresses)) == [(v6, 1), (v4, 4), (v6, 2), (v4, 5), (v6, 3)]
    assert list(dialing._interleaved([(v4, 1), (v4, 2), (v6, 3)])) == [(v4, 1), (v6, 3), (v4, 2)]
    assert list(dialing._interleaved([])) == []


async def test_the_error_of_the_last_address_is_told(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every address fails, the request fails at once, and may be sent again."""
    resolve_to(monkeypatch, closed_port(), closed_port())
    outcome = await asyncio.wait_for(send(Exchange(request_to("http://platform.test"), 30.0)), PROMPT)
    assert isinstance(outcome, Failure)
    assert (outcome.may_have_left, outcome.may_retry) == (False, True)
    assert "cannot connect to platform.test: " in outcome.message
    assert "nothing listens there" in outcome.message


async def test_a_name_lookup_that_hangs_sends_nothing_afterwards(
    pace: Pace, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No socket can wake a name lookup: the request still ends in time, and its thread sends nothing later."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
    pace.hurry("POST", 10, 0.1)
    release = threading.Event()
    with Server() as server:
        resolver.answers = [server.port]
        resolver.before = lambda: release.wait(10)
        try:
            with pytest.raises(HttpClientError, match="timed out") as caught:
                await start("http://platform.test")
        finally:
            release.set()
        assert not caught.value.may_have_started
        await eventually(pool_is_at_rest)
        assert server.connections == 0


NO_DESCRIPTOR_AT_ALL = (
    OUT_OF_DESCRIPTORS
    + """
async def main(url):
    await start(url)
    leave(0)
    try:
        await start(url)
    except HttpClientError as exc:
        print(exc.may_have_started, exc)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(await start(url))
asyncio.run(main(*sys.argv[1:]))
"""
)


@posix_only
def test_a_start_that_no_descriptor_is_left_for_was_not_sent() -> None:
    """Where nothing gives way, the error says what ran out, and that nothing has started."""
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, {"Connection": "close"}))
        done = run_script(NO_DESCRIPTOR_AT_ALL, server.url)
        first, second = done.stdout.splitlines()
        assert first.startswith("False starting the action: cannot connect to 127.0.0.1:")
        assert "Too many open files" in first
        assert second == ACTION_ID
        assert server.count("POST") == 2
