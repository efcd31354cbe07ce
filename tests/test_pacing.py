"""How fast a platform lets itself be asked: the rules one by one, and what comes of them on simulated platforms."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest

from zamp_sdk.action_executor import pacing
from zamp_sdk.action_executor.pacing import Pace, pace_of

from .pacing_simulation import CASES, simulate


def limiting(*, taken: int = 0, retry_after: float | None = 1.0) -> Pace:
    """A pace whose platform has taken so many requests in the last second, and then refused some, at 100 s."""
    pace = Pace()
    for number in range(taken):
        pace.learn(99.1, 99.2 + 0.7 * number / taken)
    strays = 0
    while not pace.learn(99.9, 100.0, is_refused=True, retry_after=retry_after):
        strays += 1
    assert strays <= 0.12 * taken
    return pace


def join(pace: Pace, count: int, now: float) -> list[int]:
    """Take so many places in the line."""
    tickets = [pace.join(now) for _ in range(count)]
    return [ticket for ticket in tickets if ticket is not None]


def go(pace: Pace, tickets: list[int], now: float, until: float) -> dict[int, float]:
    """Let waiters sleep and ask as they are told, and leave once let go; return when each ticket went."""
    asks_at = dict.fromkeys(tickets, now)
    went_at: dict[int, float] = {}
    while asks_at:
        ticket = min(asks_at, key=lambda waiter: (asks_at[waiter], waiter))
        now = asks_at[ticket]
        if now > until:
            break
        seconds = pace.wait(ticket, now)
        if seconds:
            asks_at[ticket] = now + seconds
        else:
            went_at[ticket] = now
            pace.leave(ticket)
            del asks_at[ticket]
    return went_at


@pytest.mark.parametrize("name", CASES)
def test_simulated_platforms(name: str) -> None:
    """Every action comes back in time, the line keeps its order and each ``Retry-After``, and few are refused."""
    case: dict[str, Any] = CASES[name]
    expected = case["expected"]

    done = simulate(case)

    assert len(done.took) == case["run"]["actions"]
    assert done.asked_too_early == 0
    assert max(process.longest_overtaken for process in done.processes) <= pacing.NAP_MIN
    assert max(done.took) <= expected["ends_within"]
    assert done.refused_share <= expected["refused_at_most"]
    assert max(done.refusals) <= expected["one_refused_at_most"]
    assert done.longest_refused < 300
    assert done.bound_until <= expected["bound_until"]
    if "used_at_least" in expected:
        assert done.used_share >= expected["used_at_least"]


def test_a_moment_of_refusals_costs_less_than_the_same_time_again() -> None:
    """Where everything is refused for 0.3 s, actions of 1 s end within twice the time that they take without it."""
    undisturbed = max(simulate(CASES["nothing limits"]).took)

    for name in ("everything refused for the first 0.3 s", "everything refused from 0.5 to 0.8 s"):
        assert max(simulate(CASES[name]).took) <= 2 * undisturbed


def test_nobody_waits_before_the_first_refusal() -> None:
    """However many are sent at once, there are no tickets until the platform refuses one."""
    pace = Pace()

    for number in range(1000):
        assert pace.join(number / 1e6) is None
        assert not pace.learn(number / 1e6, number / 1e6 + 0.1)

    assert not pace.is_limiting
    assert pace.rate is None


def test_the_first_refusal_tells_what_the_platform_takes() -> None:
    """The rate is what was taken in the last second, with the replies that were on their way when it refused."""
    pace = limiting(taken=60)
    assert pace.rate == pytest.approx(60)

    for _ in range(20):
        pace.learn(99.95, 100.01)

    assert pace.is_limiting
    assert pace.rate == pytest.approx(80)


def test_few_that_were_taken_say_little() -> None:
    """Where others have just used up the limit, whoever was taken twice is not held to two requests a second."""
    pace = limiting(taken=2)

    went_at = go(pace, join(pace, 40, 100.0), 100.0, until=120.0)

    assert max(went_at.values()) < 104


def test_few_refusals_among_many_are_no_limit() -> None:
    """Up to one refusal in ten cuts nothing, and its Retry-After is for who met it; one more tells of a limit."""
    pace = Pace()
    for number in range(90):
        pace.learn(99.1, 99.2 + 0.7 * number / 90)
    for number in range(10):
        assert not pace.learn(99.9, 100.0 + number / 1e4, is_refused=True, retry_after=9)
    assert (pace.is_limiting, pace.has_cut_since(99.9), pace.join(100.1)) == (False, False, None)
    assert pace.learn(99.9, 100.0, is_refused=True, retry_after=9)
    assert (pace.is_limiting, pace.has_cut_since(99.9), pace.has_cut_since(100.1)) == (True, True, False)


def test_refusals_of_one_moment_are_one() -> None:
    """Fifty requests that were under way together and refused cut the rate once."""
    one, fifty = limiting(taken=60), limiting(taken=60)

    for number in range(49):
        assert not fifty.learn(99.95, 100.0 + number / 1e4, is_refused=True)

    assert fifty.rate == one.rate
    assert go(fifty, join(fifty, 50, 100.1), 100.1, 110) == go(one, join(one, 50, 100.1), 100.1, 110)


def test_a_later_refusal_cuts_again() -> None:
    """What is refused after it was sent at the rate makes the rate fall below that."""
    pace = limiting(taken=60)
    tickets = join(pace, 400, 100.0)
    gone = go(pace, tickets, 100.0, 103.0)
    pace.learn(102.9, 102.95)

    pace.learn(103.0, 103.1, is_refused=True)

    assert pace.rate == pytest.approx(60, rel=0.01)  # 2 s after the pause the curve is back at the peak
    turns = go(pace, [ticket for ticket in tickets if ticket not in gone], 103.1, 110)
    in_one_second = sum(104.0 <= went < 105.0 for went in turns.values())
    assert 0.75 * 60 <= in_one_second < 60


@pytest.mark.parametrize(("retry_after", "begins"), [(None, 100.1), (0.0, 100.1), (1.0, 101.0), (1e9, 220.0)])
def test_nobody_goes_before_retry_after_is_over(retry_after: float | None, begins: float) -> None:
    """The whole line waits for ``Retry-After``, for 120 s at most; without one for a moment."""
    pace = limiting(taken=60, retry_after=retry_after)

    turns = go(pace, join(pace, 100, 100.0), 100.0, 300)

    assert len(turns) == 100
    assert begins <= min(turns.values()) <= begins + 0.2


def test_the_longest_retry_after_counts() -> None:
    """A refusal that comes later and asks for more is heeded; one that asks for less changes nothing."""
    pace = limiting(taken=60, retry_after=5)
    pace.learn(99.9, 100.1, is_refused=True, retry_after=10)
    pace.learn(99.9, 100.2, is_refused=True, retry_after=1)
    pace.learn(100.1, 100.3, is_refused=True)  # sent by a thread that had just missed the first refusal

    turns = go(pace, join(pace, 1, 100.3), 100.3, 200)

    assert 110.1 <= min(turns.values()) <= 110.3


def test_who_was_let_go_and_has_not_gone_waits_for_a_new_pause() -> None:
    """A refusal that comes between a turn and its waiter's asking holds that waiter, too."""
    pace = limiting(taken=60)
    first, second = join(pace, 2, 100.5)
    assert pace.wait(first, 103.0) == 0.0
    assert pace.wait(second, 103.0) == 0.0

    pace.learn(103.0, 103.1, is_refused=True, retry_after=2)

    assert pace.wait(second, 103.1) == pytest.approx(2.0)


def test_the_pause_doubles_while_nothing_is_taken() -> None:
    """Where nothing is taken between refusals, the pauses grow to 5 s, and the rate stays what it was."""
    pace = limiting(taken=60, retry_after=None)
    now, pauses = 100.0, []

    for _ in range(10):
        (ticket,) = join(pace, 1, now)
        (sent_at,) = go(pace, [ticket], now, now + 60).values()
        pauses.append(sent_at - now)
        now = sent_at + 0.01
        pace.learn(sent_at, now, is_refused=True)

    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0], abs=0.1)
    assert pace.rate == pytest.approx(60)


def test_first_come_first_served() -> None:
    """Turns come in the order of the line, at the rate and not at once."""
    pace = limiting(taken=100)

    turns = go(pace, join(pace, 200, 100.0), 100.0, 200)

    assert list(turns) == sorted(turns)
    assert max(turns.values()) - 101.0 == pytest.approx(2.25, abs=0.3)  # the curve's 2 s to the peak, and the ramp


def test_given_up_places_cost_no_time() -> None:
    """Where 990 of 1,000 give up, the last ten get their turns as if they had been the first."""
    pace = limiting(taken=60)
    tickets = join(pace, 1000, 100.0)
    for ticket in tickets[:990]:
        pace.leave(ticket)
    assert pace.waiting == 10

    alone = limiting(taken=60)

    turns = go(pace, tickets[990:], 100.0, 200)
    expected = go(alone, join(alone, 10, 100.0), 100.0, 200)

    assert max(turns.values()) == pytest.approx(max(expected.values()), abs=pacing.NAP_MIN)
    assert len(turns) == 10
    assert pace.waiting == 0


def test_giving_up_lets_no_burst_through() -> None:
    """Where every second of 400 gives up, the others go as 200 would."""
    pace = limiting(taken=100)
    tickets = join(pace, 400, 100.0)
    for ticket in tickets[::2]:
        pace.leave(ticket)

    turns = sorted(go(pace, tickets[1::2], 100.0, 200).values())

    assert len(turns) == 200
    assert turns[-1] - 101.0 == pytest.approx(2.25, abs=0.3)
    assert all(turns[number + 30] - turns[number] >= 0.1 for number in range(170))


def test_waiters_that_stop_asking_hold_up_nobody() -> None:
    """Those whose event loop has stopped keep their turns, and all others get theirs."""
    pace = limiting(taken=60)
    tickets = join(pace, 100, 100.0)

    turns = go(pace, tickets[50:], 100.0, 200)

    assert len(turns) == 50
    assert pace.waiting == 50
    assert [pace.wait(ticket, 200.0) for ticket in tickets[:50]] == [0.0] * 50


def test_a_quiet_time_saves_up_no_burst() -> None:
    """After 30 s without a request one may go at once, and the next has to wait."""
    pace = limiting(taken=100)
    pace.leave(join(pace, 1, 100.0)[0])

    first, second = join(pace, 2, 130.0)

    assert pace.wait(first, 130.0) == 0.0
    assert pace.wait(second, 130.0) > 0.0


def test_a_rate_that_nobody_needs_does_not_grow() -> None:
    """After half a minute of two requests a second, a hundred at once go as slowly as right after the refusal."""
    busy, light = limiting(taken=60), limiting(taken=60)
    for number in range(60):
        now = 102.0 + number / 2
        (ticket,) = join(light, 1, now)
        assert ticket in go(light, [ticket], now, now + 0.1)

    expected = max(go(busy, join(busy, 100, 102.0), 102.0, 200).values()) - 102.0
    took = max(go(light, join(light, 100, 132.0), 132.0, 200).values()) - 132.0

    assert took == pytest.approx(expected, rel=0.1)


def test_a_clock_that_was_read_too_early_counts_no_time_twice() -> None:
    """A thread that asks with an older time than another has asked with gets nobody a turn."""
    pace = limiting(taken=100)
    first, *_, last = join(pace, 1000, 100.0)
    pace.wait(first, 101.5)
    let_go = [ticket for ticket in range(first, last) if not pace.wait(ticket, 101.5)]

    for _ in range(20):
        pace.wait(first, 101.4)
        pace.wait(first, 101.5)

    assert [ticket for ticket in range(first, last) if not pace.wait(ticket, 101.5)] == let_go


def test_a_process_that_was_frozen_comes_back_without_a_burst() -> None:
    """Ten minutes in which nobody asked let go as many as a tenth of a second does, and the rate has not grown."""
    pace = limiting(taken=100)
    tickets = join(pace, 500, 100.0)
    turns = go(pace, tickets, 100.0, 102.0)

    waiting = [ticket for ticket in tickets if ticket not in turns]
    let_go = [ticket for ticket in waiting if pace.wait(ticket, 702.0) == 0.0]

    assert len(let_go) <= 0.1 * 100
    assert len(go(pace, waiting, 702.0, 704.0)) <= 2 * 1.5 * 100


def test_a_limit_is_forgotten_when_nobody_has_waited_for_a_minute() -> None:
    """The reply that comes a minute after the last wait says so, once, and then nobody gets a ticket."""
    pace = limiting(taken=60)
    turns = go(pace, join(pace, 10, 100.0), 100.0, 200)
    last = max(turns.values())

    assert not pace.learn(last, last + 50)
    assert pace.join(last + 50) is not None
    pace.leave(11)
    assert pace.learn(last + 61, last + 61.1)
    assert not pace.learn(last + 61, last + 61.2)

    assert not pace.is_limiting
    assert pace.join(last + 62) is None


def test_a_limit_is_not_forgotten_while_somebody_waits() -> None:
    """However long ago the last refusal was, a line stays a line."""
    pace = limiting(taken=60)
    join(pace, 1, 100.0)

    assert not pace.learn(200.0, 200.1)

    assert pace.is_limiting


def test_threads_share_one_line() -> None:
    """In several threads at once every waiter gets a ticket of its own and its turn."""
    pace = Pace()
    pace.learn(time.monotonic(), time.monotonic(), is_refused=True, retry_after=0)
    went: list[int] = []

    def work() -> None:
        for _ in range(50):
            ticket = pace.join(time.monotonic())
            assert ticket is not None
            while seconds := pace.wait(ticket, time.monotonic()):
                time.sleep(seconds)
            pace.leave(ticket)
            pace.learn(time.monotonic(), time.monotonic())
            went.append(ticket)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(went) == list(range(1, 401))
    assert pace.waiting == 0


def test_each_platform_and_token_has_one_pace() -> None:
    """The same platform and token share a pace, and another token or platform has its own."""
    pace = pace_of("https://one.example", "token-1")

    assert pace_of("https://one.example", "token-1") is pace
    assert pace_of("https://one.example", "token-2") is not pace
    assert pace_of("https://two.example", "token-1") is not pace


def test_a_process_with_many_tokens_keeps_few_paces() -> None:
    """Who has not been asked for while 64 others were is forgotten."""
    pace = pace_of("https://one.example", "token-1")

    for number in range(pacing.PACES_KEPT):
        pace_of("https://one.example", f"another-{number}")

    assert pace_of("https://one.example", "token-1") is not pace


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_begins_anew() -> None:
    """A child that is forked while another thread holds a pace's lock does not wait for that thread."""
    program = """
        import os, sys, warnings
        from zamp_sdk.action_executor.pacing import pace_of

        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forking while threads exist: here none does
        pace = pace_of("https://one.example", "token")
        with pace._lock:
            child = os.fork()
            if child == 0:
                pace_of("https://one.example", "token").learn(1.0, 2.0, is_refused=True)
                os._exit(0)
        sys.exit(os.waitpid(child, 0)[1])
    """

    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=30)
