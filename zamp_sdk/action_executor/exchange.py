"""One request and its reply, from top to bottom. ``exchange`` is the story; the rest of the transport is its words.

The event loop directs the request from beginning to end, and lends it to one hop at a time. It waits in the pool's
line for room, takes an idle connection or makes a new one (dial, CONNECT, TLS handshake), has a hop send the request,
waits until something comes, and has a hop read it, until the reply is whole. Whatever ends it early (a deadline, a
cancellation, Ctrl-C) passes through one ``finally``, which gives the connection back: at once, or when a hop that still
works on it has ended. So nothing is ever closed under a thread, and no thread has to be woken.

What the network, a peer or this machine's limits can cause is an ``OSError`` (``PeerError`` and ``NoThreadError`` are,
too) and becomes a ``Failure`` here, with advice. Everything else is a mistake of this package and surfaces as one.

This module, and with it all that a request needs, is imported by the loop before the first request: 25 ms, once. No
hop imports a module: a child that is forked meanwhile would find it half imported, and locked for ever.
"""

from __future__ import annotations

import functools
import http.client
import logging
import os
import ssl
import sys
from typing import TYPE_CHECKING

from . import messages
from .connections import OUT_OF_DESCRIPTORS, Connection, PeerError, Route, dial
from .hops import Hops, NoThreadError
from .models import authority, is_this_machine
from .pool import Pool, shared_pool
from .redaction import Redactor, one_line
from .wire import Answer, Failure, Progress, Reply, Request, may_pass

if TYPE_CHECKING:
    from .models import SdkConfig

SLOW_THREAD = 1.0
"""Seconds of waiting for a thread from which a failure mentions it: usually it is less than a millisecond."""

MAX_ROUTES = 64
"""Platforms whose routes are kept in mind; a program speaks to one or two."""

logger: logging.Logger = logging.getLogger("zamp_sdk")

_routes: dict[str, Route] = {}  # by base URL


async def exchange(
    config: SdkConfig, request: Request, timeout: float, *, user_agent: str, progress: Progress
) -> Answer:
    """Send one request, once, and return its reply, or a Failure that says why there is none.

    Args:
        config: Where to, and as whom.
        request: What to send.
        user_agent: As what program.
        timeout: Seconds for all of it together; waiting in the pool's line does not count.
        progress: Says afterwards, however this ends, whether a byte of the request may have left.
    """
    pool = shared_pool()
    await pool.enter()
    hops = Hops(timeout)
    route = connection = reply = None
    try:
        route = await _find_route(config.base_url, hops)
        connection = pool.take(route, for_start=request.method == "POST")
        if connection is None:
            connection = await _connect(route, pool, hops)
        connection.sent = 0  # what leaves from now on is the request
        outcome = await hops.run(functools.partial(_open, connection, config, request, user_agent, hops))
        reply = await _whole_reply(outcome, connection, hops)
        return reply
    except OSError as exc:
        was_sent = connection is not None and connection.sent > 0
        return _failure(exc, config, route, hops, pool, was_sent=was_sent)
    finally:
        is_at_rest = hops.when_at_rest(functools.partial(pool.leave, connection, may_keep=reply is not None))
        # A hop that still runs may be about to send.
        progress.sent = connection is not None and (connection.sent > 0 or not is_at_rest)


def _open(
    connection: Connection, config: SdkConfig, request: Request, user_agent: str, hops: Hops
) -> Reply | messages.ReplyReader:
    """In a hop: send the request. Only here is the token plain text, for as long as it takes to write it."""
    headers = {
        **request.headers,
        "Authorization": f"Bearer {config.auth_token}",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": user_agent,
    }
    try:
        return messages.open_request(connection, config.base_url + request.path, request, headers, hops)
    except messages.RouteChangedError:  # NO_PROXY, say: the next request asks for its way again
        _routes.clear()
        messages.forget_proxies()
        raise


async def _whole_reply(outcome: Reply | messages.ReplyReader, connection: Connection, hops: Hops) -> Reply:
    """Wait for what has not come yet of a reply, and have it read, until it is whole."""
    while not isinstance(outcome, Reply):
        is_in_time = await connection.until_ready(hops)
        read = functools.partial(outcome.proceed, is_last=not is_in_time)
        try:
            outcome = await hops.run(read)
        except NoThreadError:
            outcome = read()  # in the loop: a moment of it is worth less than a reply that has come
    return outcome


# --- the way to the platform ------------------------------------------------------------------------------------------


async def _find_route(base_url: str, hops: Hops) -> Route:
    """Return the way to a platform, which is remembered; urllib.request is asked only where there may be a proxy."""
    route = _routes.get(base_url)
    if route is not None:
        return route
    origin = authority(base_url)
    if _may_have_proxy():
        route = await hops.run(functools.partial(messages.find_route, base_url), may_hang=True)
        if route.authority != origin and is_this_machine(base_url):
            logger.warning(
                "%s is this machine, but the proxy %s is asked for it, and sees the token and the data: "
                "set NO_PROXY=localhost,127.0.0.1",
                base_url,
                route.authority,
            )
    else:
        route = Route(base_url.startswith("https:"), origin)
    if len(_routes) >= MAX_ROUTES:
        _routes.clear()
    _routes[base_url] = route
    return route


def _may_have_proxy() -> bool:
    """Whether urllib.request may know of a proxy: from a variable, or from the settings of macOS and Windows."""
    return sys.platform in ("darwin", "win32") or any(name.lower().endswith("_proxy") for name in os.environ)


async def _connect(route: Route, pool: Pool, hops: Hops) -> Connection:
    """Make a connection to the platform that is ready for a request; raises OSError."""
    try:
        connection = await dial(route, hops)
    except OSError as exc:
        if exc.errno not in OUT_OF_DESCRIPTORS or not pool.close_idle():
            raise
        connection = await dial(route, hops)
    pool.add(connection)
    try:
        if route.tunnel_to:
            await _dig_tunnel(connection, hops)
        if route.is_tls:
            context = pool.tls_context_at_hand
            if context is None:
                context = await hops.run(pool.tls_context)
            await connection.start_tls(context, hops)
    except BaseException:
        hops.when_at_rest(functools.partial(pool.discard, connection))
        raise
    return connection


async def _dig_tunnel(connection: Connection, hops: Hops) -> None:
    """Have the proxy connect to the platform, which http.client would wait for."""

    def ask() -> Reply | messages.ReplyReader:
        connection.send(messages.connect_request(connection.route))
        return messages.ReplyReader(connection, "CONNECT").proceed()

    reply = await _whole_reply(await hops.run(ask), connection, hops)
    if not 200 <= reply.status_code < 300:
        raise TunnelError(reply.status_code)
    if connection.incoming:  # in TLS it would look as if the platform had said it
        raise PeerError("the proxy sent more than its reply to CONNECT")


class TunnelError(PeerError):
    """A proxy has refused to connect to the platform."""

    def __init__(self, status: int) -> None:
        super().__init__(
            f"Tunnel connection failed: {status} {http.client.responses.get(status, '')}".rstrip(),
            may_retry=may_pass(status),
        )
        self.status = status


# --- what a failure says ----------------------------------------------------------------------------------------------


def _failure(
    exc: OSError, config: SdkConfig, route: Route | None, hops: Hops, pool: Pool, *, was_sent: bool
) -> Failure:
    """Say what happened, where, and what to do about it."""
    origin = authority(config.base_url)
    if isinstance(exc, ssl.SSLCertVerificationError):
        pool.forget_tls_context()
    where = origin if route is None or route.authority == origin else f"{origin} through the proxy {route.authority}"
    what = str(exc)
    if isinstance(exc, PeerError):  # or else it is in the system's words, and the system may be out of everything
        secrets = [config.auth_token]
        if route is not None and route.proxy_authorization:
            secrets.append(route.proxy_authorization.partition(" ")[2])
        what = Redactor(*secrets).text(what)
    what = one_line(what) or type(exc).__name__
    advice, may_retry = ("", getattr(exc, "may_retry", True)) if was_sent else _advice(exc, route, origin)
    message = f"no reply from {where}: {what}" if was_sent else f"cannot connect to {where}: {what}{advice}"
    if hops.queued > SLOW_THREAD:
        message += (
            f"; it waited {hops.queued:.1f} s for a thread: "
            "give the loop more with loop.set_default_executor(ThreadPoolExecutor(64))"
        )
    exc.__context__ = exc.__traceback__ = None  # frames hold the token
    cause = None if isinstance(exc, PeerError) else exc  # whose text may quote the token
    return Failure(message, was_sent, may_retry, cause)


def _advice(exc: OSError, route: Route | None, origin: str) -> tuple[str, bool]:
    """Say what a person should do about a connection that could not be made, and whether trying again may help."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return _certificate_advice(exc, origin), False
    if isinstance(exc, ssl.SSLError) and exc.reason in NO_COMMON_TLS:
        return "; does it speak TLS 1.2 or later there?", False
    if isinstance(exc, TunnelError):
        return _tunnel_advice(exc, origin), exc.may_retry
    if isinstance(exc, PeerError):
        return "", exc.may_retry
    if isinstance(exc, ConnectionRefusedError):
        what = "the proxy" if route is not None and route.authority != origin else "the platform"
        return f"; nothing listens there: check the address of {what}, or whether it is up", True
    return "", True


def _certificate_advice(exc: ssl.SSLCertVerificationError, host: str) -> str:
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        path = os.environ.get(variable)
        if path and not os.access(path, os.F_OK):
            return f"; {variable} names {path}, which does not exist, so that its authorities are not trusted"
    if exc.verify_code in HOST_MISMATCHES:
        return f"; the certificate there is for another host: check the base URL, or how {host} is reached"
    if exc.verify_code in DATES:
        return "; check this machine's clock, or have the platform's certificate renewed"
    return "; if its CA is private, set SSL_CERT_FILE to the CA's PEM file"


NO_COMMON_TLS = frozenset(
    {
        # The peer's alerts (RFC 8446, 6.2), of which others may be about a passing trouble, ...
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
        "TLSV1_ALERT_INSUFFICIENT_SECURITY",
        "TLSV1_ALERT_PROTOCOL_VERSION",
        # ... what it offers, ...
        "NO_PROTOCOLS_AVAILABLE",
        "UNKNOWN_PROTOCOL",
        "UNSUPPORTED_PROTOCOL",
        # ... and what is no TLS at all; its name depends on the version of OpenSSL.
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "UNEXPECTED_MESSAGE",
        "WRONG_VERSION_NUMBER",
    }
)
"""OpenSSL's reasons why a handshake fails that fails for good: the two sides have no version of TLS in common."""

DATES = (9, 10)
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""

HOST_MISMATCHES = (62, 64)
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""


def _tunnel_advice(exc: TunnelError, host: str) -> str:
    if exc.status in (401, 407):  # tinyproxy says 401
        return "; put the proxy's user name and password into HTTPS_PROXY"
    if exc.may_retry:
        return f"; the proxy cannot reach {host} now"
    return f"; the proxy does not let you through to {host}: ask for it, or name the host in NO_PROXY"
