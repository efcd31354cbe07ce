"""How ``urllib.request`` writes a request, and what it is given for the response.

``OpenerDirector.open`` prepares a request (its headers, its Host), and calls a handler; the handler's ``do_open`` asks
an object in the place of an ``http.client.HTTPConnection`` to send it and to give the response. That object is a
``_Writer``: it queues head and body on a connection that is open already, so that they leave together.

The opener is made by hand: the default one opens ``file:`` URLs and follows redirects with the token. Tracing agents
(opentelemetry-instrumentation-urllib, elastic-apm) wrap ``OpenerDirector.open`` and look at what it returns.

Nothing here inherits from, or keeps, what a test tool replaces for a while (vcrpy and many a test put something else in
the place of ``http.client.HTTPConnection``, ``urllib.request.Request`` or ``OpenerDirector``): the names are looked up
at each request, so that nothing of it is left when the patch is gone.
"""

from __future__ import annotations

import functools
import urllib.request
from typing import TYPE_CHECKING, Any, Callable, Mapping

from .messages import Request

if TYPE_CHECKING:
    from .connections import Connection
    from .reading import ReplyReader


def open_request(connection: Connection, request: Request, reader: ReplyReader, send: Callable[[], object]) -> None:
    """Have a request written to a connection, and sent.

    Args:
        connection: Where to; it is connected.
        request: What to write.
        reader: What knows the reply's head once that is there.
        send: Sends what was written, and may read the reply.
    """
    route = connection.route
    is_for_proxy = route.is_through_proxy and not route.is_tls  # or else a tunnel leads through it
    headers = {**request.headers, "Accept-Encoding": "identity"}
    if request.body is not None:
        headers["Content-Length"] = str(len(request.body))
    if is_for_proxy and route.proxy_authorization is not None:
        headers["Proxy-Authorization"] = route.proxy_authorization
    # Made anew each time: a second opening would send the proxy what is for the platform. Only cookies need an origin.
    prepared = urllib.request.Request(
        request.base_url + request.path, request.body, headers, origin_req_host="", method=request.method
    )
    if is_for_proxy:
        prepared.set_proxy(route.authority, "http")  # so that its first line has the whole URL (RFC 9112, 3.2.2)
    prepared.writer = functools.partial(_Writer, connection, reader, send)  # type: ignore[attr-defined]  # for _Handler
    _opener(urllib.request.OpenerDirector).open(prepared)


class _Handler(urllib.request.AbstractHTTPHandler):
    def http_open(self, request: Any) -> Any:
        return self.do_open(request.writer, request)

    https_open = http_open
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


@functools.lru_cache(maxsize=1)
def _opener(kind: type[urllib.request.OpenerDirector]) -> urllib.request.OpenerDirector:
    opener = kind()
    opener.add_handler(_Handler(debuglevel=0))
    return opener


class _Writer:
    """What ``do_open`` takes for an HTTPConnection.

    It calls, in this order:

    1. itself, with the host and the time limit, which are known here already;
    2. ``set_debuglevel``;
    3. ``request``, with what is to be written;
    4. ``getresponse``, whose result it gives a ``url`` and a ``msg``, and returns;
    5. ``close`` of ``sock``, unless that is None; and where ``request`` fails, ``close``.
    """

    sock = None

    def __init__(
        self, connection: Connection, reader: ReplyReader, send: Callable[[], object], _host: str, **_: Any
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._send = send

    def set_debuglevel(self, level: int) -> None:
        """Do without: it would print requests, and the token with them."""

    def request(self, method: str, target: str, body: Any, headers: Mapping[str, str], **_: Any) -> None:
        """Queue a request (RFC 9112, 3), but for the header with which do_open asks for the connection's end."""
        fields = [f"{name}: {value}\r\n" for name, value in headers.items() if name != "Connection"]
        head = "".join([f"{method} {target} HTTP/1.1\r\n", *fields, "\r\n"])
        self._connection.write(head.encode("latin-1") + (body or b""))

    def getresponse(self) -> _Response:
        self._send()
        return _Response(self._reader)

    def close(self) -> None:
        """Leave the connection to the pool."""


class _Response:
    """What ``open`` returns, for tracing agents: the reply's head.

    While the reply is on its way the status is 102, "Processing" (RFC 2518, 10.1), which is how things stand; some
    compare it with numbers, so it must be one.
    """

    def __init__(self, reader: ReplyReader) -> None:
        head = reader.head
        self.status: int = 102 if head is None else head.status_code
        self.code = self.status
        self.reason: str = "" if head is None else head.reason
        self.version: int = 11
        self.headers: Mapping[str, str] = {} if head is None else head.headers

    def getcode(self) -> int:
        return self.status

    def info(self) -> Mapping[str, str]:
        return self.headers

    def close(self) -> None:
        pass
