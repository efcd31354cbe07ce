"""Certificates that must not be trusted, and the variables by which a user has a private CA trusted."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any, Callable

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.peers.conftest import absent, find_program, run_program
from tests.servers import RESULT, TOKEN, Server, server_context, tls_1_1_context
from zamp_sdk import ActionExecutor, HttpClientError


def self_signed(ca: trustme.CA) -> ssl.SSLContext:
    """Nobody but itself says whose it is: an authority's own certificate on a server."""
    stranger = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with stranger.cert_pem.tempfile() as cert, stranger.private_key_pem.tempfile() as key:
        context.load_cert_chain(cert, key)
    return context


def unknown_ca(ca: trustme.CA) -> ssl.SSLContext:
    """An authority has signed it that the client has never heard of."""
    return server_context(trustme.CA().issue_cert("127.0.0.1", "localhost"))


def expired(ca: trustme.CA) -> ssl.SSLContext:
    """It was good until 2021."""
    return server_context(
        ca.issue_cert("127.0.0.1", "localhost", not_before=datetime(2020, 1, 1), not_after=datetime(2021, 1, 1))
    )


def not_yet_valid(ca: trustme.CA) -> ssl.SSLContext:
    """It will be good in 2090."""
    return server_context(
        ca.issue_cert("127.0.0.1", "localhost", not_before=datetime(2090, 1, 1), not_after=datetime(2091, 1, 1))
    )


def wrong_host(ca: trustme.CA) -> ssl.SSLContext:
    """It is good, but for another host."""
    return server_context(ca.issue_cert("elsewhere.test"))


def common_name_only(ca: trustme.CA) -> ssl.SSLContext:
    """The host stands where it has not counted since RFC 2818."""
    issuer = x509.load_pem_x509_certificate(ca.cert_pem.bytes())
    authority = serialization.load_pem_private_key(ca.private_key_pem.bytes(), password=None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()  # trustme's always have a subjectAltName
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2020, 1, 1))
        .not_valid_after(datetime(2090, 1, 1))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem = trustme.Blob(
        key.private_bytes(serialization.Encoding.PEM, *plain) + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pem.tempfile() as path:
        context.load_cert_chain(path)
    return context


BAD_CERTIFICATES = pytest.mark.parametrize(
    ("make", "says", "advises"),
    [
        (self_signed, "self.signed certificate", "set SSL_CERT_FILE to the CA's PEM file"),
        (unknown_ca, "unable to get local issuer certificate", "set SSL_CERT_FILE to the CA's PEM file"),
        (expired, "certificate has expired", "this machine's clock"),
        (not_yet_valid, "certificate is not yet valid", "this machine's clock"),
        (wrong_host, "certificate is not valid for 'localhost'", "is for another host: check the base URL"),
        (common_name_only, "certificate is not valid for 'localhost'", "is for another host: check the base URL"),
    ],
)


def local_url(server: Server) -> str:
    """Return the server's URL with its host's name instead of its address."""
    return f"https://localhost:{server.port}"


async def failed_start(server: Server) -> HttpClientError:
    """Try to execute an action there, and return why it failed."""
    with pytest.raises(HttpClientError) as caught:
        await ActionExecutor.execute("an_action", {}, base_url=local_url(server), auth_token=TOKEN)
    return caught.value


@BAD_CERTIFICATES
async def test_a_start_never_reaches_a_server_with_a_bad_certificate(
    ca: trustme.CA, trusted: Path, make: Callable[[trustme.CA], ssl.SSLContext], says: str, advises: str
) -> None:
    """It fails at once and with no doubt, not one request arrives, and the message says what to do about this fault."""
    with Server(make(ca)) as server:
        error = await failed_start(server)
    assert server.requests == []
    assert server.connections == 1
    assert not error.may_have_started
    assert error.status_code is None
    assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
    assert re.search(says, str(error))
    assert advises in str(error)
    assert ("SSL_CERT_FILE" in str(error)) == ("SSL_CERT_FILE" in advises)
    assert f"localhost:{server.port}" in str(error)


@BAD_CERTIFICATES
async def test_a_poll_never_reaches_a_server_with_a_bad_certificate(
    ca: trustme.CA, trusted: Path, make: Callable[[trustme.CA], ssl.SSLContext], says: str, advises: str
) -> None:
    """It fails at once as well, for waiting would not help, and the error carries the action's id."""
    with Server(make(ca)) as server:
        handle = ActionExecutor.get_handle("an-action", base_url=local_url(server), auth_token=TOKEN)
        with pytest.raises(HttpClientError) as caught:
            await handle.result()
    assert server.requests == []
    assert server.connections == 1
    assert caught.value.action_id == "an-action"


async def test_the_common_name_would_do_for_a_laxer_client(ca: trustme.CA, trusted: Path) -> None:
    """The server with a common name only is one that Python's defaults accept: it is refused on purpose."""
    context = ssl.create_default_context()
    context.hostname_checks_common_name = True
    with Server(common_name_only(ca)) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        context.wrap_socket(sock, server_hostname="localhost").close()


async def test_tls_1_1_is_not_spoken(localhost: trustme.LeafCert, trusted: Path) -> None:
    """A server with nothing newer is not talked to, which is told at once."""
    with Server(_tls_1_1(localhost)) as server:
        error = await failed_start(server)
    assert server.requests == []
    assert server.connections == 1
    assert not error.may_have_started
    assert "TLS 1.2" in str(error)


def _tls_1_1(certificate: trustme.LeafCert) -> ssl.SSLContext:
    """A TLS 1.1 server that works, as a client proves which speaks it: or else the test above would prove nothing."""
    lax = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    lax.check_hostname = False
    lax.verify_mode = ssl.CERT_NONE
    lax.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    lax.set_ciphers("DEFAULT:@SECLEVEL=0")
    try:
        context = tls_1_1_context(certificate)
        with Server(context) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
            tls = lax.wrap_socket(sock)
            assert tls.version() == "TLSv1.1"
            tls.close()
    except ssl.SSLError as exc:
        absent(f"this OpenSSL cannot speak TLS 1.1, not even to prove that it is refused: {exc}")
    return context


async def test_ssl_cert_file_makes_a_private_ca_trusted(ca: trustme.CA, tls: ssl.SSLContext) -> None:
    """With SSL_CERT_FILE the same authority's good certificate is accepted, by name and by address."""
    with Server(tls) as server:
        for url in (local_url(server), server.url):
            assert await ActionExecutor.execute("an_action", {}, base_url=url, auth_token=TOKEN) == RESULT


async def test_ssl_cert_dir_makes_a_private_ca_trusted(
    ca: trustme.CA, localhost: trustme.LeafCert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does SSL_CERT_DIR, a folder as ``openssl rehash`` makes it."""
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    subprocess.run([find_program("openssl", "openssl"), "rehash", tmp_path], check=True, timeout=30)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with Server(server_context(localhost)) as server:
        assert await ActionExecutor.execute("an_action", {}, base_url=server.url, auth_token=TOKEN) == RESULT


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
async def test_a_variable_that_names_nothing_is_blamed(
    ca: trustme.CA, localhost: trustme.LeafCert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """OpenSSL trusts nobody and says nothing where the variable names no file: the message says it."""
    monkeypatch.setenv(variable, str(tmp_path / "absent"))
    with Server(server_context(localhost)) as server:
        error = await failed_start(server)
    assert f"{variable} names {tmp_path / 'absent'}, which does not exist" in str(error)
    assert server.requests == []


@pytest.mark.parametrize("trusting", [True, False])
def test_a_program_needs_nothing_but_the_variable(localhost: trustme.LeafCert, trusted: Path, trusting: bool) -> None:
    """A program of its own, with SSL_CERT_FILE in its environment, gets its result; without, the advice to set it."""
    with Server(server_context(localhost)) as server:
        environment: dict[str, Any] = {**os.environ, "ZAMP_BASE_URL": local_url(server), "ZAMP_AUTH_TOKEN": TOKEN}
        if not trusting:
            del environment["SSL_CERT_FILE"]
        done = run_program(environment)
    if trusting:
        assert (done.stdout, done.stderr) == (f"{RESULT}\n", "")
    else:
        assert "set SSL_CERT_FILE" in done.stderr
        assert TOKEN not in done.stderr
        assert server.requests == []
