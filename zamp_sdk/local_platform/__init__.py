"""The Zamp API on 127.0.0.1: for trying things without an account, and for users' own tests.

`LocalPlatform` is what users see. It judges each request, and remembers requests, planned faults and actions. `server`
brings it the requests, `starts` reads what a start says, and `running` runs the actions.

A platform belongs to the process that started it: in a forked child, which has none of its threads, `stop` does
nothing. `stop` ends the server first, so that nothing new begins; then the platform's loop; then the actions'.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import sys
import threading
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Literal, Optional, TypeVar, overload

from ..action_executor.models import check_type
from .running import Function, Runner
from .server import RecordedRequest, RefusedError, Server
from .starts import checked_start

if TYPE_CHECKING:
    from concurrent.futures import Future

_STOP_SECONDS = 5.0  # for functions, which cannot be ended from outside
_MAX_BODY = 64 * 2**20  # bytes of a request: as many as the SDK reads of a reply

_KEPT = 10_000  # requests, and ended actions: more than a test looks at, and a few dozen megabytes
_REQUEST_BYTES = 64 * 2**20  # of those requests together, as sent
_OUTCOME_BYTES = 512 * 2**20  # of those actions' outcomes together: who started them may be about to ask

# What a client on this machine calls it, at whatever port a tunnel may have. A web page that has its own name point
# here (DNS rebinding) sends that name.
_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.ASCII | re.IGNORECASE)

_F = TypeVar("_F", bound=Function)


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
        check_type("auth_token", auth_token, str, "text")
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
        self._functions: dict[str, Function] = {}
        self._faults: list[_Fault] = []
        self._requests = _Newest(_REQUEST_BYTES)
        self._running: set[str] = set()  # ids of actions
        self._outcomes = _Newest(_OUTCOME_BYTES)  # as JSON, by the ids of ended actions
        self._own()

    def _own(self) -> None:
        """Belong to this process, with no server yet, and with locks that no thread of a parent holds."""
        self._process = os.getpid()
        self._server: Server | None = None
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
            server = Server(self._port, self._admit, self._answer)
            with self._lock:
                self._forget()
                self._running.clear()
                self._run_id = uuid.uuid4()
            self._runner = Runner(self._time_scale)
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
        except RefusedError:
            self._record(request, 0)
            raise

    def _body_length(self, request: RecordedRequest) -> int:
        if not _OWN_HOST.fullmatch(request.headers.get("host", "")):
            raise RefusedError(421, "the request is for another host than this machine's 127.0.0.1 or localhost")
        if request.headers.get("authorization") != f"Bearer {self.auth_token}":
            raise RefusedError(401, "the bearer token is missing or wrong", "WWW-Authenticate: Bearer")
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not re.fullmatch("[0-9]+", length):
            raise RefusedError(411, "the body must have a Content-Length")
        if len(length) > 9 or int(length) > _MAX_BODY:  # in this order: Python reads no number of over 4,300 digits
            raise RefusedError(413, f"the body must not be over {_MAX_BODY} bytes long")
        return int(length)

    def _record(self, request: RecordedRequest, body_length: int) -> None:
        headers = {name: "***" if name == "authorization" else value for name, value in request.headers.items()}
        size = body_length + len(request.path) + sum(len(name) + len(value) for name, value in headers.items())
        with self._lock:
            self._requests.add(object(), request._replace(headers=headers), size)

    def _answer(self, request: RecordedRequest, body_length: int) -> dict[str, Any]:
        self._record(request, body_length)
        with self._lock:
            self._keep_to_the_rate_limit()
            self._meet_a_fault("start" if request.method == "POST" else "poll")
        if (request.method, request.path) == ("POST", "/actions"):
            try:
                start = checked_start(request.body)
            except ValueError as exc:
                raise RefusedError(422, str(exc)) from None
            return {"id": self._start(start, request.headers.get("idempotency-key"))}
        parent, _, action_id = request.path.rpartition("/")
        if (request.method, parent) != ("GET", "/actions"):
            raise RefusedError(404, f"no such path: {request.method} {request.path}")
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
            raise RefusedError(429, f"over {rate:g} requests a second", f"Retry-After: {seconds}")
        self._tokens -= 1

    def _meet_a_fault(self, kind: str) -> None:
        self._faults = [fault for fault in self._faults if fault.times]
        for fault in self._faults:
            if fault.only in (None, kind):
                fault.times -= 1
                raise ConnectionAbortedError if fault.refusal is None else RefusedError(*fault.refusal)

    def _start(self, start: dict[str, Any], key: str | None) -> str:
        name = start["action_name"]
        if name not in self._functions:
            raise RefusedError(404, f"unknown action {name!r}; registered: {', '.join(self.action_names) or 'none'}")
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

    def _poll(self, action_id: str) -> dict[str, Any]:
        with self._lock:
            if action_id in self._running:
                return {"status": "RUNNING"}
            if action_id not in self._outcomes:
                raise RefusedError(404, f"unknown action id: {action_id}")
            outcome: dict[str, Any] = json.loads(self._outcomes[action_id])
            return outcome


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
    """Say what an argument must be."""
    check_type(name, value, kinds, expected)
    if not least <= value <= most:
        raise ValueError(f"{name} must be {expected}, not {value!r}")


def _place(function: Function) -> tuple[Any, Any]:
    """Return where a function is defined."""
    return getattr(function, "__module__", None), getattr(function, "__qualname__", None)
