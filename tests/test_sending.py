"""What urllib.request writes, what it does not do, and what others find who look at it or replace it."""

from __future__ import annotations

import socket
import sys
import urllib.request
from typing import Any

import pytest

import zamp_sdk
from tests.conftest import (
    CheckNoToken,
    Pace,
    execute,
    request_to,
    run_script,
    start,
)
from tests.servers import (
    ACTION_ID,
    RESULT,
    TOKEN,
    Server,
    reply,
)
from zamp_sdk import HttpClientError
from zamp_sdk.transport import Exchange, send


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


@pytest.mark.parametrize("delay", [0.0, 0.05])
async def test_an_agent_that_wraps_open_finds_a_response(
    delay: float, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tracing agents read of an opened response is there, whether the reply has come by then or not."""
    seen: list[Any] = []
    really_open = urllib.request.OpenerDirector.open

    def traced(self: Any, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        response = really_open(self, fullurl, data)
        headers = {str(name).lower(): str(value) for name, value in response.headers.items()}
        seen.append((response.status, response.code, response.getcode(), response.version, headers))
        return response

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", traced)
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=delay))
        assert await execute(server.url) == RESULT
        assert (server.count("POST"), server.count("GET")) == (1, 1)
    assert len(seen) == 2
    assert {version for *_, version, _ in seen} == {11}
    if delay:
        assert seen[0][:3] == (102, 102, 102)  # "Processing"; some agents compare it with numbers
    assert TOKEN not in str(seen)


REPLACED = """
import asyncio, http.client, importlib, sys, urllib.request
from zamp_sdk import ActionExecutor

def execute():
    return asyncio.run(ActionExecutor.execute("act", {}, base_url=sys.argv[1]))

module_name, name = sys.argv[2].rsplit(".", 1)
module = importlib.import_module(module_name)
real = getattr(module, name)

class Replaced(real):
    def __init__(self, *args, **kwargs):
        raise RuntimeError("replaced")

setattr(module, name, Replaced)
try:
    print(execute())
except RuntimeError as exc:
    print(exc)
setattr(module, name, real)
print(execute())
"""


@pytest.mark.parametrize(
    ("what", "first"),
    [
        ("http.client.HTTPConnection", str(RESULT)),
        ("http.client.HTTPSConnection", str(RESULT)),
        ("http.client.HTTPResponse", str(RESULT)),
        ("urllib.request.Request", "replaced"),
        ("urllib.request.OpenerDirector", "replaced"),
    ],
)
def test_what_was_replaced_for_the_first_action_leaves_no_trace(what: str, first: str) -> None:
    """A test tool that has put something of its own into the standard library is out of it when it has left."""
    with Server() as server:
        done = run_script(REPLACED, server.url, what)
        assert (done.stdout.splitlines(), done.returncode) == ([first, str(RESULT)], 0)


async def test_a_tool_that_replaces_the_opener_later_is_asked(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put into the standard library between two actions has its say about the second one, and then no more."""
    opened: list[str] = []

    class Watching(urllib.request.OpenerDirector):
        def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
            opened.append(fullurl.get_method())
            return super().open(fullurl, data)

    with Server() as server:
        assert await execute(server.url) == RESULT
        with monkeypatch.context() as patch:
            patch.setattr(urllib.request, "OpenerDirector", Watching)
            assert await execute(server.url) == RESULT
        assert await execute(server.url) == RESULT
    assert opened == ["POST", "GET"]


async def test_the_default_opener_has_no_say(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An application's own opener, which may follow redirects or send cookies, is not used."""
    opener = urllib.request.OpenerDirector()
    monkeypatch.setattr(urllib.request, "_opener", opener)
    monkeypatch.setattr(opener, "open", lambda *_, **__: pytest.fail("it was asked"))
    with Server() as server:
        assert await execute(server.url) == RESULT


async def test_head_and_body_leave_together(pace: Pace) -> None:
    """A start's head and body are one send, so one packet and one TLS record, where the socket takes it."""
    sizes: list[int] = []

    class Counting(socket.socket):
        def send(self, data: Any, flags: int = 0) -> int:
            sizes.append(len(data))
            return super().send(data, flags)

    with Server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", Counting)
        reply = await send(Exchange(request_to(server.url, "POST", body=b"x" * 1000), 10.0))
        assert reply.status_code == 200
        assert len(server.requests[0].body) == 1000
    (size,) = sizes
    assert size > 1000
