"""The Zamp API as it is on a bad day, for the soak: one request in ten meets a fault. Run in a process of its own.

For a quarter of the time it also limits how fast it is asked, and refuses what is over it.

Whatever leaves the client in doubt happens *after* the action was started, so that a start that is sent again after
such a fault is a second start, which the ledger shows. The port is the first line of output; a line of input asks for
the ledger, and the end of the input ends the server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import pacing_simulation
from tests.servers import server_context

FAULTY = 0.1  # of the requests
LONGEST_ACTION = 0.3  # s
SLOW = 1.0  # s
SILENCE = 0.005  # of the faults, for each keeps a slot of the client busy for 30 s
LIMIT_FROM, LIMIT_TO, LIMIT_EVERY = 8.0, 13.0, 20.0  # s: when there is a limit, in each so many
LIMIT = {"rate": 300, "burst": 100}  # requests a second: less than the soak asks for

# Answers that say: not processed. The action is not started. They are given to what is over the limit, and not at
# random: whoever is refused asks more slowly, and those who are refused at any speed would in the end hardly ask.
REFUSALS = {
    "429": b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n",
    "429 Retry-After": b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n",
    "503 Retry-After": b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n",
}
# Answers that leave it open. The action is started, and the client cannot know.
DOUBTS = {
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "408": b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "425": b"HTTP/1.1 425 Too Early\r\nContent-Length: 0\r\n\r\n",
    "500": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops",
    "502": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 13\r\n\r\n<html></html>",
    "503": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
    "504": b"HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 0\r\n\r\n",
    "not JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>",
    "not an object": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
    "empty object": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "not HTTP": b"What?\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"id": ',
    "end": b"",
    "reset": b"",
}
# After these the connection cannot go on.
LAST_WORDS = {"408", "not HTTP", "half a head", "half a body", "end", "reset"}


def plainly(transport: asyncio.Transport, body: bytes, header: bytes = b"") -> None:
    """Answer as one should."""
    transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), header, body))


def slowly(transport: asyncio.Transport, body: bytes) -> None:
    """Answer late."""
    asyncio.get_running_loop().call_later(SLOW, plainly, transport, body)


def byte_by_byte(transport: asyncio.Transport, body: bytes) -> None:
    """Answer in many small packets."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    for number, byte in enumerate(whole):
        asyncio.get_running_loop().call_later(0.005 * number, transport.write, bytes([byte]))


def in_chunks(transport: asyncio.Transport, body: bytes) -> None:
    """Answer without saying how long it will be."""
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)


def with_early_hints(transport: asyncio.Transport, body: bytes) -> None:
    """Say something else before the answer."""
    transport.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    plainly(transport, body)


def for_the_last_time(transport: asyncio.Transport, body: bytes) -> None:
    """Announce that the connection ends with this answer."""
    plainly(transport, body, b"Connection: close\r\n")
    transport.close()


def without_a_word(transport: asyncio.Transport, body: bytes) -> None:
    """Close the connection after a good answer, while the client may already be sending its next request."""
    plainly(transport, body)
    transport.close()


# Good answers in an unusual manner.
MANNERS: dict[str, Callable[[asyncio.Transport, bytes], None]] = {
    "slow": slowly,
    "byte by byte": byte_by_byte,
    "chunks": in_chunks,
    "103 first": with_early_hints,
    "Connection: close": for_the_last_time,
    "closes without a word": without_a_word,
}


class Platform:
    """The actions, and the ledger of what became of each start, by the number in its params."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.starts: Counter[int] = Counter()
        self.answered: set[int] = set()  # the starts that got a good answer
        self.keys: dict[str, int] = {}
        self.shared_keys = 0
        self.faults: Counter[str] = Counter()
        self.posts = self.polls = 0
        self._ends: dict[str, float] = {}
        self._limit = pacing_simulation.Platform([LIMIT])
        self._began = time.monotonic()

    def choose_fault(self, *, is_start: bool) -> str | None:
        now = time.monotonic() - self._began
        has_limit = LIMIT_FROM <= now % LIMIT_EVERY < LIMIT_TO
        if has_limit and not self._limit.takes(now, is_start=is_start):
            return self.random.choice([*REFUSALS])
        if self.random.random() >= FAULTY:
            return None
        if self.random.random() < SILENCE:
            return "silence"
        return self.random.choice([*DOUBTS, *MANNERS])

    def start(self, number: int, key: str) -> dict[str, Any]:
        self.starts[number] += 1
        self.shared_keys += self.keys.setdefault(key, number) != number
        action_id = f"action-{number}"
        self._ends[action_id] = time.monotonic() + LONGEST_ACTION * self.random.random()
        return {"id": action_id}

    def look(self, action_id: str) -> dict[str, Any]:
        if time.monotonic() < self._ends[action_id]:
            return {"id": action_id, "status": "RUNNING"}
        return {"id": action_id, "status": "COMPLETED", "result": {"number": int(action_id[len("action-") :])}}

    def ledger(self) -> dict[str, Any]:
        return {
            "posts": self.posts,
            "polls": self.polls,
            "faults": self.faults,
            "starts": self.starts,
            "answered": sorted(self.answered),
            "shared_keys": self.shared_keys,
        }


class Connection(asyncio.Protocol):
    """One connection; it believes that its client knows how to write HTTP."""

    transport: asyncio.Transport

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += data
        head, separator, rest = self._unread.partition(b"\r\n\r\n")
        if not separator:
            return
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self._unread = rest[length:]
        method, target, _ = line.split()
        if method == "POST":
            self._start(json.loads(rest[:length])["params"]["number"], headers["idempotency-key"])
        else:
            self._platform.polls += 1
            self._answer(self._platform.choose_fault(is_start=False), self._platform.look(target.rpartition("/")[2]))

    def _start(self, number: int, key: str) -> None:
        self._platform.posts += 1
        fault = self._platform.choose_fault(is_start=True)
        reply = {} if fault in REFUSALS else self._platform.start(number, key)
        if fault is None or fault in MANNERS:
            self._platform.answered.add(number)
        self._answer(fault, reply)

    def _answer(self, fault: str | None, reply: dict[str, Any]) -> None:
        if fault is not None:
            self._platform.faults[fault] += 1
        words = REFUSALS.get(fault or "", DOUBTS.get(fault or ""))
        if words is not None:
            self.transport.write(words)
            if fault == "reset":
                sock = self.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if fault in LAST_WORDS:
                self.transport.close()
        elif fault != "silence":
            MANNERS.get(fault or "", plainly)(self.transport, json.dumps(reply).encode())


async def serve(seed: int, certificate: str | None = None) -> None:
    """Listen, say where, and answer until the input ends."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each answer to somebody who has gone
    loop = asyncio.get_running_loop()
    platform = Platform(seed)
    tls = None if certificate is None else server_context(Path(certificate))
    server = await loop.create_server(lambda: Connection(platform), "127.0.0.1", 0, backlog=1024, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    finished = asyncio.Event()

    def command() -> None:
        if sys.stdin.readline():
            print(json.dumps(platform.ledger()), flush=True)
        else:
            finished.set()

    loop.add_reader(sys.stdin, command)
    await finished.wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), *sys.argv[2:]))
