"""What blocks, for worker threads only: the opener, the connection pool, TLS, and one request's way through them.

``urllib.request`` as it comes would follow redirects with the token, open ``file:`` URLs and close every connection.
So the opener is made by hand, and its ``do_open`` takes an ``Exchange`` for a connection, which sends what urllib makes
of a request over a connection from the pool. Every exception of the libraries below becomes a ``Failure`` here.
"""

from __future__ import annotations

import atexit
import errno
import functools
import http.client
import io
import math
import os
import select
import socket
import ssl
import threading
import time
import types
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Generator, Mapping, NamedTuple

from .wire import Failure, Reply, excerpt

if TYPE_CHECKING:
    from .lifeline import Lifeline
    from .wire import Answer

MAX_SOCKETS = 64  # in all, idle ones included
MAX_IDLE, MAX_IDLE_FOR_POST = 10.0, 1.0  # s; a thawed process sees no FIN
CONNECT_TIMEOUT = 10.0  # s for one address, so that a dead one leaves time for the next
MAX_BODY = 64 * 1024 * 1024  # bytes
MAX_HEADERS, MAX_LINE = 100, 64 * 1024  # headers, and bytes of each


class Wait(NamedTuple):
    """What an exchange waits for on its socket, until a time by ``time.monotonic``."""

    for_writing: bool = False
    until: float = math.inf


Steps = Generator[Wait, None, None]


class _Key(NamedTuple):
    """Where a connection leads; the hosts are as in a URL."""

    is_tls: bool
    host: str
    tunnel_to: str | None  # the platform, if the host is a proxy that has to connect to it


class _Connection:
    """A connection to a platform, through a proxy's tunnel if need be."""

    def __init__(self, key: _Key, proxy_headers: Mapping[str, str]) -> None:
        self.key = key
        self._proxy_headers = proxy_headers
        self.sock: Any = None
        self.idle_since = 0.0

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()

    def steps_to_connect(self, lifeline: Lifeline) -> Steps:
        """Connect, waiting for nothing itself but a name lookup."""
        is_tls, address, tunnel_to = self.key
        host, port = _host_and_port(address, 443 if is_tls and not tunnel_to else 80)
        yield from self._dial(host, port, lifeline)
        if tunnel_to:
            host, port = _host_and_port(tunnel_to, 443)
            target = tunnel_to if tunnel_to.endswith(f":{port}") else f"{tunnel_to}:{port}"
            yield from self._ask_for_tunnel(target, lifeline)
        if is_tls:
            # wrap_socket empties the old socket, so the handshake comes after it.
            self.sock = _pool.tls_context().wrap_socket(self.sock, server_hostname=host, do_handshake_on_connect=False)
            yield from self._shake_hands(lifeline)

    def _dial(self, host: str, port: int, lifeline: Lifeline) -> Steps:
        failure: OSError = OSError("no address found")
        for family, kind, proto, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            lifeline.remaining()
            try:
                self.sock = socket.socket(family, kind, proto)
                self.sock.setblocking(False)
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield from self._connect_to(address, lifeline)
                return
            except OSError as exc:
                self.close()
                failure = exc
        raise failure

    def _connect_to(self, address: Any, lifeline: Lifeline) -> Steps:
        give_up_at = time.monotonic() + CONNECT_TIMEOUT
        error = self.sock.connect_ex(address)
        if self.key.is_tls:
            _pool.tls_context()  # made while the network is at work
        if error in (errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0)):
            yield from _until_ready(self.sock, lifeline, for_writing=True, give_up_at=give_up_at)
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))

    def _ask_for_tunnel(self, target: str, lifeline: Lifeline) -> Steps:
        """Have the proxy connect to the platform (RFC 9110, 9.3.6), which http.client would wait for."""
        lifeline.hold(self.sock)
        stream = _Stream(self.sock, lifeline)
        stream.send(_head("CONNECT", target, {"Host": target, **self._proxy_headers}))
        yield from _until_ready(self.sock, lifeline)
        with _Response(stream, method="CONNECT") as response:  # type: ignore[arg-type]  # it quacks like a socket
            response.begin()
        if not 200 <= response.status < 300:
            raise OSError(f"Tunnel connection failed: {response.status} {response.reason}")

    def _shake_hands(self, lifeline: Lifeline) -> Steps:
        while True:
            try:
                return self.sock.do_handshake()  # type: ignore[no-any-return]  # it returns None
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
                for_writing = isinstance(exc, ssl.SSLWantWriteError)
            yield from _until_ready(self.sock, lifeline, for_writing=for_writing)


def _host_and_port(address: str, default_port: int) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(f"//{address}")
    return parts.hostname or "", parts.port or default_port


def _head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    lines = (f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {target} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("ascii")


class _TlsSocket(ssl.SSLSocket):
    def getpeername(self) -> Any:
        try:
            return super().getpeername()
        except OSError:  # the peer has gone: wrap_socket would raise, and leave this open
            self.close()
            raise ConnectionResetError("connection reset") from None


class _Stream(io.RawIOBase):
    """A socket that never blocks; the thread waits for it instead, as long as its lifeline lets it."""

    def __init__(self, sock: socket.socket, lifeline: Lifeline) -> None:
        super().__init__()
        self._sock, self._lifeline = sock, lifeline
        self._is_patient = True

    def has_begun(self, response: http.client.HTTPResponse) -> bool:
        """Whether a reply begins; a TLS session ticket makes a socket readable before it does."""
        self._is_patient = False
        try:
            response.fp.peek(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        finally:
            self._is_patient = True
        return True

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._patiently(self._sock.send, rest, for_writing=True) :]

    def makefile(self, *_: Any) -> io.BufferedReader:  # what http.client's response asks a socket for
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._patiently(self._sock.recv_into, buffer, for_writing=False)

    def _patiently(self, operation: Callable[[Any], int], data: Any, *, for_writing: bool) -> int:
        while True:
            try:
                return operation(data)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
                if not self._is_patient:
                    raise
                if not isinstance(exc, BlockingIOError):
                    for_writing = isinstance(exc, ssl.SSLWantWriteError)
            _is_ready(self._sock, self._lifeline.remaining(), for_writing=for_writing)


def _with_globals(function: Any, **replacements: Any) -> Any:
    names = {**function.__globals__, **replacements}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _parse_headers(fp: io.BufferedReader, **_options: Any) -> http.client.HTTPMessage:
    lines: list[str] = []
    while len(lines) <= MAX_HEADERS:
        line = fp.readline(MAX_LINE + 1).decode("latin-1")
        if len(line) > MAX_LINE:
            raise http.client.LineTooLong("header line")
        if not line.strip():
            headers = http.client.HTTPMessage()
            for name, _, value in (line.partition(":") for line in lines):
                headers[name.strip()] = value.strip()
            return headers
        if line[0] in " \t" and lines:  # a value that is folded (RFC 9112, 5.2)
            lines[-1] = f"{lines[-1].rstrip()} {line.strip()}"
        else:
            lines.append(line)
    raise http.client.HTTPException(f"got more than {MAX_HEADERS} headers")


class _Response(http.client.HTTPResponse):
    """It skips all informational replies (RFC 9110, 15.2), not only 100."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]  # typeshed leaves it out
            if not 101 < status < 200:
                return version, status, reason
            _parse_headers(self.fp)

    # The email package's parser takes more time than all the rest of it.
    begin = _with_globals(http.client.HTTPResponse.begin, parse_headers=_parse_headers)


class _Pool:
    """The process's connections, each leased to one exchange or idle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._leased: set[_Connection] = set()
        self._idle: list[_Connection] = []  # the longest idle first

    def take(self, key: _Key, max_idle: float) -> _Connection | None:
        """Lease the idle connection that was used last, if it is alive."""
        now = time.monotonic()
        with self._lock:
            while self._idle and now - self._idle[0].idle_since > MAX_IDLE:
                self._idle.pop(0).close()
            for connection in self._idle[::-1]:
                if connection.key != key or now - connection.idle_since > max_idle:
                    continue
                self._idle.remove(connection)
                if not _is_ready(connection.sock, 0):  # readable while idle: the peer has closed it
                    self._leased.add(connection)
                    return connection
                connection.close()
        return None

    def add(self, connection: _Connection) -> None:
        """Lease a new connection, making room for it."""
        with self._lock:
            while self._idle and len(self._idle) + len(self._leased) >= MAX_SOCKETS:
                self._idle.pop(0).close()
            self._leased.add(connection)

    def give_back(self, connection: _Connection, *, reusable: bool) -> None:
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
        """Close what is idle."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def start_afresh(self) -> None:
        """In a forked child, close its copies of the sockets."""
        inherited = [*self._idle, *self._leased]
        self.__init__()  # type: ignore[misc]  # the lock too: another thread may hold it
        for connection in inherited:
            connection.close()


_pool = _Pool()
atexit.register(_pool.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.start_afresh)


class _Handler(urllib.request.AbstractHTTPHandler):
    def http_open(self, request: Any) -> http.client.HTTPResponse:
        return self.do_open(request.exchange.as_connection, request)

    https_open = http_open
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class _ProxyHandler(urllib.request.ProxyHandler):
    def proxy_open(self, request: urllib.request.Request, proxy: str, type: str) -> Any:
        scheme, separator, _ = proxy.partition("://")
        if separator and scheme.lower() != "http" and not urllib.request.proxy_bypass(request.host):
            raise ValueError(  # urllib would speak plain HTTP to it
                f"{type.upper()}_PROXY names a {scheme}:// proxy, and only http:// proxies can be used"
            )
        try:
            return super().proxy_open(request, proxy, type)
        except ValueError:
            raise ValueError(f"{type.upper()}_PROXY is not a URL like http://proxy.example:3128") from None


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    opener.add_handler(_ProxyHandler())
    opener.add_handler(_Handler(debuglevel=0))
    return opener


class Exchange:
    """One request and its reply over a leased connection."""

    sock = None  # so that do_open leaves the leased connection open
    reason = ""  # do_open reads it of a response

    def __init__(
        self, lifeline: Lifeline, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> None:
        self.sent: bool = False
        self.waits_for: Wait = Wait()
        self._lifeline = lifeline
        self._method, self._url, self._headers, self._body = method, url, headers, body
        self._host = ""
        self._tunnel_to: str | None = None
        self._tunnel_headers: Mapping[str, str] = {}
        self._head = b""
        self._connection: _Connection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._steps = self._perform()

    def proceed(self) -> Answer | None:
        """In a thread: go on to the answer, or return None when ``waits_for`` has to come first."""
        try:
            if self._connection is not None:
                self._lifeline.hold(self._connection.sock)
            self.waits_for = next(self._steps)
        except StopIteration as stop:
            reply: Reply = stop.value
            return reply
        except Exception as exc:
            return self._fail(exc)
        return None if self._lifeline.rest() else self._fail(TimeoutError("timed out"))

    def fileno(self) -> int:
        """In the event loop: the file descriptor to wait for."""
        assert self._connection is not None
        return int(self._connection.sock.fileno())

    def discard(self) -> None:
        """Close the connection; in the event loop only while the thread is at rest."""
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            _pool.give_back(self._connection, reusable=False)

    # What do_open calls.

    def as_connection(self, host: str, **_: Any) -> Exchange:
        self._host = host
        return self

    def set_debuglevel(self, level: int) -> None:
        pass

    def set_tunnel(self, host: str, headers: Mapping[str, str]) -> None:
        self._tunnel_to, self._tunnel_headers = host, headers

    def request(self, method: str, target: str, _body: bytes | None, headers: dict[str, str], **_: Any) -> None:
        del headers["Connection"]  # do_open asks for it to be closed
        self._head = _head(method, target, headers)

    def getresponse(self) -> Exchange:
        return self  # nothing is sent yet

    def _perform(self) -> Generator[Wait, None, Reply]:
        request = urllib.request.Request(self._url, self._body, dict(self._headers), method=self._method)
        request.exchange = self  # type: ignore[attr-defined]  # how the handler comes by it
        _opener().open(request)  # which comes to the methods above
        key = _Key(self._url.startswith("https:"), self._host, self._tunnel_to)
        connection = self._connection = _pool.take(key, MAX_IDLE_FOR_POST if self._method == "POST" else MAX_IDLE)
        if connection is None:
            connection = self._connection = _Connection(key, self._tunnel_headers)
            _pool.add(connection)
            yield from connection.steps_to_connect(self._lifeline)
        self._lifeline.hold(connection.sock)
        self.sent = True
        stream = _Stream(connection.sock, self._lifeline)
        stream.send(self._head + (self._body or b""))  # at once: one packet, one TLS record
        response = self._response = _Response(stream, method=self._method)  # type: ignore[arg-type]  # as above
        yield from _until_ready(connection.sock, self._lifeline)
        while not stream.has_begun(response):
            yield from _until_ready(connection.sock, self._lifeline)
        response.begin()
        reply = Reply(
            response.status, {name.lower(): value for name, value in response.headers.raw_items()}, _read(response)
        )
        self._lifeline.remaining()  # a socket that was shut down reads like one that has ended
        if self._lifeline.finish() and response.isclosed() and not response.length and not response.will_close:
            _pool.give_back(connection, reusable=True)
        else:
            self.discard()
        return reply

    def _fail(self, exc: Exception) -> Failure:
        self._lifeline.finish()
        self.discard()
        exc.__traceback__ = exc.__context__ = None  # its frames hold the token
        if self._lifeline.is_cut:
            exc = TimeoutError("timed out")
        origin = self._url.split("/")[2]
        if self._host not in ("", origin):
            origin += f" through the proxy {self._host}"
        what = excerpt(str(exc).encode(errors="replace")) if str(exc) else type(exc).__name__
        cause = exc if isinstance(exc, OSError) else None  # others quote the peer
        if self.sent:
            retryable = isinstance(exc, (OSError, http.client.HTTPException))
            return Failure(f"no reply from {origin}: {what}", sent=True, retryable=retryable, cause=cause)
        advice, retryable = _advice(exc)
        return Failure(f"cannot connect to {origin}: {what}{advice}", sent=False, retryable=retryable, cause=cause)


def _advice(exc: Exception) -> tuple[str, bool]:
    """Say what to do, and whether trying again may help."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        advice = "; if its CA is private, set SSL_CERT_FILE to its PEM file"
        for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            path = os.environ.get(variable)
            if path and not Path(path).exists():
                advice = f"; {variable} names {path}, which does not exist, so that no CA is trusted"
        return advice, False
    if isinstance(exc, ssl.SSLError) and not isinstance(exc, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return "; does it speak TLS 1.2 or later there?", False
    text = str(exc)
    if text.startswith("Tunnel connection failed: "):
        if text[26:27] == "5":
            return "; the proxy cannot reach it", True
        return "; put the proxy's user name and password into HTTPS_PROXY, or the host into NO_PROXY", False
    return "", isinstance(exc, (OSError, http.client.HTTPException))


def _read(response: http.client.HTTPResponse) -> bytes:
    """Read a body; of a refusal as much as comes: a proxy may reset before it has read the request."""
    body = bytearray()
    try:
        while len(body) + (response.length or 0) <= MAX_BODY:
            piece = response.read(64 * 1024)
            if not piece:
                break
            body += piece
        else:
            raise ValueError(f"the reply is over {MAX_BODY // 1024**2} MiB")
        if response.length:  # read(n) does not tell
            raise http.client.IncompleteRead(b"", response.length)
    except (OSError, http.client.HTTPException):
        if 200 <= response.status < 300:
            raise
    return bytes(body)


def _is_ready(sock: socket.socket, timeout: float, *, for_writing: bool = False) -> bool:
    if hasattr(select, "poll"):  # select dies of file descriptors over 1,023
        poll = select.poll()
        poll.register(sock, select.POLLOUT if for_writing else select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    reading, writing = ([], [sock]) if for_writing else ([sock], [])
    return any(select.select(reading, writing, writing, timeout))


def _until_ready(
    sock: socket.socket, lifeline: Lifeline, *, for_writing: bool = False, give_up_at: float = math.inf
) -> Steps:
    while not _is_ready(sock, lifeline.patience, for_writing=for_writing):
        if time.monotonic() >= give_up_at:
            raise TimeoutError("timed out")
        yield Wait(for_writing, give_up_at)
