"""HTTP on 127.0.0.1: connections, requests and replies.

A `Server` accepts connections; each gets a thread and carries one request. It asks `admit` how many bytes of body to
read, as soon as the head is there, and `answer` what to reply; either may raise a `RefusedError`. Nothing here knows of
actions.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, Callable, Mapping, NamedTuple

from .threads import join, start_thread

_IDLE_SECONDS = 60.0  # for a client's next bytes: a busy machine can take long between connecting and sending
_LINGER_SECONDS = 2.0  # for a client to read why its body was not read


class RecordedRequest(NamedTuple):
    """A request: its header names in lower case, its credentials masked, its body None if that was no JSON."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


class RefusedError(Exception):
    """An error to answer with: its status, its message, and lines for the reply's header."""


class Server(ThreadingTCPServer):  # an HTTPServer would look up this machine's name
    """Listens from its making on, answers from ``serve`` to ``stop``; a thread and a connection for each request."""

    allow_reuse_address = True
    request_queue_size = 1024  # connections not yet accepted, as 20 processes with 50 each may make them at once

    def __init__(
        self,
        port: int,
        admit: Callable[[RecordedRequest], int],
        answer: Callable[[RecordedRequest, int], dict[str, Any]],
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.admit: Callable[[RecordedRequest], int] = admit
        self.answer: Callable[[RecordedRequest, int], dict[str, Any]] = answer
        self._open: set[socket.socket] = set()
        self._workers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # the threads that run

    def serve(self) -> None:
        """Accept connections."""
        self._workers.add(start_thread(lambda: self.serve_forever(poll_interval=0.02)))

    def stop(self, deadline: float) -> None:
        """Accept no more, end the connections that are open, and wait for their threads until then."""
        self.shutdown()
        with contextlib.suppress(OSError):  # macOS shuts down none that listens
            self.socket.shutdown(socket.SHUT_RDWR)  # a forked child may have it open, and would keep the port
        self.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)
        join(self._workers, deadline)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        self._workers.add(start_thread(lambda: self.process_request_thread(request, client_address)))

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a connection was lost or dropped
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = _IDLE_SECONDS
    server: Server

    def _serve(self) -> None:
        fields = {name.lower(): value for name, value in self.headers.items()}
        request = RecordedRequest(self.command, self.path, fields, None)
        headers: list[str] = []
        is_read = False
        try:
            length = self.server.admit(request)
            content = self.rfile.read(length)
            if len(content) < length:
                raise ConnectionAbortedError
            is_read = True
            with contextlib.suppress(ValueError, RecursionError):
                # int() refuses NaN and Infinity, which are not JSON.
                request = request._replace(body=json.loads(content, parse_constant=int))
            status, answer = 200, self.server.answer(request, length)
        except RefusedError as exc:
            status, message, *headers = exc.args
            answer = {"error": {"message": message}}
        text = json.dumps(answer)  # in ASCII
        headers += ["Content-Type: application/json", f"Content-Length: {len(text)}", "Connection: close"]
        self.wfile.write("\r\n".join([f"HTTP/1.1 {status} ", *headers, "", text]).encode())
        if not is_read:
            self._linger()

    do_GET = do_POST = _serve

    def _linger(self) -> None:
        """Take no notice of a body for a while: to close at once would reset the connection, and lose the answer."""
        deadline = time.monotonic() + _LINGER_SECONDS
        self.connection.settimeout(_LINGER_SECONDS)
        self.connection.shutdown(socket.SHUT_WR)
        while self.connection.recv(2**16) and time.monotonic() < deadline:
            pass

    def log_message(self, format: str, *args: Any) -> None:
        pass  # the base class writes to stderr
