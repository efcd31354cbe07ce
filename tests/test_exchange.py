"""The story of one request: what it brings back, when it is over early, and what the log says of it."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import re
import socket
import sysconfig
import threading
import time
from typing import Any

import pytest

from tests.conftest import (
    PROMPT,
    CheckNoToken,
    Pace,
    execute,
    pool_state,
    request_to,
    start,
)
from tests.servers import (
    ACTION_ID,
    CONNECT,
    Act,
    Server,
    Wire,
    closed_port,
    eventually,
    hang_up,
    http_reply,
    proceed,
    raw,
    raw_but_open,
    reply,
    started,
)
from zamp_sdk import HttpClientError
from zamp_sdk.transport import Exchange, Failure, Reply, connections, send

MANY_MB = "x" * 20_000_000  # far more than sockets buffer


async def test_an_exchange_is_told_from_its_attributes(server: Server) -> None:
    """What read makes of a reply is returned and kept; it is called once, in a thread, with the reply as it came."""
    calls: list[tuple[Reply, int]] = []

    def read(reply: Reply) -> str:
        calls.append((reply, threading.get_ident()))
        return "what was made of it"

    server.on("POST", reply(201, b"hello", {"X-Kind": "greeting"}))
    exchange = Exchange(dataclasses.replace(request_to(server.url, "POST", body=b"{}"), read=read), 10.0)
    assert (exchange.answer, exchange.may_have_left) == (None, False)
    assert await send(exchange) == "what was made of it"
    assert (exchange.answer, exchange.may_have_left) == ("what was made of it", True)
    ((came, thread),) = calls
    assert (came.status_code, came.body, came.headers["x-kind"], tuple(came.secrets)) == (201, b"hello", "greeting", ())
    assert thread != threading.get_ident()


async def test_a_request_that_cannot_leave_is_a_failure_that_says_so() -> None:
    """Where nothing listens, nothing has left, and the same request may be sent again."""
    exchange = Exchange(request_to(f"http://127.0.0.1:{closed_port()}", "POST"), 10.0)
    outcome = await send(exchange)
    assert isinstance(outcome, Failure)
    assert (outcome.may_have_left, outcome.may_retry) == (False, True)
    assert (exchange.may_have_left, exchange.answer) == (False, None)
    assert isinstance(outcome.cause, ConnectionRefusedError)


async def test_a_request_that_got_no_reply_is_a_failure_that_says_so(server: Server) -> None:
    """Where the peer hangs up, the request may have left."""
    server.always("POST", hang_up)
    exchange = Exchange(request_to(server.url, "POST"), 10.0)
    outcome = await send(exchange)
    assert isinstance(outcome, Failure)
    assert (outcome.may_have_left, outcome.may_retry) == (True, True)
    assert exchange.may_have_left
    assert server.count("POST") == 1


_BODY = http_reply(200, {"id": ACTION_ID}).partition(b"\r\n\r\n")[2]
_CHUNKS = b"".join(b"1\r\n%c\r\n" % byte for byte in _BODY) + b"0\r\nTrailer: x\r\n\r\n"


@pytest.mark.parametrize(
    ("act", "is_kept"),
    [
        pytest.param(started, True, id="Content-Length"),
        pytest.param(reply(201, {"id": ACTION_ID}), True, id="HTTP 201"),
        pytest.param(reply(202, {"data": {"id": ACTION_ID}, "error": None}), True, id="in an envelope"),
        pytest.param(
            raw_but_open(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + _CHUNKS), True, id="chunked"
        ),
        pytest.param(
            raw_but_open(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + http_reply(200, {"id": ACTION_ID})),
            True,
            id="103 first",
        ),
        pytest.param(raw(b"HTTP/1.1 200 OK\r\n\r\n" + _BODY), False, id="until the end of the connection"),
        pytest.param(raw(b"HTTP/1.0 200 OK\r\n\r\n" + _BODY), False, id="HTTP/1.0"),
        pytest.param(reply(200, {"id": ACTION_ID}, {"Connection": "close"}), False, id="Connection: close"),
    ],
)
async def test_a_connection_is_kept_where_the_reply_says_its_end(
    act: Act, is_kept: bool, server: Server, pace: Pace
) -> None:
    """Each way of HTTP/1.x to frame a reply is understood, and decides whether the connection is used again."""
    server.on("POST", act)
    assert await start(server.url) == ACTION_ID
    assert await start(server.url) == ACTION_ID
    assert server.connections == (1 if is_kept else 2)


@pytest.mark.parametrize(
    "afterwards", [b"", http_reply(200, {"id": "somebody-else's"})], ids=["closed", "another reply"]
)
async def test_what_comes_before_a_request_is_sent_is_no_reply_to_it(
    afterwards: bytes, server: Server, pace: Pace
) -> None:
    """An idle connection of which a peer has enough while a busy loop keeps its next request waiting is not used."""
    may_go_on, has_gone_on = threading.Event(), threading.Event()

    def start_and_more(wire: Wire) -> bool:
        started(wire)
        assert may_go_on.wait(PROMPT)
        wire.send(afterwards)
        if not afterwards:
            wire.socket.shutdown(socket.SHUT_WR)
        has_gone_on.set()
        return True

    server.on("POST", start_and_more)
    assert await start(server.url) == ACTION_ID
    second = asyncio.ensure_future(start(server.url))
    await asyncio.sleep(0)  # it has taken the connection, and waits for a thread
    assert (pool_state().rooms_taken, pool_state().idle) == (1, 0)
    may_go_on.set()
    assert has_gone_on.wait(PROMPT)
    assert await second == ACTION_ID
    assert (server.count("POST"), server.connections) == (2, 2)


async def test_nothing_more_of_a_cancelled_start_is_sent(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that is cancelled while half of it is on its way is not sent on, though the socket would take more."""
    may_read = threading.Event()
    arrived: list[int] = []

    def read_late(wire: Wire) -> bool:
        assert may_read.wait(PROMPT)
        while data := wire.socket.recv(65536):
            arrived.append(len(data))
        return False

    made: list[connections.Connection] = []

    def make(*args: Any) -> connections.Connection:
        made.append(connections.Connection(*args))
        return made[-1]

    monkeypatch.setattr("zamp_sdk.transport.exchange.Connection", make)
    with Server() as server:
        server.always(CONNECT, read_late)
        task = asyncio.ensure_future(start(server.url, MANY_MB))
        await eventually(lambda: len(made) == 1)
        (connection,) = made
        await asyncio.sleep(0.3)  # it has sent as much as the buffers take
        sent = connection.bytes_sent
        assert 0 < sent < len(MANY_MB)
        may_read.set()
        time.sleep(0.3)  # a busy loop, so that the socket takes more before the cancellation
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: server.open_connections == 0)
    assert sum(arrived) == sent


async def test_large_requests_and_replies_arrive_whole(pace: Pace) -> None:
    """Megabytes go both ways unharmed."""
    text = "0123456789abcdef" * 300_000
    with Server() as server:
        server.always("GET", reply(200, {"status": "COMPLETED", "result": text}))
        assert await execute(server.url, text) == text
        assert text.encode() in server.requests[0].body


class Flood:
    """An act that sends its beginning, and then the rest again and again while anybody takes it."""

    def __init__(self, begin: bytes, again: bytes) -> None:
        self.begin = begin
        self.again = again * (65536 // len(again))
        self.sent = 0

    def __call__(self, wire: Wire) -> bool:
        wire.send(self.begin)
        while not wire.server.stopping.is_set() and self.sent < 1 << 29:
            wire.send(self.again)
            self.sent += len(self.again)
        return False


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(Flood(b"HTTP/1.1 200 OK\r\nX: a\r\n", b" folded\r\n"), id="folded lines"),
        pytest.param(Flood(b"HTTP/1.1 200 OK\r\nX: a\r\n", b" " + b"x" * 60_000 + b"\r\n"), id="long folded lines"),
        pytest.param(Flood(b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"), id="headers"),
        pytest.param(Flood(b"HTTP/1.1 200 OK\r\nX: ", b"x"), id="one header"),
        pytest.param(Flood(b"HTTP/1.1 ", b"2"), id="a status line"),
        pytest.param(Flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), id="informational replies"),
    ],
)
async def test_headers_that_never_end_are_soon_given_up(flood: Flood, pace: Pace) -> None:
    """However a peer writes headers for ever, folded ones too, little of it is read."""
    with Server() as server:
        server.on("POST", flood)
        with pytest.raises(HttpClientError) as caught:
            await asyncio.wait_for(start(server.url), PROMPT)
        assert caught.value.may_have_started
        await eventually(lambda: server.open_connections == 0)
        assert flood.sent < 32 << 20  # and most of that lies in the buffers of sockets


async def test_a_refusal_of_a_body_that_is_too_large_arrives(server: Server, pace: Pace) -> None:
    """A server that refuses 20 MB before it has read them, and hangs up, has refused them."""

    def refuse(wire: Wire) -> bool:
        proceed(wire)
        wire.socket.recv(4096)
        wire.send(http_reply(413, {"detail": "at most 1 MB"}, {"Connection": "close"}))
        return False

    server.on(CONNECT, refuse)
    with pytest.raises(HttpClientError, match=r"HTTP 413 .*at most 1 MB") as caught:
        await start(server.url, MANY_MB)
    assert caught.value.status_code == 413
    assert not caught.value.may_have_started
    assert server.connections == 1


async def test_a_refusal_while_the_body_goes_on_ends_the_request(server: Server, pace: Pace) -> None:
    """A server that refuses 20 MB and keeps the connection open is not sent the rest, nor another request."""

    def refuse(wire: Wire) -> bool:
        proceed(wire)
        wire.socket.recv(4096)
        wire.send(http_reply(413, {"detail": "at most 1 MB"}))
        wire.server.stopping.wait(0.2)
        wire.wait_for_end()
        return False

    server.on(CONNECT, refuse)
    with pytest.raises(HttpClientError, match="HTTP 413") as caught:
        await start(server.url, MANY_MB)
    assert not caught.value.may_have_started
    await eventually(lambda: server.open_connections == 0)
    assert await start(server.url) == ACTION_ID
    assert server.connections == 2


async def test_the_log_names_requests_and_nothing_secret(
    server: Server, pace: Pace, assert_no_token: CheckNoToken, caplog: pytest.LogCaptureFixture
) -> None:
    """At DEBUG each request is a record with method, URL, status, and where its time went; bodies are not logged."""
    server.on("GET", reply(500))
    await execute(server.url, {"password": "hunter2"})
    post, failed, get = (record.getMessage() for record in caplog.records if record.name == "zamp_sdk")
    connecting = r"\d+ looking up and connecting, " + (r"\d+ for TLS, " if server.tls else "")
    laps = r"\d+ ms \(\d+ in line, {}\d+ for the reply\)"
    url = re.escape(server.url)
    assert re.fullmatch(rf"POST {url}/actions: 200, {laps.format(connecting)}", post)
    assert re.fullmatch(rf"GET {url}/actions/{ACTION_ID}: 500, {laps.format('')}", failed)
    assert re.fullmatch(rf"GET {url}/actions/{ACTION_ID}: 200, {laps.format('')}", get)
    assert "hunter2" not in caplog.text


async def test_the_log_says_how_far_a_request_came(
    pace: Pace, assert_no_token: CheckNoToken, caplog: pytest.LogCaptureFixture
) -> None:
    """The record of a request without a reply has the failure in the status's place, and the laps that it made."""
    with Server() as server:
        server.always("POST", hang_up)
        await send(Exchange(request_to(server.url, "POST"), 10.0))
    (message,) = (record.getMessage() for record in caplog.records if record.name == "zamp_sdk")
    assert re.fullmatch(
        rf"POST {server.url}/actions: no reply from 127\.0\.0\.1:{server.port}: the peer closed the connection without "
        r"a reply, \d+ ms \(\d+ in line, \d+ looking up and connecting\)",
        message,
    )


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="free-threaded builds leave more to their collector"
)
async def test_requests_leave_nothing_to_the_garbage_collector(server: Server, pace: Pace) -> None:
    """What a request is made of goes when it is over; in cycles, that of many would take a third more memory."""

    def is_ours(thing: Any) -> bool:  # or else it may be the server's
        code = getattr(thing, "cr_code", None) or getattr(thing, "f_code", None)
        return str(getattr(thing, "__module__", "")).startswith("zamp_sdk") or "zamp_sdk" in getattr(
            code, "co_filename", ""
        )

    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        await asyncio.gather(*(execute(server.url) for _ in range(20)))
        gc.collect()
        left = [repr(thing) for thing in gc.garbage if is_ours(thing)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert len(left) < 20, left  # not a single object for each action
