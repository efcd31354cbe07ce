"""The certificates of the tests: a good one is good, and a bad one is bad in the way that its test is about."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import RSA_1024, Authority
from tests.servers import server_context


def verdict(ca: Authority, certificate: Path, *, is_strict: bool = False) -> str:
    """Return what a client that trusts the authority says of a server with this certificate; "" if it is content."""
    client = ssl.create_default_context(cafile=str(ca.file))
    client.hostname_checks_common_name = False
    client.verify_flags &= ~ssl.VerifyFlags(0x20)  # VERIFY_X509_STRICT, which Python 3.13 and later set
    if is_strict:
        client.verify_flags |= ssl.VerifyFlags(0x20)
    server = server_context(certificate)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, contextlib.suppress(OSError):  # where the client hangs up
            server.wrap_socket(theirs, server_side=True).close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours:
            client.wrap_socket(ours, server_hostname="localhost").close()
    except ssl.SSLCertVerificationError as exc:
        return exc.verify_message
    finally:
        thread.join(10)
    return ""


def test_a_good_certificate_is_good(ca: Authority) -> None:
    """A certificate for a host satisfies a strict client."""
    assert verdict(ca, ca.issue("127.0.0.1", "localhost"), is_strict=True) == ""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        pytest.param({"days": (-2, -1)}, "certificate has expired", id="expired"),
        pytest.param({"days": (1, 2)}, "certificate is not yet valid", id="not yet valid"),
        pytest.param({"key": RSA_1024}, "key too (weak|small)", id="weak key"),
    ],
)
def test_a_bad_certificate_is_bad_in_one_way(ca: Authority, how: dict[str, Any], says: str) -> None:
    """A client says what is wrong with it, and it is what was asked for."""
    assert re.search(says, verdict(ca, ca.issue("localhost", **how)))


def test_a_common_name_is_no_host(ca: Authority) -> None:
    """A certificate with a common name only is for no host at all."""
    assert "Hostname mismatch" in verdict(ca, ca.issue(common_name="localhost"))


@pytest.mark.parametrize(
    ("own", "extensions", "says"),
    [
        pytest.param({}, {"authorityKeyIdentifier": None}, "Missing Authority Key Identifier", id="no key identifier"),
        pytest.param(
            {"basicConstraints": "CA:TRUE"}, {}, "Basic Constraints of CA cert not marked critical", id="not critical"
        ),
    ],
)
def test_what_only_a_strict_client_refuses(
    ca: Authority, own: dict[str, str | None], extensions: dict[str, str | None], says: str
) -> None:
    """Without an extension that RFC 5280 asks for, a certificate is refused by strict clients, and by no others."""
    authority = Authority(ca.folder, extensions=own)
    certificate = authority.issue("localhost", extensions=extensions)
    assert verdict(authority, certificate) == ""
    assert verdict(authority, certificate, is_strict=True) == says
