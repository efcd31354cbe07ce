"""One request and its reply, in a worker thread.

``urllib.request`` as it comes would follow redirects with the token, open ``file:`` URLs and close every connection.
So the opener is made by hand, and its ``do_open`` takes an ``Exchange`` for a connection. Every exception of the
libraries below becomes a ``Failure`` here.
"""

from __future__ import annotations

import functools
import http.client
import io
import os
import socket
import ssl
import time
import types
import urllib.request
from typing import Any, Callable, Generator, Mapping

from .connections import Connection, Key, Lifeline, Steps, Wait, host_and_port, is_ready, key_of, pool
from .wire import Answer, Failure, Reply, Request, excerpt, read_reply

MAX_BODY = 64 * 1024 * 1024  # bytes
MAX_HEADERS, MAX_LINE = 100, 64 * 1024  # headers, and bytes of each


class Exchange:
    """One request and its reply over a leased connection."""

    sock = None  # so that do_open leaves the leased connection open
    reason = ""  # do_open reads it of a response

    def __init__(
        self, lifeline: Lifeline, url: str, request: Request, headers: Mapping[str, str], early: Connection | None
    ) -> None:
        self.waits_for: Wait = Wait(-1)
        self._lifeline = lifeline
        self._url, self._request, self._headers = url, request, headers
        self._key = key_of(url)
        self._tunnel_headers: Mapping[str, str] = {}
        self._head = b""
        self._connection = early if early and pool.add(early) else None
        self._response: http.client.HTTPResponse | None = None
        self._steps = self._perform()

    def proceed(self) -> Answer | None:
        """In a thread: go on to the answer, or return None when ``waits_for`` has to come first."""
        try:
            self._lifeline.hold(self._connection.sock if self._connection else None)
            self.waits_for = Wait(-1)
            self.waits_for = next(self._steps)
        except StopIteration as stop:
            reply: Reply = stop.value
            return reply
        except Exception as exc:
            return self._fail(exc)
        return None if self._lifeline.let_go(resting=True) else self._fail(TimeoutError("timed out"))

    def discard(self) -> None:
        """Close the connection; in the event loop only while the thread is at rest."""
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            pool.give_back(self._connection, reusable=False)

    # What do_open calls.

    def as_connection(self, host: str, **_: Any) -> Exchange:
        self._key = Key(self._key.is_tls, host)
        return self

    def set_debuglevel(self, level: int) -> None:
        pass

    def set_tunnel(self, host: str, headers: Mapping[str, str]) -> None:
        self._key, self._tunnel_headers = self._key._replace(tunnel_to=host), headers

    def request(self, method: str, target: str, _body: bytes | None, headers: dict[str, str], **_: Any) -> None:
        del headers["Connection"]  # do_open asks for it to be closed
        self._head = _head(method, target, headers)

    def getresponse(self) -> Exchange:
        return self  # nothing is sent yet

    def _perform(self) -> Generator[Wait, None, Reply]:
        method, body = self._request.method, self._request.body
        # Cookies alone need an origin.
        request: Any = urllib.request.Request(self._url, body, dict(self._headers), origin_req_host="", method=method)
        request.exchange = self  # how the handler comes by it
        _opener().open(request)  # which comes to the methods above
        yield from self._connect()
        connection, lifeline = self._connection, self._lifeline
        assert connection is not None
        lifeline.hold(connection.sock)
        lifeline.is_sent = True
        stream: Any = _Stream(connection.sock, lifeline)  # to http.client it is a socket
        stream.send(self._head + (body or b""))  # at once: one packet, one TLS record
        response = self._response = _Response(stream, method=method)
        yield from lifeline.until_ready(connection.sock)
        while not stream.has_begun(response):
            yield from lifeline.until_ready(connection.sock)
        response.begin()
        reply = read_reply(
            response.status, {name.lower(): value for name, value in response.headers.raw_items()}, _read(response)
        )
        lifeline.remaining()  # a socket that was shut down reads like one that has ended
        if lifeline.let_go(resting=False) and response.isclosed() and not response.length and not response.will_close:
            pool.give_back(connection, reusable=True)
        else:
            self.discard()
        return reply

    def _connect(self) -> Steps:
        key, pause = self._key, 0.01
        while self._connection is None:
            self._connection = pool.take(key, for_start=self._request.method == "POST")
            if self._connection is not None:
                return
            connection = Connection(key, self._lifeline)
            if pool.add(connection):
                self._connection = connection
            else:
                yield Wait(None, until=time.monotonic() + pause)
                pause = min(2 * pause, 0.5)
        connection = self._connection
        yield from connection.dialing
        if key.tunnel_to:
            yield from self._ask_for_tunnel(key.tunnel_to, connection.sock)
        if key.is_tls:
            yield from connection.shake_hands(self._lifeline)

    def _ask_for_tunnel(self, platform: str, sock: socket.socket) -> Steps:
        """Have the proxy connect to the platform (RFC 9110, 9.3.6), which http.client would wait for."""
        self._lifeline.hold(sock)
        stream: Any = _Stream(sock, self._lifeline)
        _, port = host_and_port(platform, 443)
        target = platform if platform.endswith(f":{port}") else f"{platform}:{port}"
        stream.send(_head("CONNECT", target, {"Host": target, **self._tunnel_headers}))
        yield from self._lifeline.until_ready(sock)
        with _Response(stream, method="CONNECT") as response:
            response.begin()
        if not 200 <= response.status < 300:
            raise OSError(f"Tunnel connection failed: {response.status} {response.reason}")

    def _fail(self, exc: Exception) -> Failure:
        self._lifeline.let_go(resting=False)
        self.discard()
        exc.__traceback__ = exc.__context__ = None  # its frames hold the token
        if self._lifeline.is_cut:
            exc = TimeoutError("timed out")
        origin = key_of(self._url).host
        if self._key.host != origin:
            origin += f" through the proxy {self._key.host}"
        what = excerpt(str(exc).encode(errors="replace")) if str(exc) else type(exc).__name__
        cause = exc if isinstance(exc, OSError) else None  # others quote the peer
        retryable = isinstance(exc, (OSError, http.client.HTTPException))
        if self._lifeline.is_sent:
            return Failure(f"no reply from {origin}: {what}", sent=True, retryable=retryable, cause=cause)
        advice, may_pass = _advice(exc)
        retryable = retryable and may_pass
        return Failure(f"cannot connect to {origin}: {what}{advice}", sent=False, retryable=retryable, cause=cause)


def _head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    lines = (f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {target} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("ascii")


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
            is_ready(self._sock, self._lifeline.remaining(), for_writing=for_writing)


def _parse_headers(fp: io.BufferedReader, **_options: Any) -> http.client.HTTPMessage:
    lines: list[str] = []
    while len(lines) <= MAX_HEADERS:
        line = fp.readline(MAX_LINE + 1).decode("latin-1")
        if len(line) > MAX_LINE:
            raise http.client.LineTooLong("header line")
        if not line.strip():
            headers = http.client.HTTPMessage()
            for name, _, value in (line.partition(":") for line in lines):
                headers.set_raw(name.strip(), value.strip())
            return headers
        if line[0] in " \t" and lines:  # a value that is folded (RFC 9112, 5.2)
            lines[-1] = f"{lines[-1].rstrip()} {line.strip()}"
        else:
            lines.append(line)
    raise http.client.HTTPException(f"got more than {MAX_HEADERS} headers")


def _copy_of(method: Any) -> Any:
    copy = types.FunctionType(method.__code__, {**vars(http.client), "parse_headers": _parse_headers})
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy


class _Response(http.client.HTTPResponse):
    """It skips all informational replies (RFC 9110, 15.2), not only 100."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]  # typeshed leaves it out
            if not 101 < status < 200:
                return version, status, reason
            _parse_headers(self.fp)

    # The email package's parser takes more time than all the rest of it.
    begin = _copy_of(http.client.HTTPResponse.begin)


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


def _advice(exc: Exception) -> tuple[str, bool]:
    """Say what to do, and whether it may pass without."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        advice = "; if its CA is private, set SSL_CERT_FILE to its PEM file"
        for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            path = os.environ.get(variable)
            if path and not os.access(path, os.F_OK):
                advice = f"; {variable} names {path}, which does not exist, so that no CA is trusted"
        return advice, False
    if isinstance(exc, ssl.SSLError) and not isinstance(exc, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return "; does it speak TLS 1.2 or later there?", False
    text = str(exc)
    if text.startswith("Tunnel connection failed: "):
        if text[26:27] == "5":
            return "; the proxy cannot reach it", True
        return "; put the proxy's user name and password into HTTPS_PROXY, or the host into NO_PROXY", False
    return "", True


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
