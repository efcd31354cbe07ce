"""What a hop does: ``urllib.request`` makes and sends a request, ``http.client`` reads its reply.

Nothing here waits for a peer, but for 2 ms after sending. (On macOS and Windows, urllib.request may look a host's name
up to see whether a proxy is meant. Where that takes until the deadline, nothing is sent.)

*Sending.* ``urllib.request``'s opener decides about proxies and headers, and its ``do_open`` writes the request to an
``http.client.HTTPConnection``. Ours is given a connection that is open already (``connections.Connection``), so that
head and body are queued there and leave together. If the reply comes within 2 ms it is returned at once, which saves
the event loop a wait and a second hop; otherwise ``open`` returns a stand-in for a response, and the event loop waits.

*Reading.* ``http.client.HTTPResponse`` reads from what has come so far. Where that runs dry, a ``NeedsMoreError``
leaves it and says how many bytes it takes to get further; the event loop waits for more, and reading begins again from
the first byte. A reply mostly comes in one piece, so that costs little; and where it comes in many, it is read only
when it may be whole: when as many bytes are there as its head has promised, or when the blank line has come that ends a
head or a chunked body.

The opener is made by hand: the default one opens ``file:`` URLs and follows redirects with the token.
"""

from __future__ import annotations

import functools
import http.client
import urllib.request
from typing import Any, Mapping

from .connections import Connection, PeerError, Route, host_and_port
from .hops import READ, Hops, is_ready
from .wire import Reply, Request, read_reply

PATIENCE = 0.002
"""Seconds that a hop waits for the reply after sending: platforms nearby have answered by then, which saves a hop."""

MAX_REPLY = 64 * 1024 * 1024
"""Bytes of a reply, as they come and after decompression: far over any sane result, far under a server's memory."""

TOO_LARGE = f"the reply is over {MAX_REPLY // 1024**2} MiB"

MAX_CHUNKS = 65_536
"""Chunks of a reply, and lines of its trailer: in chunks of 1 KiB it may be as large as any. Reading so many takes
some tenths of a second."""

MAX_HEAD = 256 * 1024
"""Bytes of a reply's status line and headers, folded lines and informational replies before it included; http.client
itself counts lines, up to 100."""

VERSION = b"HTTP/"
"""How every reply begins (RFC 9112, 4)."""


class NeedsMoreError(Exception):
    """The reply goes on beyond what has come: reading is worth a try again when ``needed`` bytes are there."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class RouteChangedError(OSError):
    """urllib.request would go another way than the connection does, so nothing was sent."""


# --- the way to the platform ------------------------------------------------------------------------------------------


def find_route(url: str) -> Route:
    """Ask urllib.request which way a request for this URL would go; PeerError if that is no usable proxy."""
    request = urllib.request.Request(url)
    origin = request.host
    through_proxy = getattr(_proxies(), f"{request.type}_open", None)  # which there is where a proxy is set
    if through_proxy is not None:
        through_proxy(request)
    is_tls = url.startswith("https:")
    if request.host == origin:  # there is no proxy for this host
        return Route(is_tls, origin)
    return Route(is_tls, request.host, origin if is_tls else None, request.get_header("Proxy-authorization"))


class _ProxyHandler(urllib.request.ProxyHandler):
    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:  # its name in urllib
        scheme, separator, _ = proxy.partition("://")
        variable = f"{type.upper()}_PROXY"
        if separator and scheme.lower() != "http" and not urllib.request.proxy_bypass(req.host):
            raise PeerError(  # urllib would speak plain HTTP to it
                f"{variable} names a {scheme}:// proxy, and only http:// proxies can be used", may_retry=False
            )
        try:
            outcome = super().proxy_open(req, proxy, type)
            host, _ = host_and_port(req.host)  # what dialing will do with it
            if not host.encode("idna"):
                raise ValueError("no host")
        except ValueError:  # which a UnicodeError is
            message = f"{variable} is not a URL like http://proxy.example:3128"
            raise PeerError(message, may_retry=False) from None
        return outcome


@functools.cache
def _proxies() -> _ProxyHandler:
    """Read the proxies from the environment, or from the system's settings on macOS and Windows."""
    return _ProxyHandler()


def forget_proxies() -> None:
    """Read the proxies anew next time."""
    _proxies.cache_clear()
    _opener.cache_clear()  # which has them


def connect_request(route: Route) -> bytes:
    """Write the request that asks a proxy for a tunnel (RFC 9110, 9.3.6)."""
    platform = route.platform if route.platform.rpartition(":")[2].isdigit() else f"{route.platform}:443"
    lines = [f"CONNECT {platform} HTTP/1.1", f"Host: {platform}"]
    if route.proxy_authorization:
        lines.append(f"Proxy-Authorization: {route.proxy_authorization}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


# --- sending ----------------------------------------------------------------------------------------------------------


def open_request(
    connection: Connection, url: str, request: Request, headers: Mapping[str, str], hops: Hops
) -> Reply | ReplyReader:
    """Send a request as far as the socket takes it; return the reply if it comes within 2 ms, or else its reader."""
    reader = ReplyReader(connection, request.method)
    # Made anew each time: a second opening would send the proxy what is for the platform. Only cookies need an origin.
    prepared: Any = urllib.request.Request(url, request.body, dict(headers), origin_req_host="", method=request.method)
    if request.body is not None:  # or else urllib.request asks http.client.HTTPConnection
        prepared.add_unredirected_header("Content-length", str(len(request.body)))
    prepared.connection_class = functools.partial(_HTTPConnection, reader=reader, hops=hops)
    _opener(urllib.request.OpenerDirector).open(prepared)
    return reader.reply or reader


class _HTTPConnection:
    """What ``do_open`` writes a request to and asks for the response, as to an http.client.HTTPConnection.

    It is none: a test tool may have replaced that class for a while, and a tracer its methods, which would see half.
    """

    sock = None  # which do_open closes

    def __init__(self, host: str, *, reader: ReplyReader, hops: Hops, **_: Any) -> None:
        self._reader = reader
        self._hops = hops
        self._connection = reader.connection
        if host != self._connection.route.authority:
            raise RouteChangedError("the proxy settings have just changed")

    def set_debuglevel(self, level: int) -> None:
        pass

    def set_tunnel(self, host: str, port: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        pass  # it leads through the tunnel already

    def close(self) -> None:
        pass

    def request(self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], **_: Any) -> None:
        # do_open's own Connection header asks for the connection's end.
        fields = [f"{name}: {value}" for name, value in headers.items() if name != "Connection"]
        head = "\r\n".join([f"{method} {url} HTTP/1.1", *fields, "", ""])
        self._connection.send(head.encode("latin-1") + (body or b""))

    def getresponse(self) -> Any:
        if not self._hops.remaining():  # urllib.request has looked a name up, say; nothing was sent yet
            raise TimeoutError("timed out")
        self._connection.flush()
        if not self._connection.has_unsent and is_ready([self._connection.sock], READ, PATIENCE):
            self._reader.proceed()
        return self._reader.response or _PendingResponse()


class _PendingResponse:
    """What ``open`` returns while the reply is on its way: tracing agents that wrap ``open`` look at its attributes.

    Some compare the status with numbers, so it has one: 102, "Processing" (RFC 2518, 10.1), which is how things stand.
    """

    status = code = 102
    reason = ""
    version = 11
    headers: Mapping[str, str] = {}

    def getcode(self) -> int:
        return self.status

    def info(self) -> Mapping[str, str]:
        return self.headers

    def close(self) -> None:
        pass


class _Handler(urllib.request.AbstractHTTPHandler):
    def http_open(self, request: Any) -> http.client.HTTPResponse:
        return self.do_open(request.connection_class, request)

    https_open = http_open
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


@functools.cache
def _opener(director: type[urllib.request.OpenerDirector]) -> urllib.request.OpenerDirector:
    """Return the opener made of this class, which a test tool may have replaced for a while."""
    opener = director()
    opener.add_handler(_proxies())
    opener.add_handler(_Handler(debuglevel=0))
    return opener


# --- reading ----------------------------------------------------------------------------------------------------------


class ReplyReader:
    """Reads one reply out of what a connection has received; asked again whenever more may have come."""

    def __init__(self, connection: Connection, method: str) -> None:
        self.connection: Connection = connection
        self.response: http.client.HTTPResponse | None = None
        """The reply's status and headers, once they are there."""
        self.reply: Reply | None = None
        """The whole reply, once it is there."""
        self._method = method
        self._needed = 0  # bytes without which reading again would end where it ended the last time
        self._searched = 0  # bytes in which the blank line that ends a chunked body was looked for

    def proceed(self, *, is_last: bool = False) -> Reply | ReplyReader:
        """Send more, receive more, and return the reply if it is whole now, or else this reader.

        A reply may come before the whole request has left, for its body is too large, say. It counts, and ends the
        request.

        Args:
            is_last: There is no time for more: an unsuccessful reply (of status 300 or over) counts with as much of its
                body as has come.

        Raises:
            PeerError: What came is no reply.
            OSError: The connection broke before the reply was whole.
            TimeoutError: It is not whole, and this is the last look.
        """
        connection = self.connection
        connection.flush()
        connection.receive()
        may_end_here = is_last or connection.has_ended or connection.failure is not None
        if not may_end_here and len(connection.incoming) < self._needed:
            return self
        if len(connection.incoming) > MAX_REPLY + MAX_HEAD:
            raise PeerError(TOO_LARGE, may_retry=False)
        try:
            source = _Source(connection, is_last=is_last)
            self.response = self._begin(source)
            self.reply = self._finish(self.response, source)
        except NeedsMoreError as exc:
            if is_last:
                raise TimeoutError("timed out") from None
            self._needed = exc.needed
            return self
        except http.client.HTTPException as exc:
            raise PeerError(str(exc) or type(exc).__name__) from None
        return self.reply

    def _begin(self, source: _Source) -> http.client.HTTPResponse:
        """Read the status and the headers; informational replies are passed over (RFC 9110, 15.2)."""
        begin = bytes(self.connection.incoming[: len(VERSION)])
        if not VERSION.startswith(begin):  # whoever speaks another protocol may wait for an answer now
            raise http.client.BadStatusLine(str(self.connection.incoming[:100].partition(b"\n")[0], "latin-1"))
        if len(self.connection.incoming) <= MAX_HEAD:  # or else it must be there
            source.expect_blank_line(0)
        while True:
            response = http.client.HTTPResponse(source, method=self._method)  # type: ignore[arg-type]  # it takes a source for a socket
            response.begin()
            if not 101 < response.status < 200:
                source.is_in_head = False
                return response

    def _finish(self, response: http.client.HTTPResponse, source: _Source) -> Reply:
        """Read the body; of an unsuccessful reply what comes, for a peer may hang up before it has read the request."""
        connection = self.connection
        source.is_lenient = response.status >= 300
        if self._method == "CONNECT":
            body = b""  # behind it the tunnel begins (RFC 9110, 9.3.6), and a refusal is known by its status
        else:
            if response.length:
                source.expect(response.length)  # http.client itself would read in steps
            elif response.chunked:  # its end is a blank line, of which three bytes may have been there the last time
                start = max(self._searched - 3, source.position)
                self._searched = len(connection.incoming)
                source.expect_blank_line(start)
            body = _read_body(response)
        headers = {name.lower(): " ".join(value.split()) for name, value in response.headers.raw_items()}
        del connection.incoming[: source.position]
        # After the last look at a reply its rest may come yet.
        connection.is_reusable = not (response.will_close or response.status == 101 or source.is_last)
        return read_reply(
            response.status, headers, _decoded(body, headers.get("content-encoding", ""), is_lenient=source.is_lenient)
        )


class _Source:
    """What a connection has received, as the socket, and the file, that http.client reads a reply from."""

    def __init__(self, connection: Connection, *, is_last: bool) -> None:
        self._received = connection.incoming
        self._has_ended = connection.has_ended
        self._failure = connection.failure
        self._lines = 0  # of the body
        self.position = 0
        self.is_last: bool = is_last
        """Whether there is no time for more to come."""
        self.is_in_head = True
        """Whether what is read counts as status lines and headers."""
        self.is_lenient = False
        """Whether a reply that breaks off, or is late, is good as far as it goes."""

    def makefile(self, *_: Any) -> _Source:
        return self

    def readline(self, limit: int) -> bytes:
        if not self.is_in_head:
            self._lines += 1
            if self._lines > MAX_CHUNKS:
                raise PeerError(f"the reply has over {MAX_CHUNKS:,} chunks", may_retry=False)
        end = self._received.find(b"\n", self.position, self.position + limit) + 1
        if not end:
            if len(self._received) < self.position + limit:
                self._run_dry(len(self._received) + 1)
            end = self.position + limit
        return self._advance(end)

    def read(self, size: int | None = None) -> bytes:
        if size is None:
            self._run_dry(len(self._received) + 1)
            return self._advance(len(self._received))
        if size < 0:  # a chunk may say so, and to a file that means: everything
            raise http.client.HTTPException("a chunk of negative size")
        self.expect(size)
        return self._advance(self.position + size)

    def close(self) -> None:
        pass

    flush = close

    def expect(self, size: int) -> None:
        """Run dry unless so many more bytes are there."""
        if size > MAX_REPLY:
            raise PeerError(TOO_LARGE, may_retry=False)
        if self.position + size > len(self._received):
            self._run_dry(self.position + size)

    def expect_blank_line(self, start: int) -> None:
        """Run dry unless there is a blank line behind this position."""
        if self._received.find(b"\n\r\n", start) < 0 and self._received.find(b"\n\n", start) < 0:
            self._run_dry(len(self._received) + 1)

    def _advance(self, end: int) -> bytes:
        if self.is_in_head and end > MAX_HEAD:
            raise http.client.HTTPException(f"got headers of over {MAX_HEAD // 1024} KiB")
        data = bytes(self._received[self.position : end])
        self.position += len(data)
        return data

    def _run_dry(self, needed: int) -> None:
        """Leave the reading until so many bytes are there; or return, if no more will come."""
        if self._failure is not None and not self.is_lenient:
            raise self._failure
        if self._failure is None and not self._has_ended and not (self.is_last and self.is_lenient):
            raise NeedsMoreError(needed)


def _read_body(response: http.client.HTTPResponse) -> bytes:
    try:
        body = response.read()
    except http.client.IncompleteRead as exc:
        if response.status < 300:
            raise
        body = exc.partial
    if len(body) > MAX_REPLY:
        raise PeerError(TOO_LARGE, may_retry=False)
    return body


def _decoded(body: bytes, coding: str, *, is_lenient: bool) -> bytes:
    """Decompress what came compressed although ``identity`` was asked for (RFC 9110, 8.4.1)."""
    if coding.lower() not in ("gzip", "x-gzip", "deflate") or not body:
        return body

    import zlib  # rarely needed

    # Of the two that call themselves deflate, zlib's format is the right one, and the bare one is in use.
    for window_bits in (zlib.MAX_WBITS + 32, -zlib.MAX_WBITS):
        decompressor = zlib.decompressobj(window_bits)
        try:
            decoded = decompressor.decompress(body, MAX_REPLY + 1)
        except zlib.error:
            continue
        if len(decoded) > MAX_REPLY:
            raise PeerError(TOO_LARGE, may_retry=False)
        if decompressor.eof:
            return decoded
    if is_lenient:
        return body
    raise PeerError(f"the reply is broken {coding}")
