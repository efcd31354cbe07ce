"""Which way to a platform: proxies, their exceptions, tunnels, and what nobody may learn from them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import logging
import socket
import ssl
import threading
import urllib.request
from collections.abc import Sequence

import pytest

from tests.conftest import (
    PROMPT,
    CheckNoToken,
    Pace,
    execute,
    pool_is_at_rest,
    request_to,
    run_script,
    start,
)
from tests.servers import (
    ACTION_ID,
    RESULT,
    Act,
    Server,
    Wire,
    closed_port,
    eventually,
    http_reply,
    raw,
    reply,
    tunnel,
)
from zamp_sdk import HttpClientError
from zamp_sdk.transport import (
    Exchange,
    Failure,
    routes,
    send,
)
from zamp_sdk.transport.hops import Hops
from zamp_sdk.transport.routes import find_route

SECRET = "hunter2@proxy"

CREDENTIALS = "user:hunter2%40proxy"

BASIC = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()


def with_credentials(url: str) -> str:
    return url.replace("://", f"://{CREDENTIALS}@")


# --- by which proxy ---------------------------------------------------------------------------------------------------


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


FIRST = """
import asyncio, sys
from zamp_sdk import ActionExecutor
print(asyncio.run(ActionExecutor.execute("act", {}, base_url=sys.argv[1])))
"""


def test_the_first_request_of_a_process_keeps_to_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform sees no connection but the proxy's."""
    with Server() as platform, Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        done = run_script(FIRST, platform.url)
        assert (done.stdout, done.returncode) == (f"{RESULT}\n", 0)
        (warning,) = done.stderr.splitlines()
        assert f"{platform.url} is this machine, but the proxy 127.0.0.1:{proxy.port}" in warning
        assert (platform.connections, proxy.connections) == (0, 1)


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


PROXY = "http://proxy.test:3128"


@pytest.mark.parametrize(
    ("scheme", "proxy", "authority", "credentials"),
    [
        ("http", "http://proxy.test:3128", "proxy.test:3128", None),
        ("https", "http://proxy.test:3128", "proxy.test:3128", None),
        ("http", "HTTP://proxy.test:3128/", "proxy.test:3128", None),
        ("http", "proxy.test:3128", "proxy.test:3128", None),
        ("http", "http://proxy.test", "proxy.test", None),
        ("http", "http://[::1]:3128", "[::1]:3128", None),
        ("http", "  http://proxy.test:3128 ", "proxy.test:3128", None),
        ("https", "\thttp://proxy.test:3128\n", "proxy.test:3128", None),
        ("http", "http://user:pass@proxy.test:3128", "proxy.test:3128", "user:pass"),
        ("https", "http://us%40er:p%3Ass@proxy.test:3128", "proxy.test:3128", "us@er:p:ss"),
        ("http", "http://user:@proxy.test:3128", "proxy.test:3128", "user:"),
        ("https", "http://user@proxy.test:3128", "proxy.test:3128", "user:"),
        ("http", "http://:pass@proxy.test:3128", "proxy.test:3128", ":pass"),
        ("http", "http://@proxy.test:3128", "proxy.test:3128", None),
    ],
)
async def test_a_proxys_url_is_read_as_it_is_meant(
    scheme: str, proxy: str, authority: str, credentials: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blanks around it, a scheme or not, credentials or half of them: what is plain is understood."""
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy)
    route = await find_route(f"{scheme}://platform.test", Hops(PROMPT))
    assert (route.is_through_proxy, route.authority) == (True, authority)
    assert route.tunnel_to == ("platform.test" if scheme == "https" else None)
    assert route.port == (3128 if authority.endswith(":3128") else 80)
    basic = None if credentials is None else "Basic " + base64.b64encode(credentials.encode()).decode()
    assert route.proxy_authorization == basic


@pytest.mark.parametrize("proxy", ["", " ", None])
async def test_an_empty_proxy_is_none(proxy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a proxy for its own scheme a platform is asked straight; ALL_PROXY is not urllib.request's."""
    if proxy is not None:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    monkeypatch.setenv("ALL_PROXY", PROXY)
    route = await find_route("https://platform.test", Hops(PROMPT))
    assert (route.is_through_proxy, route.host, route.port, route.tunnel_to) == (False, "platform.test", 443, None)


@pytest.mark.parametrize(
    ("no_proxy", "base_url", "is_exception"),
    [
        ("::1", "http://[::1]:8000", True),
        ("::1", "http://[::1]", True),
        ("[::1]", "http://[::1]:8000", True),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("[::1]:8001", "http://[::1]:8000", False),
        ("localhost,127.0.0.1,::1", "http://[::1]:8000", True),
        ("localhost,127.0.0.1,::1", "http://127.0.0.1:8000", True),
        ("localhost,127.0.0.1,::1", "http://localhost:8000", True),
        ("2001:db8::1", "https://[2001:db8::1]", True),
        ("2001:db8::2", "https://[2001:db8::1]", False),
        ("a.test\nplatform.test", "http://platform.test", True),
        ("a.test\r\nplatform.test\r\n", "https://platform.test", True),
        ("a.test platform.test", "http://platform.test", True),
        ("PLATFORM.TEST", "http://platform.test", True),
        (".platform.test", "https://eu.platform.test", True),
        ("platform.test", "https://eu.platform.test", True),
        ("platform.test:8000", "http://platform.test:8000", True),
        ("platform.test:8001", "http://platform.test:8000", False),
        ("form.test", "http://platform.test", False),
        ("platform.test.example", "http://platform.test", False),
        ("*", "https://platform.test", True),
        (" , ", "https://platform.test", False),
        ("", "https://platform.test", False),
    ],
)
async def test_what_no_proxy_names_is_asked_straight(
    no_proxy: str, base_url: str, is_exception: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_PROXY may be written with commas, blanks or newlines, and IPv6 addresses with brackets or without."""
    for variable in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, PROXY)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    route = await find_route(base_url, Hops(PROMPT))
    assert route.is_through_proxy != is_exception


@pytest.mark.parametrize("before", ["", "*"])
async def test_a_route_is_found_once_and_kept(before: str, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NO_PROXY changes while a program runs, its platform is asked on the way that it was asked first."""
    with Server() as server, Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", before)
        assert await execute(server.url) == RESULT
        monkeypatch.setenv("NO_PROXY", "" if before else "*")
        assert await execute(server.url) == RESULT
        asked, spared = (server, proxy) if before else (proxy, server)
        assert [request.method for request in asked.requests] == ["POST", "GET"] * 2
        assert spared.connections == 0
        assert {request.target.startswith("http://") for request in asked.requests} == {asked is proxy}


async def test_settings_that_were_mended_are_read_again(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that cannot be used is no route, so the next request looks again."""
    with Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:1080")
        with pytest.raises(HttpClientError, match="HTTP_PROXY names a socks5:// proxy"):
            await start("http://platform.test")
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert await start("http://platform.test") == ACTION_ID


async def test_routes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many platforms a program speaks to, a bounded number of routes is kept in mind."""
    for number in range(2 * routes.MAX_ROUTES + 1):
        await find_route(f"http://platform-{number}.test", Hops(PROMPT))
        assert len(routes._routes) <= routes.MAX_ROUTES


async def test_slow_proxy_settings_keep_the_deadline(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system's settings make urllib.request look names up, nothing is sent after the deadline."""
    release = threading.Event()
    monkeypatch.setattr(urllib.request, "proxy_bypass", lambda _: release.wait(10.0))
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    with Server() as server:
        outcome = await asyncio.wait_for(send(Exchange(request_to(server.url), 0.3)), PROMPT)
        release.set()
        assert isinstance(outcome, Failure)
        assert "timed out" in outcome.message
        assert not outcome.may_have_left
        await eventually(pool_is_at_rest)
        assert server.connections == 0


# --- proxies that cannot be used --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("begin", ["http:/", "https:/"])
@pytest.mark.usefixtures("pace")
async def test_a_proxy_url_that_is_none_is_not_quoted(
    begin: str, monkeypatch: pytest.MonkeyPatch, assert_no_token: CheckNoToken
) -> None:
    """The error for a mistyped proxy names the variable, and shows no password."""
    monkeypatch.setenv("HTTPS_PROXY", f"{begin}{CREDENTIALS}@127.0.0.1:1")
    with pytest.raises(HttpClientError, match="HTTPS_PROXY is not a URL like") as caught:
        await start("https://platform.test")
    assert_no_token(caught.value, SECRET, CREDENTIALS)
    assert not caught.value.may_have_started


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "proxy",
    [
        "http://proxy.test:99999",
        "proxy.test:99999",
        "http://proxy.test:abc",
        "http://proxy.test:-1",
        "http://a..b:3128",
        "http://:3128",
        "http://[::1:3128",
        f"http://{'x' * 70}:3128",
        "http://us\udce9r:password@proxy.test:3128",  # an octet that is no UTF-8, as os.environ gives it
    ],
)
async def test_a_proxy_that_cannot_be_one_is_named_by_its_variable(
    scheme: str, proxy: str, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port or a host that cannot be is a mistake in a variable, which the error names."""
    variable = f"{scheme.upper()}_PROXY"
    monkeypatch.setenv(variable, proxy)
    with pytest.raises(HttpClientError, match=f"{variable} is not a URL like") as caught:
        await start(f"{scheme}://platform.test")
    assert not caught.value.may_have_started


# --- tunnels ----------------------------------------------------------------------------------------------------------


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


async def test_a_proxy_cannot_forge_a_reply(pace: Pace, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a proxy sends behind its reply to CONNECT is not read as what the platform says within TLS."""

    def forge(wire: Wire) -> bool:
        with socket.create_connection(("127.0.0.1", platform.port)) as upstream:
            wire.send(b"HTTP/1.1 200 OK\r\n\r\n" + http_reply(200, {"id": "forged"}))
            upstream.settimeout(5.0)
            wire.socket.settimeout(5.0)
            with contextlib.suppress(OSError):
                while data := wire.socket.recv(65536):  # whoever believes it goes on with the handshake
                    upstream.sendall(data)
                    wire.send(upstream.recv(65536))
        return False

    with Server(tls) as platform, Server() as proxy:
        proxy.always("CONNECT", forge)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(HttpClientError, match="the proxy sent more than its reply to CONNECT") as caught:
            await start("https://platform.test")
        assert not caught.value.may_have_started
        assert platform.requests == []


# --- what is told -----------------------------------------------------------------------------------------------------


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


async def test_what_a_proxy_says_about_its_refusal_is_not_shown(
    pace: Pace, monkeypatch: pytest.MonkeyPatch, assert_no_token: CheckNoToken
) -> None:
    """A proxy that echoes the credentials as its reason, with control characters, is quoted by its status alone."""
    echo = b"HTTP/1.1 403 dXNlcjpodW50ZXIy user:hunter2 \x1b[31m\r\nContent-Length: 7\r\n\r\nhunter2"
    with Server() as proxy:
        proxy.always("CONNECT", raw(echo))
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("://", "://user:hunter2@"))
        with pytest.raises(HttpClientError, match="Tunnel connection failed: 403 Forbidden") as caught:
            await start("https://platform.test")
        assert_no_token(caught.value, "hunter2", "dXNlcjpodW50ZXIy", "\x1b")
        assert not caught.value.may_have_started


async def test_a_proxy_that_echoes_its_password_does_not_make_an_error_show_it(
    pace: Pace, monkeypatch: pytest.MonkeyPatch, assert_no_token: CheckNoToken
) -> None:
    """In plain HTTP, too, where a proxy gets its credentials with each request."""
    with Server() as proxy:
        proxy.always("POST", raw(b"Proxy-Authorization: Basic dXNlcjpodW50ZXIy\r\n\r\n"))
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("://", "://user:hunter2@"))
        with pytest.raises(HttpClientError, match=r"no reply from platform\.test") as caught:
            await start("http://platform.test")
        assert_no_token(caught.value, "hunter2", "dXNlcjpodW50ZXIy")


SECRETS = (f"user:{SECRET}", "user", SECRET)


async def test_a_reply_says_what_must_not_be_shown_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a proxy has brought come the user name and the password that it was told, and may have echoed."""
    with Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", with_credentials(proxy.url))
        proxy.always("GET", reply(407, b"who?"))
        came = await send(Exchange(request_to("http://platform.test"), PROMPT))
        assert (came.status_code, tuple(came.secrets)) == (407, SECRETS)
        monkeypatch.setenv("NO_PROXY", "*")
        straight = await send(Exchange(request_to(proxy.url), PROMPT))
        assert tuple(straight.secrets) == ()


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_what_a_proxy_wrote_is_redacted_with_its_credentials(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that quotes a proxy hands the user name and the password to whoever makes the text fit to be shown."""
    handed: list[tuple[str, tuple[str, ...]]] = []

    def redact(text: str, secrets: Sequence[str]) -> str:
        handed.append((text, tuple(secrets)))
        return "redacted"

    with Server() as proxy:
        echo = raw(f"denied for user:{SECRET}\r\n\r\n".encode())
        proxy.always("CONNECT", echo)
        proxy.always("GET", echo)
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", with_credentials(proxy.url))
        request = dataclasses.replace(request_to(f"{scheme}://platform.test"), redact=redact)
        outcome = await send(Exchange(request, PROMPT))
    assert isinstance(outcome, Failure)
    assert outcome.message.endswith(": redacted")
    ((text, secrets),) = handed
    assert f"denied for user:{SECRET}" in text
    assert secrets == SECRETS


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3", "[::1]"])
async def test_a_proxy_for_this_machine_is_warned_of(
    host: str, pace: Pace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy that is asked for a loopback URL sees the token: a warning names both, once, without credentials."""
    with Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("://", "://user:hunter2@"))
        for _ in range(2):
            await start(f"http://{host}:8000")
    (warning,) = [record for record in caplog.records if "proxy" in record.getMessage()]
    assert warning.levelno == logging.WARNING
    assert f"http://{host}:8000 is this machine, but the proxy 127.0.0.1:{proxy.port}" in warning.getMessage()
    assert "NO_PROXY" in warning.getMessage()
    assert "hunter2" not in warning.getMessage()


@pytest.mark.parametrize("no_proxy", ["localhost", ""])
async def test_other_proxies_are_not_warned_of(
    no_proxy: str, pace: Pace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where NO_PROXY has the loopback host, or the proxy is for another host, nobody is warned."""
    with Server() as server:
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.setenv("NO_PROXY", no_proxy)
        host = f"localhost:{server.port}" if no_proxy else "platform.test"
        await start(f"http://{host}")
    assert "this machine" not in caplog.text
