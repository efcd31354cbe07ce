"""Which way to a platform: straight, or through the proxy that ``urllib.request`` knows of.

Where the proxies and their exceptions come from is urllib.request's business: the variables ``HTTP_PROXY``,
``HTTPS_PROXY`` and ``NO_PROXY`` in either case, or the system's settings on macOS and Windows; ``ALL_PROXY`` is not
among them. A platform's route is found once and kept. What their values mean is read here, and more leniently: blanks
around a URL, a user name without a password, exceptions on several lines, and IPv6 addresses without their brackets.

A proxy is told its user name and password, and nobody else is. For an https platform it is asked for a tunnel with
CONNECT (RFC 9110, 9.3.6), behind which TLS begins; so it sees neither the token nor the data. For a plain http platform
it is sent the request itself.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from urllib.parse import unquote, urlsplit

from .connections import Connection, Route, host_of
from .failures import PeerError, SettingsError, TunnelError
from .hops import Hops
from .messages import authority, is_this_machine
from .reading import ReplyReader

MAX_ROUTES = 64
"""Platforms whose routes are kept in mind; a program speaks to one or two."""

logger: logging.Logger = logging.getLogger("zamp_sdk")

_routes: dict[str, Route] = {}  # by base URL


async def find_route(base_url: str, hops: Hops) -> Route:
    """Return the way to a platform; urllib.request is asked only where there may be a proxy."""
    route = _routes.get(base_url)
    if route is None:
        if _may_have_proxy():
            import urllib.request  # noqa: F401  # here and not in the thread: a child forked meanwhile could not

            route = await hops.look_up(functools.partial(_ask_for_route, base_url))
        else:
            route = _straight(base_url)
        if len(_routes) >= MAX_ROUTES:
            _routes.clear()
        _routes[base_url] = route
        if route.is_through_proxy and is_this_machine(base_url):
            logger.warning(
                "%s is this machine, but the proxy %s is asked for it, and sees the token and the data: "
                "set NO_PROXY=localhost,127.0.0.1,::1",
                base_url,
                route.authority,
            )
    return route


async def dig_tunnel(connection: Connection, hops: Hops) -> None:
    """Have the proxy connect to the platform; raises OSError, of which TunnelError is one."""
    platform = connection.route.tunnel_to or ""
    if urlsplit(f"//{platform}").port is None:
        platform += ":443"
    lines = [f"CONNECT {platform} HTTP/1.1", f"Host: {platform}"]
    if connection.route.proxy_authorization:
        lines.append(f"Proxy-Authorization: {connection.route.proxy_authorization}")
    connection.write("\r\n".join([*lines, "", ""]).encode("ascii"))
    reader = ReplyReader("CONNECT")
    reply = None
    while reply is None:
        connection.flush()
        if not await connection.until_ready(hops):
            raise TimeoutError("timed out")
        connection.receive()
        reply = reader.proceed(connection.incoming, has_ended=connection.has_ended)
        if reply is None and connection.broken_by is not None:
            raise connection.broken_by
    if not 200 <= reply.status_code < 300:
        raise TunnelError(reply.status_code)
    if connection.incoming:  # in TLS it would look as if the platform had said it
        raise PeerError("the proxy sent more than its reply to CONNECT")


def _may_have_proxy() -> bool:
    """Whether urllib.request may know of a proxy: from a variable, or from the settings of macOS and Windows."""
    return sys.platform in ("darwin", "win32") or any(name.lower().endswith("_proxy") for name in os.environ)


def _ask_for_route(base_url: str) -> Route:
    """Ask urllib.request; in a thread, for macOS and Windows may look the host up to see whether it is an exception."""
    import urllib.request  # which takes 20 ms, and most machines have no proxy

    scheme, origin = base_url.split(":", maxsplit=1)[0], authority(base_url)
    proxy = urllib.request.getproxies().get(scheme, "").strip()
    if not proxy or _is_exception(origin):
        return _straight(base_url)
    return _through(proxy, scheme, origin)


def _is_exception(origin: str) -> bool:
    """Whether NO_PROXY, or the system's settings, name this host."""
    import urllib.request

    if urllib.request.proxy_bypass(origin):
        return True
    # It splits NO_PROXY at commas alone, and knows IPv6 addresses as a URL has them, in brackets.
    names = urllib.request.getproxies().get("no", "").lower().replace(",", " ").split()
    places = (f".{origin}", f".{host_of(origin)}")
    return any(place.endswith("." + name.lstrip(".")) for place in places for name in names)


def _through(proxy: str, scheme: str, origin: str) -> Route:
    """Read the URL of a proxy, which is not quoted in a SettingsError, for it may hold a password."""
    variable = f"{scheme.upper()}_PROXY"
    if "://" in proxy and not proxy.lower().startswith("http://"):
        kind = proxy.partition("://")[0]  # urllib would speak plain HTTP to it
        raise SettingsError(f"{variable} names a {kind}:// proxy, and only http:// proxies can be used")
    try:
        proxy.encode()  # a variable may hold octets that are no text
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        where = parts.netloc.rpartition("@")[2]
        is_cut_short = where.endswith(":")  # as "http:/proxy.example" is: its host would be "http"
        if is_cut_short or parts.port == 0 or not host_of(where).encode("idna"):  # what dialing will do with it
            raise ValueError("no host or port")
    except ValueError:  # which a UnicodeError is
        raise SettingsError(f"{variable} is not a URL like http://proxy.example:3128") from None
    return Route(
        is_tls=scheme == "https",
        authority=where,
        is_through_proxy=True,
        tunnel_to=origin if scheme == "https" else None,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
    )


def _straight(base_url: str) -> Route:
    return Route(base_url.startswith("https:"), authority(base_url))
