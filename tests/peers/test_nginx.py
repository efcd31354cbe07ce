"""Behind nginx: TLS, connections that it ends, its own 413, 502 and 504, and what it makes of replies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import find_program, running
from tests.servers import ACTION_ID, RESULT, TOKEN, Act, Server, eventually, hang_up, raw, reply
from zamp_sdk import ActionExecutor, HttpClientError
from zamp_sdk.action_executor import lifecycle
from zamp_sdk.local_platform import LocalPlatform

CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
    client_body_temp_path {folder}/client_body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    log_format connections '$connection $connection_requests $request_method $status';
    access_log {folder}/access.log connections;

    keepalive_requests 3;
    keepalive_timeout 1s;
    client_max_body_size 64k;
    proxy_read_timeout {patience};
    gzip on;
    gzip_types application/json;
    limit_req_zone $binary_remote_addr zone=callers:1m rate=50r/s;
    limit_req_status 429;

    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {folder}/server.pem;
        ssl_protocols {protocols};
        ssl_certificate_key {folder}/server.pem;
        location / {{ proxy_pass http://127.0.0.1:{upstream}; }}
        location /refused/ {{ proxy_pass http://127.0.0.1:1; }}
        location /moved/ {{ return 301 https://elsewhere.test$request_uri; }}
        location /limited/ {{
            limit_req zone=callers burst=20 nodelay;
            proxy_pass http://127.0.0.1:{upstream}/;
        }}
        location /busy/ {{ add_header Retry-After 0 always; return 503; }}
    }}
}}
"""


class Nginx:
    """An nginx in front of an upstream."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        self.url = f"https://localhost:{port}"
        self._folder = folder

    async def answers(self, count: int) -> list[str]:
        """Say what nginx has answered, as in ``POST 200``, once it has logged so many: it logs after it answers."""
        await eventually(lambda: len(self._log()) >= count)
        return [line.split(maxsplit=2)[2] for line in self._log()]

    async def requests_per_connection(self, count: int) -> Counter[str]:
        """Say which connection carried how many of these requests."""
        await eventually(lambda: len(self._log()) >= count)
        return Counter(line.split()[0] for line in self._log())

    def _log(self) -> list[str]:
        return (self._folder / "access.log").read_text().splitlines()


@contextlib.contextmanager
def nginx_before(
    upstream: int,
    certificate: Path,
    folder: Path,
    *,
    protocols: str = "TLSv1.2 TLSv1.3",
    patience: str = "200ms",
) -> Iterator[Nginx]:
    """Run nginx in front of a port of 127.0.0.1, its files in this folder."""
    program = find_program("nginx", "nginx-light")
    shutil.copy(certificate, folder / "server.pem")

    def command(port: int) -> list[str]:
        config = folder / "nginx.conf"
        values = {"folder": folder, "port": port, "upstream": upstream, "protocols": protocols, "patience": patience}
        config.write_text(CONFIG.format(**values))
        return [program, "-e", "stderr", "-p", str(folder), "-c", str(config)]

    with running(command, folder / "nginx.log") as port:
        yield Nginx(port, folder)


@pytest.fixture
def upstream() -> Iterator[Server]:
    """A platform that follows a script."""
    with Server() as server:
        yield server


@pytest.fixture
def nginx(upstream: Server, localhost: Path, trusted: Path, tmp_path: Path) -> Iterator[Nginx]:
    """An nginx that the client trusts, in front of the scripted platform."""
    with nginx_before(upstream.port, localhost, tmp_path) as nginx:
        yield nginx


async def execute(nginx: Nginx, params: Any = None, path: str = "") -> Any:
    """Execute an action through nginx."""
    return await ActionExecutor.execute("an_action", params, base_url=nginx.url + path, auth_token=TOKEN)


async def test_connections_that_nginx_ends_after_three_requests_cost_nothing(
    localhost: Path, trusted: Path, tmp_path: Path
) -> None:
    """100 actions at once get each its own result, are started once each, and reuse connections up to nginx's limit."""
    platform = LocalPlatform(auth_token=TOKEN)
    platform.action("echo")(lambda params: params)
    with (
        platform,
        nginx_before(int(platform.base_url.rpartition(":")[2]), localhost, tmp_path, patience="20s") as nginx,
    ):
        calls = (
            ActionExecutor.execute("echo", {"number": number}, base_url=nginx.url, auth_token=TOKEN)
            for number in range(100)
        )
        assert await asyncio.gather(*calls) == [{"number": number} for number in range(100)]
        started = [request.body["params"]["number"] for request in platform.requests if request.method == "POST"]
        assert sorted(started) == list(range(100))
        used = await nginx.requests_per_connection(200)
        assert max(used.values()) == 3
        assert len(used) < sum(used.values()) / 1.5


async def test_a_connection_that_nginx_has_closed_while_idle_is_not_used(nginx: Nginx, upstream: Server) -> None:
    """After a pause longer than keepalive_timeout the next action runs on a new connection, without a failure."""
    assert await execute(nginx) == RESULT
    await asyncio.sleep(1.3)
    assert await execute(nginx) == RESULT
    assert await nginx.answers(4) == ["POST 200", "GET 200"] * 2
    assert len(await nginx.requests_per_connection(4)) == 2


async def test_a_poll_after_an_idle_close_uses_a_new_connection(nginx: Nginx, upstream: Server) -> None:
    """A handle that waits longer between two polls than nginx keeps connections gets its result all the same."""
    upstream.on("GET", reply(200, {"status": "RUNNING"}, {"Retry-After": "2"}))
    assert await execute(nginx) == RESULT
    assert await nginx.answers(3) == ["POST 200", "GET 200", "GET 200"]


@pytest.mark.parametrize("path", ["", "/refused"])
async def test_a_502_to_a_start_is_not_sent_again(nginx: Nginx, upstream: Server, path: str) -> None:
    """When nginx cannot say whether its upstream has read the start, the error says that it may have."""
    upstream.on("POST", hang_up)
    with pytest.raises(HttpClientError) as caught:
        await execute(nginx, path=path)
    assert caught.value.status_code == 502
    assert caught.value.may_have_started
    assert await nginx.answers(1) == ["POST 502"]


async def test_a_504_to_a_start_is_not_sent_again(nginx: Nginx, upstream: Server) -> None:
    """When the upstream is slower than nginx's patience, the error says that the action may have started."""
    upstream.on("POST", reply(200, {"id": ACTION_ID}, delay=0.5))
    with pytest.raises(HttpClientError) as caught:
        await execute(nginx)
    assert caught.value.status_code == 504
    assert caught.value.may_have_started
    assert upstream.count("POST") == 1


async def test_a_503_with_retry_after_to_a_start_is_tried_until_its_time_is_over(
    nginx: Nginx, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An nginx in maintenance has passed nothing on, so the start is sent again, and the last error says so."""
    monkeypatch.setattr(lifecycle, "REFUSAL_WINDOW", 0.01)
    with pytest.raises(HttpClientError) as caught:
        await execute(nginx, path="/busy")
    assert caught.value.status_code == 503
    assert not caught.value.may_have_started
    answers = await nginx.answers(2)
    assert answers == ["POST 503"] * len(answers)


async def test_all_come_through_an_nginx_that_limits(nginx: Nginx, upstream: Server) -> None:
    """Where nginx takes 50 requests a second, 60 actions at once come back, started once, and few are refused."""
    assert await asyncio.gather(*(execute(nginx, path="/limited") for _ in range(60))) == [RESULT] * 60
    assert upstream.count("POST") == 60
    answers = Counter(await nginx.answers(120))
    assert 0 < answers["POST 429"] + answers["GET 429"] < 90


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (hang_up, "502"),
        (reply(200, {}, delay=0.5), "504"),
        (raw(b"This is not HTTP.\r\n"), "009"),  # nginx takes it for HTTP/0.9 and makes up this status
    ],
    ids=["502", "504", "not HTTP"],
)
async def test_a_poll_survives_a_gateway_without_upstream(
    nginx: Nginx, upstream: Server, fault: Act, status: str
) -> None:
    """Whatever nginx answers to polls while it has no good reply from its upstream is waited out."""
    upstream.on("GET", fault, fault)
    assert await execute(nginx) == RESULT
    assert await nginx.answers(4) == ["POST 200", f"GET {status}", f"GET {status}", "GET 200"]


@pytest.mark.parametrize("size", [100_000, 8_000_000])
async def test_a_body_over_the_limit_never_reaches_the_platform(nginx: Nginx, upstream: Server, size: int) -> None:
    """A 413, which nginx sends before it has read the body, is read, not sent again, and no reason for doubt."""
    with pytest.raises(HttpClientError) as caught:
        await execute(nginx, "x" * size)
    assert caught.value.status_code == 413
    assert not caught.value.may_have_started
    assert upstream.requests == []
    assert await nginx.answers(1) == ["POST 413"]


async def test_a_body_up_to_the_limit_arrives_whole(nginx: Nginx, upstream: Server) -> None:
    """What is under nginx's limit arrives as it was sent, though nginx writes it to a file on the way."""
    params = {"text": "ü€😀" * 6_000}
    assert await execute(nginx, params) == RESULT
    assert json.loads(upstream.requests[0].body)["params"] == params


async def test_a_redirect_is_not_followed(nginx: Nginx, upstream: Server) -> None:
    """A 301 is an error that names where it points to, and whatever is there never sees the token."""
    with pytest.raises(HttpClientError, match=r"https://elsewhere\.test/moved/actions") as caught:
        await execute(nginx, path="/moved")
    assert caught.value.status_code == 301
    assert await nginx.answers(1) == ["POST 301"]


async def test_plain_http_to_the_tls_port_is_refused_by_nginx(nginx: Nginx, upstream: Server) -> None:
    """An http:// URL for an https:// port gets nginx's 400, which is told and raises no doubt."""
    with pytest.raises(HttpClientError, match="HTTPS port") as caught:
        await ActionExecutor.execute("a", {}, base_url=f"http://localhost:{nginx.port}", auth_token=TOKEN)
    assert caught.value.status_code == 400
    assert not caught.value.may_have_started
    assert upstream.requests == []


async def test_a_result_that_nginx_could_compress_is_read(nginx: Nginx, upstream: Server) -> None:
    """A large result comes through an nginx that compresses JSON for whoever accepts it."""
    result = ["a large result"] * 2_000
    upstream.on("GET", reply(200, {"status": "COMPLETED", "result": result}))
    assert await execute(nginx) == result


async def test_a_reply_without_length_comes_in_chunks(nginx: Nginx, upstream: Server) -> None:
    """Nginx turns an upstream's reply that ends with its connection into chunks; the connection is kept for more."""
    body = json.dumps({"status": "COMPLETED", "result": "x" * 100_000}).encode()
    upstream.on("GET", raw(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + body))
    assert await execute(nginx) == "x" * 100_000
    assert await execute(nginx) == RESULT
    assert len(await nginx.requests_per_connection(4)) == 2  # of 4 requests, with 3 for each connection


async def test_a_result_cut_short_on_its_way_is_asked_for_again(nginx: Nginx, upstream: Server) -> None:
    """A body that ends before its Content-Length, through nginx, is never taken for a result."""
    cut = raw(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"status": "COMPLETED", "result": 1}')
    upstream.on("GET", cut)
    assert await execute(nginx) == RESULT
    assert upstream.count("GET") == 2


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_tls_connections_are_reused(
    upstream: Server, localhost: Path, trusted: Path, tmp_path: Path, version: str
) -> None:
    """A start and its poll share a connection in either version of TLS."""
    with nginx_before(upstream.port, localhost, tmp_path, protocols=version) as nginx:
        assert await execute(nginx) == RESULT
        assert list((await nginx.requests_per_connection(2)).values()) == [2]
