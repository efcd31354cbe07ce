"""40,000 random replies for the reader alone: however a reply is cut, it is what it is in one piece.

Replies are framed in all ways, with headers good and bad, and many of them have bytes changed. Each is read in one
piece; cut in two at random places, or at each; in many pieces; and byte by byte. What h11 reads, too, must be the same.
A seed makes the same replies again.

    python -m tests.peers.fuzz_reading [REPLIES [SEED]]

`make fuzz` runs it, too.
"""

from __future__ import annotations

import gzip
import random
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import h11

from zamp_sdk.transport import Reply
from zamp_sdk.transport.failures import PeerError
from zamp_sdk.transport.reading import ReplyReader

REPLIES = 40_000
CUTS = 6  # at random places, of each reply
EVERY_BYTE = 0.05  # of the replies are cut at each byte, and come byte by byte
LONGEST_BODY = 400

STATUSES = [*[b"200 OK"] * 12, b"200", b"204 No", b"101 Switch", b"304 Same", b"422 No", b"500 No", b"\xff", b"2000 OK"]
HEADERS = [
    *(b"Connection: close", b"Connection: keep-alive", b"Connection: x, Close", b"Content-Type: application/json"),
    *(b"X-Folded: a\r\n\t b", b"X-Blank : a", b"no colon", b" folded", b"a b: c", b"X-Nul: a\0b", b"X-Empty:"),
    *(b"Content-Length: 5", b"Content-Length: 5, 5", b"Content-Length: -1", b"content-length:00005"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked ", b"Transfer-Encoding: gzip, chunked"),
    *(b"Transfer-Encoding: identity", b"Content-Encoding: br", b"Content-Encoding: gzip", b"X-Long: " + b"x" * 200),
]
INTERLUDES = [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early\nLink: a\n\n", b"HTTP/1.1 199\r\nA: b\r\n\r\n"]
BITS = [b"", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b":", b";", b",", b"0", b"-", b"\0", b"\xff", b"\x1f\x8b"]


class Outcome(NamedTuple):
    """What became of a reply; its error without what it quotes, for that depends on how much had come."""

    reply: Reply | None
    error: str | None
    may_keep_connection: bool
    surplus: bytes


class Fuzzer:
    """Makes replies out of dice."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def body(self) -> bytes:
        """Return a body that looks in places like what frames it."""
        pieces = [self.dice.choice([*BITS, b"HTTP/1.1 200 OK", b'{"id": 1}']) for _ in range(self.dice.randrange(30))]
        return b"".join(pieces)[:LONGEST_BODY]

    def chunked(self, body: bytes) -> bytes:
        """Return a body in chunks of random sizes, with extensions and trailers here and there."""
        data = b""
        while body:
            size = self.dice.randrange(1, len(body) + 1)
            extension = self.dice.choice([b"", b"", b"", b" ", b";a=b", b" ; a"])
            data += b"%x%s\r\n%s\r\n" % (size, extension, body[:size])
            body = body[size:]
        return data + b"0\r\n" + self.dice.choice([b"", b"", b"A: b\r\n", b"no header\r\n"]) + b"\r\n"

    def reply(self) -> bytes:
        """Return a reply as it travels, and sometimes what is behind it."""
        body = self.body()
        lines = self.dice.sample(HEADERS, self.dice.choice([0, 0, 0, 1, 2, 4]))
        coding = self.dice.random()
        if coding < 0.1:
            body = gzip.compress(body) * self.dice.randrange(1, 3)
            lines.append(b"Content-Encoding: gzip")
        elif coding < 0.2:
            body = zlib.compress(body)
            lines.append(b"Content-Encoding: deflate")
        framing = self.dice.random()
        if framing < 0.4:
            lines.append(b"Content-Length: %d" % len(body))
        elif framing < 0.8:
            lines.append(b"Transfer-Encoding: chunked")
            body = self.chunked(body)
        self.dice.shuffle(lines)
        version = self.dice.choice([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"])
        head = b"\r\n".join([version + b" " + self.dice.choice(STATUSES), *lines, b"", b""])
        data = b"".join(self.dice.choices(INTERLUDES, k=self.dice.choice([0, 0, 0, 1, 2]))) + head + body
        if self.dice.random() < 0.1:
            data = data.replace(b"\r\n", b"\n")
        if self.dice.random() < 0.3:
            data = self.changed(data)
        return data + self.dice.choice([b"", b"", b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])

    def changed(self, data: bytes) -> bytes:
        """Return the data with up to three bytes changed, left out or put in."""
        mutable = bytearray(data)
        for _ in range(self.dice.randrange(1, 4)):
            at = self.dice.randrange(len(mutable) + 1)
            mutable[at : at + self.dice.randrange(3)] = self.dice.choice([*BITS, bytes([self.dice.randrange(256)])])
        return bytes(mutable)

    def cuts(self, data: bytes) -> Iterable[list[bytes]]:
        """Return ways to cut this reply into pieces."""
        if self.dice.random() < EVERY_BYTE:
            yield [bytes([byte]) for byte in data]
            places = list(range(len(data) + 1))
        else:
            places = [self.dice.randrange(len(data) + 1) for _ in range(CUTS)]
        for place in places:
            yield [data[:place], data[place:]]
        places = sorted(self.dice.choices(range(len(data) + 1), k=10))
        yield [data[start:end] for start, end in zip([0, *places], [*places, len(data)])]


def read(pieces: list[bytes], *, ending: str) -> Outcome:
    """Read what comes in these pieces; a reply that is not whole then is ended by its connection, or the deadline."""
    reader = ReplyReader("GET")
    incoming = bytearray()
    reply = error = None
    try:
        for piece in pieces:
            incoming += piece
            if reply is None:
                reply = reader.proceed(incoming)
        if reply is None:
            reply = reader.proceed(incoming, has_ended=ending == "end", is_last=ending == "deadline")
    except PeerError as exc:
        error = str(exc).partition(":")[0]
    return Outcome(reply, error, reader.may_keep_connection, b"" if error else bytes(incoming))


def read_with_h11(data: bytes) -> tuple[int, bytes] | None:
    """Return the status and the body that h11 reads; None where it reads no whole reply."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "platform.test")]))
    connection.send(h11.EndOfMessage())
    try:
        connection.receive_data(data)
        connection.receive_data(b"")
        status, body = 0, b""
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, body
            elif not isinstance(event, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None


def check(data: bytes, cuts: Iterable[list[bytes]]) -> str:
    """Check that a reply is the same however it is cut, and the same as h11's; return what became of it."""
    at_its_end = read([data], ending="end")
    at_the_deadline = read([data], ending="deadline")
    for pieces in cuts:
        assert read(pieces, ending="end") == at_its_end, pieces
        assert read(pieces, ending="deadline") == at_the_deadline, pieces
    reply, error, may_keep_connection, surplus = at_its_end
    theirs = read_with_h11(data)
    if may_keep_connection:
        assert reply is not None
        assert read([data[: len(data) - len(surplus)]], ending="deadline") == (reply, None, True, b"")
    if reply is None:
        assert error is not None
        if theirs is not None:  # h11 leaves codings alone, and knows each version of HTTP
            assert error.startswith(("the reply came in a content coding", "the reply is broken", "the status line"))
        return re.sub(r"[0-9,]+ of [0-9,]+", "some", error)
    if theirs is None:
        return "a reply, which h11 refuses"
    if "content-encoding" not in reply.headers:
        assert (reply.status_code, reply.body) == theirs, data
    return "a reply after which the connection is kept" if may_keep_connection else "a reply"


def main(replies: int = REPLIES, seed: int = 0) -> Counter[str]:
    """Read so many random replies, and return what became of them; an AssertionError tells the first fault."""
    fuzzer = Fuzzer(seed)
    ends: Counter[str] = Counter()
    for _ in range(replies):
        data = fuzzer.reply()
        ends[check(data, fuzzer.cuts(data))] += 1
    return ends


if __name__ == "__main__":
    start = time.monotonic()
    print(dict(main(*(int(argument) for argument in sys.argv[1:]))), f"in {time.monotonic() - start:.0f} s")
