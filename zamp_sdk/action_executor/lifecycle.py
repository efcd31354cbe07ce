"""The life of an action as plain data: what to send next, how long to wait, when to stop. Pure.

A generator yields *steps* (``Send``, ``Sleep``), is sent what became of each ``Send`` (an ``ActionReply`` or a
``Failure``, whose texts are fit to be shown), and returns what was asked for or raises. ``clock`` (monotonic seconds),
``asking_clock`` (the same, but it stands still while a request waits its turn) and ``jitter`` (0 to 1) are arguments.

- The POST is sent again only if the action provably cannot exist: nothing was sent, or the platform refused it.
- A poll is sent again after whatever may pass.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Callable, Generator, Mapping, NamedTuple, Union

from .. import transport
from ..errors import ActionFailedError, ActionTimeoutError, HttpClientError
from ..transport import Failure
from .models import ActionStatus, RetryPolicy
from .params import Call, poll_call
from .redaction import Redactor, one_line
from .replies import ActionReply, read_poll, read_start

if TYPE_CHECKING:
    from datetime import timedelta

REQUEST_TIMEOUT = 30.0  # s for one request as a whole
START_TRIES, START_WINDOW = 4, 60.0  # a start that does not get through is tried this often, within this many s
REFUSAL_WINDOW = 300.0  # s for which a start is tried after its first refusal: as long as a poll
POLL_FAILURE_WINDOW = 300.0  # s without one good reply before a wait is given up
POLL_NOT_FOUND_GRACE = 10.0  # s after its start in which a platform may not know its own action
POLL_MIN, POLL_MAX = 0.1, 30.0  # s between two polls: what a platform can be asked for, and what a person will wait
POLL_FRACTION = 0.25  # of the time elapsed: with the jitter, no result is over 30 % late
POLL_ROOT = 0.3  # s, times the root of the seconds elapsed: about 170 polls in 10 minutes
POLL_JITTER = 0.1  # of the interval, either way: callers that started together do not poll together
BACKOFF_MIN, BACKOFF_MAX = 0.5, 30.0  # s
RETRY_AFTER_MAX = 120.0  # s that a poll may be told to wait
MINIMUM_WAIT_LIMIT = 3600.0  # s

Answer = Union[ActionReply, Failure]
Reader = Callable[[transport.Reply, Redactor, float], ActionReply]


class Send(NamedTuple):
    """Send this request, within ``timeout`` seconds, and have ``read`` make an answer of what comes back."""

    call: Call
    read: Reader
    timeout: float = REQUEST_TIMEOUT
    patience: float = math.inf
    """Seconds until the answer has to be there, what it waits for before it is sent included."""


class Sleep(NamedTuple):
    """Wait this many seconds; ``failure`` says why, if one is the reason, and ``warning`` what people should know."""

    seconds: float
    failure: str | None = None
    warning: str | None = None


class Turn(NamedTuple):
    """A request waits its turn, beside so many others; the executor tells it to whoever observes the steps."""

    seconds: float
    waiting: int


STARTING = "starting the action"  # what a message says was being done

Step = Union[Send, Sleep, Turn]
Steps = Generator[Union[Send, Sleep], Any, ActionReply]
Clock = Callable[[], float]
Jitter = Clock


def start(call: Call, *, asking_clock: Clock, jitter: Jitter) -> Steps:
    """Start an action, and return the platform's reply, whose id is one."""
    unsent_since = refused_since = None
    unsent = refused = 0  # tries: those in a row that did not get through, and those refused
    while True:
        asked = asking_clock()
        answer: Answer = yield Send(call, read_start)
        if isinstance(answer, ActionReply) and answer.problem is None:
            return answer
        now = asking_clock()
        error = _http_error(STARTING, answer, may_have_started=may_have_started(answer))
        if isinstance(answer, ActionReply) and is_refusal(answer):
            refused_since = now if refused_since is None else refused_since
            unsent_since, unsent, refused = None, 0, refused + 1
            left = refused_since + REFUSAL_WINDOW - now
            if left <= 0:
                raise error
            wait = min(_wait_after(answer, refused, jitter()), left)
        elif isinstance(answer, Failure) and answer.may_retry and not answer.may_have_left:
            unsent_since = asked if unsent_since is None else unsent_since
            unsent += 1
            wait = backoff(unsent, jitter())
            if unsent == START_TRIES or now - unsent_since + wait > START_WINDOW:
                raise error
        else:
            raise error
        yield Sleep(wait, error.message)


def follow(
    action_id: str,
    *,
    clock: Clock,
    asking_clock: Clock,
    jitter: Jitter,
    started_at: float | None,
    limit: float,
    grace: float = math.inf,
) -> Steps:
    """Poll an action until it ends, and return the reply that says so.

    Args:
        action_id: The action.
        clock: Monotonic seconds.
        asking_clock: Those without the ones in which a request waited its turn.
        jitter: From 0 to 1.
        started_at: By ``clock``; None if the action was started elsewhere.
        limit: Seconds to wait, and may be inf.
        grace: Seconds beyond the limit for a poll under way, whatever it waits for.
    """
    call, read = poll_call(action_id), functools.partial(read_poll, action_id)
    began, failing_since = clock(), asking_clock()
    failures = 0
    status = ""
    has_warned = False
    while True:
        asked, began_asking = clock(), asking_clock()
        left = began + limit - asked
        answer: Answer = yield Send(call, read, max(1.0, min(REQUEST_TIMEOUT, left)), left + grace)
        now = clock()
        error = warning = None
        if isinstance(answer, ActionReply) and answer.problem is None:
            if is_over(answer):
                return answer
            status, failures = str(answer.status), 0
            if status not in ActionStatus.__members__ and not has_warned:
                has_warned = True
                warning = f"{_unknown(action_id, status)}; waiting for one that it does know"
            if answer.retry_after is not None:
                wait = min(max(answer.retry_after, POLL_MIN), POLL_MAX)
            else:
                interval = poll_interval(now - (began if started_at is None else started_at), jitter())
                # From one sending to the next; but a slow platform is left half of it in peace.
                wait = max(interval - (now - asked), interval / 2)
        else:
            error = _http_error(_asking(action_id), answer, action_id=action_id)
            is_new = started_at is not None and now - started_at < POLL_NOT_FOUND_GRACE
            may_retry = answer.may_retry or (is_new and error.status_code == 404)  # it may not know at once what is new
            if failures == 0:
                failing_since = began_asking  # not the last good reply's time: a process may freeze
            left = failing_since + POLL_FAILURE_WINDOW - asking_clock()
            if left <= 0 or not may_retry:
                raise error
            failures += 1
            wait = min(_wait_after(answer, failures, jitter()), left)
        if now - began >= limit:
            raise _timeout_error(action_id, status, now - began) from error
        yield Sleep(min(wait, began + limit - now), error.message if error else None, warning)


def look(action_id: str) -> Steps:
    """Ask once how an action stands; the reply's status is one that this version knows."""
    answer: Answer = yield Send(poll_call(action_id), functools.partial(read_poll, action_id))
    if isinstance(answer, Failure) or answer.problem is not None:
        raise _http_error(_asking(action_id), answer, action_id=action_id)
    if answer.status not in ActionStatus.__members__:
        answer = answer._replace(problem=_unknown(action_id, str(answer.status)))
        raise _http_error(_asking(action_id), answer, action_id=action_id)
    return answer


def is_refusal(reply: ActionReply) -> bool:
    """Whether a platform has not done what it was asked, because it is asked for too much (RFC 6585, 4)."""
    return reply.status_code == 429 or (reply.status_code == 503 and reply.retry_after is not None)


def may_have_started(answer: Answer) -> bool:
    """Whether an action may exist after such an answer to its start."""
    if isinstance(answer, Failure):
        return answer.may_have_left
    code = answer.status_code
    if 200 <= code < 300:
        return True
    # A platform or a gateway that answers like this may have passed the start on.
    return not is_refusal(answer) and (code < 200 or code >= 500 or code in (301, 302, 303, 408, 425))


def is_over(reply: ActionReply) -> bool:
    """Whether an action has ended; with a status that nobody knows it has if there is an error or a result."""
    if reply.status in ActionStatus.__members__:
        return reply.status != ActionStatus.RUNNING
    return reply.status is not None and (reply.error is not None or reply.result is not None)


def outcome(action_id: str, reply: ActionReply, action_name: str | None = None) -> Any:
    """Return the result of an action that has ended; or raise an ActionFailedError."""
    if reply.status == ActionStatus.COMPLETED:
        return reply.result  # the action's own, whatever is in it
    action, status = name_of(action_id, action_name), str(reply.status)
    if status in ActionStatus.__members__:
        message = f"{action} ended as {status}: {reply.reason}"
    else:
        message = f"{_unknown(action_id, status)}, and ended: {reply.reason}"
    raise ActionFailedError(message, action_id=action_id, status=status, error=reply.error)


def name_of(action_id: str, action_name: str | None) -> str:
    """Name an action for people: by its id, and by its name where that is known."""
    return f"action {action_id}" + (f" ({one_line(action_name)})" if action_name else "")


@functools.lru_cache(maxsize=8)
def wait_limit(policy: RetryPolicy | None, start_to_close_timeout: timedelta | None) -> float:
    """Seconds after which the platform must have ended the action by itself, and at least an hour.

    N attempts of the start-to-close timeout and the policy's, or the default policy's, waits between them.
    """
    policy = policy or RetryPolicy.default()
    if policy.maximum_attempts == 0:
        return math.inf
    attempts = min(policy.maximum_attempts, 10**12)  # a float can count those
    interval, longest = policy.initial_interval.total_seconds(), policy.maximum_interval.total_seconds()
    total = 0.0
    for _ in range(min(attempts - 1, 10_000)):  # millions need no adding up
        total += interval
        interval = min(interval * policy.backoff_coefficient, longest)
    attempt = start_to_close_timeout.total_seconds() if start_to_close_timeout else 0.0
    return max(MINIMUM_WAIT_LIMIT, total + max(0, attempts - 10_001) * longest + attempts * attempt)


def poll_interval(elapsed: float, jitter: float) -> float:
    """Seconds from one poll to the next: a share of the time elapsed, from 1.44 s on of its root, within bounds.

    Why the root: a second of lateness costs the caller as much after an hour as after a second, and a poll costs the
    platform the same at any time. Where durations spread over all scales, the sum of both is least if the interval
    grows with the root of the time elapsed. What is over sooner is polled by a share of the time elapsed: its caller
    compares the lateness with how long the action took.

    Args:
        elapsed: Seconds since the action's start.
        jitter: A random number from 0 to 1.
    """
    interval = min(POLL_FRACTION * elapsed, POLL_ROOT * math.sqrt(elapsed), POLL_MAX)
    return max(POLL_MIN, interval) * (1 - POLL_JITTER + 2 * POLL_JITTER * jitter)


def backoff(failures: int, jitter: float) -> float:
    """Seconds to wait after so many failures in a row: exponential, with full jitter."""
    return jitter * min(BACKOFF_MAX, BACKOFF_MIN * 2.0 ** min(failures - 1, 16))


def _wait_after(answer: Answer, failures: int, jitter: float) -> float:
    """Seconds to wait after so many failures in a row: as the platform asks, within bounds, or by the backoff.

    Who was refused takes a place in the line again where ``Retry-After`` is kept for all; a second time, a bit later.
    """
    if isinstance(answer, ActionReply) and answer.is_paced:
        return backoff(failures - 1, jitter) if failures > 1 else 0.0
    if isinstance(answer, ActionReply) and answer.retry_after is not None:
        return min(max(answer.retry_after, BACKOFF_MIN), RETRY_AFTER_MAX)
    return backoff(failures, jitter)


def _http_error(
    doing: str, answer: Answer, *, action_id: str | None = None, may_have_started: bool = False
) -> HttpClientError:
    doubt = "; the action may have started all the same, so it was not sent again" if may_have_started else ""
    if isinstance(answer, Failure):
        message = f"{doing}: {answer.message}{doubt}"
        error = HttpClientError(message, action_id=action_id, may_have_started=may_have_started)
        error.__cause__ = answer.cause
        return error

    from http.client import responses  # only errors need the phrase

    code = answer.status_code
    title = f"HTTP {code} {responses.get(code, '')}".rstrip()
    return HttpClientError(
        f"{doing}: {title}: {answer.problem}{_advice(doing, code, answer.headers)}{doubt}",
        status_code=code,
        response_body=answer.body,
        headers=answer.headers,
        action_id=action_id or answer.action_id,
        may_have_started=may_have_started,
    )


def _advice(doing: str, code: int, headers: Mapping[str, str]) -> str:
    """Say what a person should do about a refusal."""
    advice = ""
    if 300 <= code < 400:
        target = one_line(headers.get("location", "")) or "nowhere"
        advice = f"redirects are not followed; this one points to {target}; check the base URL"
    elif code == 401:
        advice = "check the token"
    elif code == 403:
        advice = "the token may lack the permission, or something between here and the platform may forbid it"
    elif code == 404 and doing == STARTING:
        advice = "check the action's name, and the base URL with its path"
    elif code == 404:
        advice = "check the id, and that the base URL is of the platform where the action was started"
    elif code == 407:
        advice = "a proxy wants a user name and a password, in HTTPS_PROXY or HTTP_PROXY"
    return f" ({advice})" if advice else ""


def _asking(action_id: str) -> str:
    return f"asking for action {action_id}"


def _unknown(action_id: str, status: str) -> str:
    return (
        f"action {action_id} has the status {one_line(status)!r}, which this version of zamp-sdk does not know "
        "(a newer one may)"
    )


def _timeout_error(action_id: str, status: str, waited: float) -> ActionTimeoutError:
    """The error that says that the wait is over, and that the action is not."""
    message = (
        f"action {action_id} had not ended after {waited:.1f} s; it goes on; to collect its result: "
        f"await ActionExecutor.get_handle({action_id!r}, base_url=..., auth_token=...).result()"
    )
    return ActionTimeoutError(message, action_id=action_id, status=status, waited=waited)
