"""When each SDK polls, on a clock that only sleeping moves: for actions that take too long to wait for."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from typing import Callable, NamedTuple

from zamp_sdk.action_executor import lifecycle

Schedule = Callable[[random.Random], Iterator[float]]


class Told(NamedTuple):
    """How late callers are told, in seconds on average, and by how many polls."""

    lateness: float
    polls: float


def ours(chance: random.Random) -> Iterator[float]:
    """The times of our polls, in seconds after the start."""
    now = 0.0
    while True:
        yield now
        now += lifecycle.poll_interval(now, chance.random())


def official(chance: random.Random) -> Iterator[float]:
    """The times of the official SDK's polls: after 0.1 s, and then 1.5 times as long each time, up to 30 s."""
    now, interval = 0.0, 0.1
    while True:
        now += interval
        yield now
        interval = min(30.0, 1.5 * interval)


def notice(seconds: float, polls: Iterator[float]) -> Told:
    """The first poll that finds an action of so many seconds ended."""
    for count, now in enumerate(polls, 1):
        if now >= seconds:
            return Told(now - seconds, count)
    raise AssertionError("a schedule has no end")


def around(seconds: float, schedule: Schedule, samples: int) -> Told:
    """The mean over durations from 4/5 to 5/4 of these seconds, evenly spread."""
    chance = random.Random(0)
    low, high = 0.8 * seconds, 1.25 * seconds
    told = [notice(low + (high - low) * (number + 0.5) / samples, schedule(chance)) for number in range(samples)]
    return Told(statistics.mean(each.lateness for each in told), statistics.mean(each.polls for each in told))
