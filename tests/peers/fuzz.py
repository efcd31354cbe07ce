"""40,000 random replies: whatever comes back, only documented exceptions come out, ids are whole, no token is shown.

Before that, ``fuzz_reading`` gives the reader as many of its own, in pieces.

Most replies go straight through ``replies`` and ``lifecycle``, which is fast; the rest comes from a server on loopback,
over many connections, through the public calls. A seed makes the same replies again.

    python -m tests.peers.fuzz [REPLIES [SEED]]
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import logging
import random
import sys
import time
from collections import Counter
from datetime import timedelta
from typing import Any

from tests.peers import fuzz_reading
from zamp_sdk import ActionExecutor, ActionFailedError, ActionTimeoutError, HttpClientError, ZampError, transport
from zamp_sdk.action_executor import lifecycle, params, replies
from zamp_sdk.action_executor.executor import logger
from zamp_sdk.action_executor.redaction import Redactor

REPLIES = 40_000
OVER_THE_WIRE = 0.1  # of the replies
AT_ONCE = 32  # actions, so that connections are many and waits overlap
LONGEST = 60.0  # s, after which a run that has not ended is a failure
TOKEN = "sk_live_Zz7/fuzz+token=0123456789"
BEGINNING = TOKEN[:14]
ACTION_ID = "act-1"

VALID: list[Any] = [
    {"id": ACTION_ID},
    {"id": ACTION_ID, "status": "RUNNING"},
    {"id": ACTION_ID, "status": "COMPLETED", "result": {"a": [1, 2.5, None, "ü"]}},
    {"id": ACTION_ID, "status": "FAILED", "error": {"message": "boom", "type": "ValueError"}},
    {"id": ACTION_ID, "status": "TIMED_OUT", "error": None},
    {"status": "CANCELED", "error": "by hand"},
    {"data": {"id": ACTION_ID, "status": "RUNNING"}, "error": None},
    {"data": None, "error": {"message": "quota exceeded"}},
    {"error": f"Bearer {TOKEN} is not known"},
    {"detail": [{"loc": ["body", "params"], "msg": "field required"}]},
]
ODD: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1e308,
        "",
        " ",
        "..",
        "a/b",
        "\x1b[2J\r\n",
        "\u202e",
        "\ud800",
        "QUEUED",
        "RUNNING",
        "COMPLETED",
    ),
    *([], {}, [[]], {"": ""}, "act-2", TOKEN, f"x{TOKEN}x", {TOKEN: TOKEN}, f"{TOKEN[:20]}...", "x" * 5000),
]
STATUSES = [*[200] * 12, 201, 204, 301, 307, 400, 401, 403, 404, 407, 408, 409, 422, 425, 429, 500, 502, 503, 504, 599]
HEADERS = ["Retry-After", "Location", "Date", "X-Echo", "Content-Type", "Set-Cookie"]
HEADER_VALUES = ["0", "-1", "soon", "Wed, 21 Oct 2026 07:28:00 GMT", TOKEN, f"/{TOKEN}", "x" * 3000, "\x1b[31m", "\xff"]


class Fuzzer:
    """Makes replies out of dice."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def value(self) -> Any:
        """Return a valid body with up to three members changed for odd ones."""
        root = [copy.deepcopy(self.dice.choice(VALID))]
        for _ in range(self.dice.randrange(4)):
            place: Any = root
            while True:
                key = self.dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if not (isinstance(place[key], (dict, list)) and place[key] and self.dice.random() < 0.8):
                    break
                place = place[key]
            place[key] = copy.deepcopy(self.dice.choice(ODD))
            if isinstance(place, dict) and self.dice.random() < 0.3:
                place[self.dice.choice(["id", "status", "error", "result", "data"])] = copy.deepcopy(
                    self.dice.choice(ODD)
                )
        return root[0]

    def body(self) -> bytes:
        """Return a body: JSON, or JSON with some bytes changed, or what Python cannot read."""
        body = json.dumps(self.value()).encode()
        kind = self.dice.random()
        if kind < 0.02:
            depth = self.dice.choice([100, 700, 100_000])
            odd = self.dice.choice([b"7" * 5000, b"[" * depth + b"]" * depth, b"[" * depth])
            name = self.dice.choice([b"result", b"error", b"id"])
            return b'{"status": "%s", "%s": %s}' % (self.dice.choice([b"COMPLETED", b"FAILED"]), name, odd)
        if kind < 0.4:
            mutable = bytearray(body)
            for _ in range(self.dice.randrange(1, 5)):
                at = self.dice.randrange(len(mutable) + 1)
                mutable[at : at + self.dice.randrange(3)] = self.dice.choice(
                    [
                        b"",
                        b"\xff",
                        b"\x00",
                        b'"',
                        b"{",
                        b"]",
                        b"\\",
                        b"\\u0073",
                        TOKEN.encode(),
                        bytes([self.dice.randrange(256)]),
                    ]
                )
            return bytes(mutable)
        return body

    def headers(self) -> dict[str, str]:
        """Return up to three headers."""
        return {self.dice.choice(HEADERS): self.dice.choice(HEADER_VALUES) for _ in range(self.dice.randrange(4))}

    def reply(self) -> transport.Reply:
        """Return a reply as the transport makes it."""
        headers = {name.lower(): value for name, value in self.headers().items()}
        return transport.Reply(self.dice.choice(STATUSES), headers, self.body())

    def raw(self) -> tuple[bytes, bool]:
        """Return a reply as it travels, and whether the connection goes on: not after one that is broken."""
        body = self.body()
        lines = [f"HTTP/1.1 {self.dice.choice(STATUSES)} {self.dice.choice(['OK', 'No', '', TOKEN])}"]
        lines += [f"{name}: {value}" for name, value in self.headers().items()]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode("latin-1")
        is_broken = self.dice.random() < 0.1
        if is_broken:
            at = self.dice.randrange(len(head))
            head = head[:at] + bytes([self.dice.randrange(256)]) + head[at + 1 :]
        return head + body, not is_broken and self.dice.random() < 0.7


def check(error: BaseException, started: bool) -> str:
    """Check an error, and return its kind: it is documented, it has the id, and nothing in it shows the token."""
    assert isinstance(error, (HttpClientError, ActionFailedError, ActionTimeoutError)), repr(error)
    if started:
        assert error.action_id == ACTION_ID
    elif error.action_id is not None:
        replies.check_action_id(error.action_id)
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is not None:
            shown = [str(link), repr(link.args), *getattr(link, "__notes__", [])]
            if isinstance(link, ZampError):
                assert str(link).isprintable(), repr(str(link))
                assert len(str(link)) < 2000
            members: list[Any] = [vars(link)]
            while members:  # attributes may be nested too deeply for a repr
                member = members.pop()
                if isinstance(member, dict):
                    members += [*member, *member.values()]
                elif isinstance(member, (list, tuple)):
                    members += member
                else:
                    shown.append(str(member))
            assert not [text for text in shown if TOKEN in text], shown
            assert not [text for text in shown if f"{BEGINNING}..." in text], shown
            links += [link.__cause__, link.__context__]
    return type(error).__name__


def step_through(fuzzer: Fuzzer, budget: int, redact: Redactor) -> tuple[int, str]:
    """Follow or start an action with random replies; return how many it took and how it ended."""
    now = 0.0
    started = fuzzer.dice.random() < 0.7
    if started:
        steps = lifecycle.follow(
            ACTION_ID,
            clock=lambda: now,
            asking_clock=lambda: now,
            jitter=lambda: 0.5,
            started_at=0.0,
            limit=3600.0,
        )
    else:
        steps = lifecycle.start(params.Call("POST", "/actions"), asking_clock=lambda: now, jitter=lambda: 0.5)
    used, answer = 0, None
    try:
        while used < budget:
            step = steps.send(answer)
            answer = None
            if isinstance(step, lifecycle.Send):
                used += 1
                answer = step.read(fuzzer.reply(), redact, 0.0)
            else:
                assert 0 <= step.seconds <= 120
                now += step.seconds
                for text in (step.failure or "", step.warning or ""):
                    assert text.isprintable()
                    assert TOKEN not in text
    except StopIteration as stop:
        reply = stop.value
        if not started:
            replies.check_action_id(reply.action_id)
            return used, "started"
        assert reply.action_id in (None, ACTION_ID)
        try:
            lifecycle.outcome(ACTION_ID, reply)
        except ActionFailedError as exc:
            return used, check(exc, started)
        return used, "result"
    except ZampError as exc:
        return used, check(exc, started)
    return used, "budget"


async def over_the_wire(fuzzer: Fuzzer, budget: int, ends: Counter[str]) -> None:
    """Run actions against a server that answers at random, until so many replies have been given."""
    left = budget
    numbers = itertools.count()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                if length:
                    await reader.readexactly(int(length[0].split(b":")[1]))
                left -= 1
                reply, goes_on = fuzzer.raw()
                writer.write(reply)
                await writer.drain()
                if not goes_on:
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            return  # the second when the run ends
        finally:
            writer.close()

    async def run(server_url: str) -> None:
        while left > 0:
            # Each action has a platform of its own: one that refuses at random would be asked slower and slower.
            base_url = f"{server_url}/{next(numbers)}"
            started = fuzzer.dice.random() < 0.7
            try:
                if started:
                    handle: Any = ActionExecutor.get_handle(ACTION_ID, base_url=base_url, auth_token=TOKEN)
                    await handle.result(timeout=timedelta(seconds=0.2))
                else:
                    replies.check_action_id(
                        (await ActionExecutor.start("act", {}, base_url=base_url, auth_token=TOKEN)).id
                    )
                ends["result" if started else "started"] += 1
            except ZampError as exc:
                ends[check(exc, started)] += 1

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        await asyncio.gather(*(run(f"http://127.0.0.1:{port}") for _ in range(AT_ONCE)))


class _Watch(logging.Handler):
    """Fails on a log record that shows the token or more than a line."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if TOKEN in text or not text.isprintable():
            self.faults.append(text)


def main(number: int = REPLIES, seed: int = 0) -> Counter[str]:
    """Give so many random replies, and return how often each end was met; an AssertionError tells the first fault."""
    began = time.monotonic()
    fuzzer = Fuzzer(seed)
    ends: Counter[str] = Counter()
    redact = Redactor(TOKEN)
    watch = _Watch()
    logger.addHandler(watch)
    saved = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    waits = lifecycle.BACKOFF_MIN, lifecycle.POLL_MIN
    try:
        left = number - int(number * OVER_THE_WIRE)
        while left > 0:
            assert time.monotonic() - began < LONGEST, "it takes too long"
            used, end = step_through(fuzzer, left, redact)
            left -= used
            ends[end] += 1
        lifecycle.BACKOFF_MIN = lifecycle.POLL_MIN = 0.001  # s, for these waits are real
        rest = LONGEST - (time.monotonic() - began)
        asyncio.run(asyncio.wait_for(over_the_wire(fuzzer, int(number * OVER_THE_WIRE), ends), rest))
    finally:
        lifecycle.BACKOFF_MIN, lifecycle.POLL_MIN = waits
        logger.propagate, logger.level = saved
        logger.removeHandler(watch)
    assert not watch.faults, watch.faults[0]
    return ends


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    for fuzz in (fuzz_reading.main, main):
        start = time.monotonic()
        print(dict(fuzz(*arguments)), f"in {time.monotonic() - start:.0f} s")
