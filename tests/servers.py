"""Servers on 127.0.0.1 that follow a script, for tests: well-behaved ones, faulty ones, proxies, TLS.

A ``Server`` is a context manager. Each connection has a thread of its own; h11 reads the requests, so one that breaks
RFC 9112 fails the test; what goes back is an *act*: a function that is given the ``Wire`` (the connection) and says
whether the connection goes on. ``on`` scripts what happens the next few times, ``always`` what happens otherwise.
Requests are counted here, where they arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import ssl
import struct
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

import h11

TOKEN = "zamp-7f3a9c-token-that-must-never-be-shown"
ACTION_ID = "action-1"
RESULT = {"answer": 42}

CONNECT = "connection"  # the event, beside the names of methods, that a script can speak of
PATIENCE = 10.0  # s after which a server stops waiting for what will not come


class Received(NamedTuple):
    """A request as it arrived; header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Wire:
    """One accepted connection, as an act sees it."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.socket = sock
        self.request: Received | None = None
        self._unread = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def wait_for_end(self) -> None:
        """Read and forget until the peer closes or the server stops."""
        while self.socket.recv(65536):
            pass

    def next_request(self) -> Received | None:
        """Read one request; None at the end of the connection."""
        parser = h11.Connection(h11.SERVER)
        if self._unread:
            parser.receive_data(self._unread)
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                data = self.socket.recv(65536)
                if not data and head is not None:
                    return None  # given up half-way
                parser.receive_data(data)
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                self._unread = parser.trailing_data[0]
                headers = {name.decode().lower(): value.decode() for name, value in head.headers}
                return Received(head.method.decode(), head.target.decode(), headers, bytes(body))
            else:
                return None


Act = Callable[[Wire], bool]


# --- acts -------------------------------------------------------------------------------------------------------------


def http_reply(status: int, body: Any = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a reply; a body that is not bytes is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + content


def reply(status: int = 200, body: Any = b"", headers: Mapping[str, str] | None = None, delay: float = 0.0) -> Act:
    """Answer, and keep the connection unless a header says otherwise."""
    data = http_reply(status, body, headers)

    def act(wire: Wire) -> bool:
        time.sleep(delay)
        wire.send(data)
        return (headers or {}).get("Connection") != "close"

    return act


def raw(data: bytes) -> Act:
    """Send these bytes and close the connection."""

    def act(wire: Wire) -> bool:
        wire.send(data)
        return False

    return act


def raw_but_open(data: bytes) -> Act:
    """Send these bytes, and read on."""

    def act(wire: Wire) -> bool:
        wire.send(data)
        return True

    return act


def stall_after(data: bytes) -> Act:
    """Send these bytes, and no more."""

    def act(wire: Wire) -> bool:
        wire.send(data)
        return silent(wire)

    return act


def then_close(act: Act) -> Act:
    """Answer as if the connection stayed, and close it."""

    def closing(wire: Wire) -> bool:
        act(wire)
        return False

    return closing


def drip(data: bytes, at_once: int = 0) -> Act:
    """Send the first bytes together and each one after them on its own, every 20 ms."""

    def act(wire: Wire) -> bool:
        wire.send(data[:at_once])
        for index in range(at_once, len(data)):
            if wire.server.stopping.wait(0.02):
                break
            wire.send(data[index : index + 1])
        return False

    return act


def reset(wire: Wire) -> bool:
    """Send a TCP reset."""
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def hang_up(wire: Wire) -> bool:
    """Close the connection without a word."""
    return False


def silent(wire: Wire) -> bool:
    """Say nothing for as long as the peer waits."""
    wire.wait_for_end()
    return False


def deaf(wire: Wire) -> bool:
    """Do not even read."""
    wire.server.stopping.wait(PATIENCE)
    return False


def after_hello(act: Act) -> Act:
    """Read what comes first (a TLS ClientHello) before the act."""

    def with_hello(wire: Wire) -> bool:
        wire.socket.recv(65536)
        return act(wire)

    return with_hello


def proceed(wire: Wire) -> bool:
    """Do what the server does by itself at a new connection: the TLS handshake, if it has a certificate."""
    context = wire.server.tls
    return True if context is None else handshake(context)(wire)


def handshake(context: ssl.SSLContext) -> Act:
    """Do a TLS handshake with this certificate."""

    def act(wire: Wire) -> bool:
        wire.socket = sock = context.wrap_socket(wire.socket, server_side=True, do_handshake_on_connect=False)
        wire.server.replace_socket(wire)
        sock.do_handshake()
        return True

    return act


def tunnel(port: int) -> Act:
    """Be a CONNECT proxy whose every host is 127.0.0.1 at this port."""

    def act(wire: Wire) -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as upstream:
            wire.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            peers = {wire.socket: upstream, upstream: wire.socket}
            while True:
                for sock in select.select(list(peers), [], [], PATIENCE)[0]:
                    data = sock.recv(65536)
                    if not data:
                        return False
                    peers[sock].sendall(data)

    return act


started = reply(200, {"id": ACTION_ID})


def started_after(event: threading.Event) -> Act:
    """Tell of a start when the event is set."""

    def act(wire: Wire) -> bool:
        assert event.wait(PATIENCE)
        return started(wire)

    return act


completed = reply(200, {"status": "COMPLETED", "result": RESULT})
running = reply(200, {"status": "RUNNING"})


# --- the server -------------------------------------------------------------------------------------------------------


class Server:
    """A platform, unless it is told otherwise: a POST starts an action, and a GET says that it has completed."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.requests: list[Received] = []
        self.connections = 0
        self.open_connections = 0
        self.most_open_connections = 0
        self.stopping = threading.Event()
        self._always: dict[str, Act] = {CONNECT: proceed, "POST": started, "GET": completed, "CONNECT": reply(405)}
        self._next: dict[str, deque[Act]] = {}
        self._lock = threading.Lock()
        self._wires: dict[Wire, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._violations: list[Exception] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"

    def on(self, event: str, *acts: Act) -> None:
        """Script what the next requests of this method, or the next connections, get."""
        self._next[event] = deque(acts)

    def always(self, event: str, act: Act) -> None:
        """Say what those get that the script does not speak of."""
        self._always[event] = act

    def count(self, method: str) -> int:
        """Say how many requests of this method have arrived."""
        with self._lock:
            return sum(request.method == method for request in self.requests)

    def __enter__(self) -> Server:  # noqa: PYI034  # typing.Self came with 3.11
        self._spawn(self._accept)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stopping.set()
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), timeout=1).close()  # wakes accept()
        with self._lock:
            for sock in self._wires.values():
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()
        assert not any(thread.is_alive() for thread in self._threads), "a server's thread did not end"
        if kind is None:
            assert not self._violations, f"requests that break HTTP: {self._violations}"

    def replace_socket(self, wire: Wire) -> None:
        with self._lock:
            self._wires[wire] = wire.socket

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="server", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            # Or else what is written just before a reset may never leave.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.stopping.is_set():
                sock.close()
                return
            self._spawn(self._serve, Wire(self, sock))

    def _serve(self, wire: Wire) -> None:
        with self._lock:
            self._wires[wire] = wire.socket
            self.connections += 1
            self.open_connections += 1
            self.most_open_connections = max(self.most_open_connections, self.open_connections)
        try:
            # OSError: the peer has gone, which faults provoke.
            with contextlib.suppress(OSError):
                goes_on = self._act(CONNECT)(wire)
                while goes_on:
                    wire.request = request = wire.next_request()
                    if request is None:
                        break
                    with self._lock:
                        self.requests.append(request)
                    goes_on = self._act(request.method)(wire)
        except h11.RemoteProtocolError as exc:
            self._violations.append(exc)
        finally:
            with self._lock:
                self.open_connections -= 1
                del self._wires[wire]
            wire.socket.close()

    def _act(self, event: str) -> Act:
        with self._lock:
            script = self._next.get(event)
            return script.popleft() if script else self._always.get(event, reply(405))


# --- certificates and ports -------------------------------------------------------------------------------------------


def server_context(cert: Path, *, clients: Path | None = None) -> ssl.SSLContext:
    """The TLS side of a server with this certificate; with ``clients`` it wants one of theirs, from this authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # a weak key is for the client to refuse
    context.load_cert_chain(cert)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients)
    return context


def tls_1_1_context(cert: Path) -> ssl.SSLContext:
    """A server that speaks nothing newer than TLS 1.1; raises ssl.SSLError where OpenSSL cannot be one."""
    context = server_context(cert)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # obsolete, which is the point
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def closed_port() -> int:
    """A port at which connections are refused."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def hanging_port() -> Iterator[int]:
    """A port at which connections are neither accepted nor refused, for its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        time.sleep(0.02)
        yield listener.getsockname()[1]


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait in the event loop until the condition holds."""
    for _ in range(int(PATIENCE / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")
