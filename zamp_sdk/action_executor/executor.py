"""The public calls, and the one loop that performs the lifecycle's steps."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Callable, Generic, NoReturn, Optional, Protocol, TypeVar, overload

from .. import __version__, transport
from ..errors import ActionFailedError, ActionTimeoutError, ZampError
from ..transport import HELD_BACK, Exchange, Failure, in_thread, is_this_machine, send
from . import lifecycle
from .models import ActionStatus, RetryPolicy, SdkConfig, check_type
from .notices import Notice, add_note, warn, warn_now_and_then
from .pacing import NAP_MAX, Pace, pace_of
from .params import is_small, start_call
from .redaction import Redactor, one_line
from .replies import ActionReply, check_action_id

logger: logging.Logger = logging.getLogger("zamp_sdk")

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
USER_AGENT = f"zamp-sdk/{__version__} Python/{sys.version_info[0]}.{sys.version_info[1]} {sys.platform}"
LONG_RETRY = 5.0  # s of waiting from which a failure is worth a warning
SOON = 0.5  # s after a first refusal, when more is known
GRACE = 2.0  # s beyond a caller's timeout for a poll under way
LARGE_RESULT = 64 * 1024  # bytes of JSON from which a model may keep the event loop busy for over a millisecond
INTERRUPTED = (asyncio.CancelledError, KeyboardInterrupt)  # to Python 3.10 Ctrl-C is either in a task
WAITING = "no longer waiting for {}, which may go on"
UNFIT_RESULT = "{} did complete; only its result did not become what return_type describes"
Observer = Callable[[lifecycle.Step], None]


if TYPE_CHECKING:

    class Model(Protocol):
        """What a ``return_type`` needs for its type to be the result's: pydantic models have it, own classes may."""

        @classmethod
        def model_validate(cls: type[T], obj: Any, /) -> T:  # noqa: PYI019  # typing.Self came with Python 3.11
            """Return an instance made of an action's result, or raise what tells why not."""
            ...

    ModelT = TypeVar("ModelT", bound=Model)


class ActionHandle(Generic[T_co]):
    """An action on the platform; made by ``ActionExecutor.start`` and ``get_handle``.

    A handle belongs to the process that made it and cannot be pickled or copied; its ``id`` is what to keep.
    """

    def __init__(
        self,
        action_id: str,
        config: SdkConfig,
        return_type: Optional[type[T_co]],
        *,
        action_name: Optional[str] = None,
        started_at: Optional[float] = None,
        limit: float = math.inf,
        reply: Optional[ActionReply] = None,
    ) -> None:
        self._id = action_id
        self._config = config
        self._return_type = return_type
        self._started_at = started_at  # by time.monotonic
        self._limit = limit  # seconds that ``result`` waits without a timeout
        self._action_name = action_name
        self._ended = reply if reply is not None and lifecycle.is_over(reply) else None
        self._told: set[str] = set()  # the fates that a warning has told of

    def __repr__(self) -> str:
        return f"<ActionHandle {self._id!r} at {self._config.base_url}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an ActionHandle holds the token, and cannot be pickled or copied; keep handle.id instead")

    @property
    def id(self) -> str:
        """The platform's id, with which any process can collect the result."""
        return self._id

    async def status(self) -> ActionStatus:
        """Ask the platform once how the action stands.

        Raises:
            HttpClientError: The platform cannot be asked, or gives a status that this version does not know.
        """
        reply = await _Driver(self._config).run(lifecycle.look(self._id))
        return ActionStatus(reply.status)

    async def result(self, timeout: Optional[timedelta] = None) -> T_co:
        """Wait until the action ends and return its result.

        It may be called again and again: a ``return_type`` makes a new object each time, and without one each call
        returns the same object, so that a change in it is seen by all.

        Args:
            timeout: How long to wait; a poll under way then gets up to 2 s more. The default is until the platform must
                have ended an action started here, at least an hour; else there is no limit.

        Raises:
            ActionFailedError: The action ended without a result.
            ActionTimeoutError: The wait is over; the action goes on.
            HttpClientError: The platform cannot be asked; the action goes on.
        """
        _check_timeout(timeout)
        try:
            return await self._wait(timeout)
        except (ActionFailedError, ActionTimeoutError):  # which say all there is to say
            raise
        except BaseException as exc:  # a cancellation, Ctrl-C, an error of the wait, or a fault of ours
            self._tell(exc)
            raise

    def _tell(self, exc: BaseException) -> None:
        """Say in a note and, once, in a warning what has become of the action and how to collect its result."""
        fate = WAITING if self._ended is None or isinstance(exc, INTERRUPTED) else UNFIT_RESULT
        notice = _notice(fate, self._id, self._action_name, self._config)
        add_note(exc, str(notice))
        if fate not in self._told:  # who waits in short turns is told once
            self._told.add(fate)
            warn(notice)

    async def _wait(self, timeout: Optional[timedelta], observe: Optional[Observer] = None) -> T_co:
        """Wait as ``result`` does, but say nothing of what has become of the action where the wait ends early."""
        if self._ended is None:
            driver = _Driver(self._config, observe)
            steps = lifecycle.follow(
                self._id,
                clock=time.monotonic,
                asking_clock=driver.asking_clock,
                jitter=_jitter,
                started_at=self._started_at,
                limit=self._limit if timeout is None else timeout.total_seconds(),
                grace=math.inf if timeout is None else GRACE,
            )
            self._ended = await driver.run(steps)
        value = lifecycle.outcome(self._id, self._ended, self._action_name)
        validate = getattr(self._return_type, "model_validate", None)
        if validate is not None:
            make = functools.partial(validate, value)
            value = await in_thread(make) if self._ended.size > LARGE_RESULT else make()
        result: T_co = value
        return result


class ActionExecutor:
    """Runs actions on the Zamp platform."""

    if TYPE_CHECKING:

        @overload
        @staticmethod
        async def execute(
            action_name: str,
            params: Any,
            *,
            base_url: Optional[str] = None,
            auth_token: Optional[str] = None,
            summary: Optional[str] = None,
            return_type: type[ModelT],
            action_retry_policy: Optional[RetryPolicy] = None,
            action_start_to_close_timeout: Optional[timedelta] = None,
        ) -> ModelT: ...

        @overload
        @staticmethod
        async def execute(
            action_name: str,
            params: Any,
            *,
            base_url: Optional[str] = None,
            auth_token: Optional[str] = None,
            summary: Optional[str] = None,
            return_type: Any = None,
            action_retry_policy: Optional[RetryPolicy] = None,
            action_start_to_close_timeout: Optional[timedelta] = None,
        ) -> Any: ...

    @staticmethod
    async def execute(
        action_name: str,
        params: Any,
        *,
        base_url: Optional[str] = None,
        auth_token: Optional[str] = None,
        summary: Optional[str] = None,
        return_type: Optional[type] = None,
        action_retry_policy: Optional[RetryPolicy] = None,
        action_start_to_close_timeout: Optional[timedelta] = None,
    ) -> Any:
        """Start an action, wait until it ends, and return its result.

        Args:
            action_name: The action's name on the platform.
            params: Any JSON value, with dataclasses, ``model_dump``, dates, times, timedeltas, UUIDs, Decimals and
                Enums anywhere in it. Large ones are turned into JSON in a thread: change them only after the return.
            base_url: The platform's URL; default: ``ZAMP_BASE_URL``.
            auth_token: The bearer token; default: ``ZAMP_AUTH_TOKEN``.
            summary: What the platform shows people about this run.
            return_type: Its ``model_validate`` makes the result; a type without one leaves it as it came.
            action_retry_policy: How the platform retries the action's attempts; default: the platform's.
            action_start_to_close_timeout: The limit of one attempt; default: the platform's.

        Raises:
            MissingConfigError, TypeError, ValueError: An argument is missing or cannot be used; nothing was sent.
            HttpClientError: A request failed; it tells whether the action runs.
            ActionFailedError, ActionTimeoutError: As for ``ActionHandle.result``.
        """
        config = _resolve(base_url, auth_token)
        del auth_token  # error reporters ship the local variables of frames
        handle = await _start(
            config,
            action_name,
            params,
            summary=summary,
            return_type=return_type,
            retry_policy=action_retry_policy,
            start_to_close_timeout=action_start_to_close_timeout,
        )
        return await handle.result()

    if TYPE_CHECKING:

        @overload
        @staticmethod
        async def start(
            action_name: str,
            params: Any,
            *,
            base_url: Optional[str] = None,
            auth_token: Optional[str] = None,
            summary: Optional[str] = None,
            return_type: type[ModelT],
            action_retry_policy: Optional[RetryPolicy] = None,
            action_start_to_close_timeout: Optional[timedelta] = None,
        ) -> ActionHandle[ModelT]: ...

        @overload
        @staticmethod
        async def start(
            action_name: str,
            params: Any,
            *,
            base_url: Optional[str] = None,
            auth_token: Optional[str] = None,
            summary: Optional[str] = None,
            return_type: Any = None,
            action_retry_policy: Optional[RetryPolicy] = None,
            action_start_to_close_timeout: Optional[timedelta] = None,
        ) -> ActionHandle[Any]: ...

    @staticmethod
    async def start(
        action_name: str,
        params: Any,
        *,
        base_url: Optional[str] = None,
        auth_token: Optional[str] = None,
        summary: Optional[str] = None,
        return_type: Optional[type] = None,
        action_retry_policy: Optional[RetryPolicy] = None,
        action_start_to_close_timeout: Optional[timedelta] = None,
    ) -> ActionHandle[Any]:
        """Start an action as ``execute`` does, and return its handle as soon as it has an id."""
        config = _resolve(base_url, auth_token)
        del auth_token  # error reporters ship the local variables of frames
        return await _start(
            config,
            action_name,
            params,
            summary=summary,
            return_type=return_type,
            retry_policy=action_retry_policy,
            start_to_close_timeout=action_start_to_close_timeout,
        )

    if TYPE_CHECKING:

        @overload
        @staticmethod
        def get_handle(
            action_id: str,
            *,
            base_url: Optional[str] = None,
            auth_token: Optional[str] = None,
            return_type: type[ModelT],
        ) -> ActionHandle[ModelT]: ...

        @overload
        @staticmethod
        def get_handle(
            action_id: str, *, base_url: Optional[str] = None, auth_token: Optional[str] = None, return_type: Any = None
        ) -> ActionHandle[Any]: ...

    @staticmethod
    def get_handle(
        action_id: str,
        *,
        base_url: Optional[str] = None,
        auth_token: Optional[str] = None,
        return_type: Optional[type] = None,
    ) -> ActionHandle[Any]:
        """Return the handle of an action started anywhere; sends nothing; ValueError for a bad id."""
        check_action_id(action_id)
        return ActionHandle(action_id, _resolve(base_url, auth_token), return_type)


async def _start(
    config: SdkConfig,
    action_name: str,
    params: Any,
    *,
    summary: str | None,
    return_type: type | None,
    retry_policy: RetryPolicy | None,
    start_to_close_timeout: timedelta | None,
    observe: Observer | None = None,
) -> ActionHandle[Any]:
    """Start an action; whoever is interrupted meanwhile is told whether it exists."""
    is_wanted = True
    prepare = functools.partial(
        start_call,
        action_name,
        params,
        summary=summary,
        retry_policy=retry_policy,
        start_to_close_timeout=start_to_close_timeout,
        idempotency_key=os.urandom(16).hex(),
        is_wanted=lambda: is_wanted,
    )
    driver = _Driver(config, observe)
    try:
        call = prepare() if is_small(params) else await in_thread(prepare)
        limit = lifecycle.wait_limit(retry_policy, start_to_close_timeout)  # what can fail does so before the start
        steps = lifecycle.start(call, asking_clock=driver.asking_clock, jitter=_jitter)
        reply = await driver.run(steps)
    except ZampError:  # which says it itself
        raise
    except BaseException as exc:  # a cancellation, Ctrl-C, what cannot be sent, or a fault of ours
        is_wanted = False
        _tell_of_start(exc, action_name, config, driver)
        raise
    return ActionHandle(
        str(reply.action_id),
        config,
        return_type,
        action_name=action_name,
        started_at=time.monotonic(),
        limit=limit,
        reply=reply,
    )


def _tell_of_start(exc: BaseException, action_name: str, config: SdkConfig, driver: _Driver) -> None:
    """Say whether an action exists whose start was interrupted."""
    what = "cancelled" if isinstance(exc, INTERRUPTED) else "failed"
    name = f"action {one_line(str(action_name))!r}"
    exchange = driver.exchange
    answer = None if exchange is None else exchange.answer
    if isinstance(answer, ActionReply) and answer.action_id is not None:
        notice = _notice(WAITING, answer.action_id, action_name, config)
    elif exchange is not None and (lifecycle.may_have_started(answer) if answer else exchange.may_have_left):
        notice = Notice(f"{what} while starting {{}}: it may have started all the same", name)
    elif isinstance(exc, INTERRUPTED):  # which is worth no warning
        why = "it was refused" if answer is not None or driver.was_refused else "nothing was sent"
        add_note(exc, f"{what} while starting {name}: {why}, so it has not started")
        return
    else:
        return
    add_note(exc, str(notice))
    warn(notice)


def _notice(fate: str, action_id: str, action_name: str | None, config: SdkConfig) -> Notice:
    collect = f"await ActionExecutor.get_handle({{}}, base_url={config.base_url!r}, auth_token=...).result()"
    return Notice(fate, lifecycle.name_of(action_id, action_name), collect, action_id)


def _check_timeout(timeout: timedelta | None) -> None:
    if timeout is not None:
        check_type("timeout", timeout, timedelta, "a timedelta")
        if timeout < timedelta(0):
            raise ValueError(f"timeout must not be negative: {timeout}")


def _jitter() -> float:
    from random import random  # slow to import; by the first reply urllib.request has done it

    return random()


def _resolve(base_url: str | None, auth_token: str | None) -> SdkConfig:
    config = SdkConfig.resolve(base_url, auth_token)
    if config.base_url.startswith("http:"):
        _warn_of_plain_http(config.base_url)
    return config


@functools.cache  # a program that speaks to many in turn would be warned again and again
def _warn_of_plain_http(base_url: str) -> None:
    """Warn once of each URL to which the token goes in the clear."""
    if not is_this_machine(base_url):
        logger.warning("%s is plain http: the token and the data can be read on the way; use https", base_url)


class _Driver:
    """Performs the lifecycle's steps; what its attributes say is for whoever is interrupted."""

    def __init__(self, config: SdkConfig, observe: Observer | None = None) -> None:
        import json  # noqa: F401  # here and not in a thread: a child that is forked meanwhile could not

        self._config = config
        self._observe = observe
        self._pace = pace_of(config.base_url, config.auth_token)
        self._waited_for_turns = 0.0  # seconds
        self.exchange: Exchange | None = None
        """The last one, which is enough: a start is sent again only if nothing can have come of the one before."""
        self.was_refused: bool = False
        """Whether the platform has refused one before."""

    def asking_clock(self) -> float:
        """Return monotonic seconds, without those in which requests waited their turn."""
        return time.monotonic() - self._waited_for_turns

    async def run(self, steps: lifecycle.Steps) -> ActionReply:
        """Perform the steps, and return what they return or raise what they raise."""
        answer: lifecycle.Answer | None = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as stop:
                reply: ActionReply = stop.value
                return reply
            if self._observe is not None:
                self._observe(step)
            if isinstance(step, lifecycle.Send):
                answer = await (self._send(step) if step.patience == math.inf else self._send_in_time(step))
            else:
                answer = None
                if step.warning:
                    warn_now_and_then(f"{self._config.base_url} status", step.warning)
                if step.failure and step.seconds > LONG_RETRY:
                    text = f"waiting {step.seconds:.0f} s to try again: {step.failure}"
                    warn_now_and_then(self._config.base_url, text)
                await asyncio.sleep(step.seconds)

    async def _send_in_time(self, step: lifecycle.Send) -> lifecycle.Answer:
        """Send a request, and give up at the end of the step's patience, whatever the request waits for.

        The request's own timeout begins only when it has had its turn, and room.
        """
        task = asyncio.ensure_future(self._send(step))
        try:  # not wait_for, which can swallow a cancellation
            await asyncio.wait({task}, timeout=step.patience)
            if task.done() and not task.cancelled():  # by somebody else, that is
                return task.result()
        finally:
            task.cancel()
        return Failure("no answer came in the time given", may_have_left=True, may_retry=True)

    async def _send(self, step: lifecycle.Send) -> lifecycle.Answer:
        """Send a request when it is its turn, and let the pace learn from the reply."""
        request = _transport_request(step, self._config)
        answer: Any = HELD_BACK
        while answer is HELD_BACK:  # for the platform has refused others while this one waited for room
            await self._wait_for_turn()
            is_held_back = functools.partial(self._pace.has_cut_since, time.monotonic())
            exchange = self.exchange = Exchange(request, step.timeout, is_held_back)
            answer = await send(exchange)
        if isinstance(answer, ActionReply):
            is_refused = lifecycle.is_refusal(answer)
            self.was_refused |= is_refused
            has_changed = self._pace.learn(
                exchange.sent_at, time.monotonic(), is_refused=is_refused, retry_after=answer.retry_after
            )
            if has_changed:
                _tell_of_pace(self._pace, self._config.base_url, answer.retry_after)
            if is_refused:
                answer = answer._replace(is_paced=self._pace.has_cut_since(exchange.sent_at))
        reply: lifecycle.Answer = answer
        return reply

    async def _wait_for_turn(self) -> None:
        """Wait in the line that there is while a platform limits how fast it is asked; it holds nothing meanwhile."""
        ticket = self._pace.join(time.monotonic())
        if ticket is None:
            return
        try:
            while True:
                began = time.monotonic()
                seconds = self._pace.wait(ticket, began)
                if not seconds:
                    return
                turn = lifecycle.Turn(seconds, self._pace.waiting)
                logger.debug("waiting %.2f s for a turn, with %d in the line", *turn)
                if self._observe is not None:
                    self._observe(turn)
                try:
                    await asyncio.sleep(seconds)
                finally:
                    if seconds <= NAP_MAX:  # longer ones are no place in a line: the platform has told all to wait
                        self._waited_for_turns += time.monotonic() - began
        finally:
            self._pace.leave(ticket)


def _tell_of_pace(pace: Pace, base_url: str, retry_after: float | None) -> None:
    """Warn once when a platform begins to limit how fast it is asked, and once when that has ended."""

    def tell_how_fast() -> None:
        rate = "" if pace.rate is None else f"; it takes about {pace.rate:.0f} requests a second from this process"
        pause = f"; it asks for a pause of {retry_after:.0f} s" if retry_after and retry_after > LONG_RETRY else ""
        logger.warning("%s limits how fast it is asked%s%s; waiting: %d", base_url, rate, pause, pace.waiting)

    if pace.is_limiting:  # nothing can be said of the rate, and of who waits, at the very moment of a refusal
        asyncio.get_running_loop().call_later(SOON, tell_how_fast)
    else:
        logger.warning("%s no longer limits how fast it is asked", base_url)


def _transport_request(step: lifecycle.Send, config: SdkConfig) -> transport.Request:
    """Add what every request has: the platform, the token, who asks, and how its reply is read, in a thread."""
    return transport.Request(
        method=step.call.method,
        base_url=config.base_url,
        path=step.call.path,
        headers={
            **step.call.headers,
            "Authorization": f"Bearer {config.auth_token}",
            "Accept": "application/json",
            "User-Agent": USER_AGENT,
        },
        body=step.call.body,
        read=lambda raw: step.read(raw, Redactor(config.auth_token, raw.secrets), time.time()),
        redact=lambda text, secrets: one_line(Redactor(config.auth_token, secrets).text(text)),
    )
