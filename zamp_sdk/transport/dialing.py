"""From a host's name to a connected socket, in the loop: TCP to the first of its addresses that answers (RFC 8305).

Addresses are tried in ``getaddrinfo``'s order, the families taking turns, the next one a quarter of a second after the
last, or at once when that fails. So a dead address costs a quarter of a second and not a minute. Only the name lookup
needs a thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import socket
import time
import weakref
from collections import deque
from typing import Any, Callable, Iterator

from .hops import WRITE, Hops, is_ready

CONNECT_TIMEOUT = 10.0
"""Seconds for TCP to connect to any of a host's addresses, from the first one on. Linux itself would try for two
minutes, and a start has 30 seconds for each of its tries."""

ATTEMPT_DELAY = 0.25
"""Seconds from one address to the next while none has answered (RFC 8305, 5: the Connection Attempt Delay)."""

OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
"""What the system says when this process, or the machine, can open nothing more."""

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""Every socket that was made here and still exists, so that a forked child can close its copies."""


async def dial(host: str, port: int, hops: Hops, meanwhile: Callable[[], object]) -> socket.socket:
    """Look the host up and connect to the first of its addresses that answers; raises OSError.

    Args:
        host: A name, or an IP address.
        port: Its port.
        hops: The deadline, and the ways to wait.
        meanwhile: Called whenever an address is being connected to: what has to be done once anyway, and takes time.
    """
    lookup = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    addresses = deque(_address(host, port) or _interleaved(await hops.look_up(lookup)))
    last_error: OSError = OSError("no address found")
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
                    last_error = exc
                    continue
                meanwhile()
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
                last_error = OSError(error, os.strerror(error))
        raise last_error
    finally:
        for sock in trying:
            sock.close()


def _address(host: str, port: int) -> list[Any]:
    """Return what a lookup would, without a thread, if the host is an address already."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]
    return []


def _interleaved(addresses: list[Any]) -> Iterator[Any]:
    """Alternate between the address families, the first one's first (RFC 8305, 4)."""
    families: dict[int, list[Any]] = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    for row in itertools.zip_longest(*families.values()):
        yield from (address for address in row if address is not None)


def _begin_to_connect(address: Any) -> socket.socket:
    family, kind, protocol, _, where = address
    sock = socket.socket(family, kind, protocol)
    try:
        _sockets.add(sock)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex(where)
        if error not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            raise OSError(error, os.strerror(error))
    except BaseException:
        sock.close()
        raise
    return sock


def _close_inherited() -> None:
    for sock in list(_sockets):
        sock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
