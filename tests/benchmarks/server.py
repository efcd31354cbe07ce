"""The Zamp API for benchmarks: lean enough that the client is what gets measured. Run in a process of its own.

A hand-parsed asyncio.Protocol that keeps connections alive, speaks TLS itself and can delay every byte: the delay
sits below TLS, so the handshakes pay for it too. It checks no input and has no limits; tests use
`zamp_sdk.local_platform` instead.

The one thing it knows about an action is how long it takes: `params = {"seconds": 0.2}`. The result of an action
carries when it ended (`time.monotonic`, which all processes of a machine share) and how many polls it took, so that
a client can tell how late it was told.

Standard input commands it: a line asks for the figures since the last one, as a line of JSON; the end of the input
ends the server.
"""

from __future__ import annotations

import asyncio
import json
import resource
import ssl
import sys
import time
from collections import deque
from typing import Any


class Statistics:
    """What the clients did since the last report."""

    def __init__(self) -> None:
        self.open_connections = 0
        self.reset()

    def reset(self) -> None:
        self.connections = 0
        self.peak_connections = self.open_connections
        self.posts = 0
        self.polls = 0
        self.cpu_at_reset = time.process_time()

    def report(self) -> dict[str, float]:
        return {
            "connections": self.connections,
            "peak_connections": self.peak_connections,
            "posts": self.posts,
            "polls": self.polls,
            "server_cpu": time.process_time() - self.cpu_at_reset,
        }


class Action:
    """An action that is COMPLETED once its time is over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.polls = 0


class Platform:
    """The actions of every port, and their answers."""

    def __init__(self) -> None:
        self.actions: dict[bytes, Action] = {}
        self.statistics = Statistics()

    def answer(self, method: bytes, path: bytes, body: bytes) -> bytes:
        """The JSON text of a reply, or b"" where there is no such action."""
        if method == b"POST":
            self.statistics.posts += 1
            action_id = b"act-%d" % len(self.actions)
            self.actions[action_id] = Action(float(json.loads(body)["params"]["seconds"]))
            return b'{"id": "%b"}' % action_id
        self.statistics.polls += 1
        action_id = path.rpartition(b"/")[2]
        action = self.actions.get(action_id)
        if action is None:
            return b""
        action.polls += 1
        if time.monotonic() < action.end:
            return b'{"id": "%b", "status": "RUNNING", "result": null, "error": null}' % action_id
        result = json.dumps({"end": action.end, "polls": action.polls}).encode()
        return b'{"id": "%b", "status": "COMPLETED", "result": %b, "error": null}' % (action_id, result)


class Connection(asyncio.Protocol):
    """One connection: bytes -> (delay) -> (TLS) -> requests, and the answers back the same way."""

    def __init__(self, platform: Platform, tls: ssl.SSLContext | None, latency: float) -> None:
        self._platform = platform
        self._latency = latency
        self._loop = asyncio.get_running_loop()
        self._arriving: deque[bytes] = deque()
        self._leaving: deque[bytes] = deque()
        self._buffer = b""
        self._tls: ssl.SSLObject | None = None
        if tls is not None:
            self._encrypted_in, self._encrypted_out = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = tls.wrap_bio(self._encrypted_in, self._encrypted_out, server_side=True)
            self._handshaking = True

    # The wire, with its delay.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # The kernel completes TCP's handshake at once. Over a real distance the client may send only after one round
        # trip: what it sends earlier counts as sent then.
        self._connected_at = self._loop.time() + 2 * self._latency
        statistics = self._platform.statistics
        statistics.connections += 1
        statistics.open_connections += 1
        statistics.peak_connections = max(statistics.peak_connections, statistics.open_connections)

    def connection_lost(self, exc: Exception | None) -> None:
        self._platform.statistics.open_connections -= 1

    def data_received(self, data: bytes) -> None:
        if not self._latency:
            self._received(data)
            return
        self._arriving.append(data)
        sent_at = max(self._loop.time(), self._connected_at)
        self._loop.call_at(sent_at + self._latency, self._deliver)

    def _deliver(self) -> None:
        self._received(self._arriving.popleft())

    def _send(self, data: bytes) -> None:
        if not self._latency:
            self._transport.write(data)
            return
        self._leaving.append(data)
        self._loop.call_later(self._latency, self._leave)

    def _leave(self) -> None:
        data = self._leaving.popleft()
        if not self._transport.is_closing():
            self._transport.write(data)

    # TLS.

    def _received(self, data: bytes) -> None:
        if self._tls is None:
            self._send_unless_empty(self._answers(data))
            return
        self._encrypted_in.write(data)
        try:
            if self._handshaking:
                self._tls.do_handshake()
                self._handshaking = False
            while True:
                plain = self._tls.read(65536)
                if not plain:
                    break
                answers = self._answers(plain)
                if answers:
                    self._tls.write(answers)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:  # a client that went away without a word
            self._transport.close()
            return
        self._send_unless_empty(self._encrypted_out.read())

    def _send_unless_empty(self, data: bytes) -> None:
        if data:
            self._send(data)

    # HTTP/1.1, as much of it as well-behaved clients need.

    def _answers(self, data: bytes) -> bytes:
        """The replies to the requests that `data` completes."""
        self._buffer += data
        replies = b""
        while True:
            head, separator, rest = self._buffer.partition(b"\r\n\r\n")
            if not separator:
                return replies
            _, has_body, after = head.lower().partition(b"content-length:")
            length = int(after.partition(b"\r\n")[0]) if has_body else 0
            if len(rest) < length:
                return replies
            self._buffer = rest[length:]
            method, path, _ = head.split(b" ", 2)
            replies += self._reply(method, path, rest[:length])

    def _reply(self, method: bytes, path: bytes, body: bytes) -> bytes:
        answer = self._platform.answer(method, path, body)
        status = b"200 OK" if answer else b"404 Not Found"
        return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
            status,
            len(answer),
            answer,
        )


async def serve(certificate: str, latencies: list[float]) -> None:
    """Listen in plain and in TLS at every latency, say the ports as a line of JSON, and report until the input ends."""
    loop = asyncio.get_running_loop()
    platform = Platform()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    ports: list[dict[str, Any]] = []
    for latency in latencies:
        for tls in (None, context):
            server = await loop.create_server(
                # The defaults bind this iteration's values.
                lambda tls=tls, latency=latency: Connection(platform, tls, latency),  # type: ignore[misc]  # mypy can't infer such defaults
                "127.0.0.1",
                0,
                backlog=4096,
            )
            ports.append({"tls": tls is not None, "latency": latency, "port": server.sockets[0].getsockname()[1]})
    print(json.dumps(ports), flush=True)

    finished = asyncio.Event()

    def command() -> None:
        if not sys.stdin.readline():
            finished.set()
            return
        print(json.dumps(platform.statistics.report()), flush=True)
        platform.statistics.reset()

    loop.add_reader(sys.stdin, command)
    await finished.wait()


if __name__ == "__main__":
    # A client may open a thousand connections and more; macOS refuses "unlimited".
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 65536 if hard_limit == resource.RLIM_INFINITY else min(65536, hard_limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard_limit))
    asyncio.run(serve(sys.argv[1], [float(latency) for latency in sys.argv[2:]]))
