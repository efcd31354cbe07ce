"""The soak: 20,000 actions, 200 at a time, on a platform where one request in ten meets a fault (`make soak`).

For a quarter of the time that platform limits how fast it is asked, too.

Checked at its end: every action has its result, or an error that admits that it may have started, where the fault hit
its start after it was sent; none was started twice, and none given up because it was refused; no thread, socket or file
descriptor is left over; memory is flat. Prints its figures and exits with 1 if anything of this does not hold, or with
2 if it takes too long.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import pool_state
from tests.peers import faulty_platform
from zamp_sdk import ActionExecutor, HttpClientError
from zamp_sdk.transport.pool import MOST_ROOMS, shared_pool

LIMIT = 240.0  # s; it takes half of it
MEMORY_GROWTH = 4.0  # MiB from the first quarter to the end that are no growth yet

# What became of an action.
PENDING, RESULT, DOUBT, REFUSED = range(4)


class Soak:
    """One run against one platform."""

    def __init__(self, url: str, actions: int, concurrency: int) -> None:
        self.url = url
        self.actions = actions
        self.concurrency = concurrency
        self.outcomes = bytearray(actions)  # small and of fixed size, for memory is measured
        self.violations: list[str] = []
        self.most_sockets = 0
        self.memory_at_quarter = 0
        self._done = 0

    async def run(self) -> None:
        """Execute all actions."""
        numbers = iter(range(self.actions))
        watch = asyncio.ensure_future(self._watch())
        await asyncio.gather(*(self._work(numbers) for _ in range(self.concurrency)))
        watch.cancel()

    async def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            self.outcomes[number] = await self._execute(number)
            self._done += 1
            if self._done == self.actions // 4:
                self.memory_at_quarter = memory()

    async def _execute(self, number: int) -> int:
        try:
            result = await ActionExecutor.execute("soak", {"number": number}, base_url=self.url, auth_token="soak")
        except HttpClientError as exc:
            if exc.action_id is None:
                return DOUBT if exc.may_have_started else REFUSED
            self.violations.append(f"action {number} was lost: {exc}")
        except Exception as exc:  # noqa: BLE001  # anything else is a finding
            self.violations.append(f"action {number}: {exc!r}")
        else:
            if result == {"number": number}:
                return RESULT
            self.violations.append(f"action {number} has the result {result}")
        return PENDING

    async def _watch(self) -> None:
        while True:
            state = pool_state()
            self.most_sockets = max(self.most_sockets, state.rooms_taken + state.idle)
            await asyncio.sleep(0.05)

    def compare(self, ledger: dict[str, Any]) -> None:
        """Hold what the callers were told against what the platform did."""
        starts = {int(number): count for number, count in ledger["starts"].items()}
        answered = set(ledger["answered"])
        self._forbid_for("started twice", [number for number, count in starts.items() if count > 1])
        self._forbid_for(
            "had a good answer, and its caller got no result",
            [number for number in answered if self.outcomes[number] != RESULT],
        )
        self._forbid_for(
            "had no good answer, and its caller got a result",
            [number for number, outcome in enumerate(self.outcomes) if outcome == RESULT and number not in answered],
        )
        self._forbid_for(
            "was started, and its caller was told that it was not",
            [number for number in starts if self.outcomes[number] == REFUSED],
        )
        self._forbid_for("never ended", [number for number, outcome in enumerate(self.outcomes) if outcome == PENDING])
        self.forbid("actions were given up though they were only refused", self.outcomes.count(REFUSED))
        self.forbid("starts had the idempotency key of another", ledger["shared_keys"])

    def forbid(self, what: str, count: float) -> None:
        """Take it for a violation if there are any of these."""
        if count > 0:
            self.violations.append(f"{count:g} {what}")

    def _forbid_for(self, finding: str, numbers: list[int]) -> None:
        if numbers:
            self.violations.append(f"{finding}: {len(numbers)} actions, such as {numbers[:5]}")


def memory() -> int:
    """Return the resident set of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Return how many file descriptors are open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextlib.contextmanager
def platform(seed: int, certificate: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run the faulty platform in a process of its own; with a certificate it speaks TLS."""
    command = [sys.executable, "-m", faulty_platform.__name__, str(seed)]
    command += [] if certificate is None else [str(certificate)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[str], line: str = "") -> Any:
    """Send the platform a line, if there is one, and return what it says."""
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        process.stdin.write(line)
        process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> int:
    """Run the soak, and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.soak", description=__doc__)
    parser.add_argument("--actions", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    faulthandler.dump_traceback_later(LIMIT + 30, exit=True)  # if even the event loop is stuck
    print(f"{options.actions:,} actions, {options.concurrency} at a time, seed {options.seed}", flush=True)

    descriptors_before = descriptors()
    with platform(options.seed) as process:
        soak = Soak(f"http://127.0.0.1:{ask(process)}", options.actions, options.concurrency)
        began, cpu = time.monotonic(), time.process_time()
        try:
            asyncio.run(asyncio.wait_for(soak.run(), LIMIT))
        except asyncio.TimeoutError:
            print(f"not finished within {LIMIT:.0f} s: {soak.outcomes.count(PENDING):,} actions are left")
            return 2
        wall, cpu = time.monotonic() - began, time.process_time() - cpu
        memory_after = memory()
        leased = pool_state().rooms_taken
        shared_pool().close_idle()
        ledger = ask(process, "ledger\n")
    soak.compare(ledger)

    threads, descriptors_after = threading.active_count() - 1, descriptors()
    quarter, end = soak.memory_at_quarter / 2**20, memory_after / 2**20
    soak.forbid("threads are left", threads)
    soak.forbid("connections are still leased", leased)
    soak.forbid("file descriptors are left", descriptors_after - descriptors_before)
    soak.forbid("sockets too many at once", soak.most_sockets - MOST_ROOMS)
    soak.forbid("MiB of memory too many", end - quarter - MEMORY_GROWTH)

    posts, polls, faults = ledger["posts"], ledger["polls"], ledger["faults"]
    count = soak.outcomes.count
    print(
        f"{wall:.0f} s, {cpu:.0f} s of CPU; {posts:,} starts and {polls:,} polls, {(posts + polls) / wall:.0f} a second"
    )
    print(f"{sum(faults.values()):,} faults: {', '.join(f'{name} {faults[name]}' for name in sorted(faults))}")
    refused = sum(faults.get(name, 0) for name in faulty_platform.REFUSALS)
    print(f"over the limit: {refused:,} requests, {refused / (posts + polls):.1%} of all")
    print(f"{count(RESULT):,} results, {count(DOUBT):,} errors that say 'may have started', {count(REFUSED):,} refused")
    print(f"started twice: {sum(starts > 1 for starts in ledger['starts'].values())}")
    print(f"left over: {threads} threads, {leased} leases, {descriptors_after - descriptors_before} file descriptors")
    print(f"at most {soak.most_sockets} sockets at once")
    print(f"memory: {quarter:.1f} MiB after a quarter, {end:.1f} MiB at the end")
    for violation in soak.violations[:20]:
        print(f"VIOLATION: {violation}")
    print(f"{len(soak.violations)} violations")
    return 1 if soak.violations else 0


if __name__ == "__main__":
    sys.exit(main())
