"""The local platform, seen through the standard library's HTTP client and bare sockets, never through the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import http.client
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import typing
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest import mock

import pytest

from zamp_sdk import local_platform
from zamp_sdk.local_platform import LocalPlatform, starts

POLICY = {"initial_interval": "PT10S", "maximum_interval": "PT15S", "maximum_attempts": 3, "backoff_coefficient": 1.5}


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: Any

    @property
    def message(self) -> str:
        return str(self.body["error"]["message"])


class Client:
    """A client that knows the token."""

    def __init__(self, platform: LocalPlatform) -> None:
        self.address = platform.base_url.partition("//")[2]
        self.headers = {"Authorization": f"Bearer {platform.auth_token}", "Content-Type": "application/json"}

    def send(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> Reply:
        with contextlib.closing(http.client.HTTPConnection(self.address, timeout=5)) as connection:
            connection.request(method, path, body, {**self.headers, **headers})
            with connection.getresponse() as response:
                assert response.headers["Content-Type"] == "application/json"
                return Reply(response.status, response.headers, json.loads(response.read()))

    def start(self, name: str, params: Any = None, *, key: str | None = None, **fields: Any) -> Reply:
        body = {"action_name": name, "params": params, "is_external_action": True, **fields}
        return self.send("POST", "/actions", json.dumps(body), **({} if key is None else {"Idempotency-Key": key}))

    def poll(self, action_id: str) -> Reply:
        return self.send("GET", f"/actions/{action_id}")

    def execute(self, name: str, params: Any = None, **fields: Any) -> dict[str, Any]:
        """Start an action and return its outcome."""
        started = self.start(name, params, **fields)
        assert started.status == 200
        assert set(started.body) == {"id"}
        return self.outcome(started.body["id"])

    def outcome(self, action_id: str) -> dict[str, Any]:
        """Return the first poll's body that is not RUNNING, less its id."""
        for _ in range(500):
            outcome: dict[str, Any] = self.poll(action_id).body
            assert outcome.pop("id") == action_id
            if outcome != {"status": "RUNNING"}:
                return outcome
            time.sleep(0.005)
        raise AssertionError("the action did not end")


@pytest.fixture
def platform() -> Iterator[LocalPlatform]:
    """A running platform with the action `echo`; after it no thread is left."""
    before = threading.enumerate()
    with LocalPlatform(time_scale=0.0001) as running:
        running.action(echo)
        yield running
    assert threading.enumerate() == before


@pytest.fixture
def client(platform: LocalPlatform) -> Client:
    """A client of that platform."""
    return Client(platform)


def echo(params: Any) -> Any:
    """Return the params."""
    return params


# Actions


@pytest.mark.parametrize("params", [None, 1.5, "é", [1, {"a": None}], {"id": "inv_1"}], ids=repr)
def test_what_an_action_returns_is_its_result(platform: LocalPlatform, client: Client, params: Any) -> None:
    """Functions and coroutine functions are called with any JSON as their one argument, and return the result."""

    @platform.action
    async def echo_later(params: Any) -> Any:
        await asyncio.sleep(0)
        return params

    for name in ("echo", "echo_later"):
        assert client.execute(name, params) == {"status": "COMPLETED", "result": params}


async def plus_one(params: int) -> int:
    """Return one more."""
    await asyncio.sleep(0)
    return params + 1


class PlusOne:
    """An object whose call is a coroutine."""

    async def __call__(self, params: int) -> int:
        return params + 1


class Later:
    """Something to await that is no coroutine."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        return self.value


@functools.wraps(plus_one)
def wrapper(*args: Any) -> Any:
    """Do what a decorator does that knows nothing of coroutines."""
    return plus_one(*args)


def asynchronous_mock() -> Any:
    """Make what tests stand in for a coroutine function with."""
    return mock.create_autospec(plus_one, side_effect=plus_one)


@pytest.mark.parametrize(
    "function",
    [
        lambda params: plus_one(params + 0),
        wrapper,
        functools.partial(plus_one),
        PlusOne(),
        PlusOne().__call__,
        asynchronous_mock(),
        mock.AsyncMock(side_effect=plus_one),
        lambda params: Later(params + 1),
        lambda params: Later(plus_one(params)),
    ],
    ids=["lambda", "wraps", "partial", "object", "method", "autospec", "AsyncMock", "awaitable", "nested"],
)
def test_what_can_be_awaited_is_awaited(platform: LocalPlatform, client: Client, function: Any) -> None:
    """Whatever a function gives that can be awaited is, until it is a result."""
    platform.action("plus_one")(function)
    assert client.execute("plus_one", 1) == {"status": "COMPLETED", "result": 2}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_traceback_of_a_failed_attempt_is_in_the_log(
    platform: LocalPlatform, client: Client, caplog: pytest.LogCaptureFixture, asynchronous: bool
) -> None:
    """Each failed attempt is a record of level INFO with the traceback that leads to the user's own line."""
    caplog.set_level(logging.INFO, "zamp_sdk")

    def divide(params: int) -> float:
        return 1 / params

    async def divide_later(params: int) -> float:
        return 1 / params

    platform.action("divide")(divide_later if asynchronous else divide)
    assert client.execute("divide", 0, retry_policy={**POLICY, "maximum_attempts": 2})["status"] == "FAILED"
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert re.search(r"attempt 2 of action act_\w+ \('divide'\) failed", caplog.text)
    assert caplog.text.count("    return 1 / params") == 2
    assert "ZeroDivisionError" in caplog.text


def cell(result: int) -> Any:
    """Define an action as a notebook's cell does that is run again."""

    def action(params: Any) -> int:
        return result

    return action


def test_the_same_function_defined_again_takes_its_place(platform: LocalPlatform, client: Client) -> None:
    """A cell that is run again redefines its action, and a function of another name or module does not."""
    platform.action(cell(1))
    assert platform.action(cell(2)).__name__ == "action"
    assert client.execute("action")["result"] == 2
    with pytest.raises(ValueError, match="there already is an action named 'action'"):
        platform.action("action")(echo)
    elsewhere = cell(3)
    elsewhere.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="there already is an action named 'action'"):
        platform.action(elsewhere)


def test_what_cannot_be_registered_is_a_type_error() -> None:
    """An object without a name needs one, and what cannot be called is no action."""
    platform = LocalPlatform()
    with pytest.raises(TypeError, match=r"has no name: use `platform\.action\(name\)\(function\)`"):
        platform.action(PlusOne())
    with pytest.raises(TypeError, match="an action must be a function, not int"):
        platform.action("one")(1)  # type: ignore[type-var]  # that is the test


def test_registering_returns_the_function_unchanged() -> None:
    """The decorator works bare and with a name, returns what it was given, and gives a name once."""
    platform = LocalPlatform()
    assert platform.action(echo) is echo
    assert platform.action("second")(echo) is echo
    assert platform.action_names == ["echo", "second"]
    with pytest.raises(ValueError, match="already is an action named 'echo'"):
        platform.action("echo")(lambda params: params)


@pytest.mark.parametrize(
    "error", [ValueError("no"), ValueError(), SystemExit("bye"), asyncio.CancelledError()], ids=repr
)
def test_an_exception_fails_the_action(platform: LocalPlatform, client: Client, error: BaseException) -> None:
    """Without a policy what is raised is FAILED at once, with its message, or its type where it has none."""
    calls = []

    @platform.action
    def fail(params: Any) -> None:
        calls.append(params)
        raise error

    @platform.action
    async def fail_later(params: Any) -> None:
        fail(params)

    kind = type(error).__name__
    for name in ("fail", "fail_later"):
        outcome = {"status": "FAILED", "error": {"message": str(error) or kind, "type": kind}}
        assert client.execute(name) == outcome
    assert calls == [None, None]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda _: {1}, "Object of type set is not JSON serializable"),
        (lambda _: float("nan"), "Out of range float values are not JSON compliant"),
        (lambda _: next(iter([])), "StopIteration"),  # a future can't hold it
    ],
)
def test_a_function_that_returns_no_json_fails(
    platform: LocalPlatform, client: Client, function: Any, message: str
) -> None:
    """A result that is not JSON is FAILED with the reason, and so is none at all."""
    platform.action("bad")(function)
    outcome = client.execute("bad")
    assert outcome["status"] == "FAILED"
    assert outcome["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("maximum_attempts", "outcome"),
    [
        (2, {"status": "FAILED", "error": {"message": "attempt 2", "type": "OSError"}}),
        (3, {"status": "COMPLETED", "result": 3}),
        (0, {"status": "COMPLETED", "result": 3}),
    ],
)
def test_a_failed_attempt_is_retried_under_the_policy(
    platform: LocalPlatform, client: Client, maximum_attempts: int, outcome: Any
) -> None:
    """Attempts end with the first that succeeds or the last that is allowed; each has its own copy of the params."""
    attempts = []

    @platform.action
    def flaky(params: dict[str, int]) -> int:
        params["seen"] += 1
        attempts.append(params)
        if len(attempts) < 3:
            raise OSError(f"attempt {len(attempts)}")
        return len(attempts)

    policy = {**POLICY, "maximum_attempts": maximum_attempts}
    assert client.execute("flaky", {"seen": 0}, retry_policy=policy) == outcome
    assert attempts == [{"seen": 1}] * (maximum_attempts or 3)
    assert platform.requests[0].body["params"] == {"seen": 0}


def test_the_intervals_follow_the_policy_and_the_time_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals grow by the coefficient up to the maximum, times time_scale."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    platform = LocalPlatform(time_scale=0.5)
    platform.action("fail")(lambda _: 1 / 0)
    policy = {**POLICY, "maximum_attempts": 5, "maximum_interval": "PT20S"}
    with platform:
        assert Client(platform).execute("fail", retry_policy=policy)["error"]["type"] == "ZeroDivisionError"
    assert waits == [5.0, 7.5, 10.0, 10.0]


def test_an_attempt_over_its_timeout_times_out(platform: LocalPlatform, client: Client) -> None:
    """Functions and coroutines that take longer than start_to_close_timeout_seconds are retried, then TIMED_OUT."""
    go_on = threading.Event()
    calls = []

    @platform.action
    def slow(params: Any) -> None:
        calls.append(params)
        go_on.wait(5)

    @platform.action
    async def slow_coroutine(params: Any) -> None:
        calls.append(params)
        await asyncio.sleep(60)

    for name in ("slow", "slow_coroutine"):
        policy = {**POLICY, "maximum_attempts": 2}
        outcome = client.execute(name, retry_policy=policy, start_to_close_timeout_seconds=0.03)
        assert outcome["status"] == "TIMED_OUT"
        assert outcome["error"]["message"] == "the attempt took over 0.03 s, its start-to-close timeout"
    go_on.set()
    assert len(calls) == 4


@pytest.mark.parametrize("seconds", [5, 2**80, 1e300])
def test_an_attempt_within_its_timeout_completes(client: Client, seconds: float) -> None:
    """Every field of the wire format is accepted, and a timeout of any size harms no faster attempt."""
    fields = {"summary": "s", "retry_policy": POLICY, "start_to_close_timeout_seconds": seconds}
    assert client.execute("echo", 1, **fields) == {"status": "COMPLETED", "result": 1}


# What actions do to what runs them


async def exit_in_a_task(_: Any) -> str:
    """Call sys.exit in a task of its own, which leaves the event loop at once."""
    task = asyncio.ensure_future(leave(SystemExit("bye")))
    await asyncio.wait({task})
    assert task.exception()
    return "done"


async def interrupt_in_a_task(_: Any) -> str:
    """Raise what Ctrl-C raises, in a task of its own."""
    task = asyncio.ensure_future(leave(KeyboardInterrupt()))
    await asyncio.wait({task})
    assert task.exception()
    return "done"


async def await_a_task_that_exits(_: Any) -> None:
    """Await a task that calls sys.exit."""
    await asyncio.ensure_future(leave(SystemExit("bye")))


async def leave(error: BaseException) -> None:
    """Raise it."""
    raise error


async def interrupt(_: Any) -> None:
    """Raise what Ctrl-C raises."""
    raise KeyboardInterrupt


async def cancel_all_tasks(_: Any) -> None:
    """Cancel every task that there is, the own one too."""
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(0)


async def stop_the_loop(_: Any) -> str:
    """Stop the event loop, twice."""
    for _ in range(2):
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)
    return "done"


async def close_the_loop(_: Any) -> None:
    """Close the event loop."""
    asyncio.get_running_loop().close()


@pytest.mark.parametrize(
    ("action", "outcome"),
    [
        (exit_in_a_task, "done"),
        (interrupt_in_a_task, "done"),
        (stop_the_loop, "done"),
        (await_a_task_that_exits, "SystemExit"),
        (interrupt, "KeyboardInterrupt"),
        (cancel_all_tasks, "CancelledError"),
        (close_the_loop, "RuntimeError"),
    ],
)
def test_nothing_an_action_does_ends_the_platform(
    platform: LocalPlatform, client: Client, action: Any, outcome: str
) -> None:
    """What an action does to its event loop is a failed attempt at worst; it gets its outcome, and so does the next."""
    platform.action(action)
    ended = client.execute(action.__name__)
    assert outcome in (ended.get("result"), ended.get("error", {}).get("type"))
    assert client.execute("echo", 1)["result"] == 1


def test_cancelling_all_tasks_ends_only_what_is_awaited(platform: LocalPlatform, client: Client) -> None:
    """Actions that are awaited meanwhile fail an attempt, and are tried again; functions notice nothing."""
    go_on = threading.Event()
    attempts = []

    @platform.action
    async def awaited(params: Any) -> int:
        attempts.append(params)
        if len(attempts) == 1:
            await asyncio.sleep(60)
        return len(attempts)

    @platform.action
    def function(params: Any) -> str:
        return str(go_on.wait(5))

    platform.action(cancel_all_tasks)
    ids = [client.start(name, retry_policy=POLICY).body["id"] for name in ("awaited", "function")]
    until(lambda: bool(attempts))
    assert client.execute("cancel_all_tasks")["status"] == "FAILED"
    assert client.outcome(ids[0]) == {"status": "COMPLETED", "result": 2}
    go_on.set()
    assert client.outcome(ids[1]) == {"status": "COMPLETED", "result": "True"}


def test_a_coroutine_that_blocks_holds_up_only_its_like(platform: LocalPlatform, client: Client) -> None:
    """A coroutine that blocks its event loop times out in time, and functions run meanwhile."""
    go_on = threading.Event()

    @platform.action
    async def block(params: Any) -> None:
        go_on.wait(10)

    try:
        assert client.execute("block", start_to_close_timeout_seconds=0.05)["status"] == "TIMED_OUT"
        assert client.execute("echo", 1)["result"] == 1
    finally:
        go_on.set()


class UnprintableError(Exception):
    """An exception whose text cannot be had."""

    def __init__(self, effect: Any) -> None:
        self.effect = effect

    def __str__(self) -> str:
        if isinstance(self.effect, BaseException):
            raise self.effect
        return self.effect  # type: ignore[no-any-return]  # that is the test


@pytest.mark.parametrize("effect", [RuntimeError(), SystemExit(5), KeyboardInterrupt(), 1, None], ids=repr)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_that_cannot_be_printed_is_told_by_its_type(
    platform: LocalPlatform, client: Client, caplog: pytest.LogCaptureFixture, effect: Any, asynchronous: bool
) -> None:
    """Whatever an exception does when it is made a text of, the attempt has failed, and nothing else."""
    caplog.set_level(logging.INFO, "zamp_sdk")

    def fail(params: Any) -> None:
        raise UnprintableError(effect)

    async def fail_later(params: Any) -> None:
        fail(params)

    platform.action("fail")(fail_later if asynchronous else fail)
    error = {"message": "UnprintableError", "type": "UnprintableError"}
    assert client.execute("fail") == {"status": "FAILED", "error": error}
    assert "attempt 1 of action" in caplog.text


def test_a_log_that_cannot_be_written_keeps_no_outcome_back(platform: LocalPlatform, client: Client) -> None:
    """A handler of the user's that raises is no reason to leave an action RUNNING."""

    class Handler(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise SystemExit(5)

    logger, handler, level = logging.getLogger("zamp_sdk"), Handler(), logging.getLogger("zamp_sdk").level
    platform.action("fail")(lambda _: 1 / 0)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert client.execute("fail")["error"]["type"] == "ZeroDivisionError"
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_no_thread_to_be_had_is_a_failed_attempt(
    platform: LocalPlatform, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A function that finds no thread fails that attempt, and the platform answers when there are threads again."""
    caplog.set_level(logging.INFO, "zamp_sdk")
    usual = threading.stack_size()

    @platform.action
    def exhaust(params: Any) -> None:
        threading.stack_size(2**47)  # more than a process can have
        raise OSError("exhausted")

    try:
        action_id = client.start("exhaust", retry_policy={**POLICY, "maximum_attempts": 2}).body["id"]
        until(lambda: "attempt 2 of action" in caplog.text)
    finally:
        threading.stack_size(usual)
    outcome = client.outcome(action_id)
    assert (outcome["status"], outcome["error"]["message"]) == ("FAILED", "can't start new thread")


def test_what_ends_with_its_platform_may_cancel_all_tasks(caplog: pytest.LogCaptureFixture) -> None:
    """An action that is cancelled by the stop, and then cancels what else there is, or exits, holds nothing up."""
    before = threading.enumerate()
    platform = LocalPlatform()
    began = threading.Event()

    @platform.action
    async def clean_up(params: Any) -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.wait({asyncio.ensure_future(leave(SystemExit("bye")))})
            await cancel_all_tasks(params)

    with platform:
        Client(platform).send("POST", "/actions", start_body({"action_name": "clean_up"}, {}))
        assert began.wait(5)
    gc.collect()
    assert threading.enumerate() == before
    assert "Task was destroyed" not in caplog.text


def test_an_action_may_stop_its_platform() -> None:
    """A function that stops the platform it runs on is not waited for by itself."""
    before = threading.enumerate()
    platform = LocalPlatform()
    stopped = threading.Event()

    @platform.action
    def stop(params: Any) -> None:
        platform.stop()
        stopped.set()

    platform.start()
    with contextlib.suppress(OSError):  # it may stop before it has answered
        Client(platform).send("POST", "/actions", start_body({"action_name": "stop"}, {}))
    assert stopped.wait(10)
    until(lambda: threading.enumerate() == before)


# Requests


def test_the_same_idempotency_key_gives_the_same_action(platform: LocalPlatform, client: Client) -> None:
    """Starts with one key, however many at once, are one action that runs once; without a key each is its own."""
    calls: list[Any] = []
    platform.action("count")(calls.append)
    with ThreadPoolExecutor(8) as pool:
        keys = ["a"] * 16 + ["b"] + [None] * 2
        ids = list(pool.map(lambda key: client.start("count", key, key=key).body["id"], keys))
    assert {client.outcome(action_id)["status"] for action_id in ids} == {"COMPLETED"}
    assert len(set(ids[:16])) == 1
    assert len(set(ids)) == 4
    assert sorted(map(str, calls)) == ["None", "None", "a", "b"]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic local-token", "Bearer é"])
def test_a_wrong_token_is_refused(platform: LocalPlatform, client: Client, header: str) -> None:
    """Without the right bearer token every request is 401, and neither the answer nor the record tells a token."""
    client.headers["Authorization"] = header
    reply = client.start("echo")
    assert reply.status == client.poll("x").status == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert platform.auth_token not in str(reply.body)
    assert platform.requests[0].headers["authorization"] == "***"


def test_what_is_unknown_is_404(platform: LocalPlatform, client: Client) -> None:
    """An action that is not registered, an id nobody was given, and any path but the two are 404, and it says which."""
    platform.action("send_invoice")(echo)
    for reply, message in (
        (client.start("send_invoise"), "unknown action 'send_invoise'; registered: echo, send_invoice"),
        (client.poll("act_0"), "unknown action id: act_0"),
        (client.send("POST", "/v1/actions", "{}"), "no such path: POST /v1/actions"),
        (client.send("GET", "/actions"), "no such path: GET /actions"),
        (client.send("POST", "/actions/act_0", "{}"), "no such path: POST /actions/act_0"),
        (client.send("POST", "/actions?x=1", "{}"), "no such path: POST /actions?x=1"),
    ):
        assert (reply.status, reply.message) == (404, message)


def start_body(fields: dict[str, Any], policy: dict[str, Any]) -> str:
    """Return a good start's body with some fields changed, or left out where the value is `...`."""
    policy = {name: value for name, value in {**POLICY, **policy}.items() if value is not ...}
    body = {"action_name": "echo", "params": 1, "is_external_action": True, "retry_policy": policy, **fields}
    return json.dumps({name: value for name, value in body.items() if value is not ...})


BAD_DURATIONS = ["", "30", "P", "PT", "P1DT", "-PT1S", "PT1S\n", "P1M", "PT1M1H", "pt1s", "PT\u0661S", 30]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("action_name", [..., 7, None], "a text"),
        ("params", [...], "any JSON value"),
        ("is_external_action", [..., 1, False], "true"),
        ("summary", [None], "a text"),
        ("start_to_close_timeout_seconds", [0, "1", True, 10**400], "a number above 0"),
        ("retry_policy", [None, []], "an object"),
    ],
)
def test_a_bad_field_is_422_with_the_reason(client: Client, name: str, values: list[Any], expected: str) -> None:
    """A field that breaks a rule of the wire format is refused, naming the field and the rule."""
    for value in values:
        reply = client.send("POST", "/actions", start_body({name: value}, {}))
        shown = "missing" if value is ... else repr(value)[:100]
        assert (reply.status, reply.message) == (422, f"{name} must be {expected}; it is {shown}")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("initial_interval", [..., "30", None, "PT16S"]),
        ("maximum_interval", [..., "30", None, "P9999999999D", "P999999999DT999999999H"]),
        ("maximum_attempts", [..., -1, 1.0, True]),
        ("backoff_coefficient", [..., 0.9, 10**400, None]),
    ],
)
def test_a_bad_retry_policy_is_422_with_the_reason(client: Client, name: str, values: list[Any]) -> None:
    """A field of the policy that is missing or breaks a rule of RetryPolicy is refused."""
    for value in values:
        reply = client.send("POST", "/actions", start_body({}, {name: value}))
        assert (reply.status, reply.message[:14]) == (422, "retry_policy: ")
        assert name in reply.message or "days" in reply.message


@pytest.mark.parametrize("text", BAD_DURATIONS)
def test_a_bad_duration_is_refused(text: Any) -> None:
    """What is not an ISO 8601 duration of days, hours, minutes and seconds is refused by its field's name."""
    with pytest.raises(ValueError, match=re.escape(f"x must be an ISO 8601 duration, not {text!r}")):
        starts._duration("x", text)


@pytest.mark.parametrize(("fields", "policy"), [({"timeout": 1}, {}), ({}, {"jitter": 1})])
def test_a_field_that_does_not_exist_is_422(client: Client, fields: dict[str, Any], policy: dict[str, Any]) -> None:
    """A field that the wire format does not have is refused by its name."""
    reply = client.send("POST", "/actions", start_body(fields, policy))
    assert (reply.status, ("timeout" if fields else "jitter") in reply.message) == (422, True)


@pytest.mark.parametrize("body", ["", "{", b'"\xff"', '{"params": NaN}', "[]", "[" * 100_000], ids=range(6))
def test_a_body_that_is_no_json_object_is_422(client: Client, body: str | bytes) -> None:
    """What is not JSON, and JSON that is not an object, is refused."""
    reply = client.send("POST", "/actions", body)
    assert (reply.status, reply.message) == (422, "the body must be a JSON object")


def test_a_policy_whose_intervals_contradict_is_422(client: Client) -> None:
    """A maximum interval below the initial one is refused."""
    reply = client.send("POST", "/actions", start_body({}, {"initial_interval": "PT16S"}))
    assert (reply.status, reply.message) == (
        422,
        "retry_policy: maximum_interval must not be under initial_interval: 0:00:15",
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("PT0S", 0), ("PT0.000001S", 0.000001), ("PT15M", 900), ("P14D", 1_209_600), ("P1DT1H1M2.5S", 90_062.5)],
)
def test_durations_are_read_as_iso_8601(text: str, seconds: float) -> None:
    """Days, hours, minutes and seconds add up."""
    assert starts._duration("x", text) == timedelta(seconds=seconds)


def test_requests_are_recorded_in_order_without_the_token(platform: LocalPlatform, client: Client) -> None:
    """Requests are kept as they arrived, refused ones too, but for the token; the list is a copy."""
    action_id = client.start("echo", {"a": 1}, key="k").body["id"]
    client.poll(action_id)
    client.send("POST", "/actions", "{")
    start, poll, malformed = platform.requests
    assert start.body == {"action_name": "echo", "params": {"a": 1}, "is_external_action": True}
    assert (start.method, start.path) == ("POST", "/actions")
    assert start.headers["idempotency-key"] == "k"
    assert start.headers["authorization"] == "***"
    assert (poll.method, poll.path, poll.body) == ("GET", f"/actions/{action_id}", None)
    assert malformed.body is None
    assert platform.auth_token not in repr(platform.requests)
    platform.requests.clear()
    assert len(platform.requests) == 3


def test_a_client_that_goes_away_is_no_error(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    """A client that leaves in the middle of its request, with a reset too, is not reported."""
    host, _, port = client.address.partition(":")
    for sent in (b"", b"POST /act", b"POST /actions HTTP/1.1\r\nContent-Length: 10\r\n\r\n{"):
        for reset in (b"\0" * 8, b"\1" + b"\0" * 7):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(sent)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    assert client.poll("x").status == 404
    assert capfd.readouterr() == ("", "")


# Memory


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalPlatform]:
    """A running platform that keeps three requests and three ended actions, and of large ones fewer."""
    monkeypatch.setattr(local_platform, "_KEPT", 3)
    monkeypatch.setattr(local_platform, "_REQUEST_BYTES", 100_000)
    monkeypatch.setattr(local_platform, "_OUTCOME_BYTES", 150_000)
    platform = LocalPlatform()
    platform.action(echo)
    with platform:
        yield platform


def test_the_newest_requests_are_kept(forgetful: LocalPlatform) -> None:
    """Of many requests the newest are kept, in their order, and refused ones count."""
    client = Client(forgetful)
    for number in range(5):
        client.poll(str(number))
    client.send("GET", "/actions/unauthorized", Authorization="Bearer wrong")
    assert [request.path for request in forgetful.requests] == ["/actions/3", "/actions/4", "/actions/unauthorized"]


def test_of_large_requests_fewer_are_kept(forgetful: LocalPlatform) -> None:
    """What is too much together is forgotten from the oldest on, and the newest is kept whatever its size."""
    client = Client(forgetful)

    def sent(length: int) -> list[int]:
        client.send("POST", "/actions", json.dumps("x" * length))
        return [len(request.body) for request in forgetful.requests]

    assert [sent(length) for length in (30_000, 60_000)] == [[30_000], [30_000, 60_000]]
    assert sent(20_000) == [60_000, 20_000]
    assert sent(500_000) == [500_000]
    assert sent(10) == [10]


def test_headers_count_as_room_that_a_request_takes(forgetful: LocalPlatform) -> None:
    """A request without a body is large if its headers are, and if it was refused, too."""
    client = Client(forgetful)
    for token in ("wrong", forgetful.auth_token):
        for number in range(2):
            client.send("GET", f"/actions/{number}", Authorization=f"Bearer {token}", X="x" * 60_000)
        assert [request.path for request in forgetful.requests] == ["/actions/1"]


@pytest.mark.parametrize("is_told", [False, True])
def test_the_newest_ended_actions_are_kept(forgetful: LocalPlatform, is_told: bool) -> None:
    """Of many ended actions the newest are kept, and their keys; whether they were asked for or not."""
    calls: list[int] = []
    forgetful.action("count")(calls.append)
    client = Client(forgetful)
    ids = []
    for number in range(5):
        ids.append(client.start("count", number, key=str(number)).body["id"])
        until(lambda: not forgetful._running)
        if is_told:
            client.outcome(ids[-1])
    assert [client.start("count", number, key=str(number)).body["id"] for number in (2, 3, 4)] == ids[2:]
    assert [client.poll(action_id).status for action_id in ids] == [404, 404, 200, 200, 200]
    assert calls == [0, 1, 2, 3, 4]


def test_a_forgotten_action_is_unknown(forgetful: LocalPlatform) -> None:
    """What is over the bound is 404, as an id that nobody was given."""
    client = Client(forgetful)
    ids = [client.start("echo").body["id"] for _ in range(2)]
    for action_id in ids:
        client.outcome(action_id)
    for _ in range(3):
        client.execute("echo")
    assert [client.poll(action_id).status for action_id in ids] == [404, 404]


def test_a_running_action_is_never_forgotten(forgetful: LocalPlatform) -> None:
    """However many end meanwhile, and whatever is cleared, an action that runs is known, and its key with it."""
    go_on = threading.Event()
    forgetful.action("wait")(lambda _: go_on.wait(10))
    client = Client(forgetful)
    action_id = client.start("wait", key="k").body["id"]
    for _ in range(5):
        client.execute("echo")
    forgetful.clear()
    assert client.start("wait", key="k").body["id"] == action_id
    assert client.poll(action_id).body["status"] == "RUNNING"
    go_on.set()
    assert client.outcome(action_id) == {"status": "COMPLETED", "result": True}


def test_of_large_outcomes_fewer_are_kept(forgetful: LocalPlatform) -> None:
    """What is too much together is forgotten from the oldest on."""
    client = Client(forgetful)
    ids = []
    for _ in range(3):
        ids.append(client.start("echo", "x" * 60_000).body["id"])
        until(lambda: not forgetful._running)
    assert [client.poll(action_id).status for action_id in ids] == [404, 200, 200]


def test_threads_that_have_ended_are_forgotten(platform: LocalPlatform, client: Client) -> None:
    """Of the threads that ran functions and connections only so many are kept as run at once."""
    threads: set[weakref.ref[threading.Thread]] = set()
    platform.action("note")(lambda _: threads.add(weakref.ref(threading.current_thread())))
    for _ in range(400):
        client.start("note")
    until(lambda: len(threads) == 400)
    gc.collect()
    assert sum(reference() is not None for reference in threads) < 300


def test_clear_forgets_what_a_test_has_left(platform: LocalPlatform, client: Client) -> None:
    """Between two tests that share a platform, requests, planned faults and ended actions can be forgotten."""
    first = client.start("echo", 1, key="k").body["id"]
    client.outcome(first)
    platform.fail_next(times=9)
    platform.drop_next(only="poll")
    platform.clear()
    assert platform.requests == []
    assert client.poll(first).status == 404
    assert client.execute("echo", 2, key="k")["result"] == 2
    assert platform.requests[0].path.endswith(first)


# The rate limit


def test_requests_over_the_rate_limit_are_429() -> None:
    """A second's worth of requests is answered, each other one as its turn comes, and those over it get Retry-After."""
    begin = time.monotonic()
    with LocalPlatform(rate_limit=20) as platform:
        client = Client(platform)
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(client.poll, ["x"] * 100))
        answered = [reply for reply in replies if reply.status == 404]
        refused = [reply for reply in replies if reply.status == 429]
        assert len(answered) + len(refused) == 100
        assert 20 <= len(answered) <= 20 + 20 * (time.monotonic() - begin)
        assert {reply.headers["Retry-After"] for reply in refused} <= {"1"}
        until(lambda: client.poll("x").status == 404)


def test_what_the_rate_limit_refuses_was_not_processed() -> None:
    """A refused request is recorded, starts nothing, uses up no fault, and is told when to come back."""
    with LocalPlatform(rate_limit=0.01) as platform:
        calls: list[Any] = []
        platform.action("count")(calls.append)
        platform.fail_next()
        client = Client(platform)
        assert client.send("GET", "/actions/x", Authorization="Bearer wrong").status == 401  # counts against nobody
        assert client.start("count", 1).status == 503
        reply = client.start("count", 2)
        assert (reply.status, reply.message) == (429, "over 0.01 requests a second")
        assert 1 <= int(reply.headers["Retry-After"]) <= 100
        assert [request.body["params"] for request in platform.requests[1:]] == [1, 2]
        platform.clear()
        assert client.start("count", 3).status == 200
        until(lambda: calls == [3])


def test_the_smallest_rate_limit_can_be_told() -> None:
    """However seldom a platform may be asked, its Retry-After is a number."""
    with LocalPlatform(rate_limit=sys.float_info.min) as platform:
        replies = [Client(platform).poll("x") for _ in range(2)]
    assert [reply.status for reply in replies] == [404, 429]
    assert int(replies[1].headers["Retry-After"]) > 1


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"time_scale": "1"}, TypeError, "time_scale must be a finite number, not negative, not str"),
        ({"time_scale": None}, TypeError, "time_scale"),
        ({"time_scale": True}, TypeError, "time_scale"),
        ({"time_scale": float("nan")}, ValueError, "time_scale must be a finite number, not negative, not nan"),
        ({"time_scale": float("inf")}, ValueError, "time_scale"),
        ({"time_scale": 10**400}, ValueError, "time_scale"),
        ({"time_scale": -0.1}, ValueError, "time_scale"),
        ({"port": "80"}, TypeError, "port must be a whole number from 0 to 65535, not str"),
        ({"port": 80.0}, TypeError, "port"),
        ({"port": None}, TypeError, "port"),
        ({"port": False}, TypeError, "port"),
        ({"port": -1}, ValueError, "port must be a whole number from 0 to 65535, not -1"),
        ({"port": 65536}, ValueError, "port"),
        ({"auth_token": None}, TypeError, "auth_token must be text, not NoneType"),
        ({"auth_token": b"x"}, TypeError, "auth_token"),
        ({"auth_token": ""}, ValueError, "auth_token must be printable ASCII without white space, and not empty"),
        ({"auth_token": "a b"}, ValueError, "auth_token"),
        ({"auth_token": "a\n"}, ValueError, "auth_token"),
        ({"auth_token": "é"}, ValueError, "auth_token"),
        ({"rate_limit": "100"}, TypeError, "rate_limit must be a finite number above 0, not str"),
        ({"rate_limit": True}, TypeError, "rate_limit"),
        ({"rate_limit": 0}, ValueError, "rate_limit must be a finite number above 0, not 0"),
        ({"rate_limit": -1}, ValueError, "rate_limit"),
        ({"rate_limit": float("nan")}, ValueError, "rate_limit"),
        ({"rate_limit": float("inf")}, ValueError, "rate_limit"),
    ],
    ids=repr,
)
def test_a_platform_that_cannot_be_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    """An argument of the wrong type is a TypeError, one out of its range a ValueError, and both name it."""
    with pytest.raises(error, match=message):
        LocalPlatform(**arguments)


@pytest.mark.parametrize(
    ("method", "arguments", "error"),
    [
        ("fail_next", {"status": 0}, ValueError("status must be a whole number from 200 to 599, not 0")),
        ("fail_next", {"status": 100}, ValueError("status")),
        ("fail_next", {"status": 600}, ValueError("status")),
        ("fail_next", {"status": "503"}, TypeError("status must be a whole number from 200 to 599, not str")),
        ("fail_next", {"status": 503.0}, TypeError("status")),
        ("fail_next", {"status": True}, TypeError("status")),
        ("fail_next", {"times": -1}, ValueError("times must be a whole number, not negative, not -1")),
        ("fail_next", {"times": "2"}, TypeError("times")),
        ("fail_next", {"times": None}, TypeError("times")),
        ("fail_next", {"retry_after": -1}, ValueError("retry_after must be whole seconds, not negative, not -1")),
        ("fail_next", {"retry_after": 1.5}, TypeError("retry_after must be whole seconds, not negative, not float")),
        ("fail_next", {"retry_after": "1\r\nX: y"}, TypeError("retry_after")),
        ("fail_next", {"retry_after": True}, TypeError("retry_after")),
        ("fail_next", {"only": "POST"}, ValueError("only must be 'start' or 'poll', not 'POST'")),
        ("fail_next", {"only": []}, ValueError("only must be 'start' or 'poll'")),
        ("drop_next", {"times": -1}, ValueError("times must be a whole number, not negative, not -1")),
        ("drop_next", {"times": 1.0}, TypeError("times")),
        ("drop_next", {"times": True}, TypeError("times")),
        ("drop_next", {"only": ""}, ValueError("only")),
    ],
    ids=repr,
)
def test_a_fault_that_cannot_be_is_refused(
    platform: LocalPlatform, client: Client, method: str, arguments: Any, error: Exception
) -> None:
    """What no platform can do is refused where it is planned, and nothing is planned."""
    with pytest.raises(type(error), match=str(error)):
        getattr(platform, method)(**arguments)
    assert client.execute("echo", 1)["result"] == 1


@pytest.mark.parametrize("name", ["__init__", "action", "fail_next", "drop_next", "clear", "start", "stop"])
def test_type_hints_can_be_read(name: str) -> None:
    """What tools read with typing.get_type_hints can be read on every Python."""
    assert "return" in typing.get_type_hints(getattr(LocalPlatform, name))


# Faults


def test_fail_next_answers_with_the_status_unprocessed(platform: LocalPlatform, client: Client) -> None:
    """The next requests get the status and Retry-After, and nothing else happens; then all is as before."""
    calls: list[Any] = []
    platform.action("count")(calls.append)
    platform.fail_next(times=2, retry_after=1)
    platform.fail_next(status=599)
    replies = [client.start("count") for _ in range(3)]
    assert [reply.status for reply in replies] == [503, 503, 599]
    assert [reply.headers["Retry-After"] for reply in replies] == ["1", "1", None]
    assert replies[0].message == "planned with fail_next"
    assert client.execute("count", 1)["status"] == "COMPLETED"
    assert calls == [1]
    assert len(platform.requests) >= 5


def test_drop_next_closes_without_an_answer(platform: LocalPlatform, client: Client) -> None:
    """A dropped request is read and recorded but not processed, and its connection ends without a byte."""
    calls: list[Any] = []
    platform.action("count")(calls.append)
    platform.drop_next(times=2)
    for _ in range(2):
        with pytest.raises(http.client.RemoteDisconnected):
            client.start("count")
    assert [request.path for request in platform.requests] == ["/actions"] * 2
    assert client.execute("echo", 1)["result"] == 1
    assert calls == []


def test_a_fault_can_be_aimed(platform: LocalPlatform, client: Client) -> None:
    """A fault for starts or for polls leaves the others alone; those that fit come in the order they were planned."""
    platform.fail_next(500, times=2, only="poll")
    platform.fail_next(HTTPStatus.BAD_GATEWAY, only="start")
    platform.fail_next(504)
    platform.drop_next(only="poll")
    assert [client.start("echo").status for _ in range(2)] == [502, 504]
    action_id = client.start("echo").body["id"]
    assert [client.poll(action_id).status for _ in range(2)] == [500, 500]
    with pytest.raises(http.client.RemoteDisconnected):
        client.poll(action_id)
    assert client.outcome(action_id)["status"] == "COMPLETED"


def test_many_faults_take_no_more_room_than_one(platform: LocalPlatform, client: Client) -> None:
    """A platform that is to fail for ever can be planned, and planning nothing is no fault."""
    platform.fail_next(times=0)
    platform.drop_next(times=0)
    assert client.poll("x").status == 404
    platform.fail_next(times=10**18)
    assert [client.poll("x").status for _ in range(3)] == [503] * 3


def test_faults_can_be_planned_ahead_and_end_with_the_run() -> None:
    """What is planned before the start holds from the first request on, and what is left is forgotten on stop."""
    platform = LocalPlatform()
    platform.fail_next(times=9)
    for status in (503, 404):
        with platform:
            assert Client(platform).poll("x").status == status


# Starting and stopping


def test_a_platform_starts_once_at_a_time_and_stops_any_time() -> None:
    """To start twice is an error, to stop twice is not, and only what runs has a base URL."""
    platform = LocalPlatform()
    platform.stop()
    with platform:
        assert platform.base_url.startswith("http://127.0.0.1:")
        with pytest.raises(RuntimeError, match="already running"):
            platform.start()
    platform.stop()
    with pytest.raises(RuntimeError, match="not running: use `with platform:`"):
        _ = platform.base_url


def test_a_restart_begins_afresh() -> None:
    """Requests outlive the stop, not the next start; actions and keys end with their run, registrations stay."""
    platform = LocalPlatform()
    platform.action(echo)
    ids: list[str] = []
    for _ in range(2):
        with platform:
            client = Client(platform)
            assert [client.poll(action_id).status for action_id in ids] == [404] * len(ids)
            ids.append(client.start("echo", key="k").body["id"])
        assert platform.requests[-1].method == "POST"
    assert len(set(ids)) == 2
    assert len(platform.requests) == 2


def test_stop_during_many_starts_leaves_nothing() -> None:
    """Stop cancels coroutines, ends retries and waits for functions, in whatever moment of its life an action is."""
    before = threading.enumerate()
    begin = time.monotonic()
    platform = LocalPlatform(time_scale=0)
    began, cancelled = threading.Event(), threading.Event()

    @platform.action
    async def sleep(params: Any) -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    platform.action("fail")(lambda _: 1 / 0)
    platform.action("short")(lambda _: time.sleep(0.05))
    for _ in range(5):
        with platform:
            client = Client(platform)
            for _ in range(5):
                client.start("sleep")
                client.start("short")
                client.start("fail", retry_policy={**POLICY, "maximum_attempts": 0})
            assert began.wait(5)
        assert cancelled.is_set()
        assert threading.enumerate() == before
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("header", ["Content-Length: -1", "Content-Length: x", "Transfer-Encoding: chunked"])
def test_a_body_of_unknown_length_is_411(header: str) -> None:
    """A body whose end cannot be known is refused, and its connection closed."""
    with LocalPlatform() as platform:
        assert raw_reply(platform, f"{AUTHORIZED}{header}\r\n\r\n".encode()).startswith(b"HTTP/1.1 411 ")


AUTHORIZED = "POST /actions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer local-token\r\n"


def connect(platform: LocalPlatform) -> socket.socket:
    """Connect as a client that is no HTTP client."""
    return socket.create_connection(("127.0.0.1", int(platform.base_url.rpartition(":")[2])), timeout=5)


def raw_reply(platform: LocalPlatform, *chunks: bytes) -> bytes:
    """Send these bytes, and return what comes until the connection is closed."""
    with connect(platform) as connection, connection.makefile("rb") as replies:
        for chunk in chunks:
            connection.sendall(chunk)
        return replies.read()


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:80", "127.0.0.1.attacker.example", "localhost@x", "192.168.0.1", ""]
)
def test_a_request_for_another_host_is_421_and_runs_nothing(platform: LocalPlatform, client: Client, host: str) -> None:
    """A web page that has its own name lead to this machine starts nothing, though it knows the token."""
    calls: list[Any] = []
    platform.action("count")(calls.append)
    body = json.dumps({"action_name": "count", "params": 1, "is_external_action": True})
    reply = client.send("POST", "/actions", body, Host=host)
    assert (reply.status, client.send("GET", "/actions/x", Host=host).status) == (421, 421)
    assert calls == []
    assert [request.path for request in platform.requests] == ["/actions", "/actions/x"]


def test_a_request_without_a_host_is_421(platform: LocalPlatform) -> None:
    """A request that names no host may be meant for any."""
    assert raw_reply(platform, b"GET /actions/x HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:1", "[::1]:8080", "127.0.0.1:65535"])
def test_a_request_for_this_machine_is_answered(client: Client, host: str) -> None:
    """This machine's own names are right at any port, which a tunnel may have changed."""
    assert client.send("GET", "/actions/x", Host=host).status == 404


def test_a_body_without_the_token_is_refused_unread(platform: LocalPlatform) -> None:
    """The answer to 300 MB without the right token comes before the first of them, and reaches who sends on."""
    head = b"POST /actions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 314572800\r\n\r\n"
    assert raw_reply(platform, head).startswith(b"HTTP/1.1 401 ")
    assert raw_reply(platform, head, *[b"x" * 2**20] * 16).startswith(b"HTTP/1.1 401 ")
    assert [request.body for request in platform.requests] == [None, None]


@pytest.mark.parametrize("length", ["67108865", "99999999999999999999", "9" * 5000])
def test_a_body_that_is_too_long_is_413(platform: LocalPlatform, length: str) -> None:
    """A body over 64 MiB is refused at once, whatever number its length is."""
    reply = raw_reply(platform, f"{AUTHORIZED}Content-Length: {length}\r\n\r\n".encode())
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"the body must not be over 67108864 bytes long" in reply


def test_a_planned_fault_is_kept_for_a_request_with_the_token(platform: LocalPlatform, client: Client) -> None:
    """What is refused at the door uses up no fault."""
    platform.fail_next()
    assert client.send("GET", "/actions/x", Authorization="Bearer wrong").status == 401
    assert client.poll("x").status == 503


@pytest.mark.parametrize(
    "begin", [b"", b"GET /act", f"{AUTHORIZED}Content-Length: 9\r\n\r\n{{".encode(), b"GET / HTTP/1.1\r\n\r\n"]
)
def test_stop_waits_for_no_client(begin: bytes) -> None:
    """A client that sends a byte now and then, or does not go away after its answer, holds nobody up."""
    before = threading.enumerate()
    platform = LocalPlatform()
    platform.start()
    with connect(platform) as connection:
        connection.sendall(begin)
        until(lambda: len(threading.enumerate()) > len(before) + 3)  # the connection's thread, after the platform's own
        stopping = threading.Thread(target=platform.stop)
        stopping.start()
        for _ in range(100):  # a byte every 20 ms, for 2 s
            stopping.join(0.02)
            if not stopping.is_alive():
                break
            with contextlib.suppress(OSError):
                connection.sendall(b"x")
        assert not stopping.is_alive()
    assert threading.enumerate() == before
    assert [request.method for request in platform.requests] in ([], ["GET"])


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def test_a_client_may_take_its_time(client: Client) -> None:
    """A client on a busy machine that connects, and says nothing for over two seconds, is answered all the same."""
    with contextlib.closing(http.client.HTTPConnection(client.address, timeout=30)) as connection:
        connection.connect()
        time.sleep(2.2)
        connection.request("GET", "/actions/x", headers=client.headers)
        assert connection.getresponse().status == 404


CHILD = """
import json, multiprocessing, os, sys, time, urllib.request
from zamp_sdk.local_platform import LocalPlatform

def call(platform):
    body = b'{"action_name": "double", "params": 1, "is_external_action": true}'
    request = urllib.request.Request(platform.base_url + "/actions", body, {"Authorization": "Bearer local-token"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
        assert json.load(response)["id"]

platform = LocalPlatform()
platform.action("double")(lambda params: 2 * params)

def child():
    STATEMENT

def run_child():
    child_id = os.fork()
    if not child_id:
        child()
        sys.exit(7)  # as any program ends: atexit, and what waits for threads
    for _ in range(1000):
        ended, status = os.waitpid(child_id, os.WNOHANG)
        if ended:
            return status >> 8
        time.sleep(0.01)
    os.kill(child_id, 9)
    os.waitpid(child_id, 0)
    return "hangs"

with platform:
    print(run_child())
    call(platform)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    print(process.exitcode)
    if process.exitcode is None:
        process.kill()
    call(platform)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.parametrize(
    "statement",
    [
        "pass",
        "platform.stop()",
        "platform.__exit__()",
        "call(platform)",
        "platform.start(); call(platform); platform.stop()",
        "platform.start(); call(platform)",
        "other = LocalPlatform(); other.action('double')(len); other.start(); call(other); other.stop()",
    ],
)
def test_a_forked_child_does_nothing_to_the_platform(statement: str) -> None:
    """Only the process that started a platform stops it; a child ends as any does, may call it, or start its own."""
    program = CHILD.replace("STATEMENT", statement)
    assert run_program(program) == (0, "7\n0\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.skipif(sys.platform == "darwin", reason="a socket that listens cannot be shut down there")
def test_a_forked_child_does_not_keep_the_port() -> None:
    """A port can be listened on again while a child lives that was forked meanwhile."""
    program = """
import multiprocessing, time
from zamp_sdk.local_platform import LocalPlatform
with LocalPlatform() as platform:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    port = int(platform.base_url.rpartition(":")[2])
try:
    with LocalPlatform(port=port):
        print("listens")
finally:
    child.kill()
    child.join()
"""
    assert run_program(program) == (0, "listens\n", "")


def run_program(program: str) -> tuple[int, str, str]:
    """Run a program that forks while it has threads, of which Python 3.12 and later warn; return how it ended."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_stop_leaves_a_function_that_does_not_return(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A function that goes on is RUNNING, then is waited for a bounded time, and left as a daemon, with a warning."""
    monkeypatch.setattr(local_platform, "_STOP_SECONDS", 1.0)
    before = threading.enumerate()
    platform = LocalPlatform()
    go_on, began = threading.Event(), threading.Event()

    @platform.action
    def wait(params: Any) -> None:
        began.set()
        go_on.wait(10)

    with platform:
        started = Client(platform).start("wait").body
        assert began.wait(5)
        assert Client(platform).poll(started["id"]).body == {"id": started["id"], "status": "RUNNING"}
    (left,) = (thread for thread in threading.enumerate() if thread not in before)
    assert left.daemon
    assert "a function that does not return was left behind" in caplog.text
    go_on.set()
    left.join(5)


def test_stop_waits_for_a_function_that_begins_meanwhile() -> None:
    """A function whose start was answered, but begins only while the platform stops, is waited for too."""
    before = threading.enumerate()
    platform = LocalPlatform()
    began = threading.Event()

    @platform.action
    async def block(params: Any) -> None:
        began.set()
        time.sleep(0.3)  # the event loop, so that what is started meanwhile has to queue

    platform.action("short")(lambda _: time.sleep(0.3))
    with platform:
        client = Client(platform)
        client.start("block")
        assert began.wait(5)
        client.start("short")
    assert threading.enumerate() == before


def test_a_process_with_all_warnings_ends_silently() -> None:
    """Under -X dev, with warnings as errors, a run and an exit without a stop print nothing and do not hang."""
    program = """
import asyncio, logging, urllib.request
from zamp_sdk.local_platform import LocalPlatform
logging.getLogger("asyncio").setLevel(logging.ERROR)  # no slow callbacks, which tell how busy the machine is
platform = LocalPlatform()
@platform.action
async def forever(params):
    await asyncio.sleep(60)
def call():
    body = b'{"action_name": "forever", "params": 1, "is_external_action": true}'
    request = urllib.request.Request(platform.base_url + "/actions", body, {"Authorization": "Bearer local-token"})
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
with platform:
    call()
platform.start()
call()
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FIXTURE = """\
import asyncio

import pytest

from zamp_sdk import ActionExecutor, ActionFailedError
from zamp_sdk.local_platform import LocalPlatform


@pytest.fixture
def platform(monkeypatch):
    platform = LocalPlatform(time_scale=0.001)

    @platform.action
    def send_invoice(params):
        return {"sent": params["invoice_id"]}

    with platform:
        monkeypatch.setenv("ZAMP_BASE_URL", platform.base_url)
        monkeypatch.setenv("ZAMP_AUTH_TOKEN", platform.auth_token)
        monkeypatch.setenv("no_proxy", "127.0.0.1")  # where the environment names a proxy
        yield platform


def bill(invoice_id):  # the code under test
    return asyncio.run(ActionExecutor.execute("send_invoice", {"invoice_id": invoice_id}))


def test_bill(platform):
    assert bill("inv_123") == {"sent": "inv_123"}
    assert platform.requests[0].body["params"] == {"invoice_id": "inv_123"}


@pytest.mark.asyncio  # from pytest-asyncio
async def test_an_expired_card(platform):
    @platform.action
    async def charge_card(params):
        raise ValueError("the card has expired")

    with pytest.raises(ActionFailedError, match="the card has expired"):
        await ActionExecutor.execute("charge_card", {"card": "4111"})
"""


def test_the_sample_of_a_pytest_fixture_works(tmp_path: Path) -> None:
    """Tests that get a platform from a fixture pass, synchronous and asynchronous, behind a proxy that is not there."""
    (tmp_path / "test_sample.py").write_text(FIXTURE, encoding="utf-8")
    options = ("-q", "-W", "error", "-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function")
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "pytest", *options, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HTTP_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
