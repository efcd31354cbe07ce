"""Whom to trust: the one TLS context of the process, made when the first connection needs it.

It trusts what OpenSSL trusts by default on this machine. ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` each replace only their
own kind: with ``SSL_CERT_FILE`` alone, the default directory stays trusted. It speaks TLS 1.2 or later, and takes the
host's name from a certificate's subject alternative names alone.
"""

from __future__ import annotations

import functools
import os
import ssl

from .failures import SettingsError


def tls_context() -> ssl.SSLContext:
    """Return the context; the first time this reads the authorities, for 20 to 40 ms.

    Raises:
        SettingsError: ``SSLKEYLOGFILE`` names a file that cannot be written.
        OSError: No descriptor is left to read the authorities with.
    """
    return _context_of(ssl.SSLContext)  # in whose place a test tool may put its own for a while


def forget_tls_context() -> None:
    """Read the authorities anew next time: their file, or a descriptor for it, may have been missing."""
    _context_of.cache_clear()


@functools.lru_cache(maxsize=1)
def _context_of(_kind: type) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context()
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as exc:
        path = os.environ.get("SSLKEYLOGFILE")
        raise SettingsError(f"SSLKEYLOGFILE names {path}, which cannot be written: {exc.strerror}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    return context
