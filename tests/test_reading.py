"""The reader of replies, bytes in and a reply out: where a reply ends, what is read, what is refused, and the work."""

from __future__ import annotations

import ast
import contextlib
import gzip
import itertools
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable

import pytest

from zamp_sdk.transport import Reply, reading
from zamp_sdk.transport.failures import PeerError
from zamp_sdk.transport.reading import MAX_CHUNKS, MAX_HEAD, MAX_REPLY, ReplyReader

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = b'{"id": "action-1"}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


def read(data: bytes) -> tuple[Reply, ReplyReader]:
    """Read a reply that is here in one piece, and nothing behind it."""
    reader = ReplyReader("POST")
    incoming = bytearray(data)
    reply = reader.proceed(incoming)
    assert reply is not None
    assert not incoming
    return reply, reader


def feed(reader: ReplyReader, pieces: Iterable[bytes], taken: list[bytes] | None = None) -> None:
    """Have these pieces read, none of which makes a reply; note which of them were."""
    incoming = bytearray()
    for piece in pieces:
        incoming += piece
        if taken is not None:
            taken.append(piece)
        assert reader.proceed(incoming) is None


def body_of(data: bytes) -> bytes:
    return read(data)[0].body


def framed(body: bytes, headers: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status, len(body), headers, body)


def in_chunks(body: bytes, size: int = 1) -> bytes:
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    return CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


# --- where a reply ends -----------------------------------------------------------------------------------------------

FRAMINGS: dict[str, tuple[bytes, bytes, bool]] = {  # the reply, its body, and whether the connection may be kept
    "length": (OK + LENGTH + b"\r\n" + BODY, BODY, True),
    "length 0": (OK + b"Content-Length: 0\r\n\r\n", b"", True),
    "length with zeros before it": (OK + b"Content-Length: 0000002\r\n\r\n{}", b"{}", True),
    "HTTP 201": (framed(BODY, status=b"201 Created"), BODY, True),
    "HTTP 500": (framed(BODY, status=b"500 No"), BODY, True),
    "chunks": (in_chunks(BODY), BODY, True),
    "one chunk": (in_chunks(BODY, 100), BODY, True),
    "no chunk": (in_chunks(b""), b"", True),
    "sizes of chunks in capitals, with zeros and blanks": (
        CHUNKED + b"0A\r\n0123456789\r\n00000002 \t\r\n{}\r\n000\r\n\r\n",
        b"0123456789{}",
        True,
    ),
    "extensions and trailers": (
        CHUNKED + b'5;a=b\r\n{"id"\r\n5 ; c="d"\r\n:\r\n\r\n\r\n0;last\r\nA: b\r\n folded\r\nno header\r\n\r\n',
        b'{"id":\r\n\r\n',
        True,
    ),
    "no body: 204": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "no body: 304, which may tell a length": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", b"", True),
    "an informational reply before it": (b"HTTP/1.1 100 Continue\r\n\r\n" + framed(BODY), BODY, True),
    "several of them": (
        b"HTTP/1.1 100 Continue\r\n\r\n"
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 7\r\n\r\n"
        + b"HTTP/1.1 199\r\n\r\n" * 20
        + framed(BODY),
        BODY,
        True,
    ),
    "HTTP/1.0 with a length": (b"HTTP/1.0 200 OK\r\n" + LENGTH + b"\r\n" + BODY, BODY, False),
    "HTTP/1.0 that goes on": (
        b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n" + LENGTH + b"\r\n" + BODY,
        BODY,
        True,
    ),
    "HTTP/1.2": (b"HTTP/1.2 200 OK\r\n" + LENGTH + b"\r\n" + BODY, BODY, True),
    "Connection: close": (framed(BODY, b"Connection: close\r\n"), BODY, False),
    "Connection: close among others": (
        framed(BODY, b"Connection: keep-alive\r\nConnection: x, Close\r\n"),
        BODY,
        False,
    ),
    "a connection of another name": (framed(BODY, b"Connection: disclose\r\n"), BODY, True),
    "a switch of protocols": (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"",
        False,
    ),
    "chunks and a length": (in_chunks(BODY).replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n", 1), BODY, False),
    "chunks in HTTP/1.0": (
        in_chunks(BODY).replace(b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK\r\nConnection: keep-alive", 1),
        BODY,
        False,
    ),
    "Transfer-Encoding: identity": (framed(BODY, b"Transfer-Encoding: identity\r\n"), BODY, True),
}


@pytest.mark.parametrize(("data", "body", "is_kept"), FRAMINGS.values(), ids=FRAMINGS)
def test_a_reply_is_read_however_it_is_framed(data: bytes, body: bytes, is_kept: bool) -> None:
    """Each way of HTTP/1.x to frame a reply is understood, and decides whether the connection may be kept."""
    reply, reader = read(data)
    assert reply.body == body
    assert reader.may_keep_connection is is_kept


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("headers", [b"", b"Connection: keep-alive\r\n", b"Transfer-Encoding: identity\r\n"])
def test_a_body_without_length_ends_with_the_connection(version: bytes, headers: bytes) -> None:
    """What says nothing about its length is whole when the connection ends, which then serves nobody else."""
    reader = ReplyReader("GET")
    incoming = bytearray(b"HTTP/%s 200 OK\r\n%s\r\n%s" % (version, headers, BODY[:5]))
    assert reader.proceed(incoming) is None
    incoming += BODY[5:]
    assert reader.proceed(incoming) is None
    reply = reader.proceed(incoming, has_ended=True)
    assert reply is not None
    assert reply.body == BODY
    assert not reader.may_keep_connection


@pytest.mark.parametrize(("data", "body", "is_kept"), FRAMINGS.values(), ids=FRAMINGS)
def test_what_is_behind_a_reply_stays_where_it_was(data: bytes, body: bytes, is_kept: bool) -> None:
    """Not a byte of a second reply is taken, nor is one of it missing in the first."""
    for surplus in (b"\r\n", b"H", b"\0", framed(b"of another action")):
        incoming = bytearray(data + surplus)
        reply = ReplyReader("GET").proceed(incoming)
        assert reply is not None
        assert reply.body == body
        assert incoming == surplus


def test_a_tunnel_begins_behind_the_head() -> None:
    """The reply to CONNECT has no body, whatever its headers say, and neither has a refusal."""
    for status in (b"200 Connection established", b"407 Who?"):
        for headers in (b"", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: x\r\n"):
            incoming = bytearray(b"HTTP/1.0 %s\r\n%s\r\nhello" % (status, headers))
            reply = ReplyReader("CONNECT").proceed(incoming)
            assert reply is not None
            assert (reply.status_code, reply.body, bytes(incoming)) == (int(status[:3]), b"", b"hello")


REFUSED: dict[str, tuple[bytes, str]] = {  # what came, and what the error says
    "two lengths": (OK + b"Content-Length: 58\r\nContent-Length: 59\r\n\r\n{}", "Content-Length is 58, 59"),
    "two lengths in a line": (OK + b"Content-Length: 58, 59\r\n\r\n{}", "Content-Length is 58, 59"),
    "a length written in two ways": (OK + b"Content-Length: 2, 02\r\n\r\n{}", "Content-Length is 2, 02"),
    "a negative length": (OK + b"Content-Length: -1\r\n\r\n{}", "Content-Length is -1"),
    "a positive length": (OK + b"Content-Length: +2\r\n\r\n{}", r"Content-Length is \+2"),
    "a length in words": (OK + b"Content-Length: two\r\n\r\n{}", "Content-Length is two"),
    "a length in two pieces": (OK + b"Content-Length: 5\r\n 8\r\n\r\n{}", "Content-Length is 5 8"),
    "a length in other digits": (OK + b"Content-Length: \xb2\r\n\r\n{}", "Content-Length is \xb2"),
    "a length in hexadecimal": (OK + b"Content-Length: 0x2\r\n\r\n{}", "Content-Length is 0x2"),
    "a length with an underscore": (OK + b"Content-Length: 5_8\r\n\r\n{}", "Content-Length is 5_8"),
    "an empty length": (OK + b"Content-Length:\r\n\r\n{}", "Content-Length is $"),
    "a length of 5,000 digits": (OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", "Content-Length is 9{100}$"),
    "compressed transfer": (
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}",
        "transfer coding .*: gzip, chunked",
    ),
    "unknown transfer": (OK + b"Transfer-Encoding: cow\r\nContent-Length: 2\r\n\r\n{}", "transfer coding .*: cow"),
    "vertical blank": (OK + b"Transfer-Encoding: chunked\x0b\r\n\r\n0\r\n\r\n", "transfer coding .*: chunked"),
    "no-break space": (OK + b"Transfer-Encoding: chunked\xa0\r\n\r\n0\r\n\r\n", "transfer coding .*: chunked"),
    "chunk of negative size": (CHUNKED + b'-1\r\n{"id": "another"}\r\n0\r\n\r\n', "size of a chunk .*: -1"),
    "chunk of huge negative size": (CHUNKED + b"-7fffffffffffffff\r\n", "size of a chunk .*: -7fff"),
    "chunk of positive size": (CHUNKED + b"+1\r\n", r"size of a chunk .*: \+1"),
    "chunk size with a prefix": (CHUNKED + b"0x1\r\n", "size of a chunk .*: 0x1"),
    "chunk size with an underscore": (CHUNKED + b"1_0\r\n", "size of a chunk .*: 1_0"),
    "chunk size in words": (CHUNKED + b"xyz\r\n{}\r\n0\r\n\r\n", "size of a chunk .*: xyz"),
    "chunk size with a blank before it": (CHUNKED + b" 1\r\n", "size of a chunk .*: 1"),
    "chunk without size": (CHUNKED + b"\r\n{}", "size of a chunk .*: $"),
    "chunk with words behind its size": (CHUNKED + b"1 x\r\n", "size of a chunk .*: 1 x"),
    "chunk size of 17 digits": (CHUNKED + b"0" * 16 + b"1\r\n", "size of a chunk .*: 0000"),
    "chunk longer than its size": (CHUNKED + b"1\r\n{}\r\n0\r\n\r\n", "a chunk is longer than its size"),
    "chunk that ends in a blank": (CHUNKED + b"2\r\n{} \r\n0\r\n\r\n", "a chunk is longer than its size"),
    "chunk that ends in CR alone": (CHUNKED + b"2\r\n{}\r0\r\n\r\n", "a chunk is longer than its size"),
    "HTTP/0.9": (b"<h1>It works!</h1>", "no HTTP: <h1>It works!"),
    "another protocol": (b"SSH-2.0-x\r\n" + b"-" * 500, "no HTTP: SSH-2.0-x$"),
    "another protocol without lines": (b"x" * 5000, "no HTTP: x{100}$"),
    "another protocol's first byte": (b"S", "no HTTP: S$"),
    "a blank line first": (b"\r\n" + framed(BODY), "no HTTP: $"),
    "no HTTP after an informational reply": (b"HTTP/1.1 100 Continue\r\n\r\nContent-Type: x\r\n", "no HTTP: Content-T"),
    "HTTP/2": (b"HTTP/2 200 OK\r\n" + LENGTH + b"\r\n" + BODY, "status line .*: HTTP/2 200 OK$"),
    "no status": (b"HTTP/1.1\r\n\r\n", "status line .*: HTTP/1.1$"),
    "status in words": (b"HTTP/1.1 OK\r\n\r\n", "status line .*: HTTP/1.1 OK$"),
    "status of two digits": (b"HTTP/1.1 99 No\r\n\r\n", "status line .*: HTTP/1.1 99"),
    "status of four digits": (b"HTTP/1.1 2000 OK\r\n\r\n", "status line .*: HTTP/1.1 2000"),
    "status that begins with 0": (b"HTTP/1.1 020 OK\r\n\r\n", "status line .*: HTTP/1.1 020"),
    "negative status": (b"HTTP/1.1 -200 OK\r\n\r\n", "status line .*: HTTP/1.1 -200"),
}


@pytest.mark.parametrize(("data", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_reply_is_told_at_once(data: bytes, says: str) -> None:
    """Where a reply ends in two places, or is none, nobody waits for more of it; whoever asks again gets nothing."""
    reader = ReplyReader("POST")
    incoming = bytearray(data)
    with pytest.raises(PeerError, match=says) as caught:
        reader.proceed(incoming)
    assert caught.value.may_retry
    assert len(str(caught.value)) < 200
    assert reader.proceed(incoming, has_ended=True, is_last=True) is None
    assert not reader.may_keep_connection


# --- headers ----------------------------------------------------------------------------------------------------------


def test_headers_are_read_however_they_are_written() -> None:
    """Names in any case, white space around values, folded, repeated, empty values, and bytes beyond ASCII are read."""
    reply, reader = read(
        b"HTTP/1.1  418\tI am:  a teapot \r\nCONTENT-length:2\r\nX-Folded: a\r\n\t b \n  c\r\nX-Bare:c\nX-Empty:\r\n"
        b"X-Latin: \xe9\r\nX-Colons: a:b: c\r\nX-Blanks: \t a \t b\t\r\nX-Twice: 1\r\nX-Twice: 2\r\n"
        b"x!#$%&'*+.^_`|~9: y\r\n\r\n{}"
    )
    assert reply == Reply(
        418,
        {
            "content-length": "2",
            "x-folded": "a b c",
            "x-bare": "c",
            "x-empty": "",
            "x-latin": "\xe9",
            "x-colons": "a:b: c",
            "x-blanks": "a b",
            "x-twice": "2",
            "x!#$%&'*+.^_`|~9": "y",
        },
        b"{}",
    )
    assert reader.head == (418, "I am:  a teapot", 11, reply.headers)


SKIPPED = {
    "no colon": b"no colon\r\n",
    "no name": b": value\r\n",
    "a blank in the name": b"a b: c\r\n",
    "a blank before the name, at the beginning": b" a: b\r\n",
    "NUL in the name": b"a\0: b\r\n",
    "CR in the name": b"a\rb: c\r\n",
    "a name beyond ASCII": b"na\xefve: b\r\n",
    "brackets": b"<a>: b\r\n",
    "CR alone": b"\r\r\n",
    "folded under one that is none": b"no colon\r\n folded: x\r\n\tContent-Length: 99\r\n",
    "an mbox's first line": b"From nobody Sat Nov 28 12:00:00 2026\r\n",
}


@pytest.mark.parametrize("line", SKIPPED.values(), ids=SKIPPED)
def test_a_line_that_is_no_header_is_skipped_alone(line: bytes) -> None:
    """A bad header line takes no other one with it: the length behind it counts."""
    reply, reader = read(OK + line + b"A: b\r\n" + LENGTH + b"\r\n" + BODY)
    assert reply == Reply(200, {"a": "b", "content-length": str(len(BODY))}, BODY)
    assert reader.may_keep_connection


PLAIN_ENOUGH = {
    "a blank before the colon": framed(BODY, b"X-FRAME-OPTIONS : SAMEORIGIN\r\n"),
    "a blank before the length's colon": OK + LENGTH.replace(b":", b" \t:") + b"\r\n" + BODY,
    "the same length twice in a line": OK + b"Content-Length: 18, 18\r\n\r\n" + BODY,
    "the same length in two lines": OK + LENGTH + LENGTH + b"\r\n" + BODY,
    "the same length in three ways": OK + b"content-length: 18\r\n" + LENGTH + b"CONTENT-LENGTH:18,18\r\n\r\n" + BODY,
    "NUL around the length": OK + b"Content-Length: \x0018\0\r\n\r\n" + BODY,
    "a blank behind chunked": in_chunks(BODY).replace(b"chunked", b"chunked "),
    "blanks around chunked": in_chunks(BODY).replace(b" chunked", b"\t  chunked\t "),
    "chunked in capitals": in_chunks(BODY).replace(b"chunked", b"Chunked"),
    "chunked, folded": in_chunks(BODY).replace(b"chunked", b"\r\n chunked"),
    "chunked twice": in_chunks(BODY).replace(b"chunked", b"chunked\r\nTransfer-Encoding: chunked"),
    "chunked and nothing": in_chunks(BODY).replace(b"chunked", b"chunked,"),
    "a blank before chunked's colon": in_chunks(BODY).replace(b"Encoding:", b"Encoding :"),
    "bare line feeds": framed(BODY, b"X: y\r\n").replace(b"\r", b""),
    "bare line feeds in chunks": in_chunks(BODY, 3).replace(b"\r", b""),
    "mixed line ends": framed(BODY, b"X: y\n").replace(b"OK\r", b"OK"),
    "no reason": framed(BODY, status=b"200"),
    "a blank for a reason": framed(BODY, status=b"200 "),
    "a reason of odd bytes": framed(BODY, status=b"200 \xff\0\x1b[31m"),
    "1,000 headers": framed(BODY, b"X: y\r\n" * 1000),
    "a header of 70,000 bytes": framed(BODY, b"X: " + b"y" * 70_000 + b"\r\n"),
    "a parameter of NULs": framed(BODY, b"Content-Type: multipart/mixed; boundary*0*=\0'\0'x\r\n"),
    "a parameter's number of 5,000 digits": framed(
        BODY, b"Content-Type: multipart/mixed; boundary*" + b"9" * 5000 + b"=x\r\n"
    ),
    "multipart without boundary": framed(BODY, b"Content-Type: multipart/mixed\r\n"),
    "a message in a message": framed(BODY, b"Content-Type: message/rfc822\r\nContent-Transfer-Encoding: base64\r\n"),
}


@pytest.mark.parametrize("data", PLAIN_ENOUGH.values(), ids=PLAIN_ENOUGH)
def test_what_is_plain_is_read(data: bytes) -> None:
    """What breaks a rule without being ambiguous is read at once."""
    reply, _ = read(data)
    assert (reply.status_code, reply.body) == (200, BODY)


def test_a_head_is_there_before_its_body() -> None:
    """Status, reason, version and headers can be looked at while the body is on its way; their reprs show nothing."""
    reader = ReplyReader("GET")
    incoming = bytearray(b"HTTP/1.0 200 Fine\r\nX-Secret: hunter2\r\n")
    assert reader.proceed(incoming) is None
    assert reader.head is None
    incoming += b"\r\nhunter2"
    assert reader.proceed(incoming) is None
    assert reader.head == (200, "Fine", 10, {"x-secret": "hunter2"})
    reply = reader.proceed(incoming, has_ended=True)
    assert repr(reader.head) == "<Head 200 with 1 headers>"
    assert repr(reply) == "<Reply 200 of 7 bytes>"


# --- replies that come in pieces, in part, or not at all --------------------------------------------------------------

WHOLE = {
    **{name: data for name, (data, _, _) in FRAMINGS.items()},
    **{name: data for name, data in PLAIN_ENOUGH.items() if len(data) < 2000},
    "gzip": framed(gzip.compress(BODY), b"Content-Encoding: gzip\r\n"),
    "gzip in chunks": in_chunks(gzip.compress(BODY), 7).replace(b"OK", b"OK\r\nContent-Encoding: gzip", 1),
    "chunks that look like ends": in_chunks(b"\n0\r\n\r\n0\n\nHTTP/1.1 200 OK\r\n\r\n", 3),
}


def outcome(pieces: list[bytes], *, has_ended: bool = False) -> Any:
    """Read what comes in pieces, and return all there is to know of it; each but the last must be too little."""
    reader = ReplyReader("POST")
    incoming = bytearray()
    for piece in pieces[:-1]:
        incoming += piece
        assert reader.proceed(incoming) is None
        assert not reader.may_keep_connection
    incoming += pieces[-1]
    reply = reader.proceed(incoming, has_ended=has_ended)
    assert reply is not None
    assert not incoming
    return reply, reader.head, reader.may_keep_connection


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_a_reply_may_be_cut_anywhere(data: bytes) -> None:
    """Whichever byte a reply is cut at, and if it comes byte by byte, it is read as if it had come in one piece."""
    whole = outcome([data])
    for cut in range(1, len(data)):
        assert outcome([data[:cut], data[cut:]]) == whole
    assert outcome([bytes([byte]) for byte in data]) == whole


@pytest.mark.parametrize(
    "data", [OK + b"\r\n" + BODY, b"HTTP/1.0 500 No\n\n\n\n", OK + b"\r\n"], ids=["body", "line feeds", "empty"]
)
def test_a_reply_without_length_may_be_cut_anywhere(data: bytes) -> None:
    """What ends with the connection is the same in pieces, and the end may come with the last of them or alone."""
    whole = outcome([data], has_ended=True)
    assert outcome([data, b""], has_ended=True) == whole
    assert outcome([bytes([byte]) for byte in data], has_ended=True) == whole


ENDED_EARLY = {
    "nothing": (b"", "closed the connection without a reply"),
    "the first byte": (b"H", "closed the connection without a reply"),
    "an informational reply": (b"HTTP/1.1 100 Continue\r\n\r\n", "closed the connection without a reply"),
    "status line": (b"HTTP/1.1 20", "closed the connection within the head of its reply"),
    "status line, whole": (OK, "within the head"),
    "header": (OK + b"Content-Le", "within the head"),
    "headers": (OK + LENGTH + b"\r", "within the head"),
    "body": (framed(BODY)[:-3], "closed the connection after 15 of 18 bytes of its body"),
    "no body": (OK + b"Content-Length: 67108864\r\n\r\n", "after 0 of 67,108,864 bytes of its body"),
    "no chunk": (CHUNKED, "before the last chunk of its reply"),
    "chunk size": (CHUNKED + b"2", "before the last chunk of its reply"),
    "chunk": (CHUNKED + b'20\r\n{"id": ', "after 7 of 32 bytes of a chunk of its reply"),
    "end of a chunk": (CHUNKED + b"2\r\n{}\r", "before the last chunk of its reply"),
    "last chunk": (CHUNKED + b"2\r\n{}\r\n", "before the last chunk of its reply"),
}


@pytest.mark.parametrize(("data", "says"), ENDED_EARLY.values(), ids=ENDED_EARLY)
def test_a_reply_that_ends_early_is_none(data: bytes, says: str) -> None:
    """The error says how far a reply came whose connection has ended; at the deadline there is no reply either."""
    reader = ReplyReader("GET")
    incoming = bytearray(data)
    assert reader.proceed(incoming, is_last=True) is None
    with pytest.raises(PeerError, match=says):
        reader.proceed(incoming, has_ended=True)


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_no_part_of_a_reply_is_taken_for_the_whole(data: bytes) -> None:
    """Where a successful reply breaks off before its body is whole, there is no reply; no connection is kept."""
    whole = outcome([data])[0]
    for cut in range(len(data)):
        for ending in ({"has_ended": True}, {"is_last": True}):
            reader = ReplyReader("GET")
            reply = None
            expected = [PeerError] if "has_ended" in ending else []
            with contextlib.suppress(*expected):
                reply = reader.proceed(bytearray(data[:cut]), **ending)
            assert reply is None or reply.status_code == whole.status_code
            assert reply is None or reply.status_code >= 300 or reply.body == whole.body
            assert not reader.may_keep_connection


@pytest.mark.parametrize("ending", [{"has_ended": True}, {"is_last": True}], ids=["end", "deadline"])
@pytest.mark.parametrize("rest", [b"", b"\r", b"A: b", b"A: b\r\n"])
def test_a_body_is_whole_before_its_trailer_is(rest: bytes, ending: dict[str, bool]) -> None:
    """Behind the last chunk only a trailer can be missing, which nobody needs; but the connection is not kept."""
    reader = ReplyReader("GET")
    reply = reader.proceed(bytearray(CHUNKED + b"2\r\n{}\r\n0\r\n" + rest), **ending)
    assert reply is not None
    assert (reply.status_code, reply.body) == (200, b"{}")
    assert not reader.may_keep_connection


@pytest.mark.parametrize("status", [b"300 Choose", b"422 No", b"503 Later"])
@pytest.mark.parametrize("ending", [{"has_ended": True}, {"is_last": True}], ids=["end", "deadline"])
@pytest.mark.parametrize(
    ("headers", "body", "counts"),
    [
        (b"Content-Length: 99\r\n", b"because", b"because"),
        (b"Content-Length: 99\r\n", b"", b""),
        (b"Transfer-Encoding: chunked\r\n", b"3\r\nbec\r\n8\r\nause", b"because"),
        (b"Transfer-Encoding: chunked\r\n", b"7\r\nbecause\r\n0\r\nA: b", b"because"),
        (b"Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n", b"1\r\n\x1f\r\n", b"\x1f"),
        (b"", b"because", b"because"),
    ],
)
def test_an_unsuccessful_reply_counts_as_far_as_it_came(
    status: bytes, ending: dict[str, bool], headers: bytes, body: bytes, counts: bytes
) -> None:
    """At the deadline, or where the peer has hung up, a refusal is one with what there is of its reason."""
    reader = ReplyReader("POST")
    incoming = bytearray(b"HTTP/1.1 %s\r\n%s\r\n%s" % (status, headers, body))
    assert reader.proceed(incoming) is None
    reply = reader.proceed(incoming, **ending)
    assert reply is not None
    assert (reply.status_code, reply.body) == (int(status[:3]), counts)
    assert not reader.may_keep_connection


@pytest.mark.parametrize(
    ("rest", "body"),
    [
        (b"Content-Length: 1, 2\r\n\r\nx", b""),
        (b"Transfer-Encoding: gzip\r\n\r\nx", b""),
        (b"Content-Length: 99999999999\r\n\r\nx", b""),
        (b"Transfer-Encoding: chunked\r\n\r\n3\r\nbec\r\n-1\r\n", b"bec"),
        (b"Transfer-Encoding: chunked\r\n\r\n3\r\nbecause\r\n", b"bec"),
        (b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * (MAX_CHUNKS + 1), b"x" * MAX_CHUNKS),
    ],
)
def test_an_unsuccessful_reply_counts_until_its_body_breaks(rest: bytes, body: bytes) -> None:
    """A refusal whose body cannot be read is one all the same, at once, and its connection is not kept."""
    reader = ReplyReader("POST")
    reply = reader.proceed(bytearray(b"HTTP/1.1 422 No\r\n" + rest))
    assert reply is not None
    assert (reply.status_code, reply.body) == (422, body)
    assert not reader.may_keep_connection


# --- limits -----------------------------------------------------------------------------------------------------------

ENDLESS = {
    "folded lines": (OK + b"X: a\r\n", b" folded\r\n"),
    "long folded lines": (OK + b"X: a\r\n", b" " + b"x" * 60_000 + b"\r\n"),
    "headers": (OK, b"X: a\r\n"),
    "short lines": (OK, b"x\n"),
    "one header": (OK + b"X: ", b"x" * 1000),
    "a status line": (b"HTTP/1.1 ", b"2" * 1000),
    "informational replies": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"X: a\r\n"),
}


@pytest.mark.parametrize(("begin", "again"), ENDLESS.values(), ids=ENDLESS)
def test_headers_that_never_end_are_given_up(begin: bytes, again: bytes) -> None:
    """However a peer writes headers for ever, no more than 256 KiB of them are taken."""
    taken: list[bytes] = []
    with pytest.raises(PeerError, match="headers of over 256 KiB"):
        feed(ReplyReader("GET"), itertools.chain([begin], itertools.repeat(again, 2 * MAX_HEAD)), taken)
    assert sum(map(len, taken)) <= len(begin) + MAX_HEAD + len(again)


@pytest.mark.parametrize("surplus", [0, 1])
def test_a_head_counts_to_the_byte(surplus: int) -> None:
    """A head of 256 KiB is read, informational replies before it included, and one that is longer by a byte is not."""
    begin = b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 0\r\nX: "
    data = begin + b"x" * (MAX_HEAD - len(begin) - 4 + surplus) + b"\r\n\r\n"
    reader = ReplyReader("GET")
    if surplus:
        with pytest.raises(PeerError, match="headers of over 256 KiB"):
            reader.proceed(bytearray(data))
    else:
        assert reader.proceed(bytearray(data)) is not None


@pytest.mark.parametrize("step", [7, 1 << 20], ids=["in pieces", "whole"])
def test_chunks_are_counted(step: int) -> None:
    """65,536 chunks are read, and one more is too many: asking again would bring as many."""
    chunk = b"1\r\nx\r\n"
    assert body_of(CHUNKED + chunk * MAX_CHUNKS + b"0\r\n\r\n") == b"x" * MAX_CHUNKS
    reader = ReplyReader("GET")
    data = CHUNKED + chunk * (MAX_CHUNKS + 1)
    with pytest.raises(PeerError, match="over 65,536 chunks") as caught:
        feed(reader, (data[start : start + step] for start in range(0, len(data), step)))
    assert not caught.value.may_retry


def test_the_line_before_a_chunk_is_bounded() -> None:
    """Extensions are skipped while they are short, and end the reply when they go on and on."""
    assert body_of(CHUNKED + b"1;" + b"x" * 4000 + b"\r\n7\r\n0\r\n\r\n") == b"7"
    with pytest.raises(PeerError, match="size of a chunk cannot be read: 1;x"):
        ReplyReader("GET").proceed(bytearray(CHUNKED + b"1;" + b"x" * 5000))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(OK + b"Content-Length: %d\r\n\r\n" % (MAX_REPLY + 1), id="length"),
        pytest.param(OK + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n", id="length of 40 digits"),
        pytest.param(CHUNKED + b"%x\r\n" % (MAX_REPLY + 1), id="chunk"),
        pytest.param(CHUNKED + b"f" * 16 + b"\r\n", id="chunk of 16 digits"),
        pytest.param(CHUNKED + b"2\r\n{}\r\n%x\r\n" % (MAX_REPLY - 1), id="second chunk"),
    ],
)
def test_a_body_that_is_too_large_is_told_from_its_size(data: bytes) -> None:
    """A reply that says it will be over 64 MiB is not waited for, and not asked for again."""
    with pytest.raises(PeerError, match="the reply is over 64 MiB") as caught:
        ReplyReader("GET").proceed(bytearray(data))
    assert not caught.value.may_retry


def test_a_body_without_length_is_bounded() -> None:
    """A body that goes on until the connection ends is given up when it is over 64 MiB."""
    reader = ReplyReader("GET")
    incoming = bytearray(OK + b"\r\n")
    mebibyte = bytes(1 << 20)
    for _ in range(64):
        incoming += mebibyte
        assert reader.proceed(incoming) is None
    incoming += b"x"
    with pytest.raises(PeerError, match="the reply is over 64 MiB") as caught:
        reader.proceed(incoming)
    assert not caught.value.may_retry


def test_a_body_of_64_mib_is_read() -> None:
    """As many bytes as the limit allows are read, by length, in chunks of 1 KiB, and compressed."""
    body = bytes(MAX_REPLY)
    compressed = gzip.compress(body, 1)
    assert body_of(framed(body)) == body
    assert body_of(in_chunks(body, 1024)) == body
    assert body_of(framed(compressed, b"Content-Encoding: gzip\r\n")) == body


# --- content codings --------------------------------------------------------------------------------------------------


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def members(data: bytes) -> bytes:
    """Compress each byte on its own."""
    return b"".join(gzip.compress(bytes([byte])) for byte in data)


def coded(body: bytes, coding: bytes, status: bytes = b"200 OK") -> bytes:
    return framed(body, b"Content-Encoding: %s\r\n" % coding, status)


@pytest.mark.parametrize(
    ("coding", "compress"),
    [
        (b"gzip", gzip.compress),
        (b"GZIP", gzip.compress),
        (b"x-gzip", gzip.compress),
        (b" gzip , identity", gzip.compress),
        (b"gzip\r\nContent-Encoding: gzip", gzip.compress),
        (b"gzip", members),
        (b"gzip", lambda data: gzip.compress(data[:5]) + gzip.compress(b"") + gzip.compress(data[5:])),
        (b"gzip", lambda data: gzip.compress(data) + bytes(512)),
        (b"deflate", zlib.compress),
        (b"Deflate", raw_deflate),
        (b"identity", bytes),
        (b"", bytes),
        (b"utf-8", bytes),
        (b"none", bytes),
    ],
)
def test_a_compressed_reply_is_read(coding: bytes, compress: Callable[[bytes], bytes]) -> None:
    """Gateways compress what nobody asked them to compress, in one member or in several; the connection is kept."""
    reply, reader = read(coded(compress(BODY), coding))
    assert reply.body == BODY
    assert reader.may_keep_connection


def test_no_body_is_not_compressed() -> None:
    """A coding says nothing where there is no body."""
    for coding in (b"gzip", b"br"):
        assert body_of(coded(b"", coding)) == b""


_ZIPPED = gzip.compress(BODY)
BROKEN = {
    "cut short": (b"gzip", _ZIPPED[:-9], "broken gzip"),
    "cut in the checksum": (b"gzip", _ZIPPED[:-1], "broken gzip"),
    "wrong checksum": (b"gzip", _ZIPPED[:-8] + bytes(8), "broken gzip"),
    "not compressed": (b"gzip", BODY, "broken gzip"),
    "second member cut short": (b"gzip", _ZIPPED + _ZIPPED[:-1], "broken gzip"),
    "second member broken": (b"x-gzip", _ZIPPED + _ZIPPED[:2] + BODY, "broken x-gzip"),
    "garbage": (b"deflate", b"\xff" * 20, "broken deflate"),
    "brotli": (b"br", b"\x8b\x08\x80" + BODY + b"\x03", "content coding that nobody asked for: br$"),
    "zstd": (b"zstd", b"\x28\xb5\x2f\xfd\x20\x12", "content coding that nobody asked for: zstd$"),
    "two": (b"deflate, gzip", gzip.compress(zlib.compress(BODY))[:-1], "broken deflate, gzip"),
    "two, of which one is known": (b"gzip, br", _ZIPPED, "content coding that nobody asked for: gzip, br$"),
    "as it was written": (b"Sk_Live", BODY, "content coding that nobody asked for: Sk_Live$"),
    "unknown": (b"x" * 5000, BODY, "content coding that nobody asked for: x{100}$"),
}


@pytest.mark.parametrize(("coding", "body", "says"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_decompressed_is_named(coding: bytes, body: bytes, says: str) -> None:
    """A coding that is broken, or that nobody asked for, is named; but a refusal counts with its body as it came."""
    broken = ReplyReader("GET")
    with pytest.raises(PeerError, match=says) as caught:
        broken.proceed(bytearray(coded(body, coding)))
    assert caught.value.may_retry
    assert not broken.may_keep_connection
    refusal, reader = read(coded(body, coding, b"422 No"))
    assert (refusal.status_code, refusal.body) == (422, body)
    assert reader.may_keep_connection


def test_a_compressed_refusal_is_read() -> None:
    """The reason in a compressed error is decompressed."""
    assert read(coded(gzip.compress(b"because"), b"gzip", b"422 No"))[0].body == b"because"


@pytest.mark.parametrize("count", [1, 65])
def test_a_small_reply_does_not_grow_without_limit(count: int) -> None:
    """The limit of 64 MiB holds for what is decompressed, too: of one member, and of all together."""
    compressor = zlib.compressobj(1, wbits=zlib.MAX_WBITS + 16)
    mebibyte = b" " * (1 << 20)
    bomb = b"".join([*(compressor.compress(mebibyte) for _ in range(65 // count)), compressor.flush()]) * count
    assert len(bomb) < 1 << 20
    with pytest.raises(PeerError, match="over 64 MiB") as caught:
        ReplyReader("GET").proceed(bytearray(coded(bomb, b"gzip")))
    assert not caught.value.may_retry


# --- work -------------------------------------------------------------------------------------------------------------


class Counted(bytearray):
    """Bytes that count how many of them are searched and copied; what is deleted must be at the beginning."""

    work = 0

    def find(self, sub: Any, start: Any = 0, end: Any = None) -> int:
        found = super().find(sub, start, len(self) if end is None else end)
        self.work += (min(len(self), end) if found < 0 else found + 1) - start
        return found

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        self.work += len(part)
        return part

    def __delitem__(self, key: Any) -> None:
        assert key.start is None
        super().__delitem__(key)


MANY_PIECES = {
    "chunks of a newline": (in_chunks(b"\n" * 50_000), 20),
    "chunks of a newline, byte by byte": (in_chunks(b"\n" * 10_000), 1),
    "chunks that say 0": (in_chunks(b"\n0\r\n\r\n" * 10_000, 7), 20),
    "chunks of 1 KiB": (in_chunks(b"\n" * (1 << 22), 1024), 4000),
    "one large chunk": (in_chunks(b"\n" * (1 << 22), 1 << 22), 1000),
    "length": (framed(b"\n" * (1 << 22)), 1000),
    "a header, byte by byte": (framed(b"", b"X: " + b"x" * 100_000 + b"\r\n"), 1),
    "headers, byte by byte": (framed(b"", b"X: y\r\n" * 10_000), 1),
    "folded lines": (framed(b"", b"X: y\r\n" + b" z\n" * 50_000), 10),
    "informational replies": (b"HTTP/1.1 100\n\n" * 10_000 + framed(b""), 10),
    "trailers": (in_chunks(b"")[:-2] + b"X: y\r\n" * 10_000 + b"\r\n", 1),
    "an extension, byte by byte": (CHUNKED + b"1;" + b"x" * 4000 + b"\r\n7\r\n0\r\n\r\n", 1),
}


@pytest.mark.parametrize(("data", "step"), MANY_PIECES.values(), ids=MANY_PIECES)
def test_each_byte_is_looked_at_once(data: bytes, step: int) -> None:
    """Whatever a reply holds, and in however many pieces it comes, each byte is searched and copied a few times."""
    reader = ReplyReader("GET")
    incoming = Counted()
    reply = None
    for start in range(0, len(data), step):
        assert reply is None
        incoming += data[start : start + step]
        reply = reader.proceed(incoming)
    assert reply is not None
    assert incoming.work <= 3 * len(data)


def test_each_compressed_byte_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many members a compressed body has, zlib is given a bounded number of bytes for each."""
    given = []
    really_make = zlib.decompressobj

    def make(*args: Any) -> Any:
        decompressor = really_make(*args)

        class Decompressor:
            def __getattr__(self, name: str) -> Any:
                return getattr(decompressor, name)

            def decompress(self, data: bytes) -> bytes:
                given.append(len(data))
                return bytes(decompressor.decompress(data))

        return Decompressor()

    monkeypatch.setattr(zlib, "decompressobj", make)
    assert body_of(coded(members(BODY * 100), b"gzip")) == BODY * 100
    assert len(given) < 2 * 100 * len(BODY)
    assert max(given) <= 4096


def test_the_reader_is_pure() -> None:
    """The reader imports nothing that could wait, or know the time."""
    tree = ast.parse(Path(reading.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    taken_from = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"re", "zlib"}
    assert taken_from == {"__future__", "failures", "messages", "typing"}
