"""The Zamp API on 127.0.0.1: for trying things without an account, and for users' own tests.

It spells the wire format out itself, to check the client and not to echo it.

An event loop in a thread of its own runs the actions: it awaits what is awaitable and gives plain functions a thread
each. Another thread accepts connections; each connection gets a thread and one request, which is judged as soon as
that can be done: by its Host and its token before a byte of its body is read. `stop` shuts the connections, so that no
thread waits for a client.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import copy
import inspect
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, Callable, Mapping, NamedTuple, TypeVar, overload

from .action_executor.models import RetryPolicy

_logger = logging.getLogger("zamp_sdk")

_STOP_SECONDS = 5.0  # for functions, which cannot be ended from outside
_IDLE_SECONDS = 2.0  # for a client's next bytes, and for it to read why its body was not read
_MAX_BODY = 64 * 2**20  # bytes of a request: as many as the SDK reads of a reply

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
    them sent, with bodies of up to 64 MiB.

    Args:
        auth_token: The token that clients must send.
        time_scale: Factor on the intervals between attempts: with 0.001 an interval of 30 s takes 30 ms.
        port: The port to listen on; 0 picks a free one at each start.
    """

    def __init__(self, *, auth_token: str = "local-token", time_scale: float = 1.0, port: int = 0) -> None:
        self.auth_token = auth_token
        self._time_scale = time_scale
        self._port = port
        self._functions: dict[str, _Function] = {}
        self._requests: list[RecordedRequest] = []  # shared by threads, as the next three: atomic methods only
        self._faults: list[Exception] = []
        self._ids: dict[str, str] = {}  # by idempotency key
        self._outcomes: dict[str, _Object] = {}  # by id
        self._threads: list[threading.Thread] = []  # the event loop's is the first
        self._lock = threading.Lock()  # guards the one below
        self._server: _Server | None = None

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
            existing = self._functions.setdefault(name, function)
            if existing is not function:
                if _definition(existing) != _definition(function):
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
        """The requests since the last start: a copy."""
        return self._requests.copy()

    def fail_next(self, status: int = 503, times: int = 1, retry_after: int | None = None) -> None:
        """Refuse the next ``times`` requests with ``status``, and with ``Retry-After`` if seconds are given."""
        headers = [] if retry_after is None else [f"Retry-After: {retry_after}"]
        self._faults.extend([_RefusedError(status, "planned with fail_next", *headers)] * times)

    def drop_next(self, times: int = 1) -> None:
        """Close the connections of the next ``times`` requests instead of answering them."""
        self._faults.extend([ConnectionAbortedError()] * times)

    def start(self) -> None:
        """Listen and answer until ``stop``, with no memory of earlier runs."""
        with self._lock:
            if self._server is not None:
                raise RuntimeError("the local platform is already running")
            for memory in (self._requests, self._ids, self._outcomes):
                memory.clear()
            self._server = server = _Server(("127.0.0.1", self._port), _Handler)
            server.admit, server.answer = self._admit, self._answer
            serving: Future[None] = Future()  # from Python 3.12 on an ending program starts no thread
            self._run_in_thread(lambda: asyncio.run(self._main(server, serving), debug=False))
            serving.result()
            atexit.register(self.stop)  # Python 3.9 can crash where daemon threads are busy

    def stop(self) -> None:
        """Stop listening, forget planned faults, cancel coroutines, and wait up to 5 s for functions to return.

        Connections are closed, whatever their clients are doing.
        """
        with self._lock:
            if self._server is not None:
                self._server.shutdown()
            self._server = None
            deadline = time.monotonic() + _STOP_SECONDS
            for thread in self._threads:  # it grows until the first, the event loop's, has ended
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    _logger.warning("a function that does not return was left behind")
            self._threads.clear()
            self._faults.clear()
            atexit.unregister(self.stop)

    def __enter__(self) -> LocalPlatform:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _admit(self, request: RecordedRequest) -> int:
        """Return how many bytes of body to read; refuse a request whose body is not even to be read."""
        try:
            return self._body_length(request)
        except _RefusedError:
            self._record(request)
            raise

    def _body_length(self, request: RecordedRequest) -> int:
        if not _OWN_HOST.fullmatch(request.headers.get("host", "")):
            raise _RefusedError(421, "the request is for another host than this machine's 127.0.0.1 or localhost")
        if request.headers.get("authorization") != f"Bearer {self.auth_token}":
            raise _RefusedError(401, "the bearer token is missing or wrong", "WWW-Authenticate: Bearer")
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or "transfer-encoding" in request.headers:
            raise _RefusedError(411, "the body must have a Content-Length")
        # As text first: Python reads no number of over 4,300 digits.
        if len(length.lstrip("0")) > len(str(_MAX_BODY)) or int(length) > _MAX_BODY:
            raise _RefusedError(413, f"the body must not be over {_MAX_BODY} bytes long")
        return int(length)

    def _record(self, request: RecordedRequest) -> None:
        headers = {name: "***" if name == "authorization" else value for name, value in request.headers.items()}
        self._requests.append(request._replace(headers=headers))

    def _answer(self, request: RecordedRequest) -> _Object:
        self._record(request)
        with contextlib.suppress(IndexError):  # no fault is planned
            raise self._faults.pop(0)
        if (request.method, request.path) == ("POST", "/actions"):
            return {"id": self._start(_checked(request.body), request.headers.get("idempotency-key"))}
        parent, _, action_id = request.path.rpartition("/")
        if (request.method, parent) != ("GET", "/actions"):
            raise _RefusedError(404, f"no such path: {request.method} {request.path}")
        if action_id not in self._outcomes:
            raise _RefusedError(404, f"unknown action id: {action_id}")
        return {"id": action_id, **self._outcomes[action_id]}

    def _start(self, start: _Object, key: str | None) -> str:
        name = start["action_name"]
        if name not in self._functions:
            raise _RefusedError(404, f"unknown action {name!r}; registered: {', '.join(self.action_names) or 'none'}")
        new_id = f"act_{os.urandom(8).hex()}"
        self._outcomes[new_id] = {"status": "RUNNING"}  # before others are told the id
        action_id = self._ids.setdefault(key or new_id, new_id)
        if action_id == new_id:
            asyncio.run_coroutine_threadsafe(self._execute(action_id, self._functions[name], start), self._loop)
        return action_id

    async def _main(self, server: _Server, serving: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        end = self._run_in_thread(server.serve)
        serving.set_result(None)
        await asyncio.wrap_future(end)
        # Then asyncio.run cancels all tasks, and so the actions.

    async def _execute(self, action_id: str, function: _Function, start: _Object) -> None:
        name, policy = start["action_name"], start["retry_policy"]
        interval = policy.initial_interval.total_seconds()
        attempt = 0
        while True:
            attempt += 1
            ended = await self._attempt(function, start["params"], start["start_to_close_timeout_seconds"])
            if not isinstance(ended, _Failure):
                break
            _logger.info("attempt %d of action %s (%r) failed", attempt, action_id, name, exc_info=ended.error)
            if attempt == policy.maximum_attempts:  # 0 is no limit, for no attempt has that number
                ended = ended.outcome()
                break
            await asyncio.sleep(interval * self._time_scale)
            interval = min(interval * policy.backoff_coefficient, policy.maximum_interval.total_seconds())
        self._outcomes[action_id] = ended

    async def _attempt(self, function: _Function, params: Any, timeout: float) -> _Object | _Failure:
        attempt = asyncio.ensure_future(self._perform(function, params))
        try:
            await asyncio.wait({attempt}, timeout=timeout)
            if attempt.done():
                return attempt.result()
            error = TimeoutError(f"the attempt took over {timeout} s, its start-to-close timeout")
            return _Failure("TIMED_OUT", error)
        finally:
            attempt.cancel()

    async def _perform(self, function: _Function, params: Any) -> _Object | _Failure:
        """Call the function, and await what can be awaited of what it returns."""
        if inspect.iscoroutinefunction(function):
            return await _awaited(_called(function, params))
        calling = self._run_in_thread(lambda: _called(function, params))
        try:
            called = await asyncio.wrap_future(calling)
        except asyncio.CancelledError:
            calling.add_done_callback(_drop)
            raise
        return await _awaited(called)

    def _run_in_thread(self, function: Callable[[], Any]) -> Future[Any]:
        result: Future[Any] = Future()
        result.set_running_or_notify_cancel()  # it cannot be cancelled, only left behind
        # A daemon: no function can keep the program from exiting.
        thread = threading.Thread(target=lambda: result.set_result(function()), name="zamp-local-platform", daemon=True)
        self._threads.append(thread)
        thread.start()
        return result


class _RefusedError(Exception):
    """An error to answer with: its status, its message, and lines for the reply's header."""


class _Failure(NamedTuple):
    """How an attempt failed."""

    status: str
    error: BaseException

    def outcome(self) -> _Object:
        message = kind = type(self.error).__name__
        with contextlib.suppress(Exception):  # not every exception can be printed
            message = str(self.error) or kind
        return {"status": self.status, "error": {"message": message, "type": kind}}


class _Server(ThreadingTCPServer):  # an HTTPServer would look up this machine's name
    allow_reuse_address = True
    request_queue_size = 128
    admit: Callable[[RecordedRequest], int]
    answer: Callable[[RecordedRequest], _Object]

    def serve(self) -> None:
        """Accept connections until ``shutdown``, then end those that are open."""
        self._connections: list[tuple[socket.socket, threading.Thread]] = []  # only this thread's
        with self:
            self.serve_forever(poll_interval=0.02)
        for connection, thread in self._connections:
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections = [pair for pair in self._connections if pair[1].is_alive()]
        # A daemon: no client can keep the program from exiting.
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        thread.start()
        self._connections.append((request, thread))

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
            status, answer = 200, self.server.answer(request)
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
        deadline = time.monotonic() + _IDLE_SECONDS
        self.connection.shutdown(socket.SHUT_WR)
        while self.connection.recv(2**16) and time.monotonic() < deadline:
            pass

    def log_message(self, format: str, *args: Any) -> None:
        pass  # the base class writes to stderr


def _definition(function: _Function) -> Any:
    """Tell where a function is defined; what does not say is only the same as itself."""
    place = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return place if all(isinstance(name, str) for name in place) else id(function)


def _called(function: _Function, params: Any) -> Any:
    """Return the outcome of a call, or what has to be awaited for it."""
    try:
        result = function(copy.deepcopy(params))
        return result if inspect.isawaitable(result) else _success(result)
    except BaseException as exc:
        return _Failure("FAILED", exc)


async def _awaited(called: Any) -> _Object | _Failure:
    """Return the outcome of what a call returned."""
    if isinstance(called, (dict, _Failure)):
        return called
    try:
        while inspect.isawaitable(called):
            called = await called
        return _success(called)
    except BaseException as exc:
        return _Failure("FAILED", exc)


def _drop(calling: Future[Any]) -> None:
    """Close a coroutine that nobody is left to await; Python would warn of it."""
    if inspect.iscoroutine(calling.result()):
        calling.result().close()


def _success(result: Any) -> _Object:
    return {"status": "COMPLETED", "result": json.loads(json.dumps(result, allow_nan=False))}


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
