"""Running actions: attempts, timeouts and retries.

A `Runner` has two event loops, each in a thread of its own. One is the platform's: attempts, timeouts and retries are
decided there, and no action is run in it. The other is for what actions await: whatever an action does to it
(`sys.exit` in a task, cancelling all tasks, `loop.stop()`), it is run on. Functions that are no coroutine functions get
a thread each. Nothing here knows of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import json
import logging
import threading
import weakref
from concurrent.futures import Future
from typing import Any, Callable, Coroutine, NamedTuple

from .threads import join, start_thread

_logger = logging.getLogger("zamp_sdk")

Function = Callable[[Any], Any]
"""An action: it is called with params, and returns JSON or something to await that gives it."""


class _Ended(NamedTuple):
    """How an attempt ended: the outcome as JSON, and what was raised if it failed."""

    outcome: str
    error: BaseException | None


class Runner:
    """Runs actions until it is stopped."""

    def __init__(self, time_scale: float) -> None:
        self._time_scale = time_scale
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # those of functions that run
        self._platform_loop = _LoopThread()
        self._actions_loop = _LoopThread()

    def run(self, action_id: str, function: Function, start: dict[str, Any]) -> Future[str]:
        """Run an action to its end; the result is its outcome as JSON."""
        return self._platform_loop.run(self._execute(action_id, function, start))

    def stop(self, deadline: float) -> None:
        """Cancel what runs, and wait for it until then."""
        self._platform_loop.stop(deadline)
        self._actions_loop.stop(deadline)
        join(self._threads, deadline)

    async def _execute(self, action_id: str, function: Function, start: dict[str, Any]) -> str:
        name, policy = start["action_name"], start["retry_policy"]
        interval = policy.initial_interval.total_seconds()
        attempt = 0
        while True:
            attempt += 1
            ended = await self._attempt(function, start["params"], start["start_to_close_timeout_seconds"])
            if ended.error is None:
                break
            with contextlib.suppress(BaseException):  # exceptions and log handlers may be the user's own
                _logger.info("attempt %d of action %s (%r) failed", attempt, action_id, name, exc_info=ended.error)
            if attempt == policy.maximum_attempts:  # 0 is no limit, for no attempt has that number
                break
            await asyncio.sleep(interval * self._time_scale)
            interval = min(interval * policy.backoff_coefficient, policy.maximum_interval.total_seconds())
        return ended.outcome

    async def _attempt(self, function: Function, params: Any, timeout: float) -> _Ended:
        attempt = asyncio.ensure_future(self._perform(function, params))
        try:
            await asyncio.wait({attempt}, timeout=timeout)
            if attempt.cancelled():  # an action has cancelled all tasks of its loop, and this one had not begun
                return _failure("FAILED", asyncio.CancelledError())
            if attempt.done():
                return attempt.result()
            return _failure("TIMED_OUT", TimeoutError(f"the attempt took over {timeout} s, its start-to-close timeout"))
        finally:
            attempt.cancel()

    async def _perform(self, function: Function, params: Any) -> _Ended:
        """Call the function, and await what can be awaited of what it returns."""
        if inspect.iscoroutinefunction(function):
            return await self._await(lambda: function(copy.deepcopy(params)))
        calling: Future[Any] = Future()
        calling.set_running_or_notify_cancel()  # it cannot be cancelled, only left behind
        try:
            self._threads.add(start_thread(lambda: calling.set_result(_called(function, params))))
        except RuntimeError as exc:  # there are as many threads as there can be
            return _failure("FAILED", exc)
        called = await asyncio.wrap_future(calling)
        return called if isinstance(called, _Ended) else await self._await(lambda: called)

    async def _await(self, call: Callable[[], Any]) -> _Ended:
        return await asyncio.wrap_future(self._actions_loop.run(_awaited(call)))


class _LoopThread:
    """An event loop in a thread of its own, which runs until it is stopped, whatever is done in it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_debug(False)  # under `python -X dev` it would tell of every slow step
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._thread = start_thread(self._run)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self, deadline: float) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set_result, None)
        join([self._thread], deadline)

    def _run(self) -> None:
        """Do what asyncio.run does, which ends with the first sys.exit, and with a main task that is cancelled."""
        self._run_until(self._stopped)
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._run_until(asyncio.gather(*tasks, return_exceptions=True))
        self._run_until(self._loop.create_task(self._loop.shutdown_asyncgens()))
        self._run_until(self._loop.create_task(self._loop.shutdown_default_executor()))
        self._loop.close()

    def _run_until(self, future: asyncio.Future[Any]) -> None:
        future.add_done_callback(lambda _: self._loop.stop())
        while not future.done():
            # A task that raises one of these ends run_forever, as loop.stop() does. The loop can be run on.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_forever()


def _called(function: Function, params: Any) -> Any:
    """Return how a call ended, or what has to be awaited for it."""
    try:
        result = function(copy.deepcopy(params))
        return result if inspect.isawaitable(result) else _success(result)
    except BaseException as exc:
        return _failure("FAILED", exc)


async def _awaited(call: Callable[[], Any]) -> _Ended:
    """Return how what a call returns ends."""
    try:
        result = call()
        while inspect.isawaitable(result):
            result = await result
        return _success(result)
    except BaseException as exc:
        return _failure("FAILED", exc)


def _success(result: Any) -> _Ended:
    return _Ended(json.dumps({"status": "COMPLETED", "result": result}, allow_nan=False), None)


def _failure(status: str, error: BaseException) -> _Ended:
    message = kind = type(error).__name__
    with contextlib.suppress(BaseException):  # not every exception can be printed
        message = str(error) or kind
    return _Ended(json.dumps({"status": status, "error": {"message": message, "type": kind}}), error)
