"""The Zamp API on 127.0.0.1: for trying things without an account, and for users' own tests.

It spells the wire format out itself, to check the client and not to echo it. Four parts, in this order:

- `LocalPlatform` is what users see. It judges each request, and remembers requests, planned faults and actions.
- `_Runner` runs the actions. It has two event loops, each in a thread of its own. One is the platform's: attempts,
  timeouts and retries are decided there, and no action is run in it. The other is for what actions await:
  whatever an action does to it (`sys.exit` in a task, cancelling all tasks, `loop.stop()`), it is run on. Functions
  that are no coroutine functions get a thread each.
- `_Server` accepts connections; each gets a thread and carries one request, which is judged as soon as that can be
  done: by its Host and its token before a byte of its body is read.
- `_checked` checks a start's body.

A platform belongs to the process that started it: in a forked child, which has none of its threads, `stop` does
nothing. `stop` ends the server first, so that nothing new begins; then the platform's loop; then the actions'.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import copy
import inspect
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, Callable, Coroutine, Iterable, Literal, Mapping, NamedTuple, Optional, TypeVar, overload

from .action_executor.models import RetryPolicy

_logger = logging.getLogger("zamp_sdk")

_STOP_SECONDS = 5.0  # for functions, which cannot be ended from outside
_IDLE_SECONDS = 60.0  # for a client's next bytes: a busy machine can take long between connecting and sending
_LINGER_SECONDS = 2.0  # for a client to read why its body was not read
_MAX_BODY = 64 * 2**20  # bytes of a request: as many as the SDK reads of a reply

_KEPT = 10_000  # requests, and ended actions: more than a test looks at, and a few dozen megabytes
_REQUEST_BYTES = 64 * 2**20  # of those requests together, as sent
_OUTCOME_BYTES = 512 * 2**20  # of those actions' outcomes together: who started them may be about to ask

# What a client on this machine calls it, at whatever port a tunnel may have. A web page that has its own name point
# here (DNS rebinding) sends that name.
_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.ASCII | re.IGNORECASE)

_Function = Callable[[Any], Any]
_F = TypeVar("_F", bound=_Function)
_Object = dict[str, Any]


class RecordedRequest(NamedTuple):
    """A request: its header names in lower case, its credentials masked, its body None if that was no JSON."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


class LocalPlatform:
    """The Zamp API on 127.0.0.1, running the functions registered with ``action``; safe to use from any thread.

    It answers requests that have its token and name 127.0.0.1 or localhost as their host, so that no web page can have
    them sent, with bodies of up to 64 MiB. Its memory is bounded: it knows all actions that run, the newest 10,000
    that have ended, and the newest 10,000 requests; of large ones fewer: 512 MiB of outcomes, and 64 MiB of requests.

    Args:
        auth_token: The token that clients must send: printable ASCII without white space.
        time_scale: Factor on the intervals between attempts: with 0.001 an interval of 30 s takes 30 ms.
        port: The port to listen on; 0 picks a free one at each start.
        rate_limit: How many requests a second it takes, with a burst of as many; what is over it gets 429 with
            ``Retry-After`` in whole seconds. Default: no limit.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        auth_token: str = "local-token",
        time_scale: float = 1.0,
        port: int = 0,
        rate_limit: Optional[float] = None,
    ) -> None:
        if not isinstance(auth_token, str):
            raise TypeError(f"auth_token must be text, not {type(auth_token).__name__}")
        if not re.fullmatch("[!-~]+", auth_token):
            raise ValueError("auth_token must be printable ASCII without white space, and not empty (RFC 6750)")
        _check_number("time_scale", time_scale, "a finite number, not negative", most=sys.float_info.max)
        _check_number("port", port, "a whole number from 0 to 65535", int, most=65535)
        if rate_limit is not None:
            least, most = sys.float_info.min, sys.float_info.max
            _check_number("rate_limit", rate_limit, "a finite number above 0", least=least, most=most)
        self.auth_token = auth_token
        self._time_scale = time_scale
        self._port = port
        self._rate_limit = rate_limit
        self._functions: dict[str, _Function] = {}
        self._faults: list[_Fault] = []
        self._requests = _Newest(_REQUEST_BYTES)
        self._running: set[str] = set()  # ids of actions
        self._outcomes = _Newest(_OUTCOME_BYTES)  # as JSON, by the ids of ended actions
        self._own()

    def _own(self) -> None:
        """Belong to this process, with no server yet, and with locks that no thread of a parent holds."""
        self._process = os.getpid()
        self._server: _Server | None = None
        self._starting = threading.Lock()  # held by start and stop: guards the server and the runner
        self._lock = threading.Lock()  # held for moments: guards all that is remembered

    @overload
    def action(self, name: _F) -> _F: ...
    @overload
    def action(self, name: str) -> Callable[[_F], _F]: ...
    def action(self, name: Any) -> Any:
        """Register a function or coroutine function; a decorator, bare or with the action's name.

        It is called with ``params`` and returns JSON, or something to await that gives it; an exception is a failed
        attempt, whose traceback is logged by ``zamp_sdk`` at level INFO. A function gets a thread of its own,
        coroutines share an event loop. The same function defined again, as by a notebook's cell, takes its place.

        Raises:
            ValueError: Another function has that name.
            TypeError: What is registered cannot be called, or has no name of its own and was given none.
        """
        if not isinstance(name, str):
            if not isinstance(getattr(name, "__name__", None), str):
                raise TypeError(f"{name!r} has no name: use `platform.action(name)(function)`")
            return self.action(name.__name__)(name)

        def register(function: _F) -> _F:
            if not callable(function):
                raise TypeError(f"an action must be a function, not {type(function).__name__}")
            if _place(self._functions.get(name, function)) != _place(function):
                raise ValueError(f"there already is an action named {name!r}")
            self._functions[name] = function
            return function

        return register

    @property
    def action_names(self) -> list[str]:
        """The names of the registered actions, sorted."""
        return sorted(self._functions)

    @property
    def base_url(self) -> str:
        """Where the platform listens; a RuntimeError while it does not."""
        server = self._server
        if server is None:
            raise RuntimeError("the local platform is not running: use `with platform:` or call platform.start()")
        return f"http://127.0.0.1:{server.server_address[1]}"

    @property
    def requests(self) -> list[RecordedRequest]:
        """The requests since the last start or ``clear``, of the last 10,000 or 64 MiB: a copy."""
        with self._lock:
            return self._requests.values()

    def fail_next(
        self,
        status: int = 503,
        times: int = 1,
        retry_after: Optional[int] = None,
        *,
        only: Optional[Literal["start", "poll"]] = None,
    ) -> None:
        """Refuse the next requests.

        Args:
            status: The HTTP status to refuse them with, from 200 to 599.
            times: How many to refuse.
            retry_after: The seconds to send as ``Retry-After``; default: none is sent.
            only: Refuse only starts, or only polls; the others are answered as usual meanwhile.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of its range.
        """
        _check_number("status", status, "a whole number from 200 to 599", int, least=200, most=599)
        headers = []
        if retry_after is not None:
            _check_number("retry_after", retry_after, "whole seconds, not negative", int)
            headers = [f"Retry-After: {retry_after}"]
        self._plan((int(status), "planned with fail_next", *headers), times, only)

    def drop_next(self, times: int = 1, *, only: Optional[Literal["start", "poll"]] = None) -> None:
        """Close the connections of the next ``times`` requests, or starts, or polls, instead of answering them.

        Raises:
            TypeError: ``times`` is no whole number.
            ValueError: ``times`` is negative, or ``only`` is neither ``"start"`` nor ``"poll"``.
        """
        self._plan(None, times, only)

    def clear(self) -> None:
        """Forget requests, ended actions, the faults that are left, and what counted against the rate limit.

        For between two tests that share a platform. Actions that run go on, and stay known.
        """
        with self._lock:
            self._faults.clear()
            self._forget()

    def start(self) -> None:
        """Listen and answer until ``stop``, with no memory of earlier runs.

        Raises:
            RuntimeError: It runs already.
            OSError: The port cannot be listened on.
        """
        if self._process != os.getpid():  # a forked child may run one of its own
            self._own()
        with self._starting:
            if self._server is not None:
                raise RuntimeError("the local platform is already running")
            server = _Server(self._port, self._admit, self._answer)
            with self._lock:
                self._forget()
                self._running.clear()
                self._run_id = uuid.uuid4()
            self._runner = _Runner(self._time_scale)
            server.serve()
            self._server = server
            atexit.register(self.stop)  # Python 3.9 can crash where daemon threads are busy

    def stop(self) -> None:
        """Stop listening, forget planned faults, cancel coroutines, and wait up to 5 s for functions to return.

        Connections are closed, whatever their clients are doing. In a forked child it does nothing: the platform
        belongs to the process that started it.
        """
        if self._process != os.getpid():
            return
        with self._starting:
            if self._server is not None:
                deadline = time.monotonic() + _STOP_SECONDS
                self._server.stop(deadline)
                self._server = None
                self._runner.stop(deadline)
                atexit.unregister(self.stop)
            with self._lock:
                self._faults.clear()

    def __enter__(self) -> LocalPlatform:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _plan(self, refusal: tuple[Any, ...] | None, times: int, only: str | None) -> None:
        _check_number("times", times, "a whole number, not negative", int)
        if only not in (None, "start", "poll"):
            raise ValueError(f"only must be 'start' or 'poll', not {only!r}")
        with self._lock:
            self._faults.append(_Fault(refusal, times, only))

    def _forget(self) -> None:
        self._requests.clear()
        self._outcomes.clear()
        self._tokens = math.inf  # of the rate limit's bucket: it is full
        self._refilled = time.monotonic()

    def _admit(self, request: RecordedRequest) -> int:
        """Return how many bytes of body to read; refuse a request whose body is not even to be read."""
        try:
            return self._body_length(request)
        except _RefusedError:
            self._record(request, 0)
            raise

    def _body_length(self, request: RecordedRequest) -> int:
        if not _OWN_HOST.fullmatch(request.headers.get("host", "")):
            raise _RefusedError(421, "the request is for another host than this machine's 127.0.0.1 or localhost")
        if request.headers.get("authorization") != f"Bearer {self.auth_token}":
            raise _RefusedError(401, "the bearer token is missing or wrong", "WWW-Authenticate: Bearer")
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not re.fullmatch("[0-9]+", length):
            raise _RefusedError(411, "the body must have a Content-Length")
        if len(length) > 9 or int(length) > _MAX_BODY:  # in this order: Python reads no number of over 4,300 digits
            raise _RefusedError(413, f"the body must not be over {_MAX_BODY} bytes long")
        return int(length)

    def _record(self, request: RecordedRequest, body_length: int) -> None:
        headers = {name: "***" if name == "authorization" else value for name, value in request.headers.items()}
        size = body_length + len(request.path) + sum(len(name) + len(value) for name, value in headers.items())
        with self._lock:
            self._requests.add(object(), request._replace(headers=headers), size)

    def _answer(self, request: RecordedRequest, body_length: int) -> _Object:
        self._record(request, body_length)
        with self._lock:
            self._keep_to_the_rate_limit()
            self._meet_a_fault("start" if request.method == "POST" else "poll")
        if (request.method, request.path) == ("POST", "/actions"):
            return {"id": self._start(_checked(request.body), request.headers.get("idempotency-key"))}
        parent, _, action_id = request.path.rpartition("/")
        if (request.method, parent) != ("GET", "/actions"):
            raise _RefusedError(404, f"no such path: {request.method} {request.path}")
        return {"id": action_id, **self._poll(action_id)}

    def _keep_to_the_rate_limit(self) -> None:
        """Take a token out of the bucket, which holds a second's worth of them; refuse the request if it is empty."""
        rate = self._rate_limit
        if rate is None:
            return
        now = time.monotonic()
        self._tokens = min(max(1.0, rate), self._tokens + (now - self._refilled) * rate)
        self._refilled = now
        if self._tokens < 1:
            seconds = math.ceil((1 - self._tokens) / rate)  # at least 1, for it is more than 0
            raise _RefusedError(429, f"over {rate:g} requests a second", f"Retry-After: {seconds}")
        self._tokens -= 1

    def _meet_a_fault(self, kind: str) -> None:
        self._faults = [fault for fault in self._faults if fault.times]
        for fault in self._faults:
            if fault.only in (None, kind):
                fault.times -= 1
                raise ConnectionAbortedError if fault.refusal is None else _RefusedError(*fault.refusal)

    def _start(self, start: _Object, key: str | None) -> str:
        name = start["action_name"]
        if name not in self._functions:
            raise _RefusedError(404, f"unknown action {name!r}; registered: {', '.join(self.action_names) or 'none'}")
        # The id is made from the key, so that the same start sent again is the same action.
        action_id = f"act_{uuid.uuid5(self._run_id, key or os.urandom(16).hex()).hex[:16]}"
        with self._lock:
            if action_id in self._running or action_id in self._outcomes:
                return action_id
            self._running.add(action_id)

        def end(running: Future[str]) -> None:
            if not running.cancelled():  # by `stop`
                outcome = running.result()
                with self._lock:
                    self._running.discard(action_id)
                    self._outcomes.add(action_id, outcome, len(outcome))

        self._runner.run(action_id, self._functions[name], start).add_done_callback(end)
        return action_id

    def _poll(self, action_id: str) -> _Object:
        with self._lock:
            if action_id in self._running:
                return {"status": "RUNNING"}
            if action_id not in self._outcomes:
                raise _RefusedError(404, f"unknown action id: {action_id}")
            outcome: _Object = json.loads(self._outcomes[action_id])
            return outcome


class _RefusedError(Exception):
    """An error to answer with: its status, its message, and lines for the reply's header."""


@dataclass
class _Fault:
    """A planned fault: what to refuse requests with (None: no answer at all), how many, and which (None: any)."""

    refusal: tuple[Any, ...] | None
    times: int
    only: str | None


class _Newest:
    """The newest entries by key: at most ``_KEPT``, and of large ones fewer, but always the last."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        self._entries: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def add(self, key: Any, value: Any, size: int) -> None:
        self._entries[key] = value, size
        self._bytes += size
        while len(self._entries) > _KEPT or (self._bytes > self._max_bytes and len(self._entries) > 1):
            _, (_, size) = self._entries.popitem(last=False)
            self._bytes -= size

    def values(self) -> list[Any]:
        return [value for value, _ in self._entries.values()]

    def __contains__(self, key: Any) -> bool:
        return key in self._entries

    def __getitem__(self, key: Any) -> Any:
        return self._entries[key][0]


def _check_number(
    name: str, value: Any, expected: str, kinds: Any = (int, float), *, least: float = 0, most: float = math.inf
) -> None:
    """Say what an argument must be; a bool is no number."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be {expected}, not {value!r}")


def _place(function: _Function) -> tuple[Any, Any]:
    """Return where a function is defined."""
    return getattr(function, "__module__", None), getattr(function, "__qualname__", None)


# Running actions.


class _Ended(NamedTuple):
    """How an attempt ended: the outcome as JSON, and what was raised if it failed."""

    outcome: str
    error: BaseException | None


class _Runner:
    """Runs actions until it is stopped."""

    def __init__(self, time_scale: float) -> None:
        self._time_scale = time_scale
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # those of functions that run
        self._platform_loop = _LoopThread()
        self._actions_loop = _LoopThread()

    def run(self, action_id: str, function: _Function, start: _Object) -> Future[str]:
        """Run an action to its end; the result is its outcome as JSON."""
        return self._platform_loop.run(self._execute(action_id, function, start))

    def stop(self, deadline: float) -> None:
        """Cancel what runs, and wait for it until then."""
        self._platform_loop.stop(deadline)
        self._actions_loop.stop(deadline)
        _join(self._threads, deadline)

    async def _execute(self, action_id: str, function: _Function, start: _Object) -> str:
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

    async def _attempt(self, function: _Function, params: Any, timeout: float) -> _Ended:
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

    async def _perform(self, function: _Function, params: Any) -> _Ended:
        """Call the function, and await what can be awaited of what it returns."""
        if inspect.iscoroutinefunction(function):
            return await self._await(lambda: function(copy.deepcopy(params)))
        calling: Future[Any] = Future()
        calling.set_running_or_notify_cancel()  # it cannot be cancelled, only left behind
        try:
            self._threads.add(_start_thread(lambda: calling.set_result(_called(function, params))))
        except RuntimeError as exc:  # there are as many threads as there can be
            return _failure("FAILED", exc)
        called = await asyncio.wrap_future(calling)
        return called if isinstance(called, _Ended) else await self._await(lambda: called)

    async def _await(self, call: Callable[[], Any]) -> _Ended:
        return await asyncio.wrap_future(self._actions_loop.run(_awaited(call)))


def _start_thread(work: Callable[[], object]) -> threading.Thread:
    """Start a daemon thread, which cannot keep a program from exiting."""
    thread = threading.Thread(target=work, name="zamp-local-platform", daemon=True)
    thread.start()
    return thread


def _join(threads: Iterable[threading.Thread], deadline: float) -> None:
    """Wait until all have ended, or until the monotonic clock shows the deadline."""
    for thread in list(threads):
        if thread is not threading.current_thread():  # an action that stops its platform
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _logger.warning("a function that does not return was left behind")


class _LoopThread:
    """An event loop in a thread of its own, which runs until it is stopped, whatever is done in it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_debug(False)  # under `python -X dev` it would tell of every slow step
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._thread = _start_thread(self._run)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self, deadline: float) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set_result, None)
        _join([self._thread], deadline)

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


def _called(function: _Function, params: Any) -> Any:
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


# Requests and replies.


class _Server(ThreadingTCPServer):  # an HTTPServer would look up this machine's name
    """Listens from its making on, answers from ``serve`` to ``stop``; a thread and a connection for each request."""

    allow_reuse_address = True
    request_queue_size = 1024  # connections not yet accepted, as 20 processes with 50 each may make them at once

    def __init__(
        self,
        port: int,
        admit: Callable[[RecordedRequest], int],
        answer: Callable[[RecordedRequest, int], _Object],
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.admit, self.answer = admit, answer
        self._open: set[socket.socket] = set()
        self._workers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # the threads that run

    def serve(self) -> None:
        """Accept connections."""
        self._workers.add(_start_thread(lambda: self.serve_forever(poll_interval=0.02)))

    def stop(self, deadline: float) -> None:
        """Accept no more, end the connections that are open, and wait for their threads until then."""
        self.shutdown()
        with contextlib.suppress(OSError):  # macOS shuts down none that listens
            self.socket.shutdown(socket.SHUT_RDWR)  # a forked child may have it open, and would keep the port
        self.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)
        _join(self._workers, deadline)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        self._workers.add(_start_thread(lambda: self.process_request_thread(request, client_address)))

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a connection was lost or dropped
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = _IDLE_SECONDS
    server: _Server

    def _serve(self) -> None:
        fields = {name.lower(): value for name, value in self.headers.items()}
        request = RecordedRequest(self.command, self.path, fields, None)
        headers: list[str] = []
        is_read = False
        try:
            length = self.server.admit(request)
            content = self.rfile.read(length)
            if len(content) < length:
                raise ConnectionAbortedError
            is_read = True
            with contextlib.suppress(ValueError, RecursionError):
                # int() refuses NaN and Infinity, which are not JSON.
                request = request._replace(body=json.loads(content, parse_constant=int))
            status, answer = 200, self.server.answer(request, length)
        except _RefusedError as exc:
            status, message, *headers = exc.args
            answer = {"error": {"message": message}}
        text = json.dumps(answer)  # in ASCII
        headers += ["Content-Type: application/json", f"Content-Length: {len(text)}", "Connection: close"]
        self.wfile.write("\r\n".join([f"HTTP/1.1 {status} ", *headers, "", text]).encode())
        if not is_read:
            self._linger()

    do_GET = do_POST = _serve

    def _linger(self) -> None:
        """Take no notice of a body for a while: to close at once would reset the connection, and lose the answer."""
        deadline = time.monotonic() + _LINGER_SECONDS
        self.connection.settimeout(_LINGER_SECONDS)
        self.connection.shutdown(socket.SHUT_WR)
        while self.connection.recv(2**16) and time.monotonic() < deadline:
            pass

    def log_message(self, format: str, *args: Any) -> None:
        pass  # the base class writes to stderr


# What a start must say.

# Days, hours, minutes and seconds (ISO 8601); longer units have no fixed length.
_DURATION = re.compile(
    r"P(?=.)(?:(\d{1,9})D)?(?:T(?=.)(?:(\d{1,9})H)?(?:(\d{1,9})M)?(?:(\d{1,9}(?:\.\d+)?)S)?)?", re.ASCII
)


def _duration(name: str, text: Any) -> timedelta:
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{name} must be an ISO 8601 duration, not {text!r}")
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return timedelta(days, seconds, hours=hours, minutes=minutes)


# Types, least value, and both in words.
_RULES: dict[str, Any] = {
    "action_name": ((str,), None, "a text"),
    "params": ((dict, list, str, int, float, bool, type(None)), None, "any JSON value"),
    "is_external_action": ((bool,), True, "true"),
    "summary": ((str,), None, "a text"),
    "start_to_close_timeout_seconds": ((int, float), sys.float_info.min, "a number above 0"),
    "retry_policy": ((dict,), None, "an object"),
}
_ONE_ATTEMPT = {"initial_interval": "PT0S", "maximum_interval": "PT0S", "maximum_attempts": 1, "backoff_coefficient": 1}
_DEFAULTS = {"summary": "", "start_to_close_timeout_seconds": sys.float_info.max, "retry_policy": _ONE_ATTEMPT}


def _checked(body: Any) -> _Object:
    """Return all fields of a start, or refuse it with the reason."""
    if not isinstance(body, dict):
        raise _RefusedError(422, "the body must be a JSON object")
    fields = {**_DEFAULTS, **body}
    for name in fields.keys() - _RULES.keys():
        raise _RefusedError(422, f"there is no field {name}")
    for name, (kinds, least, expected) in _RULES.items():
        value = fields.get(name, ...)
        if type(value) not in kinds or (least is not None and not least <= value <= sys.float_info.max):
            shown = "missing" if value is ... else repr(value)[:100]
            raise _RefusedError(422, f"{name} must be {expected}; it is {shown}")
    policy = fields["retry_policy"].items()
    try:
        policy = {name: _duration(name, value) if name.endswith("_interval") else value for name, value in policy}
        fields["retry_policy"] = RetryPolicy(**policy)
    except (TypeError, ValueError, OverflowError) as exc:
        raise _RefusedError(422, f"retry_policy: {exc}") from None
    return fields
