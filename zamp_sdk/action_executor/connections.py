"""The process's connections: dialing, TLS, the pool, and what an event loop holds of a thread that blocks on one.

It needs neither urllib.request nor http.client, so that the first request can dial while those are imported.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import select
import socket
import ssl
import sys
import threading
import time
from typing import Any, Generator, NamedTuple

MAX_SOCKETS = 64  # in the process, idle ones included
MAX_IDLE, MAX_IDLE_FOR_START = 10.0, 1.0  # s; a thawed process sees no FIN
CONNECT_TIMEOUT = 10.0  # s for one address, so that a dead one leaves time for the next
PATIENCE = 0.002  # s that a thread waits for its socket before it leaves the wait to the event loop


class Wait(NamedTuple):
    """What a thread leaves to the event loop: to wait for a socket, or until a time by ``time.monotonic``."""

    fileno: int | None
    for_writing: bool = False
    until: float | None = None


Steps = Generator[Wait, None, None]


class Lifeline:
    """Shutting a socket down wakes whatever blocks on it; closing it never does.

    The lock sees to it that one side, the thread or the loop, cleans up after a request that was cut off.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline  # by time.monotonic()
        self.is_cut: bool = False
        self.is_sent: bool = False  # a byte of the request may have left
        self.patience: float = PATIENCE
        self._lock = threading.Lock()
        self._held: socket.socket | None = None
        self._resting = False

    def remaining(self) -> float:
        """Return the seconds left; raise TimeoutError if there are none, or if the lifeline is cut."""
        remaining = self.deadline - time.monotonic()
        if self.is_cut or remaining <= 0:
            raise TimeoutError("timed out")
        return remaining

    def hold(self, sock: socket.socket | None) -> None:
        """In the thread, before it blocks, maybe on this socket; raises as ``remaining``."""
        with self._lock:
            self.remaining()
            self._held, self._resting = sock, False

    def let_go(self, *, resting: bool) -> bool:
        """In the thread, when it leaves the connection to the loop or is done; if False, it must clean up."""
        with self._lock:
            self._held, self._resting = None, resting and not self.is_cut
            return not self.is_cut

    def cut(self) -> bool:
        """In the loop: wake the thread, now or when it next blocks; if True, the loop cleans up."""
        with self._lock:
            self.is_cut = True
            if self._held is not None:
                with contextlib.suppress(OSError):
                    # Not SSLSocket.shutdown: it drops the TLS state under the thread that is reading.
                    socket.socket.shutdown(self._held, socket.SHUT_RDWR)
            return self._resting

    def until_ready(self, sock: socket.socket, *, for_writing: bool = False, give_up_at: float | None = None) -> Steps:
        while not is_ready(sock, self.patience, for_writing=for_writing):
            if give_up_at is not None and time.monotonic() >= give_up_at:
                raise TimeoutError("timed out")
            yield Wait(sock.fileno(), for_writing, give_up_at)


class Key(NamedTuple):
    """Where a connection leads; the hosts are as in a URL."""

    is_tls: bool
    host: str
    tunnel_to: str | None = None  # the platform, if the host is a proxy that has to connect to it


class Connection:
    """A connection to a platform or a proxy; no step of it blocks but a name lookup."""

    def __init__(self, key: Key, lifeline: Lifeline) -> None:
        self.key = key
        self.sock: Any = None
        self.idle_since: float = 0.0
        self.dialing: Steps = self._dial(lifeline)

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()

    def _dial(self, lifeline: Lifeline) -> Steps:
        host, port = host_and_port(self.key.host, 443 if self.key.is_tls and not self.key.tunnel_to else 80)
        failure: OSError = OSError("no address found")
        for family, kind, proto, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            lifeline.remaining()
            give_up_at = time.monotonic() + CONNECT_TIMEOUT
            try:
                self.sock = sock = socket.socket(family, kind, proto)
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                error = sock.connect_ex(address)
                if self.key.is_tls:
                    pool.tls_context()  # made while the network is at work
                if error in (errno.EINPROGRESS, errno.EWOULDBLOCK):
                    yield from lifeline.until_ready(sock, for_writing=True, give_up_at=give_up_at)
                    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not error:
                    return
                failure = OSError(error, os.strerror(error))
            except OSError as exc:
                failure = exc
            self.close()
        raise failure

    def shake_hands(self, lifeline: Lifeline) -> Steps:
        host, _ = host_and_port(self.key.tunnel_to or self.key.host, 443)
        # wrap_socket empties the old socket, so the handshake comes after it.
        self.sock = pool.tls_context().wrap_socket(self.sock, server_hostname=host, do_handshake_on_connect=False)
        while True:
            try:
                self.sock.do_handshake()
                return
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
                for_writing = isinstance(exc, ssl.SSLWantWriteError)
            yield from lifeline.until_ready(self.sock, for_writing=for_writing)


class _TlsSocket(ssl.SSLSocket):
    def getpeername(self) -> Any:
        try:
            return super().getpeername()
        except OSError:  # the peer has gone: wrap_socket would raise, and leave this open
            self.close()
            raise ConnectionResetError("connection reset") from None


class _Pool:
    """The process's connections, each leased to one request or idle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._leased: set[Connection] = set()
        self._idle: list[Connection] = []  # the longest idle first

    def take(self, key: Key, *, for_start: bool) -> Connection | None:
        """Lease the idle connection that was used last, if it is alive."""
        now = time.monotonic()
        max_idle = MAX_IDLE_FOR_START if for_start else MAX_IDLE
        with self._lock:
            while self._idle and now - self._idle[0].idle_since > MAX_IDLE:
                self._idle.pop(0).close()
            for connection in self._idle[::-1]:
                if connection.key != key or now - connection.idle_since > max_idle:
                    continue
                self._idle.remove(connection)
                if not is_ready(connection.sock, 0):  # readable while idle: the peer has closed it
                    self._leased.add(connection)
                    return connection
                connection.close()
        return None

    def add(self, connection: Connection) -> bool:
        """Lease a new connection; False while other event loops have leased all that may exist."""
        with self._lock:
            if len(self._leased) >= MAX_SOCKETS:
                return False
            while self._idle and len(self._idle) + len(self._leased) >= MAX_SOCKETS:
                self._idle.pop(0).close()
            self._leased.add(connection)
            return True

    def give_back(self, connection: Connection, *, reusable: bool) -> None:
        """End a lease; twice does no harm."""
        with self._lock:
            if connection not in self._leased:
                return
            self._leased.remove(connection)
            if reusable:
                connection.idle_since = time.monotonic()
                self._idle.append(connection)
            else:
                connection.close()

    def tls_context(self) -> ssl.SSLContext:
        """The one context, for it costs 20 ms."""
        with self._lock:
            if self._context is None:
                self._context = ssl.create_default_context()
                self._context.sslsocket_class = _TlsSocket
                self._context.minimum_version = ssl.TLSVersion.TLSv1_2
                self._context.hostname_checks_common_name = False
            return self._context

    def close(self) -> None:
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def start_afresh(self) -> None:
        """In a forked child, close its copies of the sockets."""
        inherited = [*self._idle, *self._leased]
        self.__init__()  # type: ignore[misc]  # the lock too: another thread may hold it
        for connection in inherited:
            connection.close()


pool: _Pool = _Pool()
atexit.register(pool.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.start_afresh)


def head_start(url: str, lifeline: Lifeline) -> Connection | None:
    """Dial before it is known whether there is a proxy, if there can be none."""
    if sys.platform in ("darwin", "win32") or any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    connection = Connection(key_of(url), lifeline)
    with contextlib.suppress(Exception):  # the request itself will meet it again
        next(connection.dialing, None)
        return connection
    return None


def key_of(url: str) -> Key:
    """Where a URL leads without a proxy."""
    return Key(url.startswith("https:"), url.split("/")[2])


def host_and_port(address: str, default_port: int) -> tuple[str, int]:
    """Take an address apart."""
    from urllib.parse import urlsplit  # not needed to import zamp_sdk, and not cheap

    parts = urlsplit(f"//{address}")
    return parts.hostname or "", parts.port or default_port


def is_ready(sock: socket.socket, timeout: float, *, for_writing: bool = False) -> bool:
    """Wait for a socket, and say whether it is ready."""
    if hasattr(select, "poll"):  # select dies of file descriptors over 1,023
        poll = select.poll()
        poll.register(sock, select.POLLOUT if for_writing else select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    reading, writing = ([], [sock]) if for_writing else ([sock], [])
    return any(select.select(reading, writing, writing, timeout))
