"""How fast a platform lets itself be asked: one *pace* for each platform and token, shared by all of the process.

A request takes its place in the line *before* it is sent, sleeps as long as ``wait`` says, and asks again; what became
of it is what the pace learns from. Pure: all times are arguments, seconds of one monotonic clock, and nobody is woken.
The pace counts how many of the line it has let go, and a waiter's turn has come when that count has reached its ticket.
So nobody depends on another waiter: not on one in another thread, nor on one whose event loop has stopped. A lock
guards each call, and nobody holds it while waiting.

A *refusal* is a 429, or a 503 with ``Retry-After``. Until the first cut a pace only counts what the platform takes, and
nobody waits. From then on there is a line, first come, first served, and a rate at which it moves.

The *cut*. Fifty requests that were under way together may be refused for one reason. So only the refusal of what was
sent after the last cut makes another. Then:

- A refusal is *stray* if no more than one in ten of the last second's replies is one: of a replica that is out of
  order, say. It cuts nothing, for less speed would not help; who met it waits as long as it asks.
- Nobody is let go before ``Retry-After`` is over. Without one, or with a shorter one, there is a pause of 0.1 s, which
  doubles as long as nothing is taken between two cuts: refusals in a row say when to come back, not how fast to ask.
- The *peak* is the rate at which the refused request was sent; at the first cut, which has no rate before it, what the
  platform took in the last second, replies that were still on their way included. If that is few, the curve begins
  as if they had been 20, for others with the same token may just have used up what there was.

The *curve*. ``t`` seconds after the pause the rate is ``peak * (1 + 0.3 * ((t - 2) / 2) ** 3)``. It begins at 70 % of
the peak, comes quickly near it, stays there for a while because the limit was there, and then leaves it behind faster
and faster, in case the limit has gone: twice the peak after 5 s, twenty times after 10 s. This is CUBIC's idea (RFC
9438, section 4.2) with a rate in place of a window, and with a fixed time of return: what is limited here is how often
one client asks, however many it may ask for, and not a wire's share. In the first quarter of a second the rate rises
from nothing, so that a platform that still refuses is asked by few before its first reply is back. While nobody waits
the curve stands still, for a rate that nobody used has not been tried; when nobody has waited for a minute, the limit
is forgotten.
"""

from __future__ import annotations

import functools
import math
import os
import threading

# The figures are of tests/pacing_simulation.py.
# Of the last second's replies: refusals that are fewer tell of no limit. Where 1.5 % are refused at random, actions
# take about as long as without; if each refusal made a cut, they would take ten times as long. At a limit, 10 % of the
# requests are refused in the long run, and with 0.05 it is 7 %.
STRAY = 0.1
FALL = 0.7  # of the peak is where the curve begins (RFC 9438, section 4.6); with 0.6 or 0.8 all is much the same
# s from there to the peak. At 100 a second 10 % are refused, and a limit that has gone is left behind in 7 s; with 1 s
# it is 14 % and 3 s, with 4 s it is 6 % and 15 s.
RETURN = 2.0
RAMP = 0.25  # s in which the rate rises from nothing: an outage of a minute refuses 5 %, with 0.1 s twice as many
PAUSE_MIN = 0.1  # s: short, because a platform may refuse for a moment only
PAUSE_MAX = 5.0  # s: the end of a long outage is noticed within it
RETRY_AFTER_MAX = 120.0  # s that a platform may tell its callers to wait
RATE_MIN = 1.0  # requests a second; whoever takes fewer is met by the pauses
# Requests a second, where nothing was taken before. 300 actions of 1 s, all refused for a moment at first, then end in
# 2.1 s, with 100 in 5.7 s. Where it is too many, the next cuts correct it.
RATE_UNKNOWN = 1000.0
# Requests a second, where fewer were taken before the first cut. Two processes with 20 actions each, of which one came
# first, then end in 4 s instead of 10 at 40 a second; with 40, platforms that take only a few refuse more.
FIRST_PEAK_MIN = 20.0
SLACK = 0.1  # s whose turns can be made up for when waiters ask late; more would be a burst after a process was frozen
NAP_SHORTEST, NAP_MIN, NAP_MAX = 0.001, 0.05, 2.0  # s between a waiter's questions: 2,000 waiters take 2 % of a CPU
QUIET = 60.0  # s without a waiter after which the limit is forgotten: many platforms count by the minute
PACES_KEPT = 64  # a pace that was forgotten learns anew


class Pace:
    """How fast one platform lets itself be asked, and the line of those who wait for it."""

    def __init__(self) -> None:
        self.is_limiting: bool = False
        """Whether there is a line; else nobody has to wait."""
        self._lock = threading.Lock()
        self._line: set[int] = set()  # the tickets of those who have not left
        self._last_ticket = 0
        self._let_go = 0  # the last ticket whose turn has come
        self._credit = 0.0  # how much of the next one's turn has come
        self._advanced_at = -math.inf  # when the two above were true
        self._peak = 0.0  # requests a second; 0: not known
        self._resumes_at = -math.inf  # where the curve begins
        self._pause = PAUSE_MIN
        self._cut_at = -math.inf
        self._peaked_at = -math.inf  # the last cut that was no repetition
        self._is_first_peak = False
        self._has_taken = False  # anything that was sent after that cut
        self._waited_at = -math.inf
        self._counting_since = -math.inf  # the second before it is `_taken_before`
        self._taken = self._taken_before = 0
        self._refused = self._refused_before = 0

    def has_cut_since(self, then: float) -> bool:
        """Whether there was a cut at that moment or later.

        Then the refusal of what was sent at that moment makes all wait as long as it asks for; and who was let go at
        that moment, and has not been sent yet, joins the line again.
        """
        return self._cut_at >= then

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._line)

    @property
    def rate(self) -> float | None:
        """About how many requests a second the platform takes from this process; None: not known yet."""
        return self._peak or None

    def join(self, now: float) -> int | None:
        """Take a place in the line and return its ticket; None: nothing limits, the request may be sent at once."""
        if not self.is_limiting:  # read without the lock: a request that just misses the first refusal does no harm
            return None
        with self._lock:
            self._advance(now)
            self._last_ticket += 1
            self._line.add(self._last_ticket)
            return self._last_ticket

    def wait(self, ticket: int, now: float) -> float:
        """Return the seconds to sleep before asking again; 0.0 means that it is this ticket's turn."""
        with self._lock:
            self._advance(now)
            if now < self._resumes_at:  # whoever was let go just before, too; and no further, for the rate may change
                self._waited_at = now
                return self._resumes_at - now
            if ticket <= self._let_go:
                return 0.0
            self._waited_at = now
            share = min(1.0, len(self._line) / (self._last_ticket - self._let_go))  # of the line that has not given up
            ahead = share * (ticket - self._let_go - self._credit)
            soonest = min(NAP_MAX, ahead / self._rate(now + NAP_MAX))  # the rate may rise, and others may leave
            return max(soonest, min(NAP_MIN, ahead / self._rate(now)), NAP_SHORTEST)

    def leave(self, ticket: int) -> None:
        """Leave the line, let go or given up; the turn of who has given up is the next one's."""
        with self._lock:
            self._line.discard(ticket)

    def learn(self, sent_at: float, now: float, *, is_refused: bool = False, retry_after: float | None = None) -> bool:
        """Learn that the platform took a request (any reply but a refusal), or refused it.

        Args:
            sent_at: When the request was sent.
            now: When its reply came.
            is_refused: Whether it was a 429, or a 503 with ``Retry-After``.
            retry_after: The seconds that the reply asks to wait, if it does.

        Returns:
            Whether ``is_limiting`` has changed, which is worth a line in the log.
        """
        if not is_refused and not self.is_limiting:  # without the lock: two threads may lose a count, and no more
            self._count(now, taken=1)
            return False
        with self._lock:
            if is_refused:
                return self._learn_refused(sent_at, now, min(retry_after or 0.0, RETRY_AFTER_MAX))
            return self._learn_taken(sent_at, now)

    def _learn_taken(self, sent_at: float, now: float) -> bool:
        self._count(now, taken=1)
        if sent_at > self._peaked_at:
            self._has_taken = True
        elif self._is_first_peak:
            self._peak = max(self._peak, self._recently_taken(now))
        has_ended = self.is_limiting and not self._line and now - self._waited_at > QUIET
        if has_ended:
            self.is_limiting = False
        return has_ended

    def _learn_refused(self, sent_at: float, now: float, retry_after: float) -> bool:
        self._count(now, refused=1)
        if self.is_limiting and sent_at <= self._cut_at:
            self._resumes_at = max(self._resumes_at, now + retry_after)
            return False
        refused, taken = self._recently(now, self._refused, self._refused_before), self._recently_taken(now)
        if refused <= STRAY * (refused + taken):
            return False
        has_begun = not self.is_limiting
        if has_begun or self._has_taken:
            self._peak = self._recently_taken(now) if has_begun else self._curve(sent_at)
            self._peaked_at, self._is_first_peak, self._has_taken = now, has_begun, False
            self._pause = PAUSE_MIN
        else:
            self._pause = min(2 * self._pause, PAUSE_MAX)
        self.is_limiting = True
        self._cut_at = self._waited_at = now
        self._resumes_at = max(self._resumes_at, now + max(retry_after, self._pause))
        return has_begun

    def _curve(self, at: float) -> float:
        since = max(0.0, at - self._resumes_at)
        peak = max(FIRST_PEAK_MIN if self._is_first_peak else RATE_MIN, self._peak or RATE_UNKNOWN)
        return peak * (1 + (1 - FALL) * ((since - RETURN) / RETURN) ** 3)

    def _rate(self, at: float) -> float:
        """How many requests a second are let go at a time after the pause."""
        return max(RATE_MIN, self._curve(at) * min(1.0, (at - self._resumes_at) / RAMP))

    def _advance(self, now: float) -> None:
        """Let go whose turn has come since this was last called."""
        elapsed = max(0.0, now - max(self._advanced_at, self._resumes_at))
        self._advanced_at = max(self._advanced_at, now)  # another thread's clock may have been read a moment later
        if self._let_go == self._last_ticket or elapsed > NAP_MAX:  # nobody waited, or the process was frozen
            self._resumes_at = max(self._resumes_at, min(self._resumes_at + elapsed, now - RAMP))
        rate = self._rate(now)
        self._credit = min(self._credit + elapsed * rate, max(1.0, SLACK * rate))
        while self._credit >= 1 and self._let_go < self._last_ticket:
            self._let_go += 1
            if self._let_go in self._line:  # who has given up takes no turn
                self._credit -= 1
        if self._let_go == self._last_ticket:
            self._credit = min(self._credit, 1.0)  # a quiet time saves up one turn, and no burst

    def _count(self, now: float, *, taken: int = 0, refused: int = 0) -> None:
        if now - self._counting_since >= 1:
            has_gap = now - self._counting_since >= 2
            self._taken_before, self._refused_before = (0, 0) if has_gap else (self._taken, self._refused)
            self._counting_since, self._taken, self._refused = now, 0, 0
        self._taken += taken
        self._refused += refused

    def _recently_taken(self, now: float) -> float:
        return self._recently(now, self._taken, self._taken_before)

    def _recently(self, now: float, count: int, before: int) -> float:
        """How many of these there were in the last second, if those of the second before came evenly."""
        since = now - self._counting_since
        if since < 1:
            return count + before * (1 - since)
        return count * max(0.0, 2 - since)


def pace_of(base_url: str, auth_token: str) -> Pace:
    """Return the pace of a platform for a token, for each token has its own share; the token itself is not kept."""
    return _pace_of(base_url, hash(auth_token))


@functools.lru_cache(maxsize=PACES_KEPT)
def _pace_of(_base_url: str, _token_hash: int) -> Pace:
    return Pace()


if hasattr(os, "register_at_fork"):  # a child would wait for ever for a lock that another thread of its parent held
    os.register_at_fork(after_in_child=_pace_of.cache_clear)
