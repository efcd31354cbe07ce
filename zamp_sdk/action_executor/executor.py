"""The public calls, and the one loop that performs the lifecycle's steps."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Callable, Coroutine, Generic, NoReturn, Protocol, TypeVar, overload

from ..errors import ActionFailedError, MissingConfigError, ZampError
from . import http_client, lifecycle, wire
from .models import ActionStatus, RetryPolicy, SdkConfig, check_type, is_this_machine
from .redaction import Redactor

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
LONG_RETRY = 5.0  # s of waiting from which a failure is worth a warning
GRACE = 2.0  # s beyond a caller's timeout for a poll under way
INTERRUPTED = (asyncio.CancelledError, KeyboardInterrupt)  # to Python 3.10 Ctrl-C is either in a task
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
        return_type: type[T_co] | None,
        *,
        action_name: str | None = None,
        started_at: float | None = None,
        limit: float = math.inf,
        reply: wire.ActionReply | None = None,
    ) -> None:
        self._id = action_id
        self._config = config
        self._return_type = return_type
        self._started_at = started_at
        self._limit = limit
        self._action_name = action_name
        self._redact = Redactor(config.auth_token)
        self._ended = reply if reply is not None and lifecycle.is_over(reply) else None
        self._told: set[str] = set()

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
        reply = await _perform(lifecycle.look(self._id, redact=self._redact), self._config)
        return ActionStatus(reply.status)

    async def result(self, timeout: timedelta | None = None) -> T_co:
        """Wait until the action ends and return its result; may be called again and again.

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
        except ActionFailedError:  # it has ended, and the error says all there is to say
            raise
        except BaseException as exc:  # a cancellation, Ctrl-C, an error of the wait, or a fault of ours
            self._tell(exc)
            raise

    def _tell(self, exc: BaseException) -> None:
        """Say in a note and, once, in a warning what has become of the action and how to collect its result."""
        action = lifecycle.name_of(self._id, self._action_name)
        collect = f"await ActionExecutor.get_handle({self._id!r}{_beside_environment(self._config)}).result()"
        if self._ended is None:
            text = f"no longer waiting for {action}, which may go on; to collect its result: {collect}"
        else:
            text = (
                f"{action} did complete; only its result did not become what return_type describes; "
                f"to collect it as it came: {collect}"
            )
        _add_note(exc, text)
        if text not in self._told:  # who waits in short turns is told once
            self._told.add(text)
            http_client.logger.warning("%s", text)

    async def _wait(self, timeout: timedelta | None, observe: Observer | None = None) -> T_co:
        _check_timeout(timeout)
        limit = self._limit if timeout is None else timeout.total_seconds()
        if self._ended is None:
            steps = lifecycle.follow(
                self._id,
                clock=time.monotonic,
                jitter=_jitter,
                redact=self._redact,
                started_at=self._started_at,
                limit=limit,
            )
            following = _perform(steps, self._config, observe)
            self._ended = await (following if timeout is None else self._within(limit + GRACE, following))
        value = lifecycle.outcome(self._id, self._ended, redact=self._redact, action_name=self._action_name)
        validate = getattr(self._return_type, "model_validate", None)
        if validate is not None:
            make = functools.partial(validate, value)
            value = await _off_the_loop(make) if self._ended.size > wire.LARGE_BODY else make()
        result: T_co = value
        return result

    async def _within(self, seconds: float, following: Coroutine[Any, Any, wire.ActionReply]) -> wire.ActionReply:
        """Keep the caller's time even where other requests hold every slot."""
        task = asyncio.ensure_future(following)
        try:  # not wait_for, which can swallow a cancellation
            await asyncio.wait({task}, timeout=seconds)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        raise lifecycle.timeout_error(self._id, "", seconds)


class ActionExecutor:
    """Runs actions on the Zamp platform."""

    if TYPE_CHECKING:

        @overload
        @staticmethod
        async def execute(
            action_name: str,
            params: Any,
            *,
            base_url: str | None = None,
            auth_token: str | None = None,
            summary: str | None = None,
            return_type: type[ModelT],
            action_retry_policy: RetryPolicy | None = None,
            action_start_to_close_timeout: timedelta | None = None,
        ) -> ModelT: ...

        @overload
        @staticmethod
        async def execute(
            action_name: str,
            params: Any,
            *,
            base_url: str | None = None,
            auth_token: str | None = None,
            summary: str | None = None,
            return_type: Any = None,
            action_retry_policy: RetryPolicy | None = None,
            action_start_to_close_timeout: timedelta | None = None,
        ) -> Any: ...

    @staticmethod
    async def execute(
        action_name: str,
        params: Any,
        *,
        base_url: str | None = None,
        auth_token: str | None = None,
        summary: str | None = None,
        return_type: type | None = None,
        action_retry_policy: RetryPolicy | None = None,
        action_start_to_close_timeout: timedelta | None = None,
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
            base_url: str | None = None,
            auth_token: str | None = None,
            summary: str | None = None,
            return_type: type[ModelT],
            action_retry_policy: RetryPolicy | None = None,
            action_start_to_close_timeout: timedelta | None = None,
        ) -> ActionHandle[ModelT]: ...

        @overload
        @staticmethod
        async def start(
            action_name: str,
            params: Any,
            *,
            base_url: str | None = None,
            auth_token: str | None = None,
            summary: str | None = None,
            return_type: Any = None,
            action_retry_policy: RetryPolicy | None = None,
            action_start_to_close_timeout: timedelta | None = None,
        ) -> ActionHandle[Any]: ...

    @staticmethod
    async def start(
        action_name: str,
        params: Any,
        *,
        base_url: str | None = None,
        auth_token: str | None = None,
        summary: str | None = None,
        return_type: type | None = None,
        action_retry_policy: RetryPolicy | None = None,
        action_start_to_close_timeout: timedelta | None = None,
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
            action_id: str, *, base_url: str | None = None, auth_token: str | None = None, return_type: type[ModelT]
        ) -> ActionHandle[ModelT]: ...

        @overload
        @staticmethod
        def get_handle(
            action_id: str, *, base_url: str | None = None, auth_token: str | None = None, return_type: Any = None
        ) -> ActionHandle[Any]: ...

    @staticmethod
    def get_handle(
        action_id: str,
        *,
        base_url: str | None = None,
        auth_token: str | None = None,
        return_type: type | None = None,
    ) -> ActionHandle[Any]:
        """Return the handle of an action started anywhere; sends nothing; ValueError for a bad id."""
        wire.check_action_id(action_id)
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
) -> ActionHandle[Any]:
    """Start an action; whoever is interrupted meanwhile is told whether it may exist."""
    prepare = functools.partial(
        wire.start_request,
        action_name,
        params,
        summary=summary,
        retry_policy=retry_policy,
        start_to_close_timeout=start_to_close_timeout,
        idempotency_key=os.urandom(16).hex(),
    )
    progress = wire.Progress()
    try:
        request = prepare() if wire.is_small(params) else await _off_the_loop(prepare)
    except INTERRUPTED as exc:
        _tell_of_start(exc, action_name, progress)
        raise
    limit = lifecycle.wait_limit(retry_policy, start_to_close_timeout)  # nothing may go wrong once the action has an id
    steps = lifecycle.start(request, clock=time.monotonic, jitter=_jitter, redact=Redactor(config.auth_token))
    try:
        reply = await _perform(steps, config, progress=progress)
    except ZampError:  # which says it itself
        raise
    except BaseException as exc:  # a cancellation, Ctrl-C, or a fault of ours
        _tell_of_start(exc, action_name, progress)
        raise
    return ActionHandle(
        reply.id,
        config,
        return_type,
        action_name=action_name,
        started_at=time.monotonic(),
        limit=limit,
        reply=reply,
    )


def _tell_of_start(exc: BaseException, action_name: str, progress: wire.Progress) -> None:
    """Say in a note and a warning whether an action whose start was interrupted may exist."""
    fate = "it may have started all the same" if progress.sent else "nothing was sent, so it has not started"
    what = "cancelled" if isinstance(exc, INTERRUPTED) else "failed"
    text = f"{what} while starting action {action_name!r}: {fate}"
    _add_note(exc, text)
    http_client.logger.warning("%s", text)


def _beside_environment(config: SdkConfig) -> str:
    """Say as arguments what of a configuration the environment does not give; of the token only that it is needed."""
    base_url = "" if _resolves_to(config, None, config.auth_token) else f", base_url={config.base_url!r}"
    return base_url if _resolves_to(config, config.base_url, None) else f"{base_url}, auth_token=..."


def _resolves_to(config: SdkConfig, base_url: str | None, auth_token: str | None) -> bool:
    """Whether these arguments and the environment make this configuration."""
    try:
        return SdkConfig.resolve(base_url, auth_token) == config
    except (MissingConfigError, ValueError):
        return False


def _add_note(exc: BaseException, text: str) -> None:
    if hasattr(exc, "add_note"):  # Python 3.11
        exc.add_note(text)


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


@functools.lru_cache(maxsize=8)
def _warn_of_plain_http(base_url: str) -> None:
    """Warn once of each URL to which the token goes in the clear."""
    if not is_this_machine(base_url):
        http_client.logger.warning(
            "%s is plain http: the token and the data can be read on the way; use https", base_url
        )


async def _off_the_loop(work: Callable[[], T]) -> T:
    """Do in a thread what would hold the event loop up; where no thread is to be had, here."""
    doing = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.wait({doing})
        return doing.result()
    except RuntimeError:  # no thread could be had; or it is work's own error, which it raises again
        return work()
    except asyncio.CancelledError:
        if not doing.cancelled():  # it is the caller who was cancelled, not what waited for a thread
            raise
        return work()
    finally:
        doing.cancel()


async def _perform(
    steps: lifecycle.Steps,
    config: SdkConfig,
    observe: Observer | None = None,
    progress: wire.Progress | None = None,
) -> wire.ActionReply:
    """Perform the lifecycle's steps; ``progress`` is that of the request whose fate is open."""
    answer = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as stop:
            reply: wire.ActionReply = stop.value
            return reply
        if observe is not None:
            observe(step)
        if isinstance(step, lifecycle.Send):
            answer = await http_client.send(config, step.request, step.timeout, progress)
        else:
            answer = None
            if progress is not None:
                progress.sent = False  # for only a start that cannot exist is tried again
            if step.warning:
                http_client.logger.warning("%s", step.warning)
            if step.failure and step.seconds > LONG_RETRY:
                http_client.logger.warning("waiting %.0f s to try again: %s", step.seconds, step.failure)
            await asyncio.sleep(step.seconds)
