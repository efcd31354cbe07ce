"""What the tests share: a clean environment, fresh transport state, short waits, certificates."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.certificates import Authority
from tests.servers import TOKEN, server_context
from zamp_sdk.action_executor import exchange, executor, http_client, lifecycle, messages, pool
from zamp_sdk.action_executor.models import SdkConfig
from zamp_sdk.action_executor.wire import Answer, Progress, Request


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
        http_client.logger.addHandler(handlers[-1])

    yield interrupt_after
    for handler in handlers:
        http_client.logger.removeHandler(handler)


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
    exchange._routes.clear()
    messages._proxies.cache_clear()
    messages._opener.cache_clear()
    pool.shared_pool().close_idle()
    pool.shared_pool().forget_tls_context()
    executor._warn_of_plain_http.cache_clear()


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
    really_send = http_client.send

    async def send(config: SdkConfig, request: Request, timeout: float, progress: Progress | None = None) -> Answer:
        return await really_send(config, request, pace.timeout(request.method, timeout), progress)

    monkeypatch.setattr(http_client, "send", send)
    return pace


class Resolver:
    """The name lookups of ``*.test`` hosts: each takes the next of ``answers`` (a port of 127.0.0.1, or an error)."""

    def __init__(self) -> None:
        self.answers: list[int | OSError] = []
        self.hosts: list[str] = []
        self.before: Callable[[], object] = lambda: None
        self._really = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(host).endswith(".test"):
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


@pytest.fixture
def tls(localhost: Path, trusted: Path) -> Any:
    """The TLS side of a server that the client trusts."""
    return server_context(localhost)
