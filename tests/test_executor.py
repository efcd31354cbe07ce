"""The public calls, end to end against the local platform."""

from __future__ import annotations

import asyncio
import base64
import copy
import logging
import pickle
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Callable

import pydantic
import pytest

from tests.servers import TOKEN, Server, eventually, reply, silent
from zamp_sdk import (
    ActionExecutor,
    ActionFailedError,
    ActionStatus,
    ActionTimeoutError,
    HttpClientError,
    MissingConfigError,
    RetryPolicy,
)
from zamp_sdk.action_executor import executor, lifecycle, notices
from zamp_sdk.action_executor.replies import ActionReply
from zamp_sdk.local_platform import LocalPlatform
from zamp_sdk.transport import pool

logger = logging.getLogger("zamp_sdk")


class Invoice(pydantic.BaseModel):
    number: int


class Checked:
    """A result type that has the method alone."""

    @classmethod
    def model_validate(cls, value: Any) -> Checked:
        checked = cls()
        checked.value = value
        return checked

    value: Any


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalPlatform]:
    """A running platform, to which the environment points."""
    platform = LocalPlatform(time_scale=0.001)

    @platform.action
    def echo(params: Any) -> Any:
        return params

    @platform.action
    def fail(params: Any) -> Any:
        raise ValueError(params)

    @platform.action
    async def wait(params: Any) -> Any:
        await asyncio.sleep(params)
        return "waited"

    with platform:
        monkeypatch.setenv("ZAMP_BASE_URL", platform.base_url)
        monkeypatch.setenv("ZAMP_AUTH_TOKEN", platform.auth_token)
        yield platform


async def test_execute_returns_the_result(platform: LocalPlatform) -> None:
    """An action's result is what execute returns, and its POST and its polls are all that is sent."""
    assert await ActionExecutor.execute("echo", {"a": [1, "é"]}) == {"a": [1, "é"]}
    assert [request.method for request in platform.requests[:2]] == ["POST", "GET"]


async def test_execute_sends_what_it_is_given(platform: LocalPlatform) -> None:
    """Every argument arrives, in the wire format, with one idempotency key and our user agent."""
    await ActionExecutor.execute(
        "echo",
        None,
        summary="s",
        action_retry_policy=RetryPolicy.default(),
        action_start_to_close_timeout=timedelta(minutes=10),
    )
    post, poll = platform.requests[:2]
    assert post.body == {
        "action_name": "echo",
        "params": None,
        "is_external_action": True,
        "summary": "s",
        "retry_policy": {
            "initial_interval": "PT30S",
            "maximum_attempts": 11,
            "maximum_interval": "PT15M",
            "backoff_coefficient": 1.5,
        },
        "start_to_close_timeout_seconds": 600.0,
    }
    assert len(post.headers["idempotency-key"]) == 32
    assert post.headers["accept"] == poll.headers["accept"] == "application/json"
    assert post.headers["user-agent"].startswith("zamp-sdk/1.")
    assert "idempotency-key" not in poll.headers


async def test_arguments_win_over_the_environment(platform: LocalPlatform) -> None:
    """A base URL and a token in the call are used instead of the environment's."""
    with pytest.raises(HttpClientError) as caught:
        await ActionExecutor.execute("echo", 1, base_url=platform.base_url + "/v1", auth_token="other")
    assert caught.value.status_code in (401, 404)
    assert platform.requests[-1].path == "/v1/actions"


async def test_missing_configuration_sends_nothing(platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token nothing is sent."""
    monkeypatch.delenv("ZAMP_AUTH_TOKEN")
    with pytest.raises(MissingConfigError, match="ZAMP_AUTH_TOKEN is not set"):
        await ActionExecutor.execute("echo", 1)
    assert platform.requests == []


async def test_bad_params_send_nothing(platform: LocalPlatform) -> None:
    """What cannot be sent is refused before the network."""
    with pytest.raises(TypeError, match=r"params\.a: cannot send a set as JSON"):
        await ActionExecutor.execute("echo", {"a": {1}})
    assert platform.requests == []


async def test_return_type_of_pydantic(platform: LocalPlatform) -> None:
    """A pydantic model validates the result."""
    assert await ActionExecutor.execute("echo", {"number": "7"}, return_type=Invoice) == Invoice(number=7)


async def test_return_type_that_has_the_method(platform: LocalPlatform) -> None:
    """A class with model_validate is enough."""
    checked = await ActionExecutor.execute("echo", [1], return_type=Checked)
    assert checked.value == [1]


async def test_other_return_types_leave_the_result(platform: LocalPlatform) -> None:
    """Any other type leaves the result as it came."""
    result: object = await ActionExecutor.execute("echo", {"a": 1}, return_type=list)
    assert result == {"a": 1}


async def test_invalid_result(platform: LocalPlatform) -> None:
    """A result that the model refuses raises the model's error, with a note that the action did complete."""
    handle = await ActionExecutor.start("echo", {}, return_type=Invoice)
    with pytest.raises(pydantic.ValidationError) as caught:
        await handle.result()
    if sys.version_info >= (3, 11):
        assert f"action {handle.id} (echo) did complete" in caught.value.__notes__[0]


async def test_failed_action(platform: LocalPlatform) -> None:
    """An action that fails is a RuntimeError kind with the platform's reason."""
    with pytest.raises(ActionFailedError, match=r"^action act\w+ \(fail\) ended as FAILED: ValueError: boom") as caught:
        await ActionExecutor.execute("fail", "boom")
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.status == "FAILED"


async def test_handle(platform: LocalPlatform) -> None:
    """A handle knows its id and its status, and gives the result again and again."""
    handle = await ActionExecutor.start("wait", 0.2)
    assert await handle.status() is ActionStatus.RUNNING
    assert await handle.result() == "waited"
    polls = len(platform.requests)
    assert await handle.result() == "waited"
    assert len(platform.requests) == polls
    assert await handle.status() is ActionStatus.COMPLETED
    assert handle.id in repr(handle)
    assert platform.auth_token not in repr(handle)


async def test_collect_elsewhere(platform: LocalPlatform) -> None:
    """Whoever has the id can collect the result."""
    started = await ActionExecutor.start("echo", {"number": 7})
    platform_requests = len(platform.requests)
    handle = ActionExecutor.get_handle(started.id, return_type=Invoice)
    assert len(platform.requests) == platform_requests
    assert await handle.result() == Invoice(number=7)


async def take_every_room() -> int:
    """Leave no connection for others, and return how many rooms of the pool that took."""
    shared = pool.shared_pool()
    taken = 0
    while shared._rooms_taken < shared._rooms:
        await asyncio.wait_for(shared.enter(), 10)
        taken += 1
    return taken


async def test_a_timeout_holds_while_others_have_every_connection(
    platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller's timeout counts the wait for a connection, too."""
    monkeypatch.setattr(executor, "GRACE", 0.0)
    handle = await ActionExecutor.start("wait", 0.0)
    taken = await take_every_room()
    with pytest.raises(ActionTimeoutError) as caught:
        await handle.result(timeout=timedelta(seconds=0.05))
    for _ in range(taken):
        pool.shared_pool().leave()
    assert (caught.value.action_id, caught.value.status) == (handle.id, "")
    assert 0.05 <= caught.value.waited < 5
    assert await handle.result(timeout=timedelta(seconds=30)) == "waited"


async def test_a_timeout_tells_the_last_status_that_was_seen(
    platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait that others' requests cut short, after polls that said RUNNING, says so."""
    monkeypatch.setattr(executor, "GRACE", 0.0)
    handle = await ActionExecutor.start("wait", 30)
    waiting = asyncio.ensure_future(handle.result(timeout=timedelta(seconds=1)))
    await eventually(lambda: len(platform.requests) > 3)
    taken = await take_every_room()
    with pytest.raises(ActionTimeoutError) as caught:
        await waiting
    for _ in range(taken):
        pool.shared_pool().leave()
    assert caught.value.status == "RUNNING"


async def test_a_cancellation_that_comes_with_the_result_is_not_lost(
    platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to Python 3.11 wait_for would swallow it, and the caller's task would go on."""

    async def send(*_: Any) -> ActionReply:
        await asyncio.sleep(0.02)
        return ActionReply(200, "act", "COMPLETED", 42)

    handle = await ActionExecutor.start("wait", 0.0)
    monkeypatch.setattr(executor._Driver, "_send", send)

    async def job() -> None:
        await handle.result(timeout=timedelta(seconds=5))
        await asyncio.sleep(5)

    task = asyncio.ensure_future(job())
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    loop.call_later(0.01, time.sleep, 0.03)  # so that both are due at once
    loop.call_later(0.025, task.cancel)
    await asyncio.wait({task}, timeout=2)
    assert task.cancelled()


async def test_unknown_id(platform: LocalPlatform) -> None:
    """An id that the platform does not know is an error at once, with the id."""
    with pytest.raises(HttpClientError) as caught:
        await ActionExecutor.get_handle("act-unknown").result()
    assert (caught.value.status_code, caught.value.action_id) == (404, "act-unknown")


async def test_wait_that_is_over(platform: LocalPlatform) -> None:
    """A timeout names the action, which goes on, and the same handle can wait again."""
    handle = await ActionExecutor.start("wait", 0.4)
    with pytest.raises(ActionTimeoutError, match="it goes on") as caught:
        await handle.result(timeout=timedelta(seconds=0.1))
    assert isinstance(caught.value, TimeoutError)
    assert (caught.value.action_id, caught.value.status) == (handle.id, "RUNNING")
    assert await handle.result(timeout=timedelta(seconds=30)) == "waited"


@pytest.mark.parametrize(("timeout", "error"), [(1, TypeError), (timedelta(seconds=-1), ValueError)])
async def test_bad_timeout(platform: LocalPlatform, timeout: Any, error: type[Exception]) -> None:
    """A timeout is a timedelta that is not negative."""
    with pytest.raises(error, match="timeout must"):
        await ActionExecutor.get_handle("act-1").result(timeout=timeout)


async def test_start_that_is_over_already() -> None:
    """A start whose reply has the result costs no poll."""
    with Server() as server:
        server.always("POST", reply(200, {"id": "act-1", "status": "COMPLETED", "result": 7}))
        assert await ActionExecutor.execute("echo", 1, base_url=server.url, auth_token=TOKEN) == 7
        assert [request.method for request in server.requests] == ["POST"]


async def test_unknown_statuses_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A status that nobody knows is waited for and warned of once; status() says that it cannot tell."""
    monkeypatch.setattr(lifecycle, "POLL_MIN", 0.001)
    with Server() as server:
        statuses = ["QUEUED", "QUEUED", "PAUSED", "RUNNING", "COMPLETED", "QUEUED"]
        server.on("GET", *(reply(200, {"id": "act-1", "status": status}) for status in statuses))
        handle = ActionExecutor.get_handle("act-1", base_url=server.url, auth_token=TOKEN)
        await handle.result()
        assert caplog.text.count("which this version of zamp-sdk does not know") == 1
        with pytest.raises(HttpClientError, match="QUEUED"):
            await handle.status()


async def test_cancelled_execute_logs_the_id(platform: LocalPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """A cancelled execute leaves the action running, and says once how to collect its result."""
    task = asyncio.ensure_future(ActionExecutor.execute("wait", 5))
    await eventually(lambda: len(platform.requests) >= 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    told = r"no longer waiting for action (act\w+) \(wait\), which may go on; to collect its result: "
    told += r"await ActionExecutor\.get_handle\('\1', base_url='http://.*', auth_token=\.\.\.\)\.result\(\)"
    assert re.fullmatch(told, record.getMessage())
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == [record.getMessage()]


async def test_the_line_that_collects_works(platform: LocalPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """The line that a warning prints collects the result, once the token is put into it."""
    handle = await ActionExecutor.start("wait", 0.3)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(handle.result(), 0.01)
    line = caplog.records[-1].getMessage().partition("to collect its result: await ")[2]
    code = line.replace("auth_token=...", f"auth_token={platform.auth_token!r}")
    assert code == (
        f"ActionExecutor.get_handle('{handle.id}', base_url='{platform.base_url}', auth_token='local-token').result()"
    )
    assert await eval(code, {"ActionExecutor": ActionExecutor}) == "waited"


async def test_a_fault_of_ours_brings_the_id(
    platform: LocalPlatform, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever leaves execute after the start says how to collect the result."""
    monkeypatch.delattr(lifecycle, "poll_interval")
    with pytest.raises(NameError):
        await ActionExecutor.execute("wait", 5)
    assert re.search(r"await ActionExecutor\.get_handle\('act\w+', base_url=.*\)\.result\(\)", caplog.text)


async def test_a_timeout_is_no_accident(platform: LocalPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """A wait that ends by its own timeout is an error that tells how to go on, and no warning."""
    handle = await ActionExecutor.start("wait", 5)
    for _ in range(3):
        with pytest.raises(ActionTimeoutError, match=rf"get_handle\('{handle.id}'"):
            await handle.result(timeout=timedelta(0))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_who_waits_in_short_turns_is_told_once(platform: LocalPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """Each cancelled wait for a handle has a note; the warning comes with the first one alone."""
    handle = await ActionExecutor.start("wait", 5)
    for _ in range(3):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle.result(), 0.01)
    assert caplog.text.count("no longer waiting") == 1


async def test_the_same_result_twice(platform: LocalPlatform) -> None:
    """Each call makes a model anew; without a return_type all share what came, as documented."""
    handle = await ActionExecutor.start("echo", {"number": 7}, return_type=Invoice)
    (await handle.result()).number = 8
    assert (await handle.result()).number == 7
    plain = ActionExecutor.get_handle(handle.id)
    assert await plain.result() is await plain.result()


def warnings_and_notes(caplog: pytest.LogCaptureFixture, exc: BaseException) -> tuple[list[str], list[str]]:
    """Return what was logged for people to see, and what an exception tells."""
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return warnings, getattr(exc, "__notes__", [])


def noted(text: str) -> list[str]:
    """Return the notes that an exception has on this Python."""
    return [text] if sys.version_info >= (3, 11) else []


NOT_STARTED = "cancelled while starting action 'wait': nothing was sent, so it has not started"
REFUSED = "cancelled while starting action 'wait': it was refused, so it has not started"


async def test_cancelled_before_anything_was_sent(platform: LocalPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """A start that is cancelled before a byte of it left has a note that says so, which is not worth a warning."""
    task = asyncio.ensure_future(ActionExecutor.start("wait", 0))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert warnings_and_notes(caplog, caught.value) == ([], noted(NOT_STARTED))
    assert platform.requests == []


async def test_cancelled_between_two_tries(platform: LocalPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """A start that was refused unprocessed, and is cancelled before it is sent again, ends at once, unstarted."""
    platform.fail_next(status=429, retry_after=30)
    task = asyncio.ensure_future(ActionExecutor.start("wait", 0))
    await eventually(lambda: "limits how fast it is asked; it asks for a pause of 30 s; waiting: 1" in caplog.text)
    caplog.clear()
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await asyncio.wait_for(task, 5)
    assert warnings_and_notes(caplog, caught.value) == ([], noted(REFUSED))
    assert len(platform.requests) == 1


async def test_cancelled_start_logs_the_doubt(caplog: pytest.LogCaptureFixture) -> None:
    """A start that is cancelled while it is under way says that the action may exist."""
    with Server() as server:
        server.always("POST", silent)
        task = asyncio.ensure_future(ActionExecutor.start("act", 0, base_url=server.url, auth_token=TOKEN))
        while not server.count("POST"):  # noqa: ASYNC110  # the server runs in threads
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert "may have started all the same" in caplog.text


class FirstWaitIsTheLast(logging.Handler):
    """Cancels a task as soon as the reply to its start has been read, before anybody was told of it."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("POST"):
            raise self.error


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, RuntimeError])
def test_a_start_whose_reply_was_read_is_never_lost(
    error: type[BaseException], platform: LocalPlatform, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever ends a start after its reply has come, the id is told, and that is all."""
    caplog.set_level(logging.DEBUG, "zamp_sdk")
    handler = FirstWaitIsTheLast(error)
    logger.addHandler(handler)
    try:
        with pytest.raises(error) as caught:
            asyncio.run(ActionExecutor.execute("wait", 0))
    finally:
        logger.removeHandler(handler)
    [warning], notes = warnings_and_notes(caplog, caught.value)
    assert re.match(r"no longer waiting for action act\w+ \(wait\), which may go on; to collect its result: ", warning)
    if error is not asyncio.CancelledError:  # up to Python 3.10 a task's cancellation is a new exception
        assert notes == noted(warning)


class Raises(logging.Handler):
    """A handler with a fault."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("disk full")


async def test_a_logging_handler_that_raises_loses_no_id(platform: LocalPlatform) -> None:
    """A handler's error does not take the place of the cancellation, whose note has the id."""
    handler = Raises(logging.WARNING)
    logger.addHandler(handler)
    try:
        task = asyncio.ensure_future(ActionExecutor.execute("wait", 30))
        await eventually(lambda: len(platform.requests) > 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
    finally:
        logger.removeHandler(handler)
    notes = getattr(caught.value, "__notes__", [])
    assert [note.startswith("no longer waiting for action act") for note in notes] == [True for _ in noted("")]


async def test_many_that_are_cancelled_at_once_are_told_in_two_lines(
    platform: LocalPlatform, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one of many fails and the rest are cancelled, there are two lines, and every id is in one of them."""
    monkeypatch.setattr(notices, "MOMENT", 1.0)  # enough for 30 on a busy machine
    handles = [await ActionExecutor.start("wait", 30) for _ in range(30)]
    tasks = [asyncio.ensure_future(handle.result()) for handle in handles]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    await eventually(lambda: len(told()) > 1)
    first, second = told()
    assert re.match(r"no longer waiting for action act\w+ \(wait\), which may go on; to collect its result: ", first)
    assert second.startswith("no longer waiting for 29 more: action act")
    assert "which may go on; to collect a result: await ActionExecutor.get_handle(ID, base_url='http://" in second
    assert all((handle.id in first) + (handle.id in second) == 1 for handle in handles)


async def test_a_large_result_is_validated_in_a_thread(platform: LocalPlatform) -> None:
    """A model that takes its time over a large result does not hold the event loop up; a small one stays in it."""

    class Where:
        @classmethod
        def model_validate(cls, _: Any) -> Any:
            return threading.current_thread() is threading.main_thread()

    in_the_loop: Any = [await ActionExecutor.execute("echo", "x" * size, return_type=Where) for size in (1, 100_000)]
    assert in_the_loop == [True, False]


async def test_a_refused_result_is_warned_of(platform: LocalPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """On every Python a result that return_type refuses is in a warning with the id, once."""
    with pytest.raises(pydantic.ValidationError):
        await ActionExecutor.execute("echo", {}, return_type=Invoice)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert re.match(r"action act\w+ \(echo\) did complete; .*\.get_handle\('act\w+', ", record.getMessage())


@pytest.mark.parametrize("copy", [pickle.dumps, copy.copy, copy.deepcopy])
def test_handles_stay_where_they_are(copy: Callable[[Any], Any]) -> None:
    """A handle, which holds the token, cannot be pickled or copied, and says what to keep instead."""
    handle = ActionExecutor.get_handle("act-1", base_url="https://platform.example", auth_token=TOKEN)
    with pytest.raises(TypeError, match=r"keep handle\.id"):
        copy(handle)


# --- who sees what ----------------------------------------------------------------------------------------------------


def frames_of(error: BaseException) -> Iterator[Any]:
    """Yield the frames of an error and of all that led to it."""
    links: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while links:
        link = links.pop()
        if link is not None and link not in seen:
            seen.append(link)
            links += [link.__cause__, link.__context__]
            yield from (frame for frame, _ in traceback.walk_tb(link.__traceback__))


def assert_no_local_shows(secret: str, frames: Iterator[Any]) -> None:
    """Check the variables in this package's frames, as an error reporter ships them."""
    ours = [frame for frame in frames if "zamp_sdk" in frame.f_globals["__name__"]]
    assert len(ours) >= 3
    for frame in ours:
        for name, value in frame.f_locals.items():
            assert secret not in repr(value), (frame.f_code.co_name, name)


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("method", ["execute", "start"])
async def test_no_frame_of_an_error_holds_the_token(method: str, status: int) -> None:
    """The local variables in an error's traceback do not show the token, not even where it was an argument."""
    with Server() as server:
        server.always("POST", reply(status, {"id": f"/{TOKEN}", "error": f"Bearer {TOKEN}"}))
        with pytest.raises(HttpClientError) as caught:
            await getattr(ActionExecutor, method)("act", 0, base_url=server.url, auth_token=TOKEN)
    assert_no_local_shows(TOKEN, frames_of(caught.value))


async def test_no_frame_of_a_suspended_task_holds_the_token(platform: LocalPlatform) -> None:
    """The local variables of a task that waits do not show the token."""
    task = asyncio.ensure_future(
        ActionExecutor.execute("wait", 5, base_url=platform.base_url, auth_token=platform.auth_token)
    )
    while len(platform.requests) < 4:  # noqa: ASYNC110  # the platform runs in a thread
        await asyncio.sleep(0.01)
    awaited: Any = task.get_coro()
    frames = []
    while hasattr(awaited, "cr_frame"):
        frames.append(awaited.cr_frame)
        awaited = awaited.cr_await
    assert_no_local_shows(platform.auth_token, iter(frames))
    task.cancel()


@pytest.mark.parametrize("status", [200, 403, 407, 500])
async def test_what_a_proxy_echoes_shows_no_credentials(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's user name and password are nowhere in an error, in whatever form the proxy sends them back."""
    basic = base64.b64encode(b"usr7:pa/55").decode()
    echo = f"denied for usr7:pa/55, usr7%3Apa%2F55, Basic {basic}; {TOKEN}"
    with Server() as server:
        server.always("POST", reply(status, {"error": echo}, {"X-Echo": echo, "Location": f"/{basic}"}))
        monkeypatch.setenv("HTTP_PROXY", f"http://usr7:pa%2F55@127.0.0.1:{server.port}")
        with pytest.raises(HttpClientError) as caught:
            await ActionExecutor.start("act", 0, base_url="http://platform.test", auth_token=TOKEN)
    shown = f"{caught.value} {vars(caught.value)} {caught.value.__cause__!r}"
    assert [secret for secret in ("usr7", "pa/55", "pa%2F55", basic.rstrip("="), TOKEN) if secret in shown] == []
    assert caught.value.headers["x-echo"].replace("=", "") == "denied for [token], [token], Basic [token]; [token]"


INTERRUPTIONS = {
    "wait_for": "asyncio.run(asyncio.wait_for(ActionExecutor.execute('wait', 30), 0.5))",
    "cancel": """
async def main():
    task = asyncio.ensure_future(ActionExecutor.execute('wait', 30))
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.wait([task])
asyncio.run(main())
""",
    "cancelled wait_for of a handle": """
async def main():
    handle = await ActionExecutor.start('wait', 30)
    await asyncio.wait_for(handle.result(), 0.5)
asyncio.run(main())
""",
    "a handle's timeout": """
async def main():
    handle = await ActionExecutor.start('wait', 30)
    await handle.result(timeout=datetime.timedelta(seconds=0.3))
asyncio.run(main())
""",
    "many": """
async def main():
    late = asyncio.wait_for(asyncio.sleep(30), 2)
    await asyncio.gather(late, *(ActionExecutor.execute('wait', 30) for _ in range(20)))
asyncio.run(main())
""",
    "Ctrl-C": """
threading.Timer(0.7, signal.raise_signal, [signal.SIGINT]).start()
asyncio.run(ActionExecutor.execute('wait', 30))
""",
    "timeout": """
async def main():
    async with asyncio.timeout(0.5):
        await ActionExecutor.execute('wait', 30)
asyncio.run(main())
""",
    "TaskGroup": """
async def fail():
    await asyncio.sleep(0.5)
    raise ValueError
async def main():
    async with asyncio.TaskGroup() as group:
        group.create_task(ActionExecutor.execute('wait', 30))
        group.create_task(fail())
asyncio.run(main())
""",
}


# The traceback that Python prints of these has the note once more.
NOTED = ("wait_for", "cancelled wait_for of a handle", "timeout", "Ctrl-C")


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_by_default_a_person_sees_the_id(interruption: str, platform: LocalPlatform) -> None:
    """However a program that sets no logging up is interrupted, stderr has, once, what collects the result."""
    if interruption in ("timeout", "TaskGroup") and sys.version_info < (3, 11):
        pytest.skip("came with Python 3.11")
    script = "import asyncio, datetime, signal, threading\nfrom zamp_sdk import ActionExecutor\n"
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n" + INTERRUPTIONS[interruption]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    collect = r"await ActionExecutor\.get_handle\('act\w+', base_url='?[^ ]+, auth_token=\.\.\.\)\.result\(\)"
    told = rf"(no longer waiting for action|TimeoutError: action) act\w+ .*{collect}$"
    warnings = re.findall(told, done.stderr, re.MULTILINE)
    notes = sys.version_info >= (3, 11) and interruption in NOTED
    most = 4 if interruption == "many" else 1  # on a busy machine the 20 are not left within one moment
    assert 1 + notes <= len(warnings) <= most + notes, done.stderr
    ids = {request.path.rpartition("/")[2] for request in platform.requests if request.method == "GET"}
    assert [action_id for action_id in ids if action_id not in done.stderr] == []
    assert len(done.stderr.splitlines()) < 60


@pytest.mark.parametrize(
    ("method", "warning"),
    [
        ("POST", "may have started all the same|no longer waiting for action act"),
        ("GET", "no longer waiting for action act"),
    ],
)
def test_interrupted_execute_logs_as_a_cancelled_one(
    method: str,
    warning: str,
    platform: LocalPlatform,
    caplog: pytest.LogCaptureFixture,
    interrupt_after: Callable[[str], None],
) -> None:
    """Ctrl-C says what is left running even where it is raised inside the task."""
    interrupt_after(method)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(ActionExecutor.execute("wait", 5))
    assert re.search(warning, caplog.text)


async def test_long_retries_are_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry that waits longer than is usual is a warning with its reason."""
    monkeypatch.setattr(executor, "LONG_RETRY", 0.5)
    with Server() as server:
        server.on("GET", reply(502, headers={"Retry-After": "1"}))
        await ActionExecutor.get_handle("act-1", base_url=server.url, auth_token=TOKEN).result()
    assert "waiting 1 s to try again: asking for action act-1: HTTP 502" in caplog.text


async def test_what_many_meet_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many wait for a platform that fails, or that has a status nobody knows, one warning of each will do."""
    monkeypatch.setattr(executor, "LONG_RETRY", 0.2)
    with Server() as server:
        odd, away = reply(200, {"status": "QUEUED"}), reply(502, headers={"Retry-After": "0.5"})
        server.on("GET", *[odd] * 20, *[away] * 20)
        handles = [ActionExecutor.get_handle("act-1", base_url=server.url, auth_token=TOKEN) for _ in range(20)]
        await asyncio.gather(*(handle.result() for handle in handles))
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(warning.split(":")[0].split(" which")[0] for warning in warnings) == [
        "action act-1 has the status 'QUEUED',",
        "waiting 0 s to try again",
    ]


async def test_who_waits_a_turn_is_observed_and_can_be_cancelled(platform: LocalPlatform) -> None:
    """Waiting for a turn is a step for whoever observes; a caller's timeout holds, and ends it."""
    handle = await ActionExecutor.start("wait", 30)
    platform.fail_next(status=429, retry_after=60)
    steps: list[Any] = []
    waiting = asyncio.ensure_future(handle._wait(None, steps.append))
    await eventually(lambda: any(isinstance(step, lifecycle.Turn) for step in steps))
    polls = len(platform.requests)
    with pytest.raises(ActionTimeoutError) as caught:
        await asyncio.wait_for(handle.result(timeout=timedelta(seconds=0.1)), 20)
    assert caught.value.status == ""
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(platform.requests) == polls


@pytest.mark.parametrize(
    ("base_url", "warns"),
    [
        ("http://api.example.com", True),
        ("http://localhost.example.com", True),
        ("http://127.example.com", True),
        ("http://127.0.0.1.example.com:80", True),
        ("http://127.0.0.2:1", False),
        ("http://localhost:1", False),
        ("http://localhost/path", False),
        ("http://[::1]:1", False),
        ("https://api.example.com", False),
    ],
)
def test_plain_http_is_warned_of(base_url: str, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A token that would travel in the clear is worth one warning for each URL."""
    executor._warn_of_plain_http.cache_clear()
    for _ in range(2):
        ActionExecutor.get_handle("act-1", base_url=base_url, auth_token="s3cret")
    assert caplog.text.count("is plain http") == warns
    assert "s3cret" not in caplog.text


def test_each_of_many_plain_http_platforms_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """A program that speaks to many of them in turn is not told again and again."""
    for base_url in [f"http://tenant-{number}.example.com" for number in range(50)] * 2:
        ActionExecutor.get_handle("act-1", base_url=base_url, auth_token="s3cret")
    assert caplog.text.count("is plain http") == 50
