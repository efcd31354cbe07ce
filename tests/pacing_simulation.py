"""Actions on a platform that limits how fast it is asked, simulated: virtual hours in milliseconds, the same each time.

Actions and requests are generators that yield how long they wait; one heap of events runs them all. They do what the
executor does: take a place in the line, wait for a connection, send, learn, and come back to the end of the line if
refused. ``python -m tests.pacing_simulation`` prints the figures of the cases in ``data/pacing.json``.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections import Counter, deque
from collections.abc import Generator
from pathlib import Path
from typing import Any, Optional

from zamp_sdk.action_executor.lifecycle import BACKOFF_MIN, backoff, poll_interval
from zamp_sdk.action_executor.pacing import RETRY_AFTER_MAX, Pace

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "pacing.json").read_text(encoding="utf-8"))
NETWORK = (0.01, 0.1)  # s there and back, without the platform's own time
CONNECTIONS = 256  # of each process
LONGEST = 7200.0  # s after which a simulation is ended
NOTICEABLE = 0.2  # s in the line

Waiting = Generator[Optional[float], None, Any]
"""Yields seconds to wait; None: until somebody else goes on with it."""


class Platform:
    """A platform whose limit may change; the last of its phases lasts for ever.

    A phase has ``until`` (s), and a limit or none: ``rate`` (requests a second) and ``burst`` are a token bucket,
    ``count`` and ``seconds`` a window, ``at_once`` is of requests in flight, ``refuses`` is "all" or "starts", and
    ``strays`` is the share of requests that are refused at random.
    """

    def __init__(
        self,
        phases: list[dict[str, Any]],
        retry_after: float | str | None = None,
        reply: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.phases = phases
        self.retry_after = retry_after
        self.reply = reply  # s that an accepted request takes there, from and to
        self.phase: dict[str, Any] | None = None
        self.tokens = self.filled_at = 0.0
        self.window, self.in_window = -1, 0
        self.in_flight = 0
        self.random = random.Random(0)

    def takes(self, now: float, *, is_start: bool) -> bool:
        """Whether a request that comes now is taken; it has to be given back to ``in_flight``."""
        phase = next(phase for phase in self.phases if now < phase.get("until", math.inf))
        if phase is not self.phase:
            self.phase, self.tokens, self.filled_at = phase, phase.get("burst", 0), now
        if not self._takes(phase, now, is_start=is_start):
            return False
        self.in_flight += 1
        return True

    def _takes(self, phase: dict[str, Any], now: float, *, is_start: bool) -> bool:
        if "strays" in phase:
            return bool(self.random.random() >= phase["strays"])
        if "refuses" in phase:
            return phase["refuses"] == "starts" and not is_start
        if "at_once" in phase:
            return bool(self.in_flight < phase["at_once"])
        if "count" in phase:
            window = int(now / phase["seconds"])
            self.in_window = self.in_window + 1 if window == self.window else 1
            self.window = window
            return bool(self.in_window <= phase["count"])
        if "rate" in phase:
            self.tokens = min(phase["burst"], self.tokens + (now - self.filled_at) * phase["rate"])
            self.filled_at = now
            if self.tokens < 1:
                return False
            self.tokens -= 1
        return True

    def told_to_wait(self, now: float) -> float | None:
        """What ``Retry-After`` says; "rest" is what remains of the window, in whole seconds."""
        if not isinstance(self.retry_after, str):
            return self.retry_after
        seconds = float(self.phases[0]["seconds"])
        return float(math.ceil(seconds - now % seconds))

    def capacity(self, seconds: float) -> float:
        """How many requests the first phase's limit lets through from the beginning on."""
        phase = self.phases[0]
        if "at_once" in phase:
            return float(phase["at_once"] * seconds / (sum(self.reply) / 2))
        if "count" in phase:
            return float(phase["count"] * math.ceil(seconds / phase["seconds"]))
        return float(phase["burst"] + phase["rate"] * seconds)


class Simulation:
    """Runs actions to their end, and has the figures."""

    def __init__(
        self,
        platform: Platform,
        *,
        actions: int,
        seconds: float,
        every: tuple[int, float] = (10**9, 0.0),
        processes: int = 1,
        connections: int = CONNECTIONS,
        network: tuple[float, float] = NETWORK,
        seed: int = 0,
    ) -> None:
        """``every`` (n, s): the next n actions are started s seconds after those before; else all at once."""
        self.platform, self.seconds, self.network = platform, seconds, network
        self.random = random.Random(seed)
        self.now = 0.0
        self.processes = [Process(self, connections) for _ in range(processes)]
        self.taken = self.refused = self.asked = 0
        self.took: list[float] = []  # s from each action's start to its result
        self.refusals: Counter[int] = Counter()  # how many requests were refused so often before they were taken
        self.longest_refused = 0.0  # s from a request's first refusal until it was taken
        self.last_wait = 0.0  # when somebody had to wait for the last time
        self.taken_by_then = 0
        self.bound_until = 0.0  # when somebody went for the last time who had waited longer than `NOTICEABLE`
        self.asked_too_early = 0  # requests sent before `Retry-After` was over
        self._events: list[tuple[float, int, Waiting]] = []
        self._order = itertools.count()
        for number in range(actions):
            begins = number // every[0] * every[1]
            self.at(begins, self._action(self.processes[number % processes], begins))
        self.running: Waiting
        while self._events:
            self.now, _, waiting = heapq.heappop(self._events)
            if self.now > LONGEST:
                break
            self.running = waiting
            pause = next(waiting, None)
            if pause is not None:
                self.at(self.now + pause, waiting)

    def at(self, when: float, waiting: Waiting) -> None:
        """Go on with it then."""
        heapq.heappush(self._events, (when, next(self._order), waiting))

    @property
    def refused_share(self) -> float:
        """Of all requests."""
        return self.refused / (self.refused + self.taken)

    @property
    def used_share(self) -> float:
        """Of what the platform would have taken while there was a line."""
        return self.taken_by_then / self.platform.capacity(self.last_wait)

    def _action(self, process: Process, begins: float) -> Waiting:
        started = yield from process.request(is_start=True)
        known = self.now
        while True:
            asked = self.now
            seen = yield from process.request(is_start=False)
            if seen - started >= self.seconds:
                break
            interval = poll_interval(self.now - known, self.random.random())
            yield max(interval - (self.now - asked), interval / 2)
        self.took.append(self.now - begins)


class Process:
    """One process: its pace and its connections."""

    def __init__(self, simulation: Simulation, connections: int) -> None:
        self.simulation = simulation
        self.pace = Pace()
        self.free = connections
        self.without_connection: deque[Waiting] = deque()
        self.closed_until = 0.0
        self.went_at: dict[int, float] = {}  # by ticket

    def request(self, *, is_start: bool) -> Waiting:
        """Ask until the platform takes it; return when it did."""
        simulation, pace = self.simulation, self.pace
        first_refused = None
        for refusals in itertools.count():
            yield from self._connection()
            sent_at = simulation.now
            simulation.asked_too_early += sent_at < self.closed_until
            yield simulation.random.uniform(*simulation.network) / 2
            is_taken = simulation.platform.takes(simulation.now, is_start=is_start)
            retry_after = None if is_taken else simulation.platform.told_to_wait(simulation.now)
            handled_at = simulation.now
            if is_taken:
                yield simulation.random.uniform(*simulation.platform.reply)
                simulation.platform.in_flight -= 1
            yield simulation.random.uniform(*simulation.network) / 2
            self._release()
            pace.learn(sent_at, simulation.now, is_refused=not is_taken, retry_after=retry_after)
            if is_taken:
                simulation.taken += 1
                simulation.refusals[refusals] += 1
                if first_refused is not None:
                    simulation.longest_refused = max(simulation.longest_refused, handled_at - first_refused)
                return handled_at
            simulation.refused += 1
            first_refused = simulation.now if first_refused is None else first_refused
            if pace.has_cut_since(sent_at):
                self.closed_until = max(self.closed_until, simulation.now + min(retry_after or 0.0, RETRY_AFTER_MAX))
                if refusals:
                    yield backoff(refusals, simulation.random.random())
            elif retry_after is None:
                yield backoff(refusals + 1, simulation.random.random())
            else:
                yield min(max(retry_after, BACKOFF_MIN), RETRY_AFTER_MAX)
        return None

    def _connection(self) -> Waiting:
        """Wait for the turn, then for a connection; and again, if the platform has refused meanwhile."""
        while True:
            yield from self._turn()
            let_go_at = self.simulation.now
            if self.free:
                self.free -= 1
            else:
                self.without_connection.append(self.simulation.running)
                yield None
            if not self.pace.has_cut_since(let_go_at):
                return
            self._release()

    def _turn(self) -> Waiting:
        simulation, pace = self.simulation, self.pace
        joined_at = simulation.now
        ticket = pace.join(simulation.now)
        if ticket is None:
            return
        while True:
            simulation.asked += 1
            seconds = pace.wait(ticket, simulation.now)
            if not seconds:
                break
            simulation.last_wait, simulation.taken_by_then = simulation.now, simulation.taken
            yield seconds
        pace.leave(ticket)
        self.went_at[ticket] = simulation.now
        if simulation.now - joined_at > NOTICEABLE:
            simulation.bound_until = simulation.now

    def _release(self) -> None:
        if self.without_connection:
            self.simulation.at(self.simulation.now, self.without_connection.popleft())
        else:
            self.free += 1

    @property
    def longest_overtaken(self) -> float:
        """The most seconds by which a ticket went later than one that was taken after it."""
        longest, earliest_after = 0.0, math.inf
        for ticket in sorted(self.went_at, reverse=True):
            longest = max(longest, self.went_at[ticket] - earliest_after)
            earliest_after = min(earliest_after, self.went_at[ticket])
        return longest


def simulate(case: dict[str, Any], seed: int = 0) -> Simulation:
    """Run one case of ``data/pacing.json``.

    What a case expects: ``ends_within``, s for each action from its start to its result; ``bound_until``, s after which
    nobody has a noticeable wait; ``refused_at_most``, a share of all requests; ``used_at_least``, a share of what the
    platform would take; ``one_refused_at_most``, how often one request is refused.
    """
    return Simulation(Platform(**case["platform"]), **case["run"], seed=seed)


if __name__ == "__main__":
    for name, case in CASES.items():
        done = simulate(case)
        used = f"{done.used_share:.0%}" if "used_at_least" in case["expected"] else "-"
        print(  # noqa: T201  # it reports on the terminal
            f"{name:52} {len(done.took):4} back in {max(done.took):5.1f} s, refused {done.refused_share:3.0%}, "
            f"used {used:>4}, one at most {max(done.refusals)} times and {done.longest_refused:5.1f} s, "
            f"bound until {done.bound_until:5.1f} s, asked {done.asked / (done.taken + done.refused):4.1f} times"
        )
