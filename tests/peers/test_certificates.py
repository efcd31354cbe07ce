"""Certificates that must not be trusted, and the variables by which a user has a private CA trusted."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.certificates import Authority
from tests.peers.conftest import absent, find_program, run_program
from tests.servers import RESULT, TOKEN, Server, server_context, tls_1_1_context
from zamp_sdk import ActionExecutor, HttpClientError


def self_signed(ca: Authority) -> Path:
    """Nobody but itself says whose it is: an authority's own certificate on a server."""
    return Authority(ca.folder).itself


def unknown_ca(ca: Authority) -> Path:
    """An authority has signed it that the client has never heard of."""
    return Authority(ca.folder).issue("127.0.0.1", "localhost")


def expired(ca: Authority) -> Path:
    """It was good until a year ago."""
    return ca.issue("127.0.0.1", "localhost", days=(-730, -365))


def not_yet_valid(ca: Authority) -> Path:
    """It will be good in a year."""
    return ca.issue("127.0.0.1", "localhost", days=(365, 730))


def wrong_host(ca: Authority) -> Path:
    """It is good, but for another host."""
    return ca.issue("elsewhere.test")


def common_name_only(ca: Authority) -> Path:
    """The host stands where it has not counted since RFC 2818."""
    return ca.issue(common_name="localhost")


BAD_CERTIFICATES = pytest.mark.parametrize(
    ("make", "says", "advises"),
    [
        (self_signed, "self.signed certificate", "set SSL_CERT_FILE to the CA's PEM file"),
        (unknown_ca, "unable to get local issuer certificate", "set SSL_CERT_FILE to the CA's PEM file"),
        (expired, "certificate has expired", "this machine's clock"),
        (not_yet_valid, "certificate is not yet valid", "this machine's clock"),
        (
            wrong_host,
            "certificate is not valid for 'localhost'",
            "does not name this host among its subject alternative names",
        ),
        (
            common_name_only,
            "certificate is not valid for 'localhost'",
            "does not name this host among its subject alternative names",
        ),
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
    ca: Authority, trusted: Path, make: Callable[[Authority], Path], says: str, advises: str
) -> None:
    """It fails at once and with no doubt, not one request arrives, and the message says what to do about this fault."""
    with Server(server_context(make(ca))) as server:
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
    ca: Authority, trusted: Path, make: Callable[[Authority], Path], says: str, advises: str
) -> None:
    """It fails at once as well, for waiting would not help, and the error carries the action's id."""
    with Server(server_context(make(ca))) as server:
        handle = ActionExecutor.get_handle("an-action", base_url=local_url(server), auth_token=TOKEN)
        with pytest.raises(HttpClientError) as caught:
            await handle.result()
    assert server.requests == []
    assert server.connections == 1
    assert caught.value.action_id == "an-action"


async def test_the_common_name_would_do_for_a_laxer_client(ca: Authority, trusted: Path) -> None:
    """The server with a common name only is one that Python's defaults accept: it is refused on purpose."""
    context = ssl.create_default_context()
    context.hostname_checks_common_name = True
    with (
        Server(server_context(common_name_only(ca))) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        context.wrap_socket(sock, server_hostname="localhost").close()


async def test_tls_1_1_is_not_spoken(localhost: Path, trusted: Path) -> None:
    """A server with nothing newer is not talked to, which is told at once."""
    with Server(_tls_1_1(localhost)) as server:
        error = await failed_start(server)
    assert server.requests == []
    assert server.connections == 1
    assert not error.may_have_started
    assert "TLS 1.2" in str(error)


def _tls_1_1(certificate: Path) -> ssl.SSLContext:
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


async def test_ssl_cert_file_makes_a_private_ca_trusted(ca: Authority, tls: ssl.SSLContext) -> None:
    """With SSL_CERT_FILE the same authority's good certificate is accepted, by name and by address."""
    with Server(tls) as server:
        for url in (local_url(server), server.url):
            assert await ActionExecutor.execute("an_action", {}, base_url=url, auth_token=TOKEN) == RESULT


async def test_ssl_cert_dir_makes_a_private_ca_trusted(
    ca: Authority, localhost: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does SSL_CERT_DIR, a folder as ``openssl rehash`` makes it."""
    shutil.copy(ca.file, tmp_path)
    subprocess.run([find_program("openssl", "openssl"), "rehash", tmp_path], check=True, timeout=30)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with Server(server_context(localhost)) as server:
        assert await ActionExecutor.execute("an_action", {}, base_url=server.url, auth_token=TOKEN) == RESULT


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
async def test_a_variable_that_names_nothing_is_blamed(
    ca: Authority, localhost: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """OpenSSL trusts nobody and says nothing where the variable names no file: the message says it."""
    monkeypatch.setenv(variable, str(tmp_path / "absent"))
    with Server(server_context(localhost)) as server:
        error = await failed_start(server)
    assert f"{variable} names {tmp_path / 'absent'}, which does not exist" in str(error)
    assert server.requests == []


@pytest.mark.parametrize("trusting", [True, False])
def test_a_program_needs_nothing_but_the_variable(localhost: Path, trusted: Path, trusting: bool) -> None:
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
