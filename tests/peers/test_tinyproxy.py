"""Through tinyproxy, as the environment names it: forwarding, CONNECT, and every way in which it says no."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.peers.conftest import find_program, run_program, running
from tests.servers import RESULT, TOKEN, Server, closed_port
from zamp_sdk import ActionExecutor, HttpClientError

USER, PASSWORD = "some-user", "pass_word.1"  # tinyproxy's configuration allows no other punctuation
CREDENTIALS = "some%2Duser:pass%5Fword.1"  # the same in a URL, where others would have to be written like this
LOGIN = f"BasicAuth {USER} {PASSWORD}"

Proxy = Callable[..., str]


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Run a tinyproxy with these lines in its configuration, and return its ``host:port``."""
    program = find_program("tinyproxy", "tinyproxy-bin")
    with contextlib.ExitStack() as stack:

        def run(*lines: str) -> str:
            def command(port: int) -> list[str]:
                config = tmp_path / "tinyproxy.conf"
                settings = [f"Port {port}", "Listen 127.0.0.1", "Timeout 20", "LogLevel Connect", *lines]
                config.write_text("\n".join([*settings, ""]))
                return [program, "-d", "-c", str(config)]

            return f"127.0.0.1:{stack.enter_context(running(command, tmp_path / 'tinyproxy.log'))}"

        yield run


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], str]:
    """Return what the proxy has logged: the requests that went through it."""
    return (tmp_path / "tinyproxy.log").read_text


@pytest.fixture
def platform() -> Iterator[Server]:
    """A platform in plain HTTP."""
    with Server() as server:
        yield server


@pytest.fixture
def tls_platform(tls: Any) -> Iterator[Server]:
    """A platform in TLS."""
    with Server(tls) as server:
        yield server


@pytest.fixture
def platforms(platform: Server, tls_platform: Server) -> dict[str, Server]:
    """The platform that each variable is about."""
    return {"HTTP_PROXY": platform, "HTTPS_PROXY": tls_platform}


async def execute(url: str) -> Any:
    """Execute an action on the platform at this URL."""
    return await ActionExecutor.execute("an_action", {"é": "ü"}, base_url=url, auth_token=TOKEN)


async def failure(url: str) -> HttpClientError:
    """Try the same, and return why it failed, which must show no secret."""
    with pytest.raises(HttpClientError) as caught:
        await execute(url)
    for secret in (PASSWORD, CREDENTIALS, TOKEN):
        assert secret not in f"{caught.value!s} {caught.value!r} {vars(caught.value)}"
    return caught.value


async def test_plain_http_is_forwarded(
    platform: Server, proxy: Proxy, log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY forwards both requests, whole."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy()}")
    assert await execute(platform.url) == RESULT
    post, get = platform.requests
    assert json.loads(post.body)["params"] == {"é": "ü"}
    assert (post.target, get.target) == ("/actions", "/actions/action-1")
    assert post.headers["host"] == get.headers["host"] == platform.url.partition("//")[2]
    assert "via" in post.headers
    assert f"POST {platform.url}/actions" in log()


async def test_https_goes_through_a_tunnel(
    tls_platform: Server, proxy: Proxy, log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTPS_PROXY makes a tunnel, which the start and its poll share, and the proxy sees nothing but the host."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy()}")
    assert await execute(tls_platform.url) == RESULT
    assert log().count(f"CONNECT {tls_platform.url.partition('//')[2]}") == 1
    assert tls_platform.connections == 1
    assert not {"via", "proxy-authorization"} & set(tls_platform.requests[0].headers)
    assert TOKEN not in log()


async def test_a_proxy_without_scheme_is_an_http_proxy(
    platform: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``HTTP_PROXY=host:port`` is understood, as curl does."""
    monkeypatch.setenv("HTTP_PROXY", proxy())
    assert await execute(platform.url) == RESULT
    assert "via" in platform.requests[0].headers


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "example.test,127.0.0.1", "*"])
async def test_no_proxy_goes_past_it(
    platform: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, no_proxy: str
) -> None:
    """A host in NO_PROXY is reached directly."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy()}")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert await execute(platform.url) == RESULT
    assert "via" not in platform.requests[0].headers


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY"])
async def test_credentials_in_the_proxy_url_work(
    platforms: dict[str, Server],
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
) -> None:
    """A user name and a password, percent-encoded in the URL, open the proxy; nobody else sees them."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(variable, f"http://{CREDENTIALS}@{proxy(LOGIN)}")
    server = platforms[variable]
    assert await execute(server.url) == RESULT
    assert not any("proxy-authorization" in request.headers for request in server.requests)
    assert PASSWORD not in caplog.text
    assert CREDENTIALS not in caplog.text


# Wrong credentials get a 401 from tinyproxy, where RFC 9110 wants a 407 too.
WITHOUT_LOGIN = pytest.mark.parametrize(
    ("credentials", "status"), [("", 407), ("some-user:wrong@", 401)], ids=["none", "wrong"]
)


@WITHOUT_LOGIN
async def test_a_forwarded_start_without_the_right_credentials(
    platform: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, credentials: str, status: int
) -> None:
    """It fails at once, with no doubt; to a 407 the message says where the credentials belong."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{credentials}{proxy(LOGIN)}")
    error = await failure(platform.url)
    assert error.status_code == status
    assert not error.may_have_started
    assert status == 401 or "HTTP_PROXY" in str(error)
    assert "wrong" not in str(error)
    assert platform.connections == 0


@WITHOUT_LOGIN
async def test_a_tunnel_without_the_right_credentials(
    tls_platform: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, credentials: str, status: int
) -> None:
    """It fails at once, nothing was sent through it, and the message says where the credentials belong."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://{credentials}{proxy(LOGIN)}")
    error = await failure(tls_platform.url)
    assert f"Tunnel connection failed: {status}" in str(error)
    assert "HTTPS_PROXY" in str(error)
    assert not error.may_have_started
    assert tls_platform.connections == 0


async def test_a_proxy_that_does_not_serve_this_client(
    platform: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 403 by the proxy's ``Allow`` is told at once, with no doubt."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy('Allow 192.0.2.1')}")
    error = await failure(platform.url)
    assert error.status_code == 403
    assert not error.may_have_started
    assert platform.connections == 0


async def test_a_filtered_host(platform: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 403 by the proxy's ``Filter`` is told at once, with no doubt."""
    (tmp_path / "filter").write_text("^127\\.0\\.0\\.1$\n")
    filtering = proxy(f'Filter "{tmp_path}/filter"')
    monkeypatch.setenv("HTTP_PROXY", f"http://{filtering}")
    error = await failure(platform.url)
    assert error.status_code == 403
    assert not error.may_have_started
    assert platform.connections == 0


async def test_connect_to_a_forbidden_port(
    tls_platform: Server, proxy: Proxy, log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 403 to CONNECT, by ``ConnectPort``, is told at once; nothing was sent, and the message says so."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy('ConnectPort 443')}")
    error = await failure(tls_platform.url)
    assert "403" in str(error)
    assert "NO_PROXY" in str(error)
    assert not error.may_have_started
    assert tls_platform.connections == 0
    assert log().count("CONNECT 127.0.0.1") == 1


async def test_connect_to_a_dead_platform_is_tried_four_times(
    proxy: Proxy, log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tinyproxy answers 500 to CONNECT when it cannot reach the host: nothing was sent, so the start is tried again."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy()}")
    error = await failure(f"https://127.0.0.1:{closed_port()}")
    assert "Tunnel connection failed: 500" in str(error)
    assert not error.may_have_started
    assert log().count("CONNECT 127.0.0.1") == 4


async def test_a_forwarded_start_to_a_dead_platform_is_not_sent_again(
    proxy: Proxy, log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 500 to a forwarded start could as well be the platform's: it is not sent again, and the error says why."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy()}")
    error = await failure(f"http://127.0.0.1:{closed_port()}")
    assert error.status_code == 500
    assert error.may_have_started
    assert log().count("POST http://127.0.0.1") == 1


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY"])
async def test_a_proxy_that_is_down(
    platforms: dict[str, Server], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """When nothing listens where the proxy should be, nothing was sent, and nothing goes past the proxy either."""
    monkeypatch.setenv(variable, f"http://{CREDENTIALS}@127.0.0.1:{closed_port()}")
    error = await failure(platforms[variable].url)
    assert not error.may_have_started
    assert platforms[variable].connections == 0


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy"])
def test_a_program_needs_nothing_but_the_variables(
    platforms: dict[str, Server], trusted: Path, proxy: Proxy, log: Callable[[], str], variable: str
) -> None:
    """A program run with the usual variables in its environment finds the proxy, the platform and the private CA."""
    server = platforms[variable.upper()]
    environment = {
        **os.environ,  # with SSL_CERT_FILE
        variable: f"http://{CREDENTIALS}@{proxy(LOGIN)}",
        "ZAMP_BASE_URL": server.url,
        "ZAMP_AUTH_TOKEN": TOKEN,
    }
    done = run_program(environment)
    assert (done.returncode, done.stdout) == (0, f"{RESULT}\n")
    (warning,) = done.stderr.splitlines()  # for the platform of this test is on loopback
    assert f"{server.url} is this machine, but the proxy" in warning
    assert server.url.partition("//")[2] in log()
