"""The transport: connections and their reuse, deadlines, cancellation, redirects, proxies, TLS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

import zamp_sdk
from tests.certificates import Authority
from tests.conftest import CheckNoToken, Pace, Resolver
from tests.servers import (
    ACTION_ID,
    CONNECT,
    RESULT,
    TOKEN,
    Act,
    Server,
    Wire,
    closed_port,
    deaf,
    drip,
    eventually,
    hanging_port,
    http_reply,
    raw,
    reply,
    running,
    server_context,
    silent,
    started,
    tunnel,
)
from zamp_sdk import ActionExecutor, HttpClientError
from zamp_sdk.action_executor import exchange, messages, pool

ROOT = Path(zamp_sdk.__file__).parent.parent
PROMPT = 5.0  # s: far less than what would be waited for otherwise, and enough for a busy machine

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGINT")


async def execute(base_url: str, params: Any = None) -> Any:
    return await ActionExecutor.execute("act", params, base_url=base_url, auth_token=TOKEN)


async def start(base_url: str, params: Any = None) -> str:
    return (await ActionExecutor.start("act", params, base_url=base_url, auth_token=TOKEN)).id


def run_script(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own, in development mode: it reports whatever is left open."""
    # But not slow callbacks, which only tell how busy the machine is.
    script = f"import logging; logging.getLogger('asyncio').setLevel(logging.ERROR)\n{script}"
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", script, *args],
        cwd=ROOT,
        env={**os.environ, "ZAMP_AUTH_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


# --- requests and replies ---------------------------------------------------------------------------------------------


async def test_the_headers_of_a_request(pace: Pace) -> None:
    """A request says who sends it, as whom, and what it takes; a start has an idempotency key, a poll has no body."""
    with Server() as server:
        assert await execute(server.url, {"text": "zażółć"}) == RESULT
        post, get = server.requests
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for request in (post, get):
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        assert request.headers["accept"] == "application/json"
        assert request.headers["user-agent"] == f"zamp-sdk/{zamp_sdk.__version__} Python/{python} {sys.platform}"
        assert request.headers["host"] == f"127.0.0.1:{server.port}"
        assert request.headers.get("connection", "keep-alive") == "keep-alive"
    assert post.headers["content-type"] == "application/json"
    assert len(post.headers["idempotency-key"]) == 32
    assert "zażółć".encode() in post.body
    assert get.body == b""
    assert "idempotency-key" not in get.headers


_BODY = http_reply(200, {"id": ACTION_ID}).partition(b"\r\n\r\n")[2]
_CHUNKS = b"".join(b"1\r\n%c\r\n" % byte for byte in _BODY) + b"0\r\nTrailer: x\r\n\r\n"


@pytest.mark.parametrize(
    ("act", "reused"),
    [
        pytest.param(started, True, id="Content-Length"),
        pytest.param(reply(201, {"id": ACTION_ID}), True, id="HTTP 201"),
        pytest.param(reply(202, {"data": {"id": ACTION_ID}, "error": None}), True, id="in an envelope"),
        pytest.param(raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + _CHUNKS), None, id="chunked"),
        pytest.param(raw(b"HTTP/1.1 200 OK\r\n\r\n" + _BODY), False, id="until the end of the connection"),
        pytest.param(raw(b"HTTP/1.0 200 OK\r\n\r\n" + _BODY), False, id="HTTP/1.0"),
        pytest.param(reply(200, {"id": ACTION_ID}, {"Connection": "close"}), False, id="Connection: close"),
        pytest.param(raw(b"HTTP/1.1 100 Continue\r\n\r\n" + http_reply(200, {"id": ACTION_ID})), None, id="100 first"),
        pytest.param(
            raw(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + http_reply(200, {"id": ACTION_ID})),
            None,
            id="103 first",
        ),
    ],
)
async def test_a_reply_is_read_however_it_is_framed(act: Act, reused: bool | None, pace: Pace) -> None:
    """Each way of HTTP/1.x to frame a reply is understood, and decides whether the connection is kept."""
    with Server() as server:
        server.on("POST", act)
        assert await start(server.url) == ACTION_ID
        if reused is not None:
            await start(server.url)
            assert server.connections == (1 if reused else 2)


async def test_headers_are_read_however_they_are_written(pace: Pace) -> None:
    """Names in any case, white space around them, folded, repeated and missing values: all reach the caller."""
    head = (
        b"HTTP/1.1 418 No\r\nCONTENT-length: 2\r\nX-Folded: a\r\n\t b\r\nX-Bare:c\nX-Empty:\r\nX-Latin: \xe9\r\n"
        b"X-Twice: 1\r\nX-Twice: 2\r\n\r\n{}and the next reply"
    )
    with Server() as server:
        server.on("POST", raw(head))
        with pytest.raises(HttpClientError) as caught:
            await start(server.url)
    assert caught.value.response_body == "{}"
    assert caught.value.headers == {
        "content-length": "2",
        "x-folded": "a b",
        "x-bare": "c",
        "x-empty": "",
        "x-latin": "é",
        "x-twice": "2",
    }


@pytest.mark.parametrize("headers", [b"X: y\r\n" * 101, b"X: " + b"y" * 70_000 + b"\r\n"], ids=["many", "long"])
async def test_a_reply_whose_headers_never_end_is_no_reply(headers: bytes, pace: Pace) -> None:
    """Over 100 headers, or one over 64 KiB, end the request instead of filling the memory."""
    with Server() as server:
        server.on("POST", raw(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n"))
        with pytest.raises(HttpClientError, match=r"(line|headers)") as caught:
            await start(server.url)
        assert caught.value.may_have_started
        assert server.count("POST") == 1


async def test_large_requests_and_replies_arrive_whole(pace: Pace) -> None:
    """Megabytes go both ways unharmed."""
    text = "0123456789abcdef" * 300_000
    with Server() as server:
        server.always("GET", reply(200, {"status": "COMPLETED", "result": text}))
        assert await execute(server.url, text) == text
        assert text.encode() in server.requests[0].body


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(code: int, pace: Pace, assert_no_token: CheckNoToken) -> None:
    """A redirect to another host is an error that says where it points, and that host hears nothing."""
    with Server() as server, Server() as other:
        server.always("POST", reply(code, headers={"Location": f"{other.url}/actions"}))
        with pytest.raises(HttpClientError, match="redirects are not followed") as caught:
            await start(server.url)
        assert_no_token(caught.value)
        assert f"{other.url}/actions" in str(caught.value)
        assert caught.value.status_code == code
        assert (server.count("POST"), other.connections) == (1, 0)


async def test_the_log_names_requests_and_nothing_secret(
    pace: Pace, assert_no_token: CheckNoToken, caplog: pytest.LogCaptureFixture
) -> None:
    """At DEBUG each request is one record with method, URL, status and milliseconds; bodies are not logged."""
    with Server() as server:
        server.on("GET", reply(500))
        await execute(server.url, {"password": "hunter2"})
    messages = [record.getMessage() for record in caplog.records if record.name == "zamp_sdk"]
    assert [message.rpartition(", ")[0] for message in messages] == [
        f"POST {server.url}/actions: 200",
        f"GET {server.url}/actions/{ACTION_ID}: 500",
        f"GET {server.url}/actions/{ACTION_ID}: 200",
    ]
    assert "hunter2" not in caplog.text


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_one_connection_serves_a_whole_execute(scheme: str, pace: Pace, request: pytest.FixtureRequest) -> None:
    """The start and all polls go over one connection."""
    with Server(request.getfixturevalue("tls") if scheme == "https" else None) as server:
        server.on("GET", *[running] * 5)
        assert await execute(server.url) == RESULT
        assert (server.count("POST"), server.count("GET"), server.connections) == (1, 6, 1)


def test_two_event_loops_in_sequence_share_the_pool(pace: Pace) -> None:
    """A connection outlives its event loop: the next one (the next Lambda invocation) uses it."""
    with Server() as server:
        for _ in range(3):
            assert asyncio.run(execute(server.url)) == RESULT
        assert server.connections == 1


def test_event_loops_in_several_threads_run_side_by_side(pace: Pace) -> None:
    """Each thread may run an event loop of its own."""
    with Server() as server, ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: asyncio.run(execute(server.url)), range(8)))
        assert results == [RESULT] * 8
        assert (server.count("POST"), server.count("GET")) == (8, 8)


def then_close(act: Act) -> Act:
    """Answer as if the connection stayed, and close it."""

    def closing(wire: Wire) -> bool:
        act(wire)
        return False

    return closing


async def test_a_dead_connection_does_not_cost_a_start(pace: Pace) -> None:
    """A kept connection that the server has closed is not used again, for a start on it would be lost."""
    with Server() as server:
        server.always("POST", then_close(started))
        for number in range(1, 5):
            assert await start(server.url) == ACTION_ID
            await eventually(lambda: server.open_connections == 0)
            assert (server.count("POST"), server.connections) == (number, number)


async def test_a_start_takes_no_connection_that_was_idle_for_long(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll may use an older connection than a start, which cannot be sent again."""
    assert pool.MAX_IDLE_FOR_START <= 1
    monkeypatch.setattr(pool, "MAX_IDLE_FOR_START", 0.05)
    with Server() as server:
        handle = await ActionExecutor.start("act", {}, base_url=server.url, auth_token=TOKEN)
        await asyncio.sleep(0.1)
        await handle.result()
        assert server.connections == 1
        await asyncio.sleep(0.1)
        await start(server.url)
        assert server.connections == 2


async def test_a_connection_that_was_idle_for_very_long_is_dropped(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing uses a connection whose end a frozen process may have slept through; it is closed."""
    assert pool.MAX_IDLE <= 10
    with Server() as server:
        handle = await ActionExecutor.start("act", {}, base_url=server.url, auth_token=TOKEN)
        monkeypatch.setattr(pool, "MAX_IDLE", 0.05)
        await asyncio.sleep(0.1)
        await handle.result()
        assert server.connections == 2
        await eventually(lambda: server.open_connections == 1)


async def test_many_actions_share_64_sockets(pace: Pace) -> None:
    """However many actions run at once, there are never more than 64 connections."""
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.005))
        results = await asyncio.gather(*(execute(server.url) for _ in range(200)))
        assert results == [RESULT] * 200
        assert (server.count("POST"), server.count("GET")) == (200, 200)
        assert server.most_open_connections <= 64


def test_event_loops_in_threads_share_64_sockets(pace: Pace) -> None:
    """The limit is the process's: several event loops at once have no more connections than one."""
    with Server() as server, ThreadPoolExecutor(3) as threads:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.2))

        async def many() -> list[Any]:
            return await asyncio.gather(*(execute(server.url) for _ in range(40)))

        assert list(threads.map(lambda _: asyncio.run(many()), range(3))) == [[RESULT] * 40] * 3
        assert server.count("POST") == 120
        assert server.most_open_connections == 64


def test_event_loops_in_threads_wait_in_one_line(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks first for a connection gets it first, whichever event loop it runs in."""
    monkeypatch.setattr(pool, "MAX_CONNECTIONS", 1)
    with Server() as server, ThreadPoolExecutor(8) as threads:
        server.on("POST", silent)
        hanging = threads.submit(lambda: asyncio.run(asyncio.wait_for(start(server.url), 0.5)))
        wait_until(lambda: server.count("POST") == 1)
        waiting = []
        for number in range(6):
            waiting.append(threads.submit(asyncio.run, start(server.url, number)))
            wait_until(lambda: len(pool.shared_pool()._line) == len(waiting))
        with pytest.raises(asyncio.TimeoutError):
            hanging.result()
        assert [each.result() for each in waiting] == [ACTION_ID] * 6
        numbers = [json.loads(request.body)["params"] for request in server.requests if request.method == "POST"]
        assert numbers == [None, *range(6)]


def test_an_event_loop_is_forgotten_after_its_requests(pace: Pace) -> None:
    """Nothing of the process's keeps a loop: a Lambda's invocations have one each."""
    with Server() as server:

        async def many() -> weakref.ref[asyncio.AbstractEventLoop]:
            await asyncio.gather(*(execute(server.url) for _ in range(70)))  # some of them have to wait for a slot
            return weakref.ref(asyncio.get_running_loop())

        loop = asyncio.run(many())
        gc.collect()
        assert loop() is None


async def test_a_start_that_is_cancelled_in_the_line_was_not_sent(
    pace: Pace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who gives up waiting for a connection is told that nothing was sent."""
    monkeypatch.setattr(pool, "MAX_CONNECTIONS", 1)
    with Server() as server:
        server.on("POST", silent)
        hanging = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 1)
        waiting = asyncio.ensure_future(start(server.url))
        await eventually(lambda: len(pool.shared_pool()._line) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert "cancelled while starting action 'act': nothing was sent" in caplog.text
        hanging.cancel()
        await asyncio.wait({hanging})
        assert await start(server.url) == ACTION_ID
        assert server.count("POST") == 2


async def test_waiting_in_the_line_is_not_part_of_a_requests_time(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that queues behind others still has all of its seconds."""
    monkeypatch.setattr(pool, "MAX_CONNECTIONS", 1)
    pace.hurry("POST", 5, 0.4)
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.15))
        assert await asyncio.gather(*(start(server.url) for _ in range(5))) == [ACTION_ID] * 5
        assert (server.count("POST"), server.connections) == (5, 1)


async def hang(server: Server, method: str, url: str) -> None:
    """Hang 50 starts on a silent server, use a thread meanwhile, and cancel them."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    tasks = [asyncio.ensure_future(start(url)) for _ in range(50)]
    await eventually(lambda: server.count(method) == 50)
    await asyncio.wait_for(asyncio.to_thread(threading.get_ident), PROMPT)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    await eventually(lambda: server.open_connections == 0)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_hanging_requests_hold_no_threads(scheme: str, pace: Pace, request: pytest.FixtureRequest) -> None:
    """With 50 requests waiting for a silent server, the application's own to_thread still runs at once."""
    with Server(request.getfixturevalue("tls") if scheme == "https" else None) as server:
        server.always("POST", silent)
        await hang(server, "POST", server.url)


async def test_hanging_tunnels_hold_no_threads(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 50 requests waiting for a proxy that does not answer CONNECT, to_thread still runs at once."""
    with Server() as proxy:
        proxy.always("CONNECT", silent)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        await hang(proxy, "CONNECT", "https://platform.test")


FORK = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forking while threads exist: here none does
from zamp_sdk import ActionExecutor
def run():
    result = asyncio.run(ActionExecutor.execute("act", {}, base_url=sys.argv[1]))
    os.write(1, f"{result}\\n".encode())  # whole, while the other process writes too
run()
child = os.fork()
run()
if child:
    print(os.waitpid(child, 0)[1])
"""


@posix_only
def test_a_forked_child_makes_its_own_connections() -> None:
    """After a fork the child starts with an empty pool, and the parent's connection goes on working."""
    with Server() as server:
        done = run_script(FORK, server.url)
        assert done.stderr == ""
        assert sorted(done.stdout.splitlines()) == ["0", *[str(RESULT)] * 3]
        assert (server.count("POST"), server.count("GET"), server.connections) == (3, 3, 2)


FORK_IN_FLIGHT = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from zamp_sdk import ActionExecutor
def start():
    return ActionExecutor.start("act", {}, base_url=sys.argv[1])
async def main():
    task = asyncio.ensure_future(start())
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    child = os.fork()
    if child == 0:
        os._exit(0 if run_in_child() else 1)
    print(os.waitpid(child, 0)[1], flush=True)
    print((await task).id)
def run_in_child():
    asyncio.events._set_running_loop(None)
    return asyncio.run(start()).id == "action-1"
asyncio.run(main())
"""


@posix_only
def test_a_fork_does_not_disturb_a_request_that_is_under_way() -> None:
    """A child that is forked while its parent waits for a reply leaves that connection alone."""
    release = threading.Event()

    def held(wire: Wire) -> bool:
        assert release.wait(10)
        return started(wire)

    with Server() as server:
        server.on("POST", held, then_close(started))
        with subprocess.Popen(
            [sys.executable, "-c", FORK_IN_FLIGHT, server.url],
            cwd=ROOT,
            env={**os.environ, "ZAMP_AUTH_TOKEN": TOKEN},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            wait_until(lambda: server.count("POST") == 1)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "0\n"
            release.set()
            assert process.stdout.readline() == f"{ACTION_ID}\n"
        assert (server.count("POST"), server.connections) == (2, 2)


EXIT = """
import asyncio, atexit, gc, socket, sys
def count():
    print(sum(isinstance(one, socket.socket) and one.fileno() >= 0 for one in gc.get_objects()), "sockets are open")
atexit.register(count)  # the first to be registered is the last to be called
from zamp_sdk import ActionExecutor
print(asyncio.run(ActionExecutor.execute("act", {}, base_url=sys.argv[1])))
"""


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nothing_is_left_open_at_exit(scheme: str, request: pytest.FixtureRequest) -> None:
    """Kept connections are closed at exit: the interpreter's development mode has nothing to report."""
    with Server(request.getfixturevalue("tls") if scheme == "https" else None) as server:
        done = run_script(EXIT, server.url)
        assert (done.stdout, done.stderr, done.returncode) == (f"{RESULT}\n0 sockets are open\n", "", 0)
        assert server.connections == 1


def test_the_first_request_of_a_process_keeps_to_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform sees no connection but the proxy's."""
    with Server() as platform, Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        done = run_script(EXIT, platform.url)
        assert (done.stdout, done.returncode) == (f"{RESULT}\n0 sockets are open\n", 0)
        (warning,) = done.stderr.splitlines()
        assert f"{platform.url} is this machine, but the proxy 127.0.0.1:{proxy.port}" in warning
        assert (platform.connections, proxy.connections) == (0, 1)


async def test_each_address_of_a_host_is_tried(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that refuses, or of a family that this machine does not have, is passed over for the next one."""
    with Server() as server:
        unknown_family = 9999
        addresses = [
            (unknown_family, socket.SOCK_STREAM, 0, "", ("::1", server.port)),
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", closed_port())),
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", server.port)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        assert await start("http://platform.test") == ACTION_ID


# --- deadlines and cancellation ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stuck:
    """A start that goes no further than one phase."""

    url: str
    reached: Callable[[], bool]
    sent: bool
    params: Any = None
    proxy: str | None = None
    settle: float = 0.3
    """Seconds from ``reached`` until it is really stuck."""


@contextlib.contextmanager
def stuck_in_connect(_: ssl.SSLContext) -> Iterator[Stuck]:
    with hanging_port() as port:
        # Nobody but the client sees that it connects.
        yield Stuck(f"http://127.0.0.1:{port}", lambda: True, sent=False, settle=0.4)


@contextlib.contextmanager
def stuck_in_handshake(tls: ssl.SSLContext) -> Iterator[Stuck]:
    with Server(tls) as server:
        server.always(CONNECT, silent)
        yield Stuck(server.url, lambda: server.connections > 0, sent=False)


@contextlib.contextmanager
def stuck_in_proxy(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as proxy:
        proxy.always("CONNECT", silent)
        yield Stuck("https://platform.test", lambda: proxy.count("CONNECT") > 0, sent=False, proxy=proxy.url)


@contextlib.contextmanager
def stuck_in_send(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as server:
        server.always(CONNECT, deaf)
        yield Stuck(server.url, lambda: server.connections > 0, sent=True, params="x" * (32 << 20))


@contextlib.contextmanager
def stuck_in_send_over_tls(tls: ssl.SSLContext) -> Iterator[Stuck]:
    def deaf_after_handshake(wire: Wire) -> bool:
        wire.socket = tls.wrap_socket(wire.socket, server_side=True)
        wire.server.replace_socket(wire)
        return deaf(wire)

    with Server(tls) as server:
        server.always(CONNECT, deaf_after_handshake)
        yield Stuck(server.url, lambda: server.connections > 0, sent=True, params="x" * (32 << 20))


@contextlib.contextmanager
def stuck_in_wait(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as server:
        server.always("POST", silent)
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


@contextlib.contextmanager
def stuck_in_wait_over_tls(tls: ssl.SSLContext) -> Iterator[Stuck]:
    with Server(tls) as server:
        server.always("POST", silent)
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


_SLOW = http_reply(200, {"id": "x" * 1000})


@contextlib.contextmanager
def stuck_in_headers(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as server:
        server.always("POST", drip(_SLOW))
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


@contextlib.contextmanager
def stuck_in_body(_: ssl.SSLContext) -> Iterator[Stuck]:
    with Server() as server:
        server.always("POST", drip(_SLOW, at_once=len(_SLOW) - 900))
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


@contextlib.contextmanager
def stuck_in_body_over_tls(tls: ssl.SSLContext) -> Iterator[Stuck]:
    with Server(tls) as server:
        server.always("POST", drip(_SLOW, at_once=len(_SLOW) - 900))
        yield Stuck(server.url, lambda: server.count("POST") > 0, sent=True)


Phase = Callable[[ssl.SSLContext], contextlib.AbstractContextManager[Stuck]]

PHASES: list[Phase] = [
    stuck_in_connect,
    stuck_in_proxy,
    stuck_in_handshake,
    stuck_in_send,
    stuck_in_send_over_tls,
    stuck_in_wait,
    stuck_in_wait_over_tls,
    stuck_in_headers,
    stuck_in_body,
    stuck_in_body_over_tls,
]


@pytest.fixture(params=PHASES, ids=lambda phase: phase.__name__)
def stuck(request: pytest.FixtureRequest, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    """Each phase in turn."""
    phase: Phase = request.param
    with phase(tls) as stuck:
        if stuck.proxy:
            monkeypatch.setenv("HTTPS_PROXY", stuck.proxy)
        yield stuck


def wait_until(condition: Callable[[], bool]) -> None:
    asyncio.run(eventually(condition))


def threads_of_executors() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncio_")]


def test_one_deadline_holds_for_all_phases_together(stuck: Stuck, pace: Pace, assert_no_token: CheckNoToken) -> None:
    """Wherever a request hangs, it ends when its time is over, and knows whether anything was sent."""
    pace.hurry("POST", 10, 0.1)
    began = time.monotonic()
    with pytest.raises(HttpClientError, match="timed out") as caught:
        asyncio.run(start(stuck.url, stuck.params))
    assert time.monotonic() - began < PROMPT
    assert_no_token(caught.value)
    assert caught.value.may_have_started == stuck.sent
    assert pool.shared_pool().rooms_taken == 0
    assert not threads_of_executors()


def test_cancelling_frees_thread_and_socket_at_once(stuck: Stuck, pace: Pace, assert_no_token: CheckNoToken) -> None:
    """Wherever a task is when it is cancelled, asyncio.run returns promptly, and neither thread nor socket is left."""

    async def main() -> None:
        task = asyncio.ensure_future(start(stuck.url, stuck.params))
        await eventually(lambda: pool.shared_pool().rooms_taken > 0 and stuck.reached())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert_no_token(caught.value)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < PROMPT
    assert pool.shared_pool().rooms_taken == 0
    assert not threads_of_executors()


INTERRUPTED = """
import asyncio, signal, sys
from zamp_sdk import ActionExecutor
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have had it ignored
print("ready", flush=True)
asyncio.run(ActionExecutor.execute("act", "x" * int(sys.argv[2]), base_url=sys.argv[1]))
"""


@posix_only
def test_ctrl_c_ends_the_program_at_once(stuck: Stuck) -> None:
    """Wherever a request hangs, Ctrl-C ends asyncio.run promptly, and nothing is reported but KeyboardInterrupt."""
    size = len(stuck.params or "")
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", INTERRUPTED, stuck.url, str(size)],
        cwd=ROOT,
        env={**os.environ, "ZAMP_AUTH_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until(stuck.reached)
        time.sleep(stuck.settle)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=PROMPT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert stderr.splitlines()[-1] == "KeyboardInterrupt"
    for unwanted in (TOKEN, "Warning", "never retrieved", "was destroyed", "Exception ignored"):
        assert unwanted not in stderr
    assert process.returncode == -signal.SIGINT


async def test_cancelling_at_any_moment_leaves_everything_in_order(pace: Pace) -> None:
    """Whichever step a cancellation hits, no connection is left leased, and the next start is not affected."""
    with Server() as server:
        for number in range(40):
            task = asyncio.ensure_future(execute(server.url))
            await asyncio.sleep(number * 0.0001)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await task == RESULT
        await eventually(lambda: pool.shared_pool().rooms_taken == 0)
        assert await execute(server.url) == RESULT


async def test_cancelling_while_a_thread_is_at_work_closes_nothing_under_it(
    pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled request whose reply a thread reads ends at once, and its connection when the thread is done."""
    really_proceed = messages.ReplyReader.proceed
    reading, release = threading.Event(), threading.Event()
    filenos: list[int] = []

    def proceed(self: messages.ReplyReader, **kwargs: Any) -> Any:
        reading.set()
        assert release.wait(10)
        filenos.append(self.connection.sock.fileno())
        return really_proceed(self, **kwargs)

    with Server() as server:
        with monkeypatch.context() as patch:
            patch.setattr(messages.ReplyReader, "proceed", proceed)
            task = asyncio.ensure_future(start(server.url))
            await eventually(reading.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert pool.shared_pool().rooms_taken == 1
            release.set()
            await eventually(lambda: pool.shared_pool().rooms_taken == 0)
        assert filenos[0] >= 0
        await eventually(lambda: server.open_connections == 0)
        assert await start(server.url) == ACTION_ID
        assert (server.count("POST"), server.connections) == (2, 2)


async def test_a_cancelled_request_gives_its_room_back(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a request that is cancelled under way nor one that is cancelled in the line keeps room."""
    monkeypatch.setattr(pool, "MAX_CONNECTIONS", 1)
    with Server() as server:
        server.on("POST", silent)
        under_way = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 1)
        queued = asyncio.ensure_future(start(server.url))
        await asyncio.sleep(0.01)
        for task in (queued, under_way):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await asyncio.wait_for(start(server.url), PROMPT) == ACTION_ID
        assert server.count("POST") == 2


async def test_a_name_lookup_that_hangs_sends_nothing_afterwards(
    pace: Pace, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No socket can wake a name lookup: the request still ends in time, and its thread sends nothing later."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
    pace.hurry("POST", 10, 0.1)
    release = threading.Event()
    with Server() as server:
        resolver.answers = [server.port]
        resolver.before = lambda: release.wait(10)
        try:
            with pytest.raises(HttpClientError, match="timed out") as caught:
                await start("http://platform.test")
        finally:
            release.set()
        assert not caught.value.may_have_started
        await eventually(lambda: pool.shared_pool().rooms_taken == 0)
        assert server.connections == 0


async def test_a_busy_default_executor_is_named_as_the_cause(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no thread was free in time, the error says so, and what to do; nothing is sent afterwards."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    monkeypatch.setattr(exchange, "SLOW_THREAD", 0.05)
    pace.hurry("POST", 10, 0.1)
    release = threading.Event()
    with Server() as server:
        blocker = loop.run_in_executor(None, release.wait, 10)
        try:
            with pytest.raises(
                HttpClientError, match=r"it waited 0\.\d s for a thread.*set_default_executor"
            ) as caught:
                await start(server.url)
        finally:
            release.set()
        await blocker
        assert not caught.value.may_have_started
        await asyncio.to_thread(threading.get_ident)  # whatever was queued before it has run by now
        assert server.connections == 0


async def test_a_reply_that_no_thread_takes_in_time_is_read_all_the_same(pace: Pace) -> None:
    """A start's reply that has come is not lost because other work keeps every thread busy."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    pace.hurry("POST", 10, 0.5)
    release, answer = threading.Event(), threading.Event()

    def held(wire: Wire) -> bool:
        assert answer.wait(10)
        return started(wire)

    with Server() as server:
        server.always("POST", held)
        task = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 1)
        blocking = threading.Event()

        def block() -> None:
            blocking.set()
            release.wait(10)

        blocker = loop.run_in_executor(None, block)
        await eventually(blocking.is_set)
        answer.set()
        try:
            assert await task == ACTION_ID
        finally:
            release.set()
        await blocker
        assert server.count("POST") == 1


async def test_a_loop_whose_threads_are_gone_gets_a_clear_error(pace: Pace) -> None:
    """After the event loop's executor was shut down, a start fails at once, and says why."""
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1)
    loop.set_default_executor(executor)
    executor.shutdown()
    with Server() as server:
        with pytest.raises(HttpClientError, match="no thread to send it from: cannot schedule new futures") as caught:
            await start(server.url)
        assert not caught.value.may_have_started
        assert server.connections == 0


async def test_a_start_that_no_thread_took_is_never_sent(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a thread cannot be started, the executor has queued the work all the same: it must not be done later."""
    really_start = threading.Thread.start

    def start_thread(thread: threading.Thread) -> None:
        if "ThreadPoolExecutor" in thread.name:
            raise RuntimeError("can't start new thread")
        really_start(thread)

    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(2))
    release = threading.Event()
    busy = loop.run_in_executor(None, release.wait, PROMPT)
    with Server() as server:
        monkeypatch.setattr(threading.Thread, "start", start_thread)
        with pytest.raises(HttpClientError, match="can't start new thread") as caught:
            await start(server.url)
        monkeypatch.undo()
        release.set()
        await busy
        await asyncio.to_thread(threading.get_ident)  # whatever was queued before has been done
        assert not caught.value.may_have_started
        assert server.connections == 0


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_blocked_event_loop_finds_requests_over(method: str, pace: Pace) -> None:
    """A loop that was blocked beyond the deadline gives the error of a request that timed out."""
    with Server() as server:
        await execute(server.url)
        server.always(method, silent)
        pace.hurry(method, 1, 0.2)
        if method == "POST":
            task: asyncio.Future[Any] = asyncio.ensure_future(start(server.url))
        else:
            handle: Any = ActionExecutor.get_handle(ACTION_ID, base_url=server.url, auth_token=TOKEN)
            task = asyncio.ensure_future(handle.status())
        for _ in range(2):  # so that the thread has it
            await asyncio.sleep(0)
        time.sleep(0.4)
        with pytest.raises(HttpClientError, match="timed out") as caught:
            await task
        assert caught.value.may_have_started == (method == "POST")
        assert caught.value.action_id == (None if method == "POST" else ACTION_ID)


# --- proxies ----------------------------------------------------------------------------------------------------------

SECRET = "hunter2@proxy"
CREDENTIALS = "user:hunter2%40proxy"
BASIC = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()


def with_credentials(url: str) -> str:
    return url.replace("://", f"://{CREDENTIALS}@")


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "http://127.0.0.1:{}/", "127.0.0.1:{}"])
async def test_http_proxy_is_asked_for_plain_urls(
    variable: str, address: str, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY gets requests with whole URLs, over one kept connection."""
    with Server() as proxy:
        monkeypatch.setenv(variable, address.format(proxy.port))
        assert await execute("http://platform.test/v1") == RESULT
        assert [request.target for request in proxy.requests] == [
            "http://platform.test/v1/actions",
            f"http://platform.test/v1/actions/{ACTION_ID}",
        ]
        assert {request.headers["host"] for request in proxy.requests} == {"platform.test"}
        assert proxy.connections == 1


async def test_https_proxy_tunnels(pace: Pace, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTPS_PROXY makes one tunnel for a whole execute, and neither side sees the other's credentials."""
    with Server(tls) as platform, Server() as proxy:
        proxy.always("CONNECT", tunnel(platform.port))
        monkeypatch.setenv("HTTPS_PROXY", with_credentials(proxy.url))
        assert await execute("https://platform.test") == RESULT
        (connect,) = proxy.requests
        assert connect.target == "platform.test:443"
        assert connect.headers["proxy-authorization"] == BASIC
        assert "authorization" not in connect.headers
        assert [request.target for request in platform.requests] == ["/actions", f"/actions/{ACTION_ID}"]
        assert all("proxy-authorization" not in request.headers for request in platform.requests)
        assert (platform.connections, proxy.connections) == (1, 1)


async def test_a_tunnel_serves_one_host_only(pace: Pace, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept tunnel is not taken for another host behind the same proxy."""
    with Server(tls) as platform, Server() as proxy:
        proxy.always("CONNECT", tunnel(platform.port))
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        for host in ("platform.test", "localhost", "platform.test"):
            await start(f"https://{host}")
        assert [request.target for request in proxy.requests] == ["platform.test:443", "localhost:443"]


async def test_credentials_of_http_proxy_are_sent(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """User name and password in HTTP_PROXY go to the proxy, percent-decoded."""
    with Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", with_credentials(proxy.url))
        await start("http://platform.test")
        assert proxy.requests[0].headers["proxy-authorization"] == BASIC


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "*", "elsewhere.test, 127.0.0.1"])
@pytest.mark.parametrize("proxy_scheme", ["http", "socks5"])
async def test_no_proxy_is_heeded(
    no_proxy: str, proxy_scheme: str, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host in NO_PROXY is asked directly, whatever the proxy would be."""
    with Server() as server, Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("http", proxy_scheme))
        monkeypatch.setenv("NO_PROXY", no_proxy)
        assert await execute(server.url) == RESULT
        assert proxy.connections == 0


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (reply(403), "403"),
        (reply(407, headers={"Proxy-Authenticate": "Basic"}), "407"),
        (reply(502), "502"),
        (raw(b"<h1>It works!</h1>"), "cannot connect to|no reply from"),
        (None, "refused"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.usefixtures("pace")
async def test_credentials_of_a_proxy_are_never_shown(
    act: Act | None, says: str, scheme: str, monkeypatch: pytest.MonkeyPatch, assert_no_token: CheckNoToken
) -> None:
    """Whatever a proxy does, its credentials are in no error and no log."""
    with Server() as proxy:
        if act is not None:
            proxy.always("CONNECT", act)
            proxy.always("POST", act)
        address = proxy.url if act is not None else f"http://127.0.0.1:{closed_port()}"
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", with_credentials(address))
        with pytest.raises(HttpClientError, match=says) as caught:
            await start(f"{scheme}://platform.test")
    assert_no_token(caught.value, SECRET, CREDENTIALS, BASIC[6:])


@pytest.mark.parametrize("proxy_scheme", ["socks5", "socks5h", "socks4", "SOCKS5", "https", "ftp"])
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.usefixtures("pace")
async def test_a_proxy_that_speaks_something_else_is_refused(
    proxy_scheme: str, scheme: str, monkeypatch: pytest.MonkeyPatch, assert_no_token: CheckNoToken
) -> None:
    """A proxy that would misunderstand plain HTTP is not spoken to, and the error names the variable to change."""
    with Server() as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"{proxy_scheme}://{CREDENTIALS}@127.0.0.1:{proxy.port}")
        with pytest.raises(HttpClientError, match=f"{scheme.upper()}_PROXY names a {proxy_scheme}://") as caught:
            await start(f"{scheme}://platform.test")
        assert_no_token(caught.value, SECRET, CREDENTIALS)
        assert not caught.value.may_have_started
        assert proxy.connections == 0


@pytest.mark.usefixtures("pace")
async def test_a_proxy_url_that_is_none_is_not_quoted(
    monkeypatch: pytest.MonkeyPatch, assert_no_token: CheckNoToken
) -> None:
    """The error for a mistyped proxy names the variable, and shows no password."""
    monkeypatch.setenv("HTTPS_PROXY", f"http:/{CREDENTIALS}@127.0.0.1:1")
    with pytest.raises(HttpClientError, match="HTTPS_PROXY is not a URL like") as caught:
        await start("https://platform.test")
    assert_no_token(caught.value, SECRET, CREDENTIALS)
    assert not caught.value.may_have_started


# --- TLS --------------------------------------------------------------------------------------------------------------


async def test_the_authorities_in_ssl_cert_dir_are_trusted(
    ca: Authority, localhost: Path, pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_DIR names a directory of certificates under their hashes, as c_rehash makes it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to hash a certificate's name")
    pem = tmp_path / "ca.pem"
    pem.write_bytes(ca.file.read_bytes())
    name_hash = subprocess.run(
        [openssl, "x509", "-noout", "-subject_hash", "-in", str(pem)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    pem.rename(tmp_path / f"{name_hash}.0")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with Server(server_context(localhost)) as server:
        assert await execute(server.url) == RESULT


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
async def test_certificates_that_do_not_exist_are_named(
    variable: str, localhost: Path, pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL says nothing of a path that does not exist; the error does."""
    path = str(tmp_path / "nowhere")
    monkeypatch.setenv(variable, path)
    with Server(server_context(localhost)) as server:
        with pytest.raises(HttpClientError, match=f"{variable} names {path}, which does not exist") as caught:
            await start(server.url)
        assert not caught.value.may_have_started
        assert server.connections == 1


async def test_one_tls_context_is_made(pace: Pace, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the authorities is slow, so it is done once for all connections; none of them trusts a common name."""
    contexts: list[ssl.SSLContext] = []
    create = ssl.create_default_context

    def create_default_context() -> ssl.SSLContext:
        contexts.append(create())
        return contexts[-1]

    monkeypatch.setattr(ssl, "create_default_context", create_default_context)
    with Server(tls) as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, {"Connection": "close"}))
        await asyncio.gather(*(start(server.url) for _ in range(5)))
        assert server.connections == 5
    (context,) = contexts
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert not context.hostname_checks_common_name
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


async def test_tls_1_2_is_spoken(pace: Pace, tls: ssl.SSLContext) -> None:
    """A server whose newest TLS is 1.2 is spoken to, over one connection."""
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    with Server(tls) as server:
        server.on("GET", running)
        assert await execute(server.url) == RESULT
        assert server.connections == 1
