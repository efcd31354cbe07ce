"""What the tests share: a clean environment, fresh transport state, short waits, certificates."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

import zamp_sdk
from tests.certificates import Authority
from tests.servers import ACTION_ID, TOKEN, Server, eventually, server_context
from zamp_sdk import ActionExecutor, ActionHandle, transport
from zamp_sdk.action_executor import executor, lifecycle, notices, pacing
from zamp_sdk.transport import pool, routes
from zamp_sdk.transport.tls import forget_tls_context

ROOT = Path(zamp_sdk.__file__).parent.parent
PROMPT = 5.0  # s: far less than what would be waited for otherwise, and enough for a busy machine

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, signals and resource.setrlimit")


@pytest.fixture(scope="session", autouse=True)
def no_implicit_event_loop() -> None:
    """Up to 3.11 pytest-asyncio else finds an event loop made implicitly, which asyncio.run in a test makes it lose."""
    asyncio.set_event_loop(None)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Let what the tests start be ended by Ctrl-C: a test run in a shell's background inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _Interrupt(logging.Handler):
    """Ctrl-C once a request of this method is over: while the task runs, not the event loop.

    Up to Python 3.10 that is a KeyboardInterrupt in the task; since then it is a cancellation.
    """

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method: str | None = method

    def emit(self, record: logging.LogRecord) -> None:
        if self.method and record.getMessage().startswith(self.method):
            self.method = None
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interrupt_after(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], None]]:
    """Press Ctrl-C right after the next request of a method, POST or GET."""
    caplog.set_level(logging.DEBUG, "zamp_sdk")
    handlers: list[_Interrupt] = []

    def interrupt_after(method: str) -> None:
        handlers.append(_Interrupt(method))
        logging.getLogger("zamp_sdk").addHandler(handlers[-1])

    yield interrupt_after
    for handler in handlers:
        logging.getLogger("zamp_sdk").removeHandler(handler)


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither this machine's environment nor the test before has a say: variables, connections, TLS context."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("ZAMP_", "SSL_CERT_")):
            monkeypatch.delenv(name)
    _forget()
    yield
    _forget()


def _forget() -> None:
    routes._routes.clear()
    pool.shared_pool().close_idle()
    pool._start_afresh()
    forget_tls_context()
    executor._warn_of_plain_http.cache_clear()
    pacing._pace_of.cache_clear()
    notices._warned_at.clear()


class Pace:
    """How long things take: retries and polls come fast, and requests are cut short where a test says so."""

    def __init__(self) -> None:
        self._hurried: dict[str, tuple[int, float]] = {}

    def hurry(self, method: str, times: int, timeout: float) -> None:
        """Give the next requests of this method only so many seconds each."""
        self._hurried[method] = times, timeout

    def timeout(self, method: str, timeout: float) -> float:
        """Say how long the next request of this method may take."""
        times, shorter = self._hurried.get(method, (0, 0.0))
        if times == 0:
            return timeout
        self._hurried[method] = times - 1, shorter
        return min(timeout, shorter)


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    """Make retries and polls come fast, and let ``pace.hurry`` cut requests short."""
    pace = Pace()
    monkeypatch.setattr(lifecycle, "BACKOFF_MIN", 0.005)
    monkeypatch.setattr(lifecycle, "POLL_MIN", 0.005)
    monkeypatch.setattr(lifecycle, "REFUSAL_WINDOW", 0.5)

    really_make = transport.Exchange.__init__

    def make(self: transport.Exchange, request: transport.Request, timeout: float, *args: Any) -> None:
        really_make(self, request, pace.timeout(request.method, timeout), *args)

    monkeypatch.setattr(transport.Exchange, "__init__", make)
    return pace


class Resolver:
    """The name lookups of ``*.test`` hosts: each takes the next of ``answers`` (a port of 127.0.0.1, or an error)."""

    def __init__(self) -> None:
        self.answers: list[int | OSError] = []
        self.hosts: list[str] = []
        self.before: Callable[[], object] = lambda: None
        self._really = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(host).rstrip(".").endswith(".test"):
            return self._really(host, port, *args, **kwargs)
        self.hosts.append(host)
        self.before()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, OSError):
            raise answer
        return self._really("127.0.0.1", answer, *args, **kwargs)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Script what name lookups say; the last answer stays."""
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    return resolver


CheckNoToken = Callable[..., None]


@pytest.fixture
def assert_no_token(caplog: pytest.LogCaptureFixture) -> Iterator[CheckNoToken]:
    """Give a check that an error shows neither the token nor other secrets; nor may any log record of the test."""
    caplog.set_level(logging.DEBUG)
    secrets = {TOKEN}

    def check(error: BaseException, *more_secrets: str) -> None:
        secrets.update(more_secrets)
        chain: list[BaseException] = []
        waiting: list[BaseException | None] = [error]
        while waiting:
            link = waiting.pop()
            if link is not None and link not in chain:
                chain.append(link)
                waiting += [link.__cause__, link.__context__]
        for link in chain:
            shown = f"{link} {link!r} {link.args!r} {vars(link)!r}"
            assert not [secret for secret in secrets if secret in shown]

    yield check
    for record in caplog.records:
        shown = f"{record.getMessage()} {vars(record)!r}"
        assert not [secret for secret in secrets if secret in shown]


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority that only the tests know."""
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def localhost(ca: Authority) -> Path:
    """A good certificate for the servers of the tests."""
    return ca.issue("127.0.0.1", "localhost", "platform.test")


@pytest.fixture
def trusted(ca: Authority, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trust the tests' authority, as a user does it: through SSL_CERT_FILE."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.file))
    return ca.file


@pytest.fixture(params=["http", "https"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server without TLS, and one with it."""
    with Server(request.getfixturevalue("tls") if request.param == "https" else None) as server:
        yield server


@pytest.fixture
def tls(localhost: Path, trusted: Path) -> Any:
    """The TLS side of a server that the client trusts."""
    return server_context(localhost)


# --- what the tests do ------------------------------------------------------------------------------------------------


async def execute(base_url: str, params: Any = None) -> Any:
    """Run an action."""
    return await ActionExecutor.execute("act", params, base_url=base_url, auth_token=TOKEN)


async def start(base_url: str, params: Any = None) -> str:
    """Start an action, and return its id."""
    return (await ActionExecutor.start("act", params, base_url=base_url, auth_token=TOKEN)).id


def handle_at(base_url: str) -> ActionHandle[Any]:
    """Return the handle of an action that was started elsewhere."""
    return ActionExecutor.get_handle(ACTION_ID, base_url=base_url, auth_token=TOKEN)


def request_to(
    base_url: str, method: str = "GET", *, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> transport.Request:
    """Return a request as the transport gets it; what is read of its reply is the reply itself."""
    return transport.Request(
        method,
        base_url,
        "/actions",
        {"Authorization": f"Bearer {TOKEN}", **(headers or {})},
        body,
        read=lambda reply: reply,
        redact=lambda text, secrets: text,
    )


def run_script(script: str, *args: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own, in development mode: it reports whatever is left open."""
    # But not slow callbacks, which only tell how busy the machine is.
    script = f"import logging; logging.getLogger('asyncio').setLevel(logging.ERROR)\n{script}"
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", script, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "ZAMP_AUTH_TOKEN": TOKEN, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


OUT_OF_DESCRIPTORS = """
import asyncio, contextlib, os, resource, sys
from zamp_sdk import ActionExecutor, HttpClientError

def leave(number):
    "Use up all descriptors but so many."
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(0))
    for _ in range(number):
        os.close(taken.pop())

async def start(url):
    return (await ActionExecutor.start("act", {}, base_url=url)).id

taken = []
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
"""
"""How a script for ``run_script`` begins whose process runs out of file descriptors."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait, where no event loop runs, until the condition holds."""
    asyncio.run(eventually(condition))


class PoolState(NamedTuple):
    """What the pool says of itself."""

    rooms_taken: int
    rooms: int
    in_line: int
    idle: int


def pool_state() -> PoolState:
    """Read the pool's repr."""
    return PoolState(*map(int, re.findall(r"\d+", repr(pool.shared_pool()))))


def pool_is_at_rest() -> bool:
    """Whether no request has room, or waits for it."""
    state = pool_state()
    return state.rooms_taken == state.in_line == 0


@pytest.fixture
def few_rooms(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give a function that makes a pool which has so many rooms, however long replies take."""

    def few_rooms(number: int) -> None:
        monkeypatch.setattr(pool, "FEWEST_ROOMS", number)
        monkeypatch.setattr(pool, "MOST_ROOMS", number)
        pool._start_afresh()

    return few_rooms
