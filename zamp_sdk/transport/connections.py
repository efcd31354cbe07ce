"""One connection to a platform or a proxy, and where it leads: TLS, and sending and receiving without ever blocking.

A ``Connection`` is a non-blocking socket with bytes before and behind it. ``write`` queues bytes; ``flush`` hands the
socket as many of them as it takes, and ``receive`` moves what has come to ``incoming``. None of them waits: who wants
more waits for the socket (``until_ready``) and calls again.

TLS is an ``ssl.SSLObject`` between two memory buffers, so that it does no I/O of its own. All that has come is
decrypted at once: what OpenSSL held back would be invisible to a wait for the socket.

Exactly one side works on a connection at a time. While a request has it, that is the event loop, or the hop (a thread)
that the loop waits for; between requests it is the pool. So there is no lock here.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from .hops import READ, WRITE, Hops, is_ready

PIECE = 64 * 1024
"""Bytes that are received, or encrypted, at a time: four TLS records (RFC 8446, 5.1), and about what a socket takes."""

PIECES = 64
"""Pieces that one call receives at most, so that a fast peer cannot keep a thread busy: 4 MiB."""

RECORD = 16 * 1024
"""Bytes of a TLS record at most (RFC 8446, 5.1), so as much as one read of OpenSSL returns."""

RECORD_HEADER = 5
"""Bytes before what a TLS record holds: its kind, a version, and in the last two the length (RFC 8446, 5.1)."""


@dataclass(frozen=True)
class Route:
    """Which way a request goes; connections of equal routes are as good as each other."""

    is_tls: bool
    """Whether the platform is spoken to in TLS."""
    authority: str
    """Where to connect to, a host and perhaps a port as in a URL (RFC 3986, 3.2): the platform's, or a proxy's."""
    is_through_proxy: bool = False
    tunnel_to: str | None = None
    """The platform's authority, if a proxy is to connect to it."""
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @property
    def host(self) -> str:
        """The host to connect to."""
        return host_of(self.authority)

    @property
    def port(self) -> int:
        """The port to connect to."""
        return urlsplit(f"//{self.authority}").port or (443 if self.is_tls and not self.is_through_proxy else 80)

    @property
    def tls_host(self) -> str:
        """The platform's name as its certificate has it: without the dot that ends a full name (RFC 6066, 3)."""
        return host_of(self.tunnel_to or self.authority).rstrip(".")

    @property
    def proxy_authorization(self) -> str | None:
        """What the proxy is told: with CONNECT, or else with each request (RFC 7617)."""
        if not self.user and not self.password:
            return None
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be shown of what a peer on this route has said."""
        return (f"{self.user}:{self.password}", self.user, self.password) if self.proxy_authorization else ()


class Connection:
    """A connected socket, in TLS once ``start_tls`` is done."""

    def __init__(self, sock: socket.socket, route: Route) -> None:
        self.sock: socket.socket = sock
        self.route: Route = route
        self.incoming: bytearray = bytearray()
        """What has come and was not read yet."""
        self.bytes_sent: int = 0
        """How many the socket has taken since the connection was made, those of the handshakes included."""
        self.has_ended: bool = False
        """Whether the peer sends no more."""
        self.broken_by: OSError | None = None
        """The error that broke it; what came before still counts."""
        self.idle_since: float = 0.0
        """When the pool was given it back last, by ``time.monotonic``; 0 while it has served no request."""
        self._outgoing = bytearray()
        self._plaintext = bytearray()
        self._tls: ssl.SSLObject | None = None
        self._encrypted_in, self._encrypted_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._record = bytearray()  # the TLS record that has come in part: OpenSSL does not tell that it has one

    def write(self, data: bytes) -> None:
        """Queue bytes, which the next calls of ``flush`` send."""
        if self._tls is None:
            self._outgoing += data
        else:
            self._plaintext += data

    @property
    def has_unsent(self) -> bool:
        """Whether the socket has yet to take something."""
        return bool(self._outgoing or self._plaintext)

    def flush(self) -> None:
        """Send as much as the socket takes now; an error is kept, for the peer may have said why."""
        try:
            while self.has_unsent:
                if not self._outgoing:
                    self._encrypt()
                sent = self.sock.send(self._outgoing)
                self.bytes_sent += sent
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError as exc:
            self._outgoing.clear()
            self._plaintext.clear()
            self.broken_by = exc

    def receive(self) -> None:
        """Take what has come; an error is kept, for what came before it still counts."""
        try:
            for _ in range(PIECES):
                data = self.sock.recv(PIECE)
                self._take(data)
                if len(data) < PIECE:
                    break
        except BlockingIOError:
            pass
        except ssl.SSLError as exc:  # the peer's alert says why it has broken
            self.broken_by = exc
        except OSError as exc:
            self.broken_by = self.broken_by or exc

    @property
    def has_leftovers(self) -> bool:
        """Whether the last request has left something behind: a byte either way, an end, or an error."""
        return bool(self.incoming or self._record or self.has_unsent or self.has_ended or self.broken_by)

    def is_quiet(self) -> bool:
        """Whether nothing is left over of the last request, and nothing has come since: not even an end."""
        return not self.has_leftovers and not is_ready([self.sock], READ)

    def close(self) -> None:
        """Close the socket; twice does no harm."""
        self.sock.close()

    async def start_tls(self, context: ssl.SSLContext, hops: Hops) -> None:
        """Do the TLS handshake with the platform; raises OSError, of which ssl.SSLError is one."""
        host = self.route.tls_host
        self._tls = context.wrap_bio(self._encrypted_in, self._encrypted_out, server_hostname=host)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                pass
            finally:
                self._outgoing += self._encrypted_out.read()  # also the alert that says what is wrong
                self.flush()
            await self._receive_handshake(hops)
        self._decrypt()

    async def _receive_handshake(self, hops: Hops) -> None:
        while True:
            if not await self.until_ready(hops):
                raise TimeoutError("timed out")
            self.flush()
            if self.broken_by is not None:
                raise self.broken_by
            with contextlib.suppress(BlockingIOError):
                data = self.sock.recv(PIECE)
                self._feed(data)
                return

    async def until_ready(self, hops: Hops) -> bool:
        """Wait until something has come or, if something is left, more can be sent; False at the deadline."""
        if self.broken_by is not None:
            return True  # there is nothing to wait for
        return await hops.until_ready(self.sock, events=READ + (WRITE if self.has_unsent else 0))

    def _encrypt(self) -> None:
        assert self._tls is not None
        written = self._tls.write(bytes(self._plaintext[:PIECE]))
        del self._plaintext[:written]
        self._outgoing += self._encrypted_out.read()

    def _take(self, data: bytes) -> None:
        if self._tls is None:
            self.incoming += data
            self.has_ended = not data
        else:
            self._feed(data)
            self._decrypt()

    def _feed(self, data: bytes) -> None:
        if data:
            self._encrypted_in.write(data)
            self._record += data
            while len(self._record) >= RECORD_HEADER:
                end = RECORD_HEADER + int.from_bytes(self._record[3:RECORD_HEADER], "big")
                if end > len(self._record):
                    break
                del self._record[:end]
        else:
            self._encrypted_in.write_eof()

    def _decrypt(self) -> None:
        assert self._tls is not None
        encrypted = self._encrypted_in
        try:
            # Each read takes a whole record, so OpenSSL holds nothing back; to ask it would give up the GIL once more.
            while encrypted.pending or encrypted.eof:
                plain = self._tls.read(RECORD)
                if not plain:  # a close_notify
                    self.has_ended = True
                    break
                self.incoming += plain
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLEOFError:  # the peer left without a close_notify, as many do; HTTP knows whether it was done
            self.has_ended = True
        self._outgoing += self._encrypted_out.read()  # the answer to a key update


def host_of(authority: str) -> str:
    """Return the host of an authority: without its port, and an IPv6 address without its brackets."""
    return urlsplit(f"//{authority}").hostname or ""
