"""Every row of the fault table: what the start does, what a poll does, how often each was sent, what the caller sees.

A fault is an act of a server (or of the resolver). It is injected once into the start (POST) and once into the polls
(GET), a few times or for ever. A start that meets it is one of

- RETRY: sent again, at most 4 times in all, for nothing was sent;
- PACED: sent again, at the platform's pace, for the platform refused it;
- UNKNOWN: not sent again, and the error says that the action may have started;
- RAISE: not sent again, and the error says that it has not;

and a poll is one of RETRY (until it succeeds, or there was no good reply for too long) and RAISE.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import errno
import http.client
import math
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any, Callable

import pytest

from tests import cases
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
    after_hello,
    closed_port,
    drip,
    handshake,
    hang_up,
    hanging_port,
    http_reply,
    proceed,
    raw,
    reply,
    reset,
    server_context,
    silent,
    tls_1_1_context,
    tunnel,
)
from zamp_sdk import ActionExecutor, ActionFailedError, HttpClientError
from zamp_sdk.action_executor import lifecycle
from zamp_sdk.transport import dialing, reading

RETRY, PACED, UNKNOWN, RAISE = "retry", "paced", "unknown", "raise"
TRIES = 4  # of a start
FOR_EVER = 1000
SHORT = 0.4  # s of patience with a server that does not answer
LONG_ENOUGH = 0.3  # s of patience with one that does, but does not come to an end


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    fault: Any
    post: str | None  # None: it cannot happen to a start
    poll: str | None
    says: str = ""
    """A part of the error's message."""
    status: int | None = None
    """The HTTP status that the error tells."""
    timeout: float | None = None
    """Seconds that a request may take that meets the fault."""


class World(abc.ABC):
    """A platform, the way to it, and a place on that way for the fault."""

    def __init__(self, platform: Server) -> None:
        self.platform = platform
        self.base_url = platform.url

    @abc.abstractmethod
    def inject(self, method: str, fault: Any, times: int) -> None:
        """Let the fault hit the next requests of this method."""

    @abc.abstractmethod
    def attempts(self, method: str) -> int:
        """Say how often a request of this method was tried."""

    async def execute(self) -> Any:
        return await ActionExecutor.execute("act", {"n": 1}, base_url=self.base_url, auth_token=TOKEN)


class FaultyReplies(World):
    """The fault comes after the platform has read the request."""

    def inject(self, method: str, fault: Act, times: int) -> None:
        self.platform.on(method, *[fault] * times)

    def attempts(self, method: str) -> int:
        return self.platform.count(method)


class FaultyConnects(World):
    """The fault comes before anything is sent: a script, of which each new connection takes the next line."""

    _polled_after = 0

    def inject(self, method: str, fault: Any, times: int) -> None:
        script = [fault] * times
        if method == "GET":
            # The start gets through, and its connection is not there for the polls.
            self._polled_after = 1
            self.platform.always("POST", reply(200, {"id": ACTION_ID}, {"Connection": "close"}))
            script.insert(0, None)
        self.set_script(script)

    def attempts(self, method: str) -> int:
        return self.connects() - (self._polled_after if method == "GET" else 0)

    @abc.abstractmethod
    def set_script(self, script: list[Any]) -> None: ...

    @abc.abstractmethod
    def connects(self) -> int: ...


class FaultyHandshakes(FaultyConnects):
    def __init__(self, platform: Server) -> None:
        super().__init__(platform)
        # A name, for no verifier of certificates would take an address for a common name.
        self.base_url = f"https://localhost:{platform.port}"

    def set_script(self, script: list[Any]) -> None:
        self.platform.on(CONNECT, *[act or proceed for act in script])

    def connects(self) -> int:
        return self.platform.connections


class FaultyProxy(FaultyConnects):
    def __init__(self, platform: Server, proxy: Server) -> None:
        super().__init__(platform)
        self.base_url = "https://platform.test"
        self.proxy = proxy
        self.through = tunnel(platform.port)
        proxy.always("CONNECT", self.through)

    def set_script(self, script: list[Any]) -> None:
        self.proxy.on("CONNECT", *[act or self.through for act in script])

    def connects(self) -> int:
        return self.proxy.count("CONNECT")


class FaultyLookups(FaultyConnects):
    def __init__(self, platform: Server, resolver: Resolver) -> None:
        super().__init__(platform)
        self.base_url = "http://platform.test"
        self.resolver = resolver

    def set_script(self, script: list[Any]) -> None:
        self.resolver.answers = [answer or self.platform.port for answer in script] + [self.platform.port]

    def connects(self) -> int:
        return len(self.resolver.hosts)


def _chunked(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


_STARTED = http_reply(200, {"id": ACTION_ID})
_COMPLETED = http_reply(200, {"status": "COMPLETED", "result": RESULT})
# Cut off, it looks like a whole one.
_ENDLESS = b'HTTP/1.1 200 OK\r\n\r\n{"id": "action-1", "status": "COMPLETED", "result": null}' + b" " * 1000
_HUGE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n{" % (64 * 1024 * 1024 + 1)

AFTER_SENDING = [
    Fault("reset", reset, UNKNOWN, RETRY, "reset"),
    Fault("end of the connection", hang_up, UNKNOWN, RETRY, "closed the connection without a reply"),
    Fault("silence", silent, UNKNOWN, RETRY, "timed out", timeout=SHORT),
    Fault("dripping headers", drip(_COMPLETED), UNKNOWN, RETRY, "timed out", timeout=SHORT),
    Fault("dripping body", drip(_COMPLETED, len(_COMPLETED) - 30), UNKNOWN, RETRY, "timed out", timeout=SHORT),
    Fault("endless body", drip(_ENDLESS, len(_ENDLESS) - 1000), UNKNOWN, RETRY, "timed out", timeout=SHORT),
    Fault("truncated status line", raw(b"HTTP/1.1 20"), UNKNOWN, RETRY, "within the head of its reply"),
    Fault("truncated headers", raw(b"HTTP/1.1 200 OK\r\nContent-Le"), UNKNOWN, RETRY, "within the head"),
    Fault("truncated body", raw(_STARTED[:-3]), UNKNOWN, RETRY, "bytes of its body"),
    Fault("truncated chunk", raw(_chunked(b'20\r\n{"id": ')), UNKNOWN, RETRY, "after 7 of 32 bytes of a chunk"),
    Fault("missing last chunk", raw(_chunked(b'7\r\n{"id": \r\n')), UNKNOWN, RETRY, "before the last chunk"),
    Fault("bad chunk size", raw(_chunked(b"xyz\r\n{}\r\n0\r\n\r\n")), UNKNOWN, RETRY, "size of a chunk"),
    Fault(
        "body cut where no length is given", raw(b'HTTP/1.1 200 OK\r\n\r\n{"id": "a'), UNKNOWN, RETRY, "not JSON", 200
    ),
    Fault("HTTP/0.9", raw(b"<h1>It works!</h1>"), UNKNOWN, RETRY, "no HTTP: <h1>It works!"),
    Fault("endless header line", raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000), UNKNOWN, RETRY, "256 KiB"),
    Fault("endless headers", raw(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 50_000), UNKNOWN, RETRY, "256 KiB"),
    Fault("not JSON", reply(200, b"<html>Please log in</html>"), UNKNOWN, RETRY, "not JSON: <html>Please log in", 200),
    Fault("not UTF-8", reply(200, b'{"id": "\xff"}'), UNKNOWN, RETRY, "not JSON", 200),
    Fault("an array", reply(200, ["id"]), UNKNOWN, RETRY, "not a JSON object", 200),
    Fault("null", reply(200, b"null"), UNKNOWN, RETRY, "not a JSON object", 200),
    Fault("no body", reply(200), UNKNOWN, RETRY, "(empty)", 200),
    Fault("HTTP 204", raw(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"), UNKNOWN, RETRY, "HTTP 204", 204),
    Fault("another protocol", drip(b"SSH-2.0-x\r\n" + b"-" * 500, 11), UNKNOWN, RETRY, "SSH-2.0-x", timeout=SHORT),
    Fault("tiny chunks", raw(_chunked(b"1\r\n \r\n" * 70_000)), UNKNOWN, RAISE, "over 65,536 chunks"),
    Fault("over 64 MiB", raw(_HUGE), UNKNOWN, RAISE, "over 64 MiB"),
    Fault("an object that says nothing", reply(200, {}), UNKNOWN, RETRY, "the reply has no", 200),
    Fault("an error without a status", reply(200, {"error": {"message": "no quota"}}), UNKNOWN, RAISE, "no quota", 200),
    *(
        Fault(f"id {value!r}", reply(200, {"id": value}), UNKNOWN, None, "no usable id", 200)
        for value in ("..", None, 7)  # one of each kind; the rest need no server
    ),
]

REFUSED = [
    Fault("HTTP 429", reply(429), PACED, RETRY, "HTTP 429 Too Many Requests", 429),
    Fault("HTTP 429, Retry-After", reply(429, headers={"Retry-After": "0"}), PACED, RETRY, "HTTP 429", 429),
    Fault("HTTP 503, Retry-After", reply(503, headers={"Retry-After": "0"}), PACED, RETRY, "HTTP 503", 503),
]

_REFUSAL = http_reply(429, b"because" * 100)
_LOGIN = http_reply(401, b"because" * 100)

STALLING_REFUSALS = [
    Fault("HTTP 429 whose body stalls", drip(_REFUSAL, 120), PACED, RETRY, "HTTP 429", 429, timeout=LONG_ENOUGH),
    Fault("HTTP 401 whose body stalls", drip(_LOGIN, 120), RAISE, RAISE, "HTTP 401", 401, timeout=LONG_ENOUGH),
]

STATUS_CODES = [
    Fault(f"HTTP {code}", reply(code, {"error": "because"}), post, poll, f"HTTP {code}", code)
    for codes, post, poll in (
        (cases.MAY_PASS, UNKNOWN, RETRY),
        (cases.ELSEWHERE, UNKNOWN, RAISE),
        (cases.REFUSED, RAISE, RAISE),
    )
    for code in codes
]

NO_ROUTE = [
    Fault("name lookup", socket.gaierror(socket.EAI_NONAME, "Name or service not known"), RETRY, RETRY, "not known"),
    Fault("name server", socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), RETRY, RETRY, "Temporary failure"),
    Fault("unreachable", OSError(errno.ENETUNREACH, "Network is unreachable"), RETRY, RETRY, "unreachable"),
    Fault("refused", "closed port", RETRY, RETRY, "refused"),
    Fault("connect times out", "hanging port", RETRY, RETRY, "timed out"),
]


def _alert(description: int) -> Act:
    """Answer a ClientHello with this fatal alert (RFC 8446, 6)."""
    return after_hello(raw(bytes((21, 3, 3, 0, 2, 2, description))))


HANDSHAKES = [
    Fault("alert: internal error", _alert(80), RETRY, RETRY, "cannot connect to localhost"),
    Fault("alert: decode error", _alert(50), RETRY, RETRY, "cannot connect to localhost"),
    Fault("alert: unrecognized name", _alert(112), RETRY, RETRY, "cannot connect to localhost"),
    Fault("alert: handshake failure", _alert(40), RAISE, RAISE, "does it speak TLS 1.2 or later there"),
    Fault("alert: protocol version", _alert(70), RAISE, RAISE, "does it speak TLS 1.2 or later there"),
    Fault("alert: insufficient security", _alert(71), RAISE, RAISE, "does it speak TLS 1.2 or later there"),
    Fault("reset", after_hello(reset), RETRY, RETRY, "cannot connect to localhost"),
    Fault("reset at once", reset, RETRY, RETRY, "cannot connect to localhost"),
    Fault("end of the connection", after_hello(hang_up), RETRY, RETRY, "cannot connect to localhost"),
    Fault("stall", silent, RETRY, RETRY, "timed out", timeout=SHORT),
    Fault("plaintext", after_hello(raw(http_reply(400))), RAISE, RAISE, "does it speak TLS 1.2 or later there"),
    Fault("untrusted", "untrusted", RAISE, RAISE, "if its CA is private, set SSL_CERT_FILE"),
    Fault("self-signed", "self-signed", RAISE, RAISE, "if its CA is private, set SSL_CERT_FILE"),
    Fault("expired", "expired", RAISE, RAISE, "certificate has expired"),
    Fault("not yet valid", "not yet valid", RAISE, RAISE, "certificate is not yet valid"),
    Fault("wrong host", "wrong host", RAISE, RAISE, "does not name this host among its subject alternative names"),
    Fault("common name only", "common name only", RAISE, RAISE, "(a common name does not count)"),
    Fault("TLS 1.1", "TLS 1.1", RAISE, RAISE, "does it speak TLS 1.2 or later there"),
]

_ENDLESS_407 = b"HTTP/1.1 407 Who?\r\nVia: x\r\n\r\n" + b" " * 1000

PROXIES = [
    *(
        Fault(f"HTTP {code}", reply(code), RETRY, RETRY, f"Tunnel connection failed: {code}")
        for code in (408, 425, 429, 500, 502, 503, 504)
    ),
    Fault("HTTP 403", reply(403), RAISE, RAISE, "the proxy does not let you through to platform.test"),
    Fault("HTTP 407 without end", drip(_ENDLESS_407, 30), RAISE, RAISE, "password into HTTPS_PROXY", timeout=SHORT),
    Fault("more than a reply", raw(http_reply(200) + _STARTED), RETRY, RETRY, "more than its reply to CONNECT"),
    Fault("HTTP 407", reply(407), RAISE, RAISE, "user name and password into HTTPS_PROXY"),
    Fault("reset", reset, RETRY, RETRY, "cannot connect to platform.test"),
    Fault("end of the connection", hang_up, RETRY, RETRY, "cannot connect to platform.test"),
    Fault("silence", silent, RETRY, RETRY, "timed out", timeout=SHORT),
    Fault("drip", drip(http_reply(200)), RETRY, RETRY, "timed out", timeout=SHORT),
    Fault("garbage", raw(b"<h1>It works!</h1>"), RETRY, RETRY, "cannot connect to platform.test"),
]

FAULTS = [
    *((FaultyReplies, fault) for fault in [*AFTER_SENDING, *REFUSED, *STALLING_REFUSALS, *STATUS_CODES]),
    *((FaultyLookups, fault) for fault in NO_ROUTE),
    *((FaultyHandshakes, fault) for fault in HANDSHAKES),
    *((FaultyProxy, fault) for fault in PROXIES),
]


def rows(method: str, *outcomes: str) -> pytest.MarkDecorator:
    """Take the rows with these outcomes of this method; each makes a world."""
    chosen = [
        pytest.param((kind, fault), id=f"{kind.__name__}: {fault.name}")
        for kind, fault in FAULTS
        if (fault.post if method == "POST" else fault.poll) in outcomes
    ]
    assert chosen
    return pytest.mark.parametrize("row", chosen)


@pytest.fixture
def fault(row: tuple[type[World], Fault]) -> Fault:
    """The row."""
    return row[1]


@pytest.fixture
def world(
    row: tuple[type[World], Fault],
    pace: Pace,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    """The row's world."""
    kind = row[0]
    with contextlib.ExitStack() as stack:
        if kind is FaultyReplies:
            yield kind(stack.enter_context(Server()))
        elif kind is FaultyLookups:
            monkeypatch.setattr(dialing, "CONNECT_TIMEOUT", 0.05)
            yield FaultyLookups(stack.enter_context(Server()), request.getfixturevalue("resolver"))
        elif kind is FaultyHandshakes:
            yield kind(stack.enter_context(Server(request.getfixturevalue("tls"))))
        else:
            platform = stack.enter_context(Server(request.getfixturevalue("tls")))
            proxy = stack.enter_context(Server())
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            yield FaultyProxy(platform, proxy)


Inject = Callable[[str, int], None]


@pytest.fixture
def inject(row: tuple[type[World], Fault], world: World, pace: Pace, ca: Authority) -> Iterator[Inject]:
    """Give a function that lets the row's fault hit the next requests of a method."""
    fault = row[1]
    with contextlib.ExitStack() as stack:

        def inject(method: str, times: int) -> None:
            act = fault.fault
            if act == "closed port":
                act = closed_port()
            elif act == "hanging port":
                act = stack.enter_context(hanging_port())
            elif isinstance(act, str):
                act = handshake(_bad_tls(act, ca))
            world.inject(method, act, times)
            if fault.timeout is not None:
                pace.hurry(method, times, fault.timeout)

        yield inject


def _bad_tls(kind: str, ca: Authority) -> ssl.SSLContext:
    if kind == "TLS 1.1":
        try:
            return tls_1_1_context(ca.issue("localhost"))
        except ssl.SSLError as exc:
            pytest.skip(f"this OpenSSL cannot be a TLS 1.1 server: {exc}")
    if kind == "self-signed":
        return server_context(Authority(ca.folder).itself)
    cert = {
        "untrusted": lambda: Authority(ca.folder).issue("localhost"),
        "expired": lambda: ca.issue("localhost", days=(-2, -1)),
        "not yet valid": lambda: ca.issue("localhost", days=(1, 2)),
        "wrong host": lambda: ca.issue("elsewhere.test", "127.0.0.2"),
        "common name only": lambda: ca.issue(common_name="localhost"),
    }[kind]()
    return server_context(cert)


# --- the table --------------------------------------------------------------------------------------------------------


@rows("POST", RETRY, PACED)
async def test_a_start_is_sent_again_after_what_cannot_have_started_it(
    world: World, fault: Fault, inject: Inject, assert_no_token: CheckNoToken
) -> None:
    """A start that was not sent, or was refused unprocessed, is sent again, and its action runs once."""
    inject("POST", 2)

    assert await world.execute() == RESULT

    assert world.attempts("POST") == 3
    accepted = [request for request in world.platform.requests if request.method == "POST"]
    assert len({request.headers["idempotency-key"] for request in accepted}) == 1
    assert world.platform.count("GET") == 1


@rows("POST", RETRY)
async def test_a_start_is_given_up_after_four_tries(
    world: World, fault: Fault, inject: Inject, assert_no_token: CheckNoToken
) -> None:
    """A start that fails four times is given up, with an error that says that nothing has started."""
    inject("POST", FOR_EVER)

    with pytest.raises(HttpClientError) as caught:
        await world.execute()

    assert_no_token(caught.value)
    assert fault.says in str(caught.value)
    assert caught.value.status_code == fault.status
    assert caught.value.action_id is None
    assert not caught.value.may_have_started
    assert world.attempts("POST") == TRIES
    assert world.platform.count("GET") == 0


@rows("POST", PACED)
async def test_a_start_is_given_up_when_it_was_refused_for_too_long(
    world: World, fault: Fault, inject: Inject, assert_no_token: CheckNoToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a start has been refused for five minutes (shorter here), the refusal is raised: nothing has started."""
    monkeypatch.setattr(lifecycle, "REFUSAL_WINDOW", 0.01)
    inject("POST", FOR_EVER)

    with pytest.raises(HttpClientError) as caught:
        await world.execute()

    assert_no_token(caught.value)
    assert fault.says in str(caught.value)
    assert caught.value.status_code == fault.status
    assert caught.value.action_id is None
    assert not caught.value.may_have_started
    assert world.attempts("POST") >= 2
    assert world.platform.count("GET") == 0


@rows("POST", UNKNOWN, RAISE)
async def test_a_start_is_not_sent_again_after_what_may_have_started_it_or_never_will(
    world: World, fault: Fault, inject: Inject, assert_no_token: CheckNoToken
) -> None:
    """A start whose fate is unknown, or that is refused for good, fails at once and says which it is."""
    inject("POST", FOR_EVER)

    with pytest.raises(HttpClientError) as caught:
        await world.execute()

    assert_no_token(caught.value)
    assert fault.says in str(caught.value)
    assert caught.value.status_code == fault.status
    assert caught.value.action_id is None
    assert caught.value.may_have_started == (fault.post == UNKNOWN)
    assert ("may have started" in str(caught.value)) == (fault.post == UNKNOWN)
    assert world.attempts("POST") == 1
    assert world.platform.count("GET") == 0


@rows("GET", RETRY)
async def test_a_poll_survives_whatever_may_pass(
    world: World, fault: Fault, inject: Inject, assert_no_token: CheckNoToken
) -> None:
    """A poll that fails for now is sent again until it succeeds, and the start is not."""
    inject("GET", 2)

    assert await world.execute() == RESULT

    assert world.attempts("GET") == 3
    assert world.platform.count("POST") == 1


@rows("GET", RETRY)
async def test_polls_are_given_up_when_none_succeeds_for_too_long(
    world: World, fault: Fault, inject: Inject, assert_no_token: CheckNoToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When no poll has had a good reply for five minutes (shorter here), the last error is raised."""
    monkeypatch.setattr(lifecycle, "POLL_FAILURE_WINDOW", 0.03)
    inject("GET", FOR_EVER)

    with pytest.raises(HttpClientError) as caught:
        await world.execute()

    assert_no_token(caught.value)
    assert fault.says in str(caught.value)
    assert caught.value.status_code == fault.status
    assert caught.value.action_id == ACTION_ID
    assert not caught.value.may_have_started
    assert world.attempts("GET") >= 1
    assert world.platform.count("POST") == 1


@rows("GET", RAISE)
async def test_a_poll_that_is_refused_for_good_raises_at_once(
    world: World, fault: Fault, inject: Inject, assert_no_token: CheckNoToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll whose answer will not change is not sent again, and the error names the action."""
    monkeypatch.setattr(lifecycle, "POLL_NOT_FOUND_GRACE", 0.0)
    inject("GET", FOR_EVER)

    with pytest.raises(HttpClientError) as caught:
        await world.execute()

    assert_no_token(caught.value)
    assert fault.says in str(caught.value)
    assert ACTION_ID in str(caught.value)
    assert caught.value.status_code == fault.status
    assert caught.value.action_id == ACTION_ID
    assert not caught.value.may_have_started
    assert world.attempts("GET") == 1
    assert world.platform.count("POST") == 1


# --- the rows that are no table ---------------------------------------------------------------------------------------


async def start(base_url: str | None, token: str | None = TOKEN, params: Any = None) -> str:
    handle = await ActionExecutor.start("act", params, base_url=base_url, auth_token=token)
    return handle.id


async def test_a_new_action_may_be_unknown_for_a_while(pace: Pace) -> None:
    """A poll that gets 404 just after the start is sent again, for the platform is catching up."""
    with Server() as server:
        server.on("GET", reply(404), reply(404))
        assert await ActionExecutor.execute("act", {}, base_url=server.url, auth_token=TOKEN) == RESULT
        assert (server.count("POST"), server.count("GET")) == (1, 3)


async def test_the_action_of_a_handle_is_not_new(pace: Pace) -> None:
    """A 404 for an action that was started elsewhere raises at once."""
    with Server() as server:
        server.always("GET", reply(404, {"detail": "no such action"}))
        with pytest.raises(HttpClientError, match="HTTP 404 Not Found: no such action") as caught:
            await ActionExecutor.get_handle("gone", base_url=server.url, auth_token=TOKEN).result()
        assert caught.value.action_id == "gone"
        assert server.count("GET") == 1


async def test_retry_after_is_waited_for(pace: Pace) -> None:
    """A refused start is sent again when Retry-After says so, and not before."""
    with Server() as server:
        server.on("POST", reply(429, headers={"Retry-After": "1"}))
        began = time.monotonic()
        assert await start(server.url) == ACTION_ID
        assert time.monotonic() - began >= 1
        assert server.count("POST") == 2


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"Content-Length: 3000\r\n\r\n" + b" " * 3000, id="Content-Length"),
        pytest.param(b"\r\n" + b" " * 3000, id="until the end of the connection"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\nbb8\r\n" + b" " * 3000 + b"\r\n0\r\n\r\n", id="chunked"),
    ],
)
async def test_a_body_over_the_limit_is_not_read(rest: bytes, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a body that is too large is framed, it is given up: the start's fate is unknown, and a poll raises."""
    monkeypatch.setattr(reading, "MAX_REPLY", 2000)
    with Server() as server:
        too_large = raw(b"HTTP/1.1 200 OK\r\n" + rest)
        server.on("POST", too_large)
        with pytest.raises(HttpClientError, match="the reply is over") as caught:
            await start(server.url)
        assert caught.value.may_have_started
        server.on("GET", too_large)
        with pytest.raises(HttpClientError, match="the reply is over") as caught:
            await ActionExecutor.execute("act", {}, base_url=server.url, auth_token=TOKEN)
        assert caught.value.action_id == ACTION_ID
        assert (server.count("POST"), server.count("GET")) == (2, 1)


@pytest.mark.parametrize(
    ("action_id", "segment"), [("act-1", "act-1"), ("a:b@c", "a%3Ab%40c"), ("é", "%C3%A9"), ("...", "...")]
)
async def test_an_id_is_one_segment_of_the_path(action_id: str, segment: str, pace: Pace) -> None:
    """Whatever id the platform gives, it is percent-encoded whole and never becomes a path, a query or a header."""
    with Server() as server:
        server.always("POST", reply(200, {"id": action_id}))
        handle = await ActionExecutor.start("act", {}, base_url=server.url, auth_token=TOKEN)
        assert handle.id == action_id
        assert await handle.result() == RESULT
        assert server.requests[-1].target == f"/actions/{segment}"


@pytest.mark.parametrize("action_id", cases.BAD_IDS)
def test_a_strange_id_is_refused_from_a_caller(action_id: str) -> None:
    """get_handle takes no id that would need encoding."""
    with pytest.raises(ValueError, match="not an action id"):
        ActionExecutor.get_handle(action_id, base_url="http://127.0.0.1:9", auth_token=TOKEN)


@pytest.mark.parametrize("base_url", cases.BAD_BASE_URLS)
async def test_a_bad_base_url_fails_before_the_network(base_url: str, resolver: Resolver) -> None:
    """A base URL that could send the token astray is a ValueError, which quotes no part that may be a secret."""
    with pytest.raises(ValueError, match="base_url") as caught:
        await start(base_url)
    assert cases.SECRET not in repr(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("base_url", ["api.example.com", "localhost:8080", "api.example.com/v1", "hunter2"])
async def test_a_base_url_without_a_scheme(base_url: str) -> None:
    """A forgotten scheme is named, with what to put there; the URL is not quoted, for it may be a token."""
    with pytest.raises(ValueError, match="did you mean https:// in front of it") as caught:
        await start(base_url)
    assert base_url not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("", "/actions"),
        ("/", "/actions"),
        ("/v1", "/v1/actions"),
        ("/v1//", "/v1/actions"),
        ("/ü/", "/%C3%BC/actions"),
    ],
)
async def test_the_path_of_the_base_url_is_kept(path: str, target: str, pace: Pace) -> None:
    """Requests go under the base URL's path, with or without a slash at its end."""
    with Server() as server:
        await start(server.url + path)
        assert [request.target for request in server.requests] == [target]


async def test_a_host_outside_ascii_is_looked_up_in_idna(resolver: Resolver, pace: Pace) -> None:
    """A host name with other letters goes to the resolver and into the Host header in its ASCII form."""
    with Server() as server:
        resolver.answers = [server.port]
        await start("http://bücher.test")
        assert resolver.hosts == ["xn--bcher-kva.test"]
        assert server.requests[0].headers["host"] == "xn--bcher-kva.test"


@pytest.mark.parametrize("token", [None, "", " \n"])
async def test_an_empty_token_means_the_environments(
    token: str | None, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a token, or with an empty one, ZAMP_AUTH_TOKEN is sent, without the white space around it."""
    monkeypatch.setenv("ZAMP_AUTH_TOKEN", f" {TOKEN}\n")
    with Server() as server:
        await start(server.url, token)
        assert server.requests[0].headers["authorization"] == f"Bearer {TOKEN}"


_circular: list[Any] = []
_circular.append(_circular)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (math.nan, ValueError),
        (math.inf, ValueError),
        ({1}, TypeError),
        (b"x", TypeError),
        (object(), TypeError),
        ("\ud800", ValueError),
        (_circular, ValueError),
        ({1: "a", "1": "b"}, ValueError),
    ],
)
async def test_what_json_cannot_say_fails_before_the_network(value: Any, error: type[Exception]) -> None:
    """Parameters that cannot be sent raise an error that names their place, and nothing is sent."""
    with Server() as server:
        with pytest.raises(error, match=r"params\.items\[1\]\.due"):
            await start(server.url, params={"items": [{}, {"due": value}]})
        assert server.connections == 0


# --- secrets ----------------------------------------------------------------------------------------------------------


def echo(status: int, *, as_json: bool = True) -> Act:
    """Answer with the request's own headers, as debugging servers and some gateways do."""

    def act(wire: Wire) -> bool:
        assert wire.request is not None
        credentials = wire.request.headers["authorization"]
        headers = {"X-Echo": credentials, "Location": f"/login?token={TOKEN}"}
        body = {"headers": {"Authorization": credentials}, "message": f"bad header: {credentials}"}
        return reply(status, body if as_json else repr(body).encode(), headers)(wire)

    return act


ECHOES = [
    pytest.param(echo(307), id="307"),
    pytest.param(echo(400), id="400"),
    pytest.param(echo(401, as_json=False), id="401, not JSON"),
    pytest.param(echo(500), id="500"),
    pytest.param(echo(200), id="200"),
    pytest.param(echo(200, as_json=False), id="200, not JSON"),
    pytest.param(raw(f"Authorization: Bearer {TOKEN}\r\n".encode()), id="no HTTP"),
    pytest.param(raw(f"HTTP/1.1 Bearer {TOKEN}\r\n".encode()), id="no status code"),
    pytest.param(raw(f"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{TOKEN}".encode()), id="truncated"),
]


@pytest.mark.parametrize("act", ECHOES)
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_reply_that_echoes_the_token_does_not_make_an_error_show_it(
    act: Act, method: str, pace: Pace, assert_no_token: CheckNoToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what comes back brings the token into an error or a log."""
    monkeypatch.setattr(lifecycle, "POLL_FAILURE_WINDOW", 0.0)
    with Server() as server:
        server.always(method, act)
        with pytest.raises(HttpClientError) as caught:
            await ActionExecutor.execute("act", {}, base_url=server.url, auth_token=TOKEN)
        assert_no_token(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        {"status": "FAILED", "error": f"401 for Bearer {TOKEN}"},
        {"status": "FAILED", "error": {"message": "401", "seen": [{TOKEN: f"Bearer {TOKEN}"}]}},
        {"status": TOKEN, "error": TOKEN},
    ],
    ids=["text", "object", "unknown status"],
)
async def test_an_action_that_echoes_the_token_does_not_make_its_error_show_it(
    answer: dict[str, Any], pace: Pace, assert_no_token: CheckNoToken
) -> None:
    """Neither an action's error nor a status nobody knows brings the token into the exception."""
    with Server() as server:
        server.always("GET", reply(200, answer))
        handle = await ActionExecutor.start("act", {}, base_url=server.url, auth_token=TOKEN)
        with pytest.raises(ActionFailedError) as caught:
            await handle.result()
        assert_no_token(caught.value)
        if answer["status"] == TOKEN:
            with pytest.raises(HttpClientError) as unknown:
                await handle.status()
            assert_no_token(unknown.value)


@pytest.mark.parametrize("cut", range(-len(TOKEN), 2))
async def test_a_token_that_an_excerpt_cuts_short_is_not_shown(cut: int, pace: Pace) -> None:
    """Where a message quotes how a reply begins, the token's own beginning may be its end."""
    with Server() as server:
        server.on("POST", raw(b"HTTP/1.1 400 No\r\n\r\n" + b"x" * (200 + cut) + TOKEN.encode() + b"!" * 900))
        with pytest.raises(HttpClientError) as caught:
            await ActionExecutor.start("act", {}, base_url=server.url, auth_token=TOKEN)
    assert TOKEN[:4] not in str(caught.value)


@pytest.mark.parametrize("written", ['to"k\\en/of/mine', 'to\\"k\\\\en/of/mine', 'to\\"k\\\\en\\/of\\/mine'])
async def test_a_token_that_json_writes_otherwise_is_not_shown(written: str, pace: Pace) -> None:
    """The token is found as it is, and as JSON escapes it."""
    with Server() as server:
        server.on("POST", raw(b"HTTP/1.1 400 No\r\n\r\n{" + written.encode()))
        with pytest.raises(HttpClientError) as caught:
            await ActionExecutor.start("act", {}, base_url=server.url, auth_token='to"k\\en/of/mine')
    assert caught.value.response_body == "{[token]"


async def test_http_clients_own_debugging_prints_nothing(
    pace: Pace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An application that switches http.client's debugging on does not get the token printed by this package."""
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    with Server() as server:
        await start(server.url)
    assert capsys.readouterr() == ("", "")
