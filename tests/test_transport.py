"""The transport among peers, networks and applications that misbehave: what it survives, and what it never does."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import gzip
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

import zamp_sdk
from tests.certificates import Authority
from tests.conftest import CheckNoToken, Pace
from tests.servers import (
    ACTION_ID,
    CONNECT,
    RESULT,
    TOKEN,
    Act,
    Server,
    Wire,
    deaf,
    eventually,
    hanging_port,
    http_reply,
    proceed,
    raw,
    reply,
    running,
    server_context,
    silent,
    tunnel,
)
from zamp_sdk import ActionExecutor, ActionHandle, HttpClientError
from zamp_sdk.action_executor import connections, exchange, hops, http_client, lifecycle, messages, pool
from zamp_sdk.action_executor.models import SdkConfig
from zamp_sdk.action_executor.wire import Failure, Reply, Request

ROOT = Path(zamp_sdk.__file__).parent.parent
PROMPT = 5.0  # s: far less than what would be waited for otherwise, and enough for a busy machine
STALLED = 6  # requests: as many as asyncio's default executor has threads on two cores
MANY_MB = "x" * 20_000_000  # far more than sockets buffer

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs resource.setrlimit")


async def execute(base_url: str, params: Any = None) -> Any:
    return await ActionExecutor.execute("act", params, base_url=base_url, auth_token=TOKEN)


async def start(base_url: str, params: Any = None) -> str:
    return (await ActionExecutor.start("act", params, base_url=base_url, auth_token=TOKEN)).id


def handle_at(base_url: str) -> ActionHandle[Any]:
    return ActionExecutor.get_handle(ACTION_ID, base_url=base_url, auth_token=TOKEN)


def room_is_free() -> bool:
    return pool.shared_pool().rooms_taken == 0


@pytest.fixture(params=["http", "https"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server without TLS, and one with it."""
    with Server(request.getfixturevalue("tls") if request.param == "https" else None) as server:
        yield server


# --- what is left over ------------------------------------------------------------------------------------------------


def together(first: Any, second: bytes, first_status: int = 200) -> Act:
    """Send two replies at once, in one TLS record, the first of them 8 KiB long: as much as is read from a file."""
    bare = http_reply(first_status, first)
    padding = 8192 - len(bare) - 2  # its length takes two digits more then
    data = http_reply(first_status, bare.partition(b"\r\n\r\n")[2] + b" " * padding)
    assert len(data) == 8192
    return raw_but_open(data + second)


def raw_but_open(data: bytes) -> Act:
    """Send these bytes, and read on."""

    def act(wire: Wire) -> bool:
        wire.send(data)
        return True

    return act


async def test_a_poll_does_not_get_a_reply_that_came_too_early(server: Server, pace: Pace) -> None:
    """A second reply in the packet, or TLS record, of the first is another request's, and nobody's."""
    another = http_reply(200, {"status": "COMPLETED", "result": "of another action"})
    server.on("POST", together({"id": ACTION_ID}, another))
    assert await execute(server.url) == RESULT
    assert server.connections == 2


async def test_a_refusal_that_is_left_over_refuses_no_start(server: Server, pace: Pace) -> None:
    """A start is not sent again because of a 429 that was there before it."""
    server.on("POST", together({"id": ACTION_ID}, http_reply(429)))
    assert await start(server.url) == ACTION_ID
    assert await start(server.url) == ACTION_ID
    assert (server.count("POST"), server.connections) == (2, 2)


@pytest.mark.parametrize("surplus", [b"\r\n", b"H", b"\0"])
async def test_a_single_byte_too_many_ends_a_connection(surplus: bytes, server: Server, pace: Pace) -> None:
    """Whatever follows a reply, its connection is closed."""
    server.on("POST", raw_but_open(http_reply(200, {"id": ACTION_ID}) + surplus))
    assert await execute(server.url) == RESULT
    assert server.connections == 2
    await eventually(lambda: server.open_connections == 1)


async def test_half_a_tls_record_too_many_ends_a_connection(localhost: Path, trusted: Path, pace: Pace) -> None:
    """A reply of which TLS can decrypt nothing yet is left over all the same."""
    context = server_context(localhost)

    def half_a_record(wire: Wire) -> bool:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)

        def step(function: Callable[[], Any]) -> Any:
            while True:
                try:
                    return function()
                except ssl.SSLWantReadError:
                    wire.send(outgoing.read())
                    incoming.write(wire.socket.recv(65536))
                finally:
                    if outgoing.pending:
                        wire.send(outgoing.read())

        step(tls.do_handshake)
        step(lambda: tls.read(65536))
        tls.write(http_reply(200, {"id": ACTION_ID}))
        whole = outgoing.read()
        tls.write(http_reply(200, {"status": "COMPLETED", "result": "of another action"}))
        surplus = outgoing.read()
        wire.send(whole + surplus[:50])
        if wire.socket.recv(65536):  # it is used again
            wire.send(surplus[50:])
        return False

    with Server(context) as server:
        server.on(CONNECT, half_a_record)
        assert await execute(server.url) == RESULT
        assert server.connections == 2


async def test_a_switch_of_protocols_ends_the_connection(server: Server, pace: Pace) -> None:
    """After a 101 a connection speaks something else, so it is closed."""
    head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    server.on("POST", raw_but_open(head))
    with pytest.raises(HttpClientError, match="HTTP 101") as caught:
        await start(server.url)
    assert caught.value.may_have_started
    await eventually(lambda: server.open_connections == 0)
    assert await start(server.url) == ACTION_ID
    assert (server.count("POST"), server.connections) == (2, 2)


async def test_another_actions_reply_is_no_reply(server: Server, pace: Pace) -> None:
    """A poll that is told of another action asks again."""
    server.on("GET", reply(200, {"id": "act_999", "status": "COMPLETED", "result": "of another action"}))
    assert await execute(server.url) == RESULT
    assert server.count("GET") == 2


# --- peers that stall -------------------------------------------------------------------------------------------------


def stall_after(data: bytes) -> Act:
    """Send these bytes, and no more."""

    def act(wire: Wire) -> bool:
        wire.send(data)
        return silent(wire)

    return act


def stall_in_send(wire: Wire) -> bool:
    """Shake hands if there is TLS, and read nothing then."""
    return proceed(wire) and deaf(wire)


_BEGUN = http_reply(200, {"id": ACTION_ID})
STALLS = {
    "first byte": ("POST", stall_after(b"H")),
    "status line": ("POST", stall_after(b"HTTP/1.1 200")),
    "header": ("POST", stall_after(b"HTTP/1.1 200 OK\r\nContent-Le")),
    "body": ("POST", stall_after(_BEGUN[:-5])),
    "chunk size": ("POST", stall_after(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2")),
    "chunk": ("POST", stall_after(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{")),
    "send": (CONNECT, stall_in_send),
}


async def others_go_on_beside(url: str, all_are_stuck: Callable[[], bool], params: Any = None) -> None:
    """Start what stalls at this URL, on two threads, and see whether an action elsewhere and to_thread go on."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    with Server() as healthy:
        tasks = [asyncio.ensure_future(start(url, params)) for _ in range(STALLED)]
        await eventually(all_are_stuck)
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(execute(healthy.url), PROMPT) == RESULT
        assert await asyncio.wait_for(asyncio.to_thread(len, "abc"), PROMPT) == 3
        assert not [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    await eventually(room_is_free)


@pytest.mark.parametrize("phase", STALLS)
async def test_a_stalled_reply_delays_nobody_else(phase: str, server: Server, pace: Pace) -> None:
    """Wherever a peer stalls, in the request or in its reply, no thread waits for it."""
    event, act = STALLS[phase]
    server.always(event, act)
    if event == "POST":
        await others_go_on_beside(server.url, lambda: server.count("POST") == STALLED)
    else:
        await others_go_on_beside(server.url, lambda: server.connections == STALLED, MANY_MB)


async def test_a_stalled_connect_delays_nobody_else(pace: Pace) -> None:
    """No thread waits for an address that does not answer."""
    with hanging_port() as port:
        await others_go_on_beside(f"http://127.0.0.1:{port}", lambda: pool.shared_pool().rooms_taken == STALLED)


async def test_a_stalled_tls_handshake_delays_nobody_else(pace: Pace, tls: ssl.SSLContext) -> None:
    """No thread waits for a server that does not shake hands."""
    with Server(tls) as server:
        server.always(CONNECT, silent)
        await others_go_on_beside(server.url, lambda: server.connections == STALLED)


@pytest.mark.parametrize("act", [silent, stall_after(b"HTTP/1.1 200 OK\r\nVia: x")])
async def test_a_stalled_proxy_delays_nobody_else(act: Act, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread waits for a proxy that does not answer CONNECT, or only half."""
    with Server() as proxy:
        proxy.always("CONNECT", act)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        await others_go_on_beside("https://platform.test", lambda: proxy.count("CONNECT") == STALLED)


# --- replies that break rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [b"-1", b"-7fffffffffffffff", b"-0x1"])
async def test_a_chunk_of_negative_size_is_no_reply(size: bytes, server: Server, pace: Pace) -> None:
    """A negative chunk size does not mean all that follows: a start's fate is unknown, and a poll asks again."""
    broken = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n" % size
    server.on("GET", raw(broken + http_reply(200, {"status": "COMPLETED", "result": 1})[-40:] + b"\r\n0\r\n\r\n"))
    assert await execute(server.url) == RESULT
    server.on("POST", raw(broken + b'{"id": "act_999"}\r\n0\r\n\r\n'))
    with pytest.raises(HttpClientError) as caught:
        await start(server.url)
    assert caught.value.may_have_started
    assert (server.count("POST"), server.count("GET")) == (2, 2)


class Flood:
    """An act that sends its beginning, and then the rest again and again while anybody takes it."""

    def __init__(self, begin: bytes, again: bytes) -> None:
        self.begin = begin
        self.again = again * (65536 // len(again))
        self.sent = 0

    def __call__(self, wire: Wire) -> bool:
        wire.send(self.begin)
        while not wire.server.stopping.is_set() and self.sent < 1 << 29:
            wire.send(self.again)
            self.sent += len(self.again)
        return False


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(Flood(b"HTTP/1.1 200 OK\r\nX: a\r\n", b" folded\r\n"), id="folded lines"),
        pytest.param(Flood(b"HTTP/1.1 200 OK\r\nX: a\r\n", b" " + b"x" * 60_000 + b"\r\n"), id="long folded lines"),
        pytest.param(Flood(b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"), id="headers"),
        pytest.param(Flood(b"HTTP/1.1 200 OK\r\nX: ", b"x"), id="one header"),
        pytest.param(Flood(b"HTTP/1.1 ", b"2"), id="a status line"),
        pytest.param(Flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), id="informational replies"),
    ],
)
async def test_headers_that_never_end_are_soon_given_up(flood: Flood, pace: Pace) -> None:
    """However a peer writes headers for ever, folded ones too, little of it is read."""
    with Server() as server:
        server.on("POST", flood)
        with pytest.raises(HttpClientError) as caught:
            await asyncio.wait_for(start(server.url), PROMPT)
        assert caught.value.may_have_started
        await eventually(lambda: server.open_connections == 0)
        assert flood.sent < 32 << 20  # and most of that lies in the buffers of sockets


async def test_headers_count_up_to_256_kib(server: Server, pace: Pace) -> None:
    """Many long headers are read while they stay under the limit, and end the request beyond it."""
    fits = {f"X-{number}": "x" * 6000 for number in range(40)}
    server.on("POST", reply(200, {"id": ACTION_ID}, fits), reply(200, {"id": ACTION_ID}, {**fits, "Y": "y" * 30_000}))
    assert await start(server.url) == ACTION_ID
    with pytest.raises(HttpClientError, match="headers of over 256 KiB") as caught:
        await start(server.url)
    assert caught.value.may_have_started


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("coding", "compress"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("identity", bytes),
    ],
)
async def test_a_compressed_reply_is_read(
    coding: str, compress: Callable[[bytes], bytes], server: Server, pace: Pace
) -> None:
    """Gateways compress what nobody asked them to compress; the connection is kept as ever."""
    headers = {"Content-Encoding": coding}
    server.on("POST", reply(200, compress(b'{"id": "%s"}' % ACTION_ID.encode()), headers))
    server.on("GET", reply(200, compress(b'{"status": "COMPLETED", "result": "zip"}'), headers))
    assert await execute(server.url) == "zip"
    assert (server.count("POST"), server.count("GET"), server.connections) == (1, 1, 1)


async def test_a_compressed_refusal_is_read(pace: Pace) -> None:
    """The reason in a compressed error is shown."""
    with Server() as server:
        body = gzip.compress(b'{"detail": "no such action"}')
        server.on("POST", reply(422, body, {"Content-Encoding": "gzip"}))
        with pytest.raises(HttpClientError, match=r"HTTP 422 .*no such action"):
            await start(server.url)


_ZIPPED = gzip.compress(b'{"id": "act_999", "status": "COMPLETED", "result": "of another action"}')


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        pytest.param("gzip", _ZIPPED[:-9], id="cut short"),
        pytest.param("gzip", _ZIPPED[:-8] + bytes(8), id="wrong checksum"),
        pytest.param("gzip", b'{"id": "act_999"}', id="not compressed"),
        pytest.param("deflate", b"\xff" * 20, id="garbage"),
    ],
)
async def test_a_broken_compressed_reply_is_no_reply(coding: str, body: bytes, pace: Pace) -> None:
    """What cannot be decompressed is a broken reply: a start's fate is unknown, and a poll asks again."""
    broken = reply(200, body, {"Content-Encoding": coding})
    with Server() as server:
        server.on("GET", broken)
        assert await execute(server.url) == RESULT
        server.on("POST", broken)
        with pytest.raises(HttpClientError, match=f"broken {coding}") as caught:
            await start(server.url)
        assert caught.value.may_have_started
        assert (server.count("POST"), server.count("GET")) == (2, 2)


async def test_a_small_reply_does_not_grow_without_limit(pace: Pace) -> None:
    """The limit of 64 MiB holds for what is decompressed, too, and a result that is over it is not asked for again."""
    compressor = zlib.compressobj(1, wbits=zlib.MAX_WBITS + 16)
    mebibyte = b" " * (1 << 20)
    bomb = b"".join([*(compressor.compress(mebibyte) for _ in range(65)), compressor.flush()])
    assert len(bomb) < 1 << 20
    with Server() as server:
        server.always("GET", reply(200, bomb, {"Content-Encoding": "gzip"}))
        with pytest.raises(HttpClientError, match="over 64 MiB") as caught:
            await execute(server.url)
        assert caught.value.action_id == ACTION_ID
        assert server.count("GET") == 1


# --- replies that come early, and late --------------------------------------------------------------------------------


async def test_a_refusal_of_a_body_that_is_too_large_arrives(server: Server, pace: Pace) -> None:
    """A server that refuses 20 MB before it has read them, and hangs up, has refused them."""

    def refuse(wire: Wire) -> bool:
        proceed(wire)
        wire.socket.recv(4096)
        wire.send(http_reply(413, {"detail": "at most 1 MB"}, {"Connection": "close"}))
        return False

    server.on(CONNECT, refuse)
    with pytest.raises(HttpClientError, match=r"HTTP 413 .*at most 1 MB") as caught:
        await start(server.url, MANY_MB)
    assert caught.value.status_code == 413
    assert not caught.value.may_have_started
    assert server.connections == 1


async def test_a_refusal_while_the_body_goes_on_ends_the_request(server: Server, pace: Pace) -> None:
    """A server that refuses 20 MB and keeps the connection open is not sent the rest, nor another request."""

    def refuse(wire: Wire) -> bool:
        proceed(wire)
        wire.socket.recv(4096)
        wire.send(http_reply(413, {"detail": "at most 1 MB"}))
        wire.server.stopping.wait(0.2)
        wire.wait_for_end()
        return False

    server.on(CONNECT, refuse)
    with pytest.raises(HttpClientError, match="HTTP 413") as caught:
        await start(server.url, MANY_MB)
    assert not caught.value.may_have_started
    await eventually(lambda: server.open_connections == 0)
    assert await start(server.url) == ACTION_ID
    assert server.connections == 2


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_reply_that_came_while_the_loop_was_blocked_is_read(method: str, server: Server, pace: Pace) -> None:
    """A deadline that passes while the application blocks the event loop costs nothing that has come meanwhile."""
    await execute(server.url)  # so that everything is imported
    done = server.count(method)
    answer = {"id": ACTION_ID, "status": "COMPLETED", "result": RESULT}
    server.always(method, reply(200, answer, delay=0.2))
    pace.hurry(method, 1, 0.4)
    call: Any = start(server.url) if method == "POST" else handle_at(server.url).result()
    task = asyncio.ensure_future(call)
    await eventually(lambda: server.count(method) == done + 1)
    time.sleep(0.6)
    assert await task == (ACTION_ID if method == "POST" else RESULT)
    assert server.count(method) == done + 1


# --- addresses --------------------------------------------------------------------------------------------------------


def resolve_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Give every host these ports of 127.0.0.1 as its addresses."""
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)


@pytest.mark.parametrize("dead", [1, 2, 3])
async def test_dead_addresses_cost_a_moment(dead: int, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that drop packets are not waited for before the next one is tried."""
    with Server() as server, hanging_port() as port:
        resolve_to(monkeypatch, *[port] * dead, server.port)
        assert await asyncio.wait_for(execute("http://platform.test"), PROMPT) == RESULT
        assert (server.count("POST"), server.connections) == (1, 1)


async def test_an_attempt_goes_on_where_there_is_no_socket_for_another(
    pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors that run out at the second address do not end the attempt at the first."""
    monkeypatch.setattr(connections, "ATTEMPT_DELAY", 0.02)
    really_begin = connections._begin_to_connect
    begun: list[Any] = []

    def begin(address: Any) -> socket.socket:
        begun.append(address)
        if len(begun) > 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return really_begin(address)

    really_until_ready = hops.Hops.until_ready

    async def until_ready(self: hops.Hops, *sockets: socket.socket, events: int, **kwargs: Any) -> bool:
        if events == hops.WRITE and not begun[1:]:
            return False  # the first one takes its time
        return await really_until_ready(self, *sockets, events=events, **kwargs)

    monkeypatch.setattr(connections, "_begin_to_connect", begin)
    monkeypatch.setattr(hops.Hops, "until_ready", until_ready)
    monkeypatch.setattr(
        connections, "is_ready", lambda sockets, events: len(begun) > 1 and hops.is_ready(sockets, events)
    )
    with Server() as server:
        resolve_to(monkeypatch, server.port, server.port)
        assert await start("http://platform.test") == ACTION_ID


async def test_a_slow_address_may_still_answer(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address goes on being tried while later ones fail."""
    monkeypatch.setattr(connections, "ATTEMPT_DELAY", 0.05)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [stack.enter_context(socket.socket()) for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        resolve_to(monkeypatch, listener.getsockname()[1], stack.enter_context(hanging_port()))
        task = asyncio.ensure_future(start("http://platform.test"))
        await asyncio.sleep(0.3)
        for filler in fillers:
            filler.close()

        def answer() -> None:
            while True:  # first come the fillers
                sock, _ = listener.accept()
                with sock:
                    if sock.recv(65536):
                        sock.sendall(http_reply(200, {"id": ACTION_ID}))
                        return

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        assert await asyncio.wait_for(task, 9.0) == ACTION_ID
        thread.join()


async def test_many_dead_addresses_are_given_up_in_time(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many addresses a host has, no more of them are tried than the time to connect allows."""
    monkeypatch.setattr(connections, "ATTEMPT_DELAY", 0.02)
    monkeypatch.setattr(connections, "CONNECT_TIMEOUT", 0.1)
    tried = []
    really_begin = connections._begin_to_connect

    def begin(address: Any) -> socket.socket:
        tried.append(address)
        return really_begin(address)

    monkeypatch.setattr(connections, "_begin_to_connect", begin)
    with hanging_port() as port:
        resolve_to(monkeypatch, *[port] * 200)
        outcome = await http_client.send(SdkConfig("http://platform.test", TOKEN), Request("GET", "/"), 30.0)
    assert isinstance(outcome, Failure)
    assert "timed out" in outcome.message
    assert len(tried) < 20


def test_address_families_take_turns() -> None:
    """The families alternate, in the order in which the first of each came (RFC 8305, 4)."""
    v6, v4 = socket.AF_INET6, socket.AF_INET
    addresses = [(v6, 1), (v6, 2), (v6, 3), (v4, 4), (v4, 5)]
    assert list(connections._interleaved(addresses)) == [(v6, 1), (v4, 4), (v6, 2), (v4, 5), (v6, 3)]
    assert list(connections._interleaved([(v4, 1), (v4, 2), (v6, 3)])) == [(v4, 1), (v6, 3), (v4, 2)]
    assert list(connections._interleaved([])) == []


# --- what runs out ----------------------------------------------------------------------------------------------------


async def test_authorities_that_come_late_are_read(
    ca: Authority, localhost: Path, pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose first request came before the CA file existed recovers by itself."""
    path = tmp_path / "ca.pem"
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with Server(server_context(localhost)) as server:
        with pytest.raises(HttpClientError, match="which does not exist"):
            await start(server.url)
        path.write_bytes(ca.file.read_bytes())
        assert await execute(server.url) == RESULT
        assert server.count("POST") == 1


def run_script(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        cwd=ROOT,
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

IDLE_GIVE_WAY = (
    OUT_OF_DESCRIPTORS
    + """
async def main(first, second, pause):
    await asyncio.gather(*(start(first) for _ in range(15)))
    leave(0)
    await asyncio.sleep(float(pause))
    print(await asyncio.gather(*(start(second) for _ in range(10))))
asyncio.run(main(*sys.argv[1:]))
"""
)


@posix_only
@pytest.mark.parametrize("pause", ["0", "1.1"])
def test_idle_connections_give_way_when_descriptors_run_out(pause: str) -> None:
    """Where no descriptor is left, idle connections are closed for starts that may not use them."""
    with Server() as first, Server() as other:
        for each in (first, other):
            each.always("POST", reply(200, {"id": ACTION_ID}, delay=0.1))
        second = other if pause == "0" else first
        done = run_script(IDLE_GIVE_WAY, first.url, second.url, pause)
        assert (done.stdout, done.stderr) == (f"{[ACTION_ID] * 10}\n", "")
        assert first.count("POST") + other.count("POST") == 25


NO_DESCRIPTOR_AT_ALL = (
    OUT_OF_DESCRIPTORS
    + """
async def main(url):
    await start(url)
    leave(0)
    try:
        await start(url)
    except HttpClientError as exc:
        print(exc.may_have_started, exc)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(await start(url))
asyncio.run(main(*sys.argv[1:]))
"""
)


@posix_only
def test_a_start_that_no_descriptor_is_left_for_was_not_sent() -> None:
    """Where nothing gives way, the error says what ran out, and that nothing has started."""
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, {"Connection": "close"}))
        done = run_script(NO_DESCRIPTOR_AT_ALL, server.url)
        first, second = done.stdout.splitlines()
        assert first.startswith("False starting the action: cannot connect to 127.0.0.1:")
        assert "Too many open files" in first
        assert second == ACTION_ID
        assert server.count("POST") == 2


NO_DESCRIPTOR_FOR_TLS = (
    OUT_OF_DESCRIPTORS
    + """
async def main(plain, secure):
    await start(plain)
    await asyncio.sleep(1.1)  # so that no start takes that connection
    import http.client, ssl, urllib.request, zamp_sdk.action_executor.exchange
    leave(1)
    try:
        print(await start(secure))
    except HttpClientError as exc:
        print(exc.may_have_started)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(await start(secure))
asyncio.run(main(*sys.argv[1:]))
"""
)


@posix_only
def test_a_first_tls_connection_without_descriptors_spoils_no_later_one(tls: ssl.SSLContext) -> None:
    """The authorities that could not be read for want of a descriptor are read when there is one."""
    with Server() as plain, Server(tls) as secure:
        done = run_script(NO_DESCRIPTOR_FOR_TLS, plain.url, secure.url, SSL_CERT_FILE=os.environ["SSL_CERT_FILE"])
        assert (done.stdout.splitlines()[-1:], done.stderr) == ([ACTION_ID], "")
        assert secure.count("POST") <= 2


@contextlib.contextmanager
def no_more_threads(monkeypatch: pytest.MonkeyPatch, times: int) -> Iterator[None]:
    """Keep an event loop's one worker busy, and fail to make it another one so many times."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(8))
    really_start = threading.Thread.start
    failures = iter(range(times))

    def start_thread(thread: threading.Thread) -> None:
        if "asyncio" in thread.name or "ThreadPoolExecutor" in thread.name:
            for _ in failures:
                raise RuntimeError("can't start new thread")
        really_start(thread)

    release, busy = threading.Event(), threading.Event()

    def occupy() -> None:
        busy.set()
        release.wait(10)

    loop.run_in_executor(None, occupy)
    assert busy.wait(10)
    monkeypatch.setattr(threading.Thread, "start", start_thread)
    try:
        yield
        assert next(failures, None) is None
    finally:
        monkeypatch.undo()
        release.set()


async def test_a_poll_survives_that_no_thread_can_be_had(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An action that runs is not lost because the machine gives no more threads for a while."""
    with Server() as server:
        handle = await ActionExecutor.start("act", {}, base_url=server.url, auth_token=TOKEN)
        with no_more_threads(monkeypatch, 3):
            assert await handle.result() == RESULT
        assert (server.count("POST"), server.count("GET")) == (1, 1)


async def test_a_start_that_found_no_thread_is_tried_again(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that no thread could send was not sent, and is sent once when there is one."""
    with Server() as server:
        with no_more_threads(monkeypatch, 2):
            assert await start(server.url) == ACTION_ID
        await asyncio.to_thread(threading.get_ident)  # whatever was queued before has been done
        assert server.count("POST") == 1


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_an_executor_that_throws_work_away_cancels_no_task(
    method: str, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An executor that the application shuts down with what is queued in it is an error, not a cancellation."""
    monkeypatch.setattr(lifecycle, "POLL_FAILURE_WINDOW", 0.05)
    executor = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(executor)
    release = threading.Event()
    with Server() as server:
        await execute(server.url)
        executor.submit(release.wait, 10)
        call: Any = start(server.url) if method == "POST" else handle_at(server.url).result()
        task = asyncio.ensure_future(call)
        try:
            await asyncio.sleep(0.05)
            executor.shutdown(wait=False, cancel_futures=True)
            with pytest.raises(HttpClientError, match="no thread") as caught:
                await asyncio.wait_for(task, PROMPT)
        finally:
            release.set()
        assert not caught.value.may_have_started
        assert (server.count("POST"), server.count("GET")) == (1, 1)
    assert room_is_free()


class Meddling(ThreadPoolExecutor):
    """An executor that queues the work, and fails all the same."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        super().submit(*args, **kwargs)
        time.sleep(0.05)  # it has begun by now
        raise RuntimeError("instrumentation failed")


async def cancel_hops() -> None:
    """Cancel whatever task waits for a thread."""
    while True:
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__name__", "") == "to_thread":
                task.cancel()
        await asyncio.sleep(0)


@pytest.mark.parametrize("meddler", ["executor", "task"])
async def test_what_a_thread_has_done_counts_whatever_became_of_its_task(
    meddler: str, server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that was sent is told by the thread that sent it, not by those who wait for the thread."""
    really_open = messages.open_request

    def slowly(*args: Any) -> Any:
        try:
            return really_open(*args)
        finally:
            time.sleep(0.1)

    monkeypatch.setattr(messages, "open_request", slowly)
    assert await start(server.url) == ACTION_ID
    cancelling = None
    if meddler == "executor":
        asyncio.get_running_loop().set_default_executor(Meddling(2))
    else:

        async def when_it_works() -> None:
            await asyncio.sleep(0.05)
            await cancel_hops()

        cancelling = asyncio.ensure_future(when_it_works())
    assert await start(server.url) == ACTION_ID
    assert server.count("POST") == 2
    if cancelling is not None:
        cancelling.cancel()
    assert room_is_free()


# --- event loops ------------------------------------------------------------------------------------------------------


class Watchless(asyncio.SelectorEventLoop):
    """An event loop that watches no sockets, as Windows' proactor."""

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]  # the stub's is generic, as 3.9 cannot write it
        raise NotImplementedError

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]  # the stub's is generic, as 3.9 cannot write it
        raise NotImplementedError

    def remove_reader(self, fd: Any) -> bool:
        raise NotImplementedError

    def remove_writer(self, fd: Any) -> bool:
        raise NotImplementedError


def run_on(loop: asyncio.AbstractEventLoop, main: Any) -> Any:
    """Do what asyncio.run does, on this loop."""
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def test_a_loop_that_watches_no_sockets_will_do(server: Server, pace: Pace) -> None:
    """Where a loop has no add_reader, threads wait for the sockets, and all the rest is the same."""
    server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.3))
    server.on("GET", running, running)
    text = "x" * 3_000_000

    async def main() -> Any:
        return await asyncio.gather(execute(server.url), execute(server.url, text))

    assert run_on(Watchless(), main()) == [RESULT] * 2
    assert (server.count("POST"), server.count("GET")) == (2, 4)


def test_a_loop_that_watches_no_sockets_cancels_soon(server: Server, pace: Pace) -> None:
    """Where a thread waits for a socket, a cancellation does not wait for the peer."""
    server.always("POST", silent)

    async def main() -> None:
        task = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 1)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: room_is_free() and server.open_connections == 0)

    began = time.monotonic()
    run_on(Watchless(), main())
    assert time.monotonic() - began < PROMPT


def test_a_loop_that_watches_no_sockets_finds_a_late_reply(server: Server, pace: Pace) -> None:
    """A reply that has come is read there, too, although every thread is busy until the deadline."""
    server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.3))
    release = threading.Event()

    async def main() -> str:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        await start(server.url)  # imports
        pace.hurry("POST", 1, 1.0)
        task = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 2)
        asyncio.get_running_loop().run_in_executor(None, release.wait, 10)
        try:
            return await task
        finally:
            release.set()

    assert run_on(Watchless(), main()) == ACTION_ID


def test_a_loop_that_watches_no_sockets_keeps_deadlines(server: Server, pace: Pace) -> None:
    """Where threads wait for the sockets, a request's time is over when it is over."""
    server.always("POST", silent)
    pace.hurry("POST", 1, 0.3)
    with pytest.raises(HttpClientError, match="timed out") as caught:
        run_on(Watchless(), start(server.url))
    assert caught.value.may_have_started
    assert server.count("POST") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_uvloop_will_do(server: Server, pace: Pace) -> None:
    """Uvloop runs actions, large ones, hanging ones and cancelled ones as asyncio's own loop does."""
    uvloop = pytest.importorskip("uvloop")
    text = "x" * 3_000_000
    server.on("GET", running, running)

    async def main() -> None:
        assert await asyncio.gather(*(execute(server.url, text) for _ in range(5))) == [RESULT] * 5
        server.always("POST", silent)
        posts = server.count("POST")
        task = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == posts + 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pace.hurry("POST", 1, 0.1)
        with pytest.raises(HttpClientError, match="timed out"):
            await start(server.url)

    run_on(uvloop.new_event_loop(), main())
    assert room_is_free()


def test_32_event_loops_in_32_threads_all_get_results(pace: Pace) -> None:
    """Event loops in many threads share the connections, and each action runs once."""

    async def several(url: str) -> list[Any]:
        return await asyncio.gather(*(execute(url) for _ in range(5)))

    with Server() as server, ThreadPoolExecutor(32) as threads:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.01))
        assert list(threads.map(lambda _: asyncio.run(several(server.url)), range(32))) == [[RESULT] * 5] * 32
        assert (server.count("POST"), server.count("GET")) == (160, 160)
        assert server.most_open_connections <= 64
    assert room_is_free()


async def test_what_a_loop_fails_to_watch_it_watches_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a loop can watch a socket one way only (a full epoll, say), nothing stays registered."""
    loop = asyncio.get_running_loop()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "add_writer", fail)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(OSError, match="No space"):
            await hops.Hops(1.0).until_ready(ours, events=hops.READ + hops.WRITE)
        assert not loop.remove_reader(ours)


def test_room_that_comes_free_while_a_request_joins_the_line_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may end forgotten requests at any moment, also between a look for room and the line."""
    shared = pool.shared_pool()
    monkeypatch.setattr(pool, "MAX_CONNECTIONS", 1)

    def future() -> Any:
        shared.leave()
        return concurrent.futures.Future()

    async def main() -> None:
        await shared.enter()
        with monkeypatch.context() as patch:
            patch.setattr(pool, "Future", future)
            await asyncio.wait_for(shared.enter(), PROMPT)
        shared.leave()

    asyncio.run(main())
    assert room_is_free()


async def test_a_socket_that_fails_to_close_keeps_no_room(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room comes back whatever happens to the connection."""

    def fail(self: connections.Connection) -> None:
        really_close(self)
        raise OSError(errno.EIO, "Input/output error")

    really_close = connections.Connection.close
    monkeypatch.setattr(connections.Connection, "close", fail)
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, {"Connection": "close"}))
        with contextlib.suppress(OSError):
            await start(server.url)
    await eventually(room_is_free)


def test_nobody_waits_behind_a_loop_that_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is not given to a request whose loop was closed over it, although its task is still there."""
    monkeypatch.setattr(pool, "MAX_CONNECTIONS", 1)
    shared = pool.shared_pool()
    closed = asyncio.new_event_loop()
    closed.run_until_complete(shared.enter())
    forgotten = closed.create_task(shared.enter())
    closed.run_until_complete(asyncio.sleep(0))
    closed.close()

    async def wait_behind() -> None:
        waiting = asyncio.ensure_future(shared.enter())
        await asyncio.sleep(0)
        shared.leave()
        await asyncio.wait_for(waiting, PROMPT)
        shared.leave()

    asyncio.run(wait_behind())
    assert shared.rooms_taken == 0
    assert not forgotten.done()
    forgotten._log_destroy_pending = False  # type: ignore[attr-defined]  # its loop cannot end it any more


async def test_idle_connections_close_by_themselves(
    server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to send another request for what is idle too long to be closed."""
    monkeypatch.setattr(pool, "MAX_IDLE", 0.1)
    server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.02))
    await asyncio.gather(*(execute(server.url) for _ in range(5)))
    assert server.open_connections > 1
    await eventually(lambda: server.open_connections == 0)
    assert pool.shared_pool().connections == 0


def test_what_one_loop_left_idle_another_one_closes(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that has ended closes nothing any more; the next one that uses the transport does."""
    monkeypatch.setattr(pool, "MAX_IDLE", 0.2)
    with Server() as first, Server() as second:
        asyncio.run(execute(first.url))

        async def main() -> None:
            await execute(second.url)
            await eventually(lambda: first.open_connections + second.open_connections == 0)

        asyncio.run(main())


# --- proxies ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("slow_call", [1, 2])
async def test_slow_proxy_settings_keep_the_deadline(
    slow_call: int, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system's settings make urllib.request look names up, nothing is sent after the deadline."""
    calls: list[str] = []
    release = threading.Event()

    def bypass(host: str) -> bool:
        calls.append(host)
        if len(calls) == slow_call:
            release.wait(10.0 if slow_call == 1 else 1.0)
        return True

    monkeypatch.setattr(urllib.request, "proxy_bypass", bypass)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.test:3128")
    with Server() as server:
        send = http_client.send(SdkConfig(server.url, TOKEN), Request("GET", "/actions/a"), 0.3)
        outcome = await asyncio.wait_for(send, PROMPT)
        release.set()
        assert isinstance(outcome, Failure)
        assert "timed out" in outcome.message
        assert not outcome.sent
        await eventually(room_is_free)
        assert server.requests == []


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


@pytest.mark.parametrize("before", ["", "*"])
async def test_no_proxy_that_changes_between_requests_does_no_harm(
    before: str, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where NO_PROXY changes, the next action goes the new way, and is sent once."""
    after = "*" if before == "" else ""
    with Server() as server, Server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", before)
        assert await execute(server.url) == RESULT
        monkeypatch.setenv("NO_PROXY", after)
        assert await execute(server.url) == RESULT
        for each in (server, proxy):
            assert [request.method for request in each.requests] == ["POST", "GET"]
            is_proxy = each is proxy
            assert [request.target.startswith("http://") for request in each.requests] == [is_proxy] * 2


async def test_no_proxy_that_changes_behind_a_tunnel_does_no_harm(
    pace: Pace, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was meant for the platform goes to the platform, through the proxy or past it."""
    with Server(tls) as platform, Server() as proxy:
        proxy.always("CONNECT", tunnel(platform.port))
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert await execute(platform.url) == RESULT
        monkeypatch.setenv("NO_PROXY", "*")
        assert await execute(platform.url) == RESULT
        monkeypatch.setenv("NO_PROXY", "")
        assert await execute(platform.url) == RESULT
        assert (platform.count("POST"), platform.count("GET")) == (3, 3)
        assert all(request.target.startswith("/actions") for request in platform.requests)
        assert {request.method for request in proxy.requests} == {"CONNECT"}


# --- tracing agents ---------------------------------------------------------------------------------------------------


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


# --- replies in pieces ------------------------------------------------------------------------------------------------

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
REPLIES = {
    "Content-Length, informational replies first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + http_reply(200, {"id": ACTION_ID})
    ),
    "chunks, an extension, a blank line inside, trailers": (
        CHUNKED + b'5;a=b\r\n{"id"\r\n5\r\n:\r\n\r\n\r\na\r\n"action-1"\r\n1\r\n}\r\n0\r\nA: b\r\nC: d\r\n\r\n'
    ),
    "no chunk": CHUNKED.replace(b"200 OK", b"500 No") + b"0\r\n\r\n",
    "no body": b"HTTP/1.1 204 No Content\r\n\r\n",
}


def read_in_pieces(pieces: list[bytes]) -> Reply:
    """Return the reply that these pieces make, of which only the last completes it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        connection = connections.Connection(ours, connections.Route(is_tls=False, authority="platform.test"))
        reader = messages.ReplyReader(connection, "POST")
        for piece in pieces[:-1]:
            theirs.sendall(piece)
            assert reader.proceed() is reader
        theirs.sendall(pieces[-1])
        found = reader.proceed()
        assert isinstance(found, Reply)
        assert not connection.has_leftovers
        assert connection.is_reusable
        return found


@pytest.mark.parametrize("data", REPLIES.values(), ids=REPLIES)
def test_a_reply_may_be_cut_anywhere(data: bytes) -> None:
    """Whichever byte a reply is cut at, and if it comes byte by byte, it is read as if it had come in one piece."""
    whole = read_in_pieces([data])
    for cut in range(1, len(data)):
        assert read_in_pieces([data[:cut], data[cut:]]) == whole
    assert read_in_pieces([bytes([byte]) for byte in data]) == whole


async def test_what_cannot_be_sent_is_told_at_once(server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A send that fails, for want of buffers say, is not waited for as if a reply could come."""
    assert await start(server.url) == ACTION_ID

    class Full:
        def __init__(self, sock: socket.socket) -> None:
            self._sock = sock

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

        def send(self, data: Any) -> int:
            raise OSError(errno.ENOBUFS, "No buffer space available")

    really_open = messages.open_request

    def open_request(connection: Any, *args: Any) -> Any:
        connection.sock = Full(connection.sock)
        return really_open(connection, *args)

    with monkeypatch.context() as patch:
        patch.setattr(messages, "open_request", open_request)
        config = SdkConfig(server.url, TOKEN)
        outcome = await asyncio.wait_for(http_client.send(config, Request("GET", "/actions/a"), 30.0), PROMPT)
    assert isinstance(outcome, Failure)
    assert not outcome.sent
    assert "No buffer space" in outcome.message


class Searched(bytearray):
    """Bytes that count how many of them are searched."""

    searched = 0

    def find(self, sub: Any, start: Any = 0, end: Any = None) -> int:
        found = super().find(sub, start, len(self) if end is None else end)
        self.searched += (len(self) if found < 0 else found) - start
        return found


def test_a_body_in_many_chunks_is_searched_once() -> None:
    """The end of a chunked body is looked for in what is new, however many pieces it comes in."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        connection = connections.Connection(ours, connections.Route(is_tls=False, authority="platform.test"))
        connection.incoming = incoming = Searched()
        reader = messages.ReplyReader(connection, "GET")
        body = b'{"id": "' + b"x" * 1_000_000 + b'"}'
        theirs.sendall(CHUNKED)
        for start in range(0, len(body), 10_000):
            piece = body[start : start + 10_000]
            theirs.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            assert reader.proceed() is reader
        assert incoming.searched < 10 * len(body)
        theirs.sendall(b"0\r\n\r\n")
        assert isinstance(reader.proceed(), Reply)


# --- mistakes of this package -----------------------------------------------------------------------------------------


def bug(*_: Any, **__: Any) -> Any:
    raise TypeError("a bug")


@pytest.mark.parametrize(
    "place",
    [
        pytest.param((exchange, "_find_route"), id="exchange"),
        pytest.param((messages, "open_request"), id="hop"),
        pytest.param((messages.ReplyReader, "proceed"), id="hop that reads"),
        pytest.param((messages._Source, "readline"), id="hop in http.client"),
        pytest.param((messages._HTTPConnection, "request"), id="hop in urllib.request"),
        pytest.param((connections, "_begin_to_connect"), id="dial"),
        pytest.param((connections, "_interleaved"), id="dial after the lookup"),
        pytest.param((connections.Connection, "flush"), id="connection"),
    ],
)
@pytest.mark.parametrize("delay", [0.0, 0.05])
async def test_a_mistake_of_ours_looks_like_one(
    place: tuple[Any, str], delay: float, server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TypeError in the transport is not translated: it comes out as it is, and leaves nothing behind."""
    server.always("POST", reply(200, {"id": ACTION_ID}, delay=delay))
    with monkeypatch.context() as patch:
        patch.setattr(*place, bug)
        with pytest.raises(TypeError, match="a bug") as caught:
            await start(server.url)
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "bug"
    await eventually(lambda: room_is_free() and server.open_connections == 0)
    assert pool.shared_pool().connections == 0
    assert await execute(server.url) == RESULT
