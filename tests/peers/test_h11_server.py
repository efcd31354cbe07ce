"""Against servers that bend HTTP, as h11 writes it, and servers that break it, as nobody should.

What RFC 9112 allows must be read; what it forbids must never become a result, run an action twice, or leave bytes
behind that the next request on the connection takes for its reply.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from typing import Any

import h11
import pytest

from tests.conftest import Pace
from tests.servers import ACTION_ID, RESULT, TOKEN, Act, Server, Wire, completed, started
from zamp_sdk import ActionExecutor, HttpClientError

STARTED = json.dumps({"id": ACTION_ID}).encode()
COMPLETED = json.dumps({"status": "COMPLETED", "result": RESULT}).encode()
WRONG = json.dumps({"id": "wrong", "status": "COMPLETED", "result": "wrong"}).encode()
JSON = ("Content-Type", "application/json")


@pytest.fixture
def platform() -> Iterator[Server]:
    """A platform that follows a script."""
    with Server() as server:
        yield server


async def execute(platform: Server) -> Any:
    """Execute an action there."""
    return await ActionExecutor.execute("an_action", {}, base_url=platform.url, auth_token=TOKEN)


def body_of(wire: Wire) -> bytes:
    """Return the good answer to a request."""
    assert wire.request is not None
    return STARTED if wire.request.method == "POST" else COMPLETED


def h11_reply(*events: Any, http_version: bytes = b"1.1", piece: int = 0, pause: float = 0.0) -> Act:
    """Send what h11 makes of these events, in pieces if wanted; ``...`` stands for the good body as one Data event."""

    def act(wire: Wire) -> bool:
        assert wire.request is not None
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(
            b"%s / HTTP/%s\r\nHost: a\r\n\r\n" % (wire.request.method.encode(), http_version),
        )
        while not isinstance(connection.next_event(), h11.EndOfMessage):
            pass
        data = b""
        for event in events:
            data += connection.send(h11.Data(data=body_of(wire)) if event is ... else event) or b""
        for start in range(0, len(data), piece or len(data)):
            wire.send(data[start : start + (piece or len(data))])
            time.sleep(pause)
        return connection.our_state is h11.DONE

    return act


def broken(head: bytes, body: bytes | None = None, *, keep: bool = False) -> Act:
    """Send these bytes; ``%d`` in the head is the length of the body, which is the good one if none is given."""

    def act(wire: Wire) -> bool:
        content = body_of(wire) if body is None else body
        wire.send(head.replace(b"%d", b"%d" % len(content)) + content)
        return keep

    return act


# --- what HTTP allows -------------------------------------------------------------------------------------------------

CHUNKED = [h11.Response(status_code=200, headers=[JSON, ("Transfer-Encoding", "chunked")]), ...]
TRAILERS = h11.EndOfMessage(headers=[("X-Checksum", "1"), ("Content-Length", "3")])
UNFRAMED = h11.Response(status_code=200, headers=[JSON])
CONTINUE = h11.InformationalResponse(status_code=100, headers=[])
MANY_HEADERS = [(f"X-Header-{number}", "v" * 600) for number in range(200)]

ALLOWED = {
    "chunks": h11_reply(*CHUNKED, h11.EndOfMessage()),
    "byte by byte": h11_reply(*CHUNKED, h11.EndOfMessage(), piece=1, pause=0.0005),
    "trailers": h11_reply(*CHUNKED, TRAILERS),
    "up to the end of the connection": h11_reply(UNFRAMED, ..., h11.EndOfMessage(), http_version=b"1.0"),
    "100 first": h11_reply(CONTINUE, CONTINUE, *CHUNKED, h11.EndOfMessage()),
    "201": h11_reply(
        h11.Response(status_code=201, headers=[("Transfer-Encoding", "chunked")]), ..., h11.EndOfMessage()
    ),
    "many headers": h11_reply(
        h11.Response(status_code=200, headers=[*MANY_HEADERS, ("Transfer-Encoding", "chunked")]),
        ...,
        h11.EndOfMessage(),
    ),
    "no reason phrase": broken(b"HTTP/1.1 200\r\nContent-Length: %d\r\n\r\n", keep=True),
    "other letters": broken(b"HTTP/1.1 200 OK\r\ncOnTeNt-LeNgTh:%d\r\n\r\n", keep=True),
    "Latin-1 in a header": broken(
        b"HTTP/1.1 200 Se\xf1or\r\nX-Name: Se\xf1or\r\nContent-Length: %d\r\n\r\n", keep=True
    ),
    "bare line feeds": broken(b"HTTP/1.1 200 OK\nContent-Length: %d\n\n", keep=True),
}


@pytest.mark.parametrize("act", [pytest.param(act, id=name) for name, act in ALLOWED.items()])
async def test_every_framing_is_read(platform: Server, act: Act) -> None:
    """A start and a poll framed like this are one request each, and the result is right, twice."""
    for method in ("POST", "GET"):
        platform.always(method, act)
    assert await execute(platform) == RESULT
    assert await execute(platform) == RESULT
    assert [request.method for request in platform.requests] == ["POST", "GET"] * 2


# --- what it forbids --------------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
FORBIDDEN = {
    "not HTTP": broken(b"SSH-2.0-OpenSSH_9.6\r\n", b""),
    "binary": broken(bytes(range(256)), b""),
    "HTTP/2": broken(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\x00" * 18, b""),
    "an endless status line": broken(b"HTTP/1.1 200 " + b"O" * 70_000, b""),
    "a status that is no number": broken(b"HTTP/1.1 2OO OK\r\nContent-Length: %d\r\n\r\n"),
    "status 99": broken(b"HTTP/1.1 99 Early\r\nContent-Length: %d\r\n\r\n"),
    "status 1000": broken(b"HTTP/1.1 1000 Late\r\nContent-Length: %d\r\n\r\n"),
    "an endless header": broken(OK + b"X: " + b"x" * 300_000 + b"\r\n\r\n"),
    "too many headers": broken(OK + b"X: y\r\n" * 50_000 + b"\r\n"),
    "half a head": broken(OK + b"Content-Le", b""),
    "half a body": broken(OK + b"Content-Length: 500\r\n\r\n"),
    "no chunk size": broken(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "half a chunk": broken(OK + b"Transfer-Encoding: chunked\r\n\r\nfff\r\n"),
    "no last chunk": broken(OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(WRONG), WRONG + b"\r\n"),
    "a chunk of minus one": broken(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n"),
    "compressed and cut short": broken(
        OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n", gzip.compress(WRONG)[:-9]
    ),
    "not UTF-8": broken(OK + b"Content-Length: %d\r\n\r\n", b'{"id": "\xff"}'),
    "two values": broken(OK + b"Content-Length: %d\r\n\r\n", WRONG + WRONG),
    "cut between two values": broken(OK + b"Content-Length: 10\r\n\r\n", WRONG),
    "nothing": broken(OK + b"Content-Length: 0\r\n\r\n", b""),
    "204 with a body": broken(b"HTTP/1.1 204 No Content\r\nContent-Length: %d\r\n\r\n", WRONG),
    "a switch of protocols": broken(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", b""),
}


@pytest.mark.parametrize("act", [pytest.param(act, id=name) for name, act in FORBIDDEN.items()])
async def test_a_broken_reply_to_a_start_leaves_it_in_doubt(platform: Server, act: Act) -> None:
    """The start is not sent again, and the error says that the action may have started."""
    platform.on("POST", act)
    with pytest.raises(HttpClientError) as caught:
        await execute(platform)
    assert caught.value.may_have_started
    assert platform.count("POST") == 1
    assert len(str(caught.value)) < 1_000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("act", [pytest.param(act, id=name) for name, act in FORBIDDEN.items()])
async def test_a_broken_reply_to_a_poll_is_asked_for_again(platform: Server, act: Act) -> None:
    """It is neither a result nor the end of the wait, and the next poll is answered on a clean connection."""
    platform.on("GET", act, act)
    assert await execute(platform) == RESULT
    assert platform.count("GET") == 3


@pytest.mark.parametrize("junk", [OK + b"Content-Length: %d\r\n\r\n%s" % (len(WRONG), WRONG), b"\r\n", b"junk"])
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_what_follows_a_reply_is_never_the_next_one(platform: Server, junk: bytes, method: str) -> None:
    """Bytes after a reply, a whole second reply even, are not read as the reply to the next request."""

    def too_much(wire: Wire) -> bool:
        good = body_of(wire)
        wire.send(OK + b"Content-Length: %d\r\n\r\n%s%s" % (len(good), good, junk))
        return True

    platform.on(method, too_much, too_much)
    for _ in range(3):
        assert await execute(platform) == RESULT
    assert platform.count("POST") == 3


async def test_a_second_reply_that_comes_late_is_never_the_next_one(platform: Server) -> None:
    """The same when it comes a moment after the first, while the connection is idle."""

    def late(wire: Wire) -> bool:
        completed(wire)
        time.sleep(0.05)
        wire.send(OK + b"Content-Length: %d\r\n\r\n%s" % (len(WRONG), WRONG))
        return True

    platform.on("GET", late)
    assert await execute(platform) == RESULT
    time.sleep(0.1)
    assert await execute(platform) == RESULT


@pytest.mark.parametrize("status", [102, 103, 199])
@pytest.mark.parametrize("pause", [0.0, 0.02])
async def test_an_informational_reply_is_not_the_final_one(platform: Server, status: int, pause: float) -> None:
    """Any 1xx but 101 may precede a reply, at once or long before (RFC 9110, 15.2), and costs nothing."""
    early = h11.InformationalResponse(status_code=status, headers=[("Link", "</style.css>; rel=preload")])

    def inform(wire: Wire) -> bool:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        connection.next_event()
        wire.send(connection.send(early) or b"")
        time.sleep(pause)
        return (started if body_of(wire) is STARTED else completed)(wire)

    for method in ("POST", "GET"):
        platform.always(method, inform)
    assert await execute(platform) == RESULT
    assert await execute(platform) == RESULT
    assert [request.method for request in platform.requests] == ["POST", "GET"] * 2


async def test_endless_informational_replies_end_by_the_deadline(platform: Server, quick: Pace) -> None:
    """A server that says 100 Continue for ever holds a request no longer than any other server can."""
    quick.hurry("POST", 1, 0.5)

    def endless(wire: Wire) -> bool:
        while not wire.server.stopping.wait(0.001):
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return False

    platform.on("POST", endless)
    began = time.monotonic()
    with pytest.raises(HttpClientError) as caught:
        await execute(platform)
    assert time.monotonic() - began < 5
    assert caught.value.may_have_started
    assert await execute(platform) == RESULT
