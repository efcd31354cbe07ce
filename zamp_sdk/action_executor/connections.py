"""One connection to a platform or a proxy: dialing, TLS, and sending and receiving without ever blocking.

A ``Connection`` is a non-blocking socket with bytes before and behind it. ``send`` puts bytes into ``outgoing``;
``flush`` hands the socket as many of them as it takes, and ``receive`` moves what has come to ``incoming``. Neither
waits: who wants more waits for the socket (``Hops.until_ready``) and calls again.

TLS is an ``ssl.SSLObject`` between two memory buffers, so that it does no I/O of its own. All that has come is
decrypted at once: what OpenSSL held back would be invisible to a wait for the socket.

Exactly one side works on a connection at a time. While a request has it, that is the event loop, or the hop (a thread)
that the loop waits for; between requests it is the pool. So there is no lock here.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import socket
import ssl
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Iterator

from .hops import READ, WRITE, Hops, is_ready

CONNECT_TIMEOUT = 10.0
"""Seconds for TCP to connect to any of a host's addresses, from the first one on. Linux itself would try for two
minutes, and a start has 30 seconds for each of its tries."""

ATTEMPT_DELAY = 0.25
"""Seconds from one address to the next while none has answered (RFC 8305, 5: the Connection Attempt Delay)."""

PIECE = 64 * 1024
"""Bytes that are received, or encrypted, at a time: four TLS records (RFC 8446, 5.1), and about what a socket takes."""

PIECES = 64
"""Pieces that one call receives at most, so that a fast peer cannot keep a thread busy: 4 MiB."""

RECORD = 16 * 1024
"""Bytes of a TLS record at most (RFC 8446, 5.1), so as much as one read of OpenSSL returns."""

RECORD_HEADER = 5
"""Bytes before what a TLS record holds: its kind, a version, and in the last two the length (RFC 8446, 5.1)."""

OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class PeerError(OSError):
    """A peer has said something that is of no use; the text may quote it, and so its secrets.

    Attributes:
        may_retry: Whether asking again may help.
    """

    def __init__(self, message: str, *, may_retry: bool = True) -> None:
        super().__init__(message)
        self.may_retry = may_retry


@dataclass(frozen=True)
class Route:
    """Which way a request goes; connections of equal routes are as good as each other."""

    is_tls: bool
    """Whether the platform is spoken to in TLS."""
    authority: str
    """Where to connect to, a host and perhaps a port as in a URL (RFC 3986, 3.2): the platform's, or a proxy's."""
    tunnel_to: str | None = None
    """The platform's authority, if a proxy is to connect to it; then TLS begins behind the tunnel."""
    proxy_authorization: str | None = field(default=None, repr=False)
    """What the proxy is told: with CONNECT, or else with each request."""

    @property
    def platform(self) -> str:
        """The platform's authority; only for TLS, for in plain HTTP a proxy is all that a connection knows."""
        return self.tunnel_to or self.authority


class Connection:
    """A connected socket, in TLS once ``start_tls`` is done."""

    def __init__(self, sock: socket.socket, route: Route) -> None:
        self.sock: socket.socket = sock
        self.route: Route = route
        self.incoming: bytearray = bytearray()
        """What has come and was not read yet."""
        self.sent: int = 0
        """Bytes that the socket has taken; who begins a request sets it to 0, for a handshake sends some, too."""
        self.has_ended: bool = False
        """Whether the peer sends no more."""
        self.failure: OSError | None = None
        """What broke it; what came before still counts."""
        self.is_reusable: bool = False
        """Whether the last reply leaves it fit for another request; who reads a reply sets it."""
        self.idle_since: float = 0.0
        """By ``time.monotonic``; kept by the pool."""
        self._outgoing = bytearray()
        self._plaintext = bytearray()
        self._tls: ssl.SSLObject | None = None
        self._encrypted_in, self._encrypted_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._record = bytearray()  # the TLS record that has come in part: OpenSSL does not tell that it has one

    def send(self, data: bytes) -> None:
        """Have these bytes sent by the next calls of ``flush``."""
        if self._tls is None:
            self._outgoing += data
        else:
            self._plaintext += data

    @property
    def has_unsent(self) -> bool:
        """Whether the socket has yet to take something."""
        return bool(self._outgoing or self._plaintext)

    def flush(self) -> None:
        """Send as much as the socket takes now; a failure is kept, for the peer may have said why."""
        try:
            while self.has_unsent:
                if not self._outgoing:
                    self._encrypt()
                sent = self.sock.send(self._outgoing)
                self.sent += sent
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError as exc:
            self._outgoing.clear()
            self._plaintext.clear()
            self.failure = exc

    def receive(self) -> None:
        """Take what has come; a failure is kept, for what came before it still counts."""
        try:
            for _ in range(PIECES):
                data = self.sock.recv(PIECE)
                self._take(data)
                if len(data) < PIECE:
                    break
        except BlockingIOError:
            pass
        except OSError as exc:
            self.failure = self.failure or exc

    @property
    def has_leftovers(self) -> bool:
        """Whether the last request has left something behind: a byte either way, an end, or a failure."""
        return bool(self.incoming or self._record or self.has_unsent or self.has_ended or self.failure)

    def is_quiet(self) -> bool:
        """Whether nothing is left over of the last request, and nothing has come since: not even an end."""
        return not self.has_leftovers and not is_ready([self.sock], READ)

    def close(self) -> None:
        """Close the socket; twice does no harm."""
        self.sock.close()

    async def start_tls(self, context: ssl.SSLContext, hops: Hops) -> None:
        """Do the TLS handshake with the platform; raises OSError, of which ssl.SSLError is one."""
        host, _ = host_and_port(self.route.platform)
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
            if self.failure is not None:
                raise self.failure
            with contextlib.suppress(BlockingIOError):
                data = self.sock.recv(PIECE)
                self._feed(data)
                return

    async def until_ready(self, hops: Hops) -> bool:
        """Wait until something has come or, if something is left, more can be sent; False at the deadline."""
        if self.failure is not None:
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


async def dial(route: Route, hops: Hops) -> Connection:
    """Look the host up and connect to the first of its addresses that answers; raises OSError."""
    host, port = host_and_port(route.authority, 443 if route.is_tls and not route.tunnel_to else 80)
    lookup = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    addresses = await hops.run(lookup, may_hang=True)
    return Connection(await _connect(deque(_interleaved(addresses)), hops), route)


def _interleaved(addresses: list[Any]) -> Iterator[Any]:
    """Alternate between the address families, the first one's first (RFC 8305, 4)."""
    families: dict[int, list[Any]] = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    for row in itertools.zip_longest(*families.values()):
        yield from (address for address in row if address is not None)


async def _connect(addresses: deque[Any], hops: Hops) -> socket.socket:
    """Try an address after the other, without waiting long for one before the next is begun (RFC 8305, 5)."""
    failure: OSError = OSError("no address found")
    give_up_at = time.monotonic() + CONNECT_TIMEOUT
    trying: list[socket.socket] = []
    try:
        while addresses or trying:
            if addresses:
                try:
                    trying.append(_begin_to_connect(addresses.popleft()))
                except OSError as exc:
                    if exc.errno in OUT_OF_DESCRIPTORS and not trying:
                        raise
                    failure = exc
                    continue
            seconds = give_up_at - time.monotonic()
            is_last_wait = not addresses or seconds <= ATTEMPT_DELAY
            is_one_ready = await hops.until_ready(
                *trying, events=WRITE, seconds=seconds if is_last_wait else ATTEMPT_DELAY
            )
            if is_last_wait and not is_one_ready:
                raise TimeoutError("timed out")
            for sock in [sock for sock in trying if is_ready([sock], WRITE)]:
                trying.remove(sock)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not error:
                    return sock
                sock.close()
                failure = OSError(error, os.strerror(error))
        raise failure
    finally:
        for sock in trying:
            sock.close()


def _begin_to_connect(address: Any) -> socket.socket:
    family, kind, protocol, _, where = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex(where)
        if error not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            raise OSError(error, os.strerror(error))
    except BaseException:
        sock.close()
        raise
    return sock


def host_and_port(address: str, default_port: int = 0) -> tuple[str, int]:
    """Take a URL's host and port apart."""
    from urllib.parse import urlsplit  # not needed to import this module, and not cheap

    parts = urlsplit(f"//{address}")
    return parts.hostname or "", parts.port or default_port
