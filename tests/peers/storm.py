"""The storm: 20,000 actions on the faulty platform, each cancelled within 50 ms, and as many over TLS (`make soak`).

Checked at its end: each caller was told what has become of its action (its id, that it may have started, or that it has
not), and that is true; none was started twice; nobody is in a line or has a connection, no thread or file descriptor is
left over; and the next actions are fine. Prints its figures and exits with 1 if anything of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import logging
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.certificates import Authority
from tests.conftest import pool_is_at_rest, pool_state
from tests.peers.soak import ask, descriptors, platform
from tests.servers import eventually
from zamp_sdk import ActionExecutor, HttpClientError
from zamp_sdk.action_executor.pacing import pace_of
from zamp_sdk.transport.pool import shared_pool

LATEST = 0.05  # s after which an action is cancelled at the latest
AFTERWARDS = 20  # actions that nobody cancels
CONCURRENCY = 20  # with 40, two cores are so busy with TLS handshakes that hardly one ends before it is cancelled
LIMIT = 240.0  # s for both; they take a quarter of it
TOKEN = "storm-token"

# What a caller was told.
ID, DOUBT, NOT_STARTED, RESULT = "an id", "may have started", "has not started", "a result"


class Storm:
    """One storm against one platform."""

    def __init__(self, url: str, actions: int, concurrency: int, dice: random.Random) -> None:
        self.url = url
        self.actions = actions
        self.concurrency = concurrency
        self.dice = dice
        self.told: list[str] = [""] * (actions + AFTERWARDS)
        self.violations: list[str] = []

    async def run(self) -> None:
        """Start and cancel all actions; then let a few go on."""
        numbers = iter(range(self.actions))
        await asyncio.gather(*(self._work(numbers) for _ in range(self.concurrency)))
        await eventually(pool_is_at_rest)  # what was at work in a thread ends within milliseconds
        if pace_of(self.url, TOKEN).waiting:
            self.violations.append("somebody is in the line of those who wait their turn")
        for number in range(self.actions, self.actions + AFTERWARDS):
            await self._execute(number)
        if RESULT not in self.told[self.actions :]:
            self.violations.append("the next actions brought no result")

    async def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            task = asyncio.ensure_future(self._execute(number))
            asyncio.get_running_loop().call_later(LATEST * self.dice.random(), task.cancel)
            with contextlib.suppress(asyncio.CancelledError):  # before it began
                await task

    async def _execute(self, number: int) -> None:
        told = NOT_STARTED  # for it may be cancelled before it begins
        try:
            result = await ActionExecutor.execute("storm", {"number": number}, base_url=self.url, auth_token=TOKEN)
        except asyncio.CancelledError as exc:
            told = self._read_note(number, exc)
        except HttpClientError as exc:
            told = ID if exc.action_id else DOUBT if exc.may_have_started else NOT_STARTED
        else:
            told = RESULT
            if result != {"number": number}:
                self.violations.append(f"action {number} has the result {result}")
        self.told[number] = told

    def _read_note(self, number: int, exc: BaseException) -> str:
        if sys.version_info < (3, 11):  # which has no notes
            return DOUBT
        (note,) = exc.__notes__
        for told in (DOUBT, NOT_STARTED):
            if told in note:
                return told
        if not re.search(rf"\baction-{number}\b", note):
            self.violations.append(f"action {number} was lost: {note}")
        return ID

    def compare(self, ledger: dict[str, Any]) -> None:
        """Hold what the callers were told against what the platform did."""
        starts = {int(number): count for number, count in ledger["starts"].items()}
        for number, told in enumerate(self.told):
            if starts.get(number, 0) > 1:
                self.violations.append(f"action {number} was started twice")
            if told in (NOT_STARTED, "") and number in starts:
                self.violations.append(f"action {number} was started, and its caller was told that it was not")
            if told in (ID, RESULT) and number not in starts:
                self.violations.append(f"action {number} was not started, and its caller was told that it was")


def run(name: str, seed: int, actions: int, concurrency: int, certificate: Path | None = None) -> list[str]:
    """Run one storm, report, and return what was wrong."""
    threads_before, descriptors_before = threading.active_count(), descriptors()
    with platform(seed, certificate) as process:
        scheme = "http" if certificate is None else "https"
        storm = Storm(f"{scheme}://127.0.0.1:{ask(process)}", actions, concurrency, random.Random(seed))
        began = time.monotonic()
        asyncio.run(asyncio.wait_for(storm.run(), LIMIT / 2))
        wall = time.monotonic() - began
        state = pool_state()
        shared_pool().close_idle()
        ledger = ask(process, "ledger\n")
    storm.compare(ledger)
    left = {
        "threads": threading.active_count() - threads_before,
        "file descriptors": descriptors() - descriptors_before,
        "rooms": state.rooms_taken,
        "in line": state.in_line,
    }
    if any(left.values()):
        storm.violations.append("something is left over")

    told = Counter(storm.told[:actions])
    print(f"{name}: {actions:,} actions, {concurrency} at a time, {wall:.0f} s; {len(ledger['starts']):,} were started")
    print(f"  told: {', '.join(f'{what or NOT_STARTED} {count:,}' for what, count in sorted(told.items()))}")
    print(f"  left over: {', '.join(f'{what} {count}' for what, count in left.items())}")
    for violation in storm.violations[:20]:
        print(f"  VIOLATION: {violation}")
    print(f"  {len(storm.violations)} violations", flush=True)
    return storm.violations


def main() -> int:
    """Run the storm in the clear and over TLS, and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.storm", description=__doc__)
    parser.add_argument("--actions", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    logging.getLogger("zamp_sdk").propagate = False  # its warnings are as many as the actions
    logging.getLogger("zamp_sdk").addHandler(logging.NullHandler())
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        os.environ["SSL_CERT_FILE"] = str(authority.file)
        violations = run("plain", options.seed, options.actions, options.concurrency)
        violations += run(
            "TLS", options.seed, options.actions, options.concurrency, authority.issue("127.0.0.1", "localhost")
        )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
