"""One connection: what it sends and receives, and that nothing of one reply is left over for the next request."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.conftest import (
    PROMPT,
    Pace,
    execute,
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
    eventually,
    http_reply,
    raw_but_open,
    server_context,
)
from zamp_sdk import HttpClientError
from zamp_sdk.transport import (
    Exchange,
    Failure,
    connections,
    send,
    sending,
)
from zamp_sdk.transport.connections import Connection, Route

# --- what is left over ------------------------------------------------------------------------------------------------


def together(first: Any, second: bytes, first_status: int = 200) -> Act:
    """Send two replies at once, in one TLS record, the first of them 8 KiB long: as much as is read from a file."""
    bare = http_reply(first_status, first)
    padding = 8192 - len(bare) - 2  # its length takes two digits more then
    data = http_reply(first_status, bare.partition(b"\r\n\r\n")[2] + b" " * padding)
    assert len(data) == 8192
    return raw_but_open(data + second)


async def test_a_poll_does_not_get_a_reply_that_came_too_early(server: Server, pace: Pace) -> None:
    """A second reply in the packet, or TLS record, of the first is another request's, and nobody's."""
    another = http_reply(200, {"status": "COMPLETED", "result": "of another action"})
    server.on("POST", together({"id": ACTION_ID}, another))
    assert await execute(server.url) == RESULT
    assert server.connections == 2


async def test_a_refusal_that_is_left_over_refuses_no_start(server: Server, pace: Pace) -> None:
    """A start is not sent again because of a 429 that was there before it."""
    server.on("POST", together({"id": ACTION_ID}, http_reply(429)))
    assert await start(server.url) == ACTION_ID
    assert await start(server.url) == ACTION_ID
    assert (server.count("POST"), server.connections) == (2, 2)


@pytest.mark.parametrize("surplus", [b"\r\n", b"H", b"\0"])
async def test_a_single_byte_too_many_ends_a_connection(surplus: bytes, server: Server, pace: Pace) -> None:
    """Whatever follows a reply, its connection is closed."""
    server.on("POST", raw_but_open(http_reply(200, {"id": ACTION_ID}) + surplus))
    assert await execute(server.url) == RESULT
    assert server.connections == 2
    await eventually(lambda: server.open_connections == 1)


async def test_half_a_tls_record_too_many_ends_a_connection(localhost: Path, trusted: Path, pace: Pace) -> None:
    """A reply of which TLS can decrypt nothing yet is left over all the same."""
    context = server_context(localhost)

    def half_a_record(wire: Wire) -> bool:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)

        def step(function: Callable[[], Any]) -> Any:
            while True:
                try:
                    return function()
                except ssl.SSLWantReadError:
                    wire.send(outgoing.read())
                    incoming.write(wire.socket.recv(65536))
                finally:
                    if outgoing.pending:
                        wire.send(outgoing.read())

        step(tls.do_handshake)
        step(lambda: tls.read(65536))
        tls.write(http_reply(200, {"id": ACTION_ID}))
        whole = outgoing.read()
        tls.write(http_reply(200, {"status": "COMPLETED", "result": "of another action"}))
        surplus = outgoing.read()
        wire.send(whole + surplus[:50])
        if wire.socket.recv(65536):  # it is used again
            wire.send(surplus[50:])
        return False

    with Server(context) as server:
        server.on(CONNECT, half_a_record)
        assert await execute(server.url) == RESULT
        assert server.connections == 2


async def test_a_switch_of_protocols_ends_the_connection(server: Server, pace: Pace) -> None:
    """After a 101 a connection speaks something else, so it is closed."""
    head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    server.on("POST", raw_but_open(head))
    with pytest.raises(HttpClientError, match="HTTP 101") as caught:
        await start(server.url)
    assert caught.value.may_have_started
    await eventually(lambda: server.open_connections == 0)
    assert await start(server.url) == ACTION_ID
    assert (server.count("POST"), server.connections) == (2, 2)


# --- what cannot be sent ----------------------------------------------------------------------------------------------


async def test_what_cannot_be_sent_is_told_at_once(server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A send that fails, for want of buffers say, is not waited for as if a reply could come."""
    assert await start(server.url) == ACTION_ID

    class Full:
        def __init__(self, sock: socket.socket) -> None:
            self._sock = sock

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

        def send(self, data: Any) -> int:
            raise OSError(errno.ENOBUFS, "No buffer space available")

    really_open = sending.open_request

    def open_request(connection: Any, *args: Any) -> Any:
        connection.sock = Full(connection.sock)
        return really_open(connection, *args)

    with monkeypatch.context() as patch:
        patch.setattr(sending, "open_request", open_request)
        outcome = await asyncio.wait_for(send(Exchange(request_to(server.url), 30.0)), PROMPT)
    assert isinstance(outcome, Failure)
    assert not outcome.may_have_left
    assert "No buffer space" in outcome.message


# --- without a server -------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection, and the peer's end of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield Connection(ours, Route(is_tls=False, authority="platform.test")), theirs


def test_flush_sends_what_the_socket_takes(pair: tuple[Connection, socket.socket]) -> None:
    """A full socket keeps nobody: the rest is sent by the next calls, and nothing twice."""
    connection, peer = pair
    data = os.urandom(1_000_000)
    connection.write(data[:300_000])
    connection.write(data[300_000:])
    connection.flush()
    assert connection.has_unsent
    assert 0 < connection.bytes_sent < len(data)
    arrived = b""
    while len(arrived) < len(data):
        arrived += peer.recv(65536)
        connection.flush()
    assert arrived == data
    assert (connection.has_unsent, connection.bytes_sent) == (False, len(data))


def test_receive_takes_what_has_come(pair: tuple[Connection, socket.socket]) -> None:
    """What has come is taken, nothing is waited for, and the end is told after the last byte."""
    connection, peer = pair
    connection.receive()
    assert (bytes(connection.incoming), connection.has_ended) == (b"", False)
    assert connection.is_quiet()
    peer.sendall(b"hello")
    assert not connection.is_quiet()
    connection.receive()
    assert (bytes(connection.incoming), connection.has_ended) == (b"hello", False)
    peer.close()
    connection.receive()
    assert (bytes(connection.incoming), connection.has_ended) == (b"hello", True)
    assert connection.broken_by is None
    assert connection.has_leftovers


def test_a_fast_peer_keeps_nobody_busy(pair: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """One call takes a bounded number of bytes, and the next one goes on where it ended."""
    monkeypatch.setattr(connections, "PIECE", 4)
    monkeypatch.setattr(connections, "PIECES", 3)
    connection, peer = pair
    peer.sendall(b"abcdefghijklmnop")
    connection.receive()
    assert connection.incoming == b"abcdefghijkl"
    connection.receive()
    assert connection.incoming == b"abcdefghijklmnop"


def test_what_came_before_a_failure_counts(pair: tuple[Connection, socket.socket]) -> None:
    """A connection that breaks while something is sent has still received what the peer said before."""
    connection, peer = pair
    peer.sendall(b"no")
    peer.close()
    connection.write(b"x")
    connection.flush()
    assert isinstance(connection.broken_by, BrokenPipeError)
    assert not connection.has_unsent
    assert connection.bytes_sent == 0
    connection.receive()
    assert connection.incoming == b"no"
    assert isinstance(connection.broken_by, BrokenPipeError)


def test_a_routes_repr_names_no_credentials() -> None:
    """What is shown of a route is where it leads to."""
    route = Route(is_tls=True, authority="proxy.test:3128", is_through_proxy=True, user="user", password="hunter2")
    assert "proxy.test:3128" in repr(route)
    assert "hunter2" not in repr(route)
