"""How late a caller is told, and after how many polls: a table, computed by following actions on a simulated clock."""

from __future__ import annotations

import random
import statistics
from typing import Callable

import pytest

from zamp_sdk.action_executor import lifecycle
from zamp_sdk.action_executor.replies import ActionReply

RUNNING = ActionReply(200, status="RUNNING")

# How long the action takes; the mean and the worst lateness, in s too; and the mean number of polls.
TABLE = [
    (0.1, 0.053, 0.11, 2.6),
    (0.3, 0.05, 0.11, 4.6),
    (1, 0.12, 0.34, 9.7),
    (3, 0.25, 0.63, 15),
    (10, 0.48, 1.2, 25),
    (30, 0.83, 2.1, 41),
    (120, 1.65, 4.1, 78),
    (600, 3.7, 9.2, 170),
    (3_600, 9.3, 23, 409),
    (10_800, 14.9, 33, 708),
]


def follow(seconds: float, jitter: Callable[[], float]) -> tuple[float, int]:
    """Follow an action that takes so long; return how late its end was seen, and by which poll."""
    now = 0.0
    polls = 0
    steps = lifecycle.follow(
        "act-1", clock=lambda: now, asking_clock=lambda: now, jitter=jitter, started_at=0.0, limit=float("inf")
    )
    step = next(steps)
    while True:
        if isinstance(step, lifecycle.Send):
            polls += 1
            if now >= seconds:
                return now - seconds, polls
            step = steps.send(RUNNING)
        else:
            now += step.seconds
            step = next(steps)


@pytest.mark.parametrize(("seconds", "mean", "worst", "polls"), TABLE)
def test_lateness_and_polls(seconds: float, mean: float, worst: float, polls: float) -> None:
    """Around each duration callers are told as late as the table says, after as many polls."""
    chance = random.Random(0)
    # From 4/5 to 5/4 of the duration: otherwise the first polls, whose jitter is small, would fall on the same side.
    told = [follow(seconds * (0.8 + 0.45 * number / 100), chance.random) for number in range(100)]

    assert statistics.mean(late for late, _ in told) == pytest.approx(mean, rel=0.15)
    assert max(late for late, _ in told) <= worst
    assert statistics.mean(count for _, count in told) == pytest.approx(polls, rel=0.05)


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_no_result_is_later_than_30_percent_or_0_15_seconds(jitter: float) -> None:
    """From 0.05 s to 3 h the larger of 30 % of the action's own time and 0.15 s is never exceeded, at any jitter."""
    durations = [0.05 * (10_800 / 0.05) ** (step / 100) for step in range(101)]

    late = {seconds: follow(seconds, lambda: jitter)[0] for seconds in durations}

    assert {seconds: by for seconds, by in late.items() if not 0 <= by <= max(0.15, 0.3 * seconds)} == {}


def test_an_action_that_has_ended_is_seen_by_the_first_poll() -> None:
    """The first poll follows the start at once."""
    assert follow(0.0, random.Random(0).random) == (0.0, 1)


@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_jitter_changes_the_number_of_polls_by_a_tenth(jitter: float) -> None:
    """Even dice that always fall the same way cost or save little more than a tenth of the polls."""
    assert follow(600, lambda: jitter)[1] == pytest.approx(follow(600, lambda: 0.5)[1], rel=0.12)


@pytest.mark.parametrize(
    ("elapsed", "interval"),
    [(0.0, 0.1), (0.4, 0.1), (1.0, 0.25), (1.44, 0.36), (4.0, 0.6), (100.0, 3.0), (10_000.0, 30.0), (1e9, 30.0)],
)
def test_intervals_grow_from_a_tenth_of_a_second_to_half_a_minute(elapsed: float, interval: float) -> None:
    """The interval is a quarter of the time elapsed, then 0.3 times its root, between 0.1 and 30 s."""
    assert lifecycle.poll_interval(elapsed, 0.5) == pytest.approx(interval)
    assert lifecycle.poll_interval(elapsed, 0.0) == pytest.approx(0.9 * interval)
    assert lifecycle.poll_interval(elapsed, 1.0) == pytest.approx(1.1 * interval)
