"""The life of an action as plain data: what to send next, how long to wait, when to stop. Pure.

A generator yields *steps* (``Send``, ``Sleep``), is sent what became of each ``Send`` (a ``Reply`` or a ``Failure``),
and returns what was asked for or raises. ``clock`` (monotonic seconds) and ``jitter`` (0 to 1) are arguments. So is
``redact``: here, and nowhere else, text that a peer wrote in a reply is put into an error, without the token and on one
printable line; attributes have the whole of it. A ``Failure``'s message comes fit to be shown.

- The POST is sent again only if the action provably cannot exist: nothing was sent, or the platform refused it.
- A poll is sent again after whatever may pass.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Callable, Generator, Mapping, NamedTuple, Union

from ..errors import ActionFailedError, ActionTimeoutError, HttpClientError
from . import wire
from .models import ActionStatus, RetryPolicy
from .redaction import Redactor, one_line
from .wire import ActionReply, Answer, Failure, Reply, Request

if TYPE_CHECKING:
    from datetime import timedelta

REQUEST_TIMEOUT = 30.0  # s for one request as a whole
START_TRIES, START_WINDOW = 4, 60.0  # a start is tried this often, within this many s
POLL_FAILURE_WINDOW = 300.0  # s without one good reply before a wait is given up
POLL_NOT_FOUND_GRACE = 10.0  # s after its start in which a platform may not know its own action
POLL_MIN, POLL_MAX = 0.1, 30.0  # s between two polls: what a platform can be asked for, and what a person will wait
POLL_FRACTION = 0.25  # of the time elapsed: with the jitter, no result is over 30 % late
POLL_ROOT = 0.3  # s, times the root of the seconds elapsed: about 170 polls in 10 minutes
POLL_JITTER = 0.1  # of the interval, either way: callers that started together do not poll together
BACKOFF_MIN, BACKOFF_MAX = 0.5, 30.0  # s
RETRY_AFTER_MAX = 120.0  # s that a refused poll may be told to wait
MINIMUM_WAIT_LIMIT = 3600.0  # s
REASON_SHOWN = 500  # characters of the reason for a failure that a message shows: a long sentence or two


class Send(NamedTuple):
    """Send this request, within ``timeout`` seconds."""

    request: Request
    timeout: float = REQUEST_TIMEOUT


class Sleep(NamedTuple):
    """Wait this many seconds; ``failure`` says why, if one is the reason, and ``warning`` what people should know."""

    seconds: float
    failure: str | None = None
    warning: str | None = None


STARTING = "starting the action"  # what a message says was being done

Step = Union[Send, Sleep]
Steps = Generator[Step, Any, ActionReply]
Clock = Callable[[], float]
Jitter = Clock


def start(request: Request, *, clock: Clock, jitter: Jitter, redact: Redactor) -> Steps:
    """Start an action, and return the platform's reply, whose id is one."""
    began = clock()
    attempt = 0
    while True:
        attempt += 1
        answer: Answer = yield Send(request)
        if isinstance(answer, Reply) and 200 <= answer.status_code < 300:
            return _accepted(answer, redact)
        wait = backoff(attempt, jitter())
        if isinstance(answer, Reply):
            told_to_wait = wire.retry_after(answer.headers)
            refused = answer.status_code == 429 or (answer.status_code == 503 and told_to_wait is not None)
            wait = wait if told_to_wait is None else max(told_to_wait, BACKOFF_MIN)
            may_have_started = not refused and _is_doubtful(answer)
        else:
            refused = answer.retryable and not answer.sent
            may_have_started = answer.sent
        error = _http_error(STARTING, answer, redact, may_have_started=may_have_started)
        if not refused or attempt == START_TRIES or clock() - began + wait > START_WINDOW:
            raise error
        yield Sleep(wait, str(error))


def follow(  # noqa: C901  # the story of a wait, which is easier to follow in one piece
    action_id: str,
    *,
    clock: Clock,
    jitter: Jitter,
    redact: Redactor,
    started_at: float | None,
    limit: float,
) -> Steps:
    """Poll an action until it ends, and return the reply that says so.

    ``started_at`` is by ``clock``, None if the action was started elsewhere; ``limit`` is in seconds, and may be inf.
    """
    request = wire.poll_request(action_id)
    began = failing_since = clock()
    failures = 0
    status = ""
    has_warned = False
    while True:
        asked = clock()
        answer: Answer = yield Send(request, max(1.0, min(REQUEST_TIMEOUT, began + limit - asked)))
        now = clock()
        age = None if started_at is None else now - started_at
        told_to_wait = wire.retry_after(answer.headers) if isinstance(answer, Reply) else None
        reply, problem, may_pass = _read_poll(action_id, answer, age, redact)
        error = warning = None
        if reply is not None:
            if is_over(reply):
                return reply
            status, failures = str(reply.status), 0
            if status not in ActionStatus.__members__:
                status = redact.text(status)
                if not has_warned:
                    warning = f"{_unknown(action_id, status)}; waiting for one that it does know"
                has_warned = True
            if told_to_wait is not None:
                wait = min(max(told_to_wait, POLL_MIN), POLL_MAX)
            else:
                interval = poll_interval(now - began if age is None else age, jitter())
                # From one sending to the next; but a slow platform is left half of it in peace.
                wait = max(interval - (now - asked), interval / 2)
        else:
            error = _http_error(_asking(action_id), answer, redact, problem, action_id=action_id)
            if failures == 0:
                failing_since = asked  # not the last good reply's time: a process may freeze
            if not may_pass or now - failing_since >= POLL_FAILURE_WINDOW:
                raise error
            failures += 1
            wait = backoff(failures, jitter())
            if told_to_wait is not None:
                wait = min(max(told_to_wait, BACKOFF_MIN), RETRY_AFTER_MAX)
            wait = min(wait, failing_since + POLL_FAILURE_WINDOW - now)
        if now - began >= limit:
            raise timeout_error(action_id, status, now - began) from error
        yield Sleep(min(wait, began + limit - now), error.message if error else None, warning)


def look(action_id: str, *, redact: Redactor) -> Steps:
    """Ask once how an action stands; the reply's status is one that this version knows."""
    answer: Answer = yield Send(wire.poll_request(action_id))
    reply, problem, _ = _read_poll(action_id, answer, None, redact)
    if reply is not None and reply.status in ActionStatus.__members__:
        return reply
    if reply is not None:
        problem = _unknown(action_id, redact.text(str(reply.status)))
    raise _http_error(_asking(action_id), answer, redact, problem, action_id=action_id)


def is_over(reply: ActionReply) -> bool:
    """Whether an action has ended; with a status that nobody knows it has if there is an error or a result."""
    if reply.status in ActionStatus.__members__:
        return reply.status != ActionStatus.RUNNING
    return reply.status is not None and (reply.error is not None or reply.result is not None)


def outcome(action_id: str, reply: ActionReply, *, redact: Redactor, action_name: str | None = None) -> Any:
    """Return the result of an action that has ended; or raise an ActionFailedError."""
    if reply.status == ActionStatus.COMPLETED:
        return reply.result  # the action's own, whatever is in it
    action = name_of(action_id, action_name)
    status, error = str(reply.status), redact.json(reply.error)
    if status in ActionStatus.__members__:
        message = f"{action} ended as {status}: {one_line(wire.reason(error), REASON_SHOWN)}"
    else:
        status = redact.text(status)
        message = f"{_unknown(action_id, status)}, and ended: {one_line(wire.reason(error), REASON_SHOWN)}"
    raise ActionFailedError(message, action_id=action_id, status=status, error=error)


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


def _accepted(answer: Reply, redact: Redactor) -> ActionReply:
    """Take the id out of a successful start."""
    reply, problem, action_id = answer.action, answer.problem, None
    if reply is not None:
        if wire.is_action_id(reply.id):
            action_id = reply.id
        elif reply.id not in (None, "") and problem is None:
            problem = f"the reply has no usable id, but {one_line(redact.text(wire.reason(reply.id)))}"
        if reply.error and reply.status is None:
            problem = one_line(redact.text(wire.reason(reply.error)), REASON_SHOWN)
        elif action_id is not None and problem is None:
            return reply
    problem = problem or "the reply has no usable id"
    raise _http_error(STARTING, answer, redact, problem, action_id=action_id, may_have_started=True)


def _is_doubtful(reply: Reply) -> bool:
    """Whether a platform or a gateway that answers like this may have passed the start on."""
    code = reply.status_code
    return code < 200 or code >= 500 or code in (301, 302, 303, 408, 425)


def _read_poll(  # noqa: PLR0911  # one return for each thing that a poll's answer may be
    action_id: str, answer: Answer, age: float | None, redact: Redactor
) -> tuple[ActionReply | None, str | None, bool]:
    """Return the reply if it tells a status; or else what is wrong with it, and whether asking again may help."""
    if isinstance(answer, Failure):
        return None, answer.message, answer.retryable
    code = answer.status_code
    if not 200 <= code < 300:
        starting = code == 404 and age is not None and age < POLL_NOT_FOUND_GRACE
        return None, None, starting or code < 200 or wire.may_pass(code)
    reply = answer.action
    if reply is not None and reply.id is not None and reply.id != action_id:
        return None, "the reply is about another action", True
    if answer.problem is not None:
        return None, answer.problem, answer.may_pass
    if reply is not None and reply.status is not None:
        return reply, None, True
    if reply is not None and reply.error:
        return None, one_line(redact.text(wire.reason(reply.error)), REASON_SHOWN), False
    return None, "the reply has no status", True


def _http_error(
    doing: str,
    answer: Answer,
    redact: Redactor,
    problem: str | None = None,
    *,
    action_id: str | None = None,
    may_have_started: bool = False,
) -> HttpClientError:
    doubt = "; the action may have started all the same, so it was not sent again" if may_have_started else ""
    if isinstance(answer, Failure):
        message = f"{doing}: {answer.message}{doubt}"
        error = HttpClientError(message, action_id=action_id, may_have_started=may_have_started)
        error.__cause__ = answer.cause
        return error

    from http.client import responses  # only errors need the phrase

    code = answer.status_code
    body = redact.text(answer.body.decode(errors="replace"))
    if problem is None:
        problem = one_line(redact.text(wire.refusal_reason(answer.body)), REASON_SHOWN) or "(empty)"
    elif answer.action is None:
        problem += f": {one_line(body) or '(empty)'}"
    title = f"HTTP {code} {responses.get(code, '')}".rstrip()
    headers = redact.json(dict(answer.headers))
    return HttpClientError(
        f"{doing}: {title}: {problem}{_advice(doing, code, headers)}{doubt}",
        status_code=code,
        response_body=body,
        headers=headers,
        action_id=action_id,
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


def timeout_error(action_id: str, status: str, waited: float) -> ActionTimeoutError:
    """The error that says that the wait is over, and that the action is not."""
    message = (
        f"action {action_id} had not ended after {waited:.1f} s; it goes on, "
        f"and ActionExecutor.get_handle({action_id!r}) can go on waiting"
    )
    return ActionTimeoutError(message, action_id=action_id, status=status, waited=waited)
