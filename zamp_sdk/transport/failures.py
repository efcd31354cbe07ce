"""What went wrong, and what a person should do about it.

What the network, a peer or this machine's limits can cause is an ``OSError`` (``PeerError`` is one, too), and becomes a
``Failure`` here. Everything else is a mistake of this package and surfaces as one.
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

from .messages import Failure, Request, authority

if TYPE_CHECKING:
    from .connections import Route


class PeerError(OSError):
    """A peer has said something that is of no use; the text may quote it, and so its secrets.

    Attributes:
        may_retry: Whether asking again may help.
    """

    def __init__(self, message: str, *, may_retry: bool = True) -> None:
        super().__init__(message)
        self.may_retry = may_retry


class SettingsError(OSError):
    """This machine's own settings (a variable, a file that one names) make a connection impossible."""


class TunnelError(PeerError):
    """A proxy has refused to connect to the platform."""

    def __init__(self, status_code: int) -> None:
        from http.client import responses

        reason = f"{status_code} {responses.get(status_code, '')}".rstrip()
        may_retry = status_code >= 500 or status_code in (408, 425, 429)
        super().__init__(f"Tunnel connection failed: {reason}", may_retry=may_retry)
        self.status_code = status_code


def explain(exc: OSError, request: Request, route: Route | None, *, may_have_left: bool) -> Failure:
    """Say what happened, where, and what to do about it."""
    origin = authority(request.base_url)
    where = origin if route is None or not route.is_through_proxy else f"{origin} through the proxy {route.authority}"
    what = str(exc)
    if isinstance(exc, PeerError):  # or else it is in the system's words, and the system may be out of everything
        what = request.redact(what, route.secrets if route is not None else ())
    what = what or type(exc).__name__
    doing = "no reply from" if may_have_left else "cannot connect to"
    exc.__context__ = exc.__traceback__ = None  # frames hold the token
    return Failure(
        f"{doing} {where}: {what}{_advice(exc, route, origin)}",
        may_have_left,
        _may_retry(exc),
        cause=None if isinstance(exc, PeerError) else exc,  # a PeerError's text may quote the token
    )


def _may_retry(exc: OSError) -> bool:
    """Whether the same request may fare better later."""
    if isinstance(exc, PeerError):
        return exc.may_retry
    if isinstance(exc, ssl.SSLError):
        is_untrusted = isinstance(exc, ssl.SSLCertVerificationError)
        return not (is_untrusted or exc.reason in WANTS_CLIENT_CERTIFICATE | NO_COMMON_TLS)
    return not isinstance(exc, SettingsError)


def _advice(exc: OSError, route: Route | None, host: str) -> str:
    """Say what a person should do about it, where that is known."""
    if isinstance(exc, ssl.SSLError):
        return _tls_advice(exc, host)
    if isinstance(exc, TunnelError):
        return _tunnel_advice(exc, host)
    if isinstance(exc, ConnectionRefusedError):
        what = "the proxy" if route is not None and route.is_through_proxy else "the platform"
        return f"; nothing listens there: check the address of {what}, or whether it is up"
    return ""


def _tunnel_advice(exc: TunnelError, host: str) -> str:
    if exc.status_code in (401, 407):  # tinyproxy says 401
        return "; put the proxy's user name and password into HTTPS_PROXY"
    if exc.may_retry:
        return f"; the proxy cannot reach {host} now"
    return f"; the proxy does not let you through to {host}: ask for it, or name the host in NO_PROXY"


# --- certificates and TLS ---------------------------------------------------------------------------------------------

WANTS_CLIENT_CERTIFICATE = frozenset({"TLSV13_ALERT_CERTIFICATE_REQUIRED"})
"""OpenSSL's reasons that say that a client without a certificate is sent away (RFC 8446, 6.2). Up to TLS 1.2 a server
says no more than that the handshake failed."""

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

# OpenSSL's X509_V_ERR_ codes (x509_vfy.h), by what a person has to do.
NOT_YET_VALID_OR_EXPIRED = (9, 10)
UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
WRONG_HOST = (62, 64)


def _tls_advice(exc: ssl.SSLError, host: str) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return _certificate_advice(exc, host)
    if exc.reason in WANTS_CLIENT_CERTIFICATE:
        return "; it wants a certificate of its clients, which this package cannot give"
    if exc.reason in NO_COMMON_TLS:
        return "; does it speak TLS 1.2 or later there, and without a certificate of its clients?"
    return ""


def _certificate_advice(exc: ssl.SSLCertVerificationError, host: str) -> str:
    code = exc.verify_code
    if code in UNKNOWN_AUTHORITY:
        return _authority_advice()
    if code in WRONG_HOST:
        return (
            f"; the certificate there does not name this host among its subject alternative names (a common name does "
            f"not count): check the base URL, how {host} is reached, or the certificate"
        )
    if code in NOT_YET_VALID_OR_EXPIRED:
        return "; check this machine's clock, or have the platform's certificate renewed"
    return "; the certificate there, or one of its authorities', is to blame: have it made anew without this fault"


def _authority_advice() -> str:
    """Say why an authority may be unknown here."""
    paths = ssl.get_default_verify_paths()
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        path = os.environ.get(variable)
        if path is not None and not os.access(path, os.R_OK):
            shown = f"names {path}, which does not exist or cannot be read" if path else "is set, but empty"
            return f"; {variable} {shown}, so that its authorities are not trusted"
    if paths.cafile is None and paths.capath is None:
        return (
            f"; this machine has no authorities to trust: neither {paths.openssl_cafile} nor {paths.openssl_capath} "
            "exists (install the package ca-certificates, or set SSL_CERT_FILE)"
        )
    return "; if its CA is private, set SSL_CERT_FILE to the CA's PEM file"
