"""The story of one request and its reply, from top to bottom: ``converse``.

The event loop directs the request from beginning to end, and lends it to one hop at a time. It waits in the pool's line
for room, takes an idle connection or makes a new one (dial, CONNECT, TLS handshake), has a hop send the request, waits
until something comes, and has a hop read it, until the reply is whole. Whatever ends it early (a deadline, a
cancellation, Ctrl-C) passes through one ``finally``, which gives the connection back: at once, or when a hop that still
works on it has ended. So nothing is ever closed under a thread, and no thread has to be woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
import time
from typing import TYPE_CHECKING, Any

from .connections import Connection
from .dialing import OUT_OF_DESCRIPTORS, dial
from .failures import PeerError, explain
from .hops import READ, Hops, is_ready
from .messages import HELD_BACK, Exchange
from .pool import Pool, shared_pool
from .reading import ReplyReader
from .routes import dig_tunnel, find_route
from .tls import forget_tls_context, tls_context

if TYPE_CHECKING:
    from .connections import Route

logger: logging.Logger = logging.getLogger("zamp_sdk")


async def converse(exchange: Exchange) -> Any:
    """Send the exchange's request, once; return what ``request.read`` makes of the reply, a Failure, or HELD_BACK."""
    request = exchange.request
    pool = shared_pool()
    laps = [("", time.monotonic())]  # what was done, and until when
    await pool.enter()
    if exchange.is_held_back():
        pool.leave()
        return HELD_BACK
    laps.append(("in line", time.monotonic()))
    hops = Hops(exchange.timeout)
    route = connection = conversation = None
    try:
        route = await find_route(request.base_url, hops)
        connection = pool.take(route, for_start=request.method == "POST")
        if connection is None:
            connection = await _connect(route, pool, hops, laps)
        conversation = _Conversation(exchange, connection, hops)
        await hops.run(conversation.begin)
        while not conversation.is_over:
            is_in_time = await connection.until_ready(hops)
            await hops.run(functools.partial(conversation.proceed, is_last=not is_in_time))
        pool.learn(time.monotonic() - exchange.sent_at)
        laps.append(("for the reply", time.monotonic()))
        _log(exchange, conversation.status_code, laps)
        return exchange.answer
    except asyncio.CancelledError:
        if conversation is not None and hops.is_at_rest:
            conversation.look_once_more()
        raise
    except OSError as exc:
        if isinstance(exc, ssl.SSLCertVerificationError):
            forget_tls_context()
        failure = explain(exc, request, route, may_have_left=conversation is not None and conversation.has_begun)
        _log(exchange, failure.message, laps)
        return failure
    finally:
        may_keep = conversation is not None and conversation.may_keep_connection
        hops.when_at_rest(functools.partial(pool.leave, connection, may_keep=may_keep))
        # A hop that still runs may be about to send; asked in this order, for it may end meanwhile.
        exchange.may_have_left = conversation is not None and (not hops.is_at_rest or conversation.has_begun)


async def _connect(route: Route, pool: Pool, hops: Hops, laps: list[tuple[str, float]]) -> Connection:
    """Make a connection to the platform that is ready for a request; raises OSError."""

    def meanwhile() -> None:
        """Do what the first request needs, and takes 30 ms and more, while the network is waited for anyway.

        Not in a thread, whose locks a child forked at that moment would wait for. Later it is done already.
        """
        from . import sending  # noqa: F401  # for the hop that sends

        if route.is_tls:
            tls_context()

    reach = functools.partial(dial, route.host, route.port, hops, meanwhile)
    try:
        sock = await reach()
    except OSError as exc:
        if exc.errno not in OUT_OF_DESCRIPTORS or not pool.close_idle():
            raise
        sock = await reach()
    connection = Connection(sock, route)
    laps.append(("looking up and connecting", time.monotonic()))
    try:
        if route.tunnel_to:
            await dig_tunnel(connection, hops)
        if route.is_tls:
            await connection.start_tls(tls_context(), hops)
            laps.append(("for TLS", time.monotonic()))
    except BaseException:
        hops.when_at_rest(connection.close)  # the room stays the request's
        raise
    return connection


class _Conversation:
    """What hops do for one request on one connection."""

    def __init__(self, exchange: Exchange, connection: Connection, hops: Hops) -> None:
        self.is_over: bool = False
        """Whether the reply is whole, and ``exchange.answer`` was made of it."""
        self._exchange = exchange
        self._connection = connection
        self._hops = hops
        self._reader = ReplyReader(exchange.request.method)
        self._sent_before = connection.bytes_sent

    def begin(self) -> None:
        """Send the request as far as the socket takes it, and read the reply if that comes at once."""
        from .sending import open_request

        # The pool has looked, but the hop may have been long in coming here: what has come since is no reply to this.
        if self._connection.idle_since and not self._connection.is_quiet():
            raise PeerError("the peer closed an idle connection, or sent what nobody had asked for")
        open_request(self._connection, self._exchange.request, self._reader, self._send)

    def _send(self) -> None:
        if not self._hops.remaining():  # it was long in coming to a thread; nothing was sent yet
            raise TimeoutError("timed out")
        self._connection.flush()
        self._exchange.sent_at = time.monotonic()
        patience = self._hops.patience
        if patience and not self._connection.has_unsent and is_ready([self._connection.sock], READ, patience):
            self.proceed()

    def proceed(self, *, is_last: bool = False) -> None:
        """Send more, receive more, and read it.

        A reply may come before the whole request has left, for its body is too large, say. It counts, and ends the
        request.

        Args:
            is_last: There is no time for more: an unsuccessful reply counts with as much of its body as has come.

        Raises:
            PeerError: What came is no reply.
            OSError: The connection broke before the reply was whole.
            TimeoutError: It is not whole, and this is the last look.
        """
        connection = self._connection
        connection.flush()
        connection.receive()
        reply = self._reader.proceed(
            connection.incoming,
            has_ended=connection.has_ended,
            is_last=is_last or connection.broken_by is not None,
        )
        if reply is not None:
            self._exchange.answer = self._exchange.request.read(reply._replace(secrets=connection.route.secrets))
            self.is_over = True
        elif connection.broken_by is not None:
            raise connection.broken_by
        elif is_last:
            raise TimeoutError("timed out")

    def look_once_more(self) -> None:
        """In the loop, after a cancellation: a start's reply may have come meanwhile, and nobody can ask again.

        What has not left by now stays here: half a start is none yet.
        """
        is_sent = self.has_begun and not self._connection.has_unsent
        if self._exchange.request.method == "POST" and is_sent and not self.is_over:
            with contextlib.suppress(OSError):
                self.proceed(is_last=True)

    @property
    def has_begun(self) -> bool:
        """Whether a byte of the request has left."""
        return self._connection.bytes_sent > self._sent_before

    @property
    def status_code(self) -> int:
        """The reply's; 0 before its head is there."""
        return 0 if self._reader.head is None else self._reader.head.status_code

    @property
    def may_keep_connection(self) -> bool:
        """Whether another request may use the connection: its reply is whole, and nothing is left of either."""
        return self.is_over and self._reader.may_keep_connection and not self._connection.has_leftovers


def _log(exchange: Exchange, outcome: object, laps: list[tuple[str, float]]) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        request = exchange.request
        times = ", ".join(f"{(end - begin) * 1000:.0f} {what}" for (_, begin), (what, end) in zip(laps, laps[1:]))
        logger.debug(
            "%s %s%s: %s, %.0f ms (%s)",
            request.method,
            request.base_url,
            request.path,
            outcome,
            (time.monotonic() - laps[0][1]) * 1000,
            times,
        )
