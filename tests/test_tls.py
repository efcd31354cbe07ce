"""Whom to trust, and what a person is told where a certificate or this machine's settings are to blame."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import RSA_1024, Authority
from tests.conftest import (
    OUT_OF_DESCRIPTORS,
    Pace,
    Resolver,
    execute,
    handle_at,
    posix_only,
    request_to,
    run_script,
    start,
)
from tests.servers import (
    ACTION_ID,
    RESULT,
    Server,
    reply,
    running,
    server_context,
)
from zamp_sdk import HttpClientError
from zamp_sdk.transport import Exchange, Failure, send, tls

# --- the context ------------------------------------------------------------------------------------------------------


async def test_one_tls_context_is_made(pace: Pace, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the authorities is slow, so it is done once for all connections; none of them trusts a common name."""
    contexts: list[ssl.SSLContext] = []
    create = ssl.create_default_context

    def create_default_context() -> ssl.SSLContext:
        contexts.append(create())
        return contexts[-1]

    monkeypatch.setattr(ssl, "create_default_context", create_default_context)
    with Server(tls) as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, {"Connection": "close"}))
        await asyncio.gather(*(start(server.url) for _ in range(5)))
        assert server.connections == 5
    (context,) = contexts
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert not context.hostname_checks_common_name
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


async def test_tls_1_2_is_spoken(pace: Pace, tls: ssl.SSLContext) -> None:
    """A server whose newest TLS is 1.2 is spoken to, over one connection."""
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    with Server(tls) as server:
        server.on("GET", running)
        assert await execute(server.url) == RESULT
        assert server.connections == 1


@pytest.mark.parametrize("beside_file", [False, True])
async def test_the_authorities_in_ssl_cert_dir_are_trusted(
    beside_file: bool, ca: Authority, localhost: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_DIR names a directory of certificates under their hashes; SSL_CERT_FILE beside it takes nothing away."""
    asked = ["openssl", "x509", "-noout", "-subject_hash", "-in", str(ca.file)]
    name_hash = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    (tmp_path / f"{name_hash}.0").write_bytes(ca.file.read_bytes())
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    if beside_file:
        monkeypatch.setenv("SSL_CERT_FILE", str(Authority(tmp_path).file))
    with Server(server_context(localhost)) as server:
        assert await execute(server.url) == RESULT


async def test_authorities_that_come_late_are_read(
    ca: Authority, localhost: Path, pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose first request came before the CA file existed recovers by itself."""
    path = tmp_path / "ca.pem"
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with Server(server_context(localhost)) as server:
        with pytest.raises(HttpClientError, match="which does not exist"):
            await start(server.url)
        path.write_bytes(ca.file.read_bytes())
        assert await execute(server.url) == RESULT
        assert server.count("POST") == 1


NO_DESCRIPTOR_FOR_TLS = (
    OUT_OF_DESCRIPTORS
    + """
async def main(plain, secure):
    await start(plain)
    await asyncio.sleep(1.1)  # so that no start takes that connection
    import http.client, ssl, urllib.request, zamp_sdk.transport.exchange
    leave(1)
    try:
        print(await start(secure))
    except HttpClientError as exc:
        print(exc.may_have_started)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(await start(secure))
asyncio.run(main(*sys.argv[1:]))
"""
)


@posix_only
def test_a_first_tls_connection_without_descriptors_spoils_no_later_one(tls: ssl.SSLContext) -> None:
    """The authorities that could not be read for want of a descriptor are read when there is one."""
    with Server() as plain, Server(tls) as secure:
        done = run_script(NO_DESCRIPTOR_FOR_TLS, plain.url, secure.url, SSL_CERT_FILE=os.environ["SSL_CERT_FILE"])
        assert (done.stdout.splitlines()[-1:], done.stderr) == ([ACTION_ID], "")
        assert secure.count("POST") <= 2


def test_what_stood_in_for_the_context_for_a_while_is_not_kept(trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test tool that has replaced ssl.SSLContext leaves no context of its own behind."""
    its_own: Any = types.SimpleNamespace()
    with monkeypatch.context() as patch:
        patch.setattr(ssl, "SSLContext", types.SimpleNamespace)
        patch.setattr(ssl, "create_default_context", lambda: its_own)
        assert tls.tls_context() is its_own
    assert tls.tls_context() is not its_own
    assert tls.tls_context() is tls.tls_context()


async def test_a_dot_that_ends_the_hosts_name_is_in_no_certificate(
    resolver: Resolver, ca: Authority, trusted: Path, pace: Pace
) -> None:
    """A full name, with its dot, is looked up as it is; TLS knows it without (RFC 6066, 3)."""
    context = server_context(ca.issue("platform.test"))
    asked: list[str | None] = []

    def note(_: Any, name: str | None, __: Any) -> None:
        asked.append(name)

    context.sni_callback = note
    with Server(context) as server:
        resolver.answers = [server.port]
        assert await execute("https://platform.test.") == RESULT
        assert resolver.hosts == ["platform.test."]
        assert asked == ["platform.test"]


# --- advice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
async def test_certificates_that_do_not_exist_are_named(
    variable: str, localhost: Path, pace: Pace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL says nothing of a path that does not exist; the error does."""
    path = str(tmp_path / "nowhere")
    monkeypatch.setenv(variable, path)
    with Server(server_context(localhost)) as server:
        with pytest.raises(HttpClientError, match=f"{variable} names {path}, which does not exist") as caught:
            await start(server.url)
        assert not caught.value.may_have_started
        assert server.connections == 1


BLAME = "the certificate there, or one of its authorities', is to blame"


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check certificates as strictly as Python 3.13 and later do, on every Python."""
    create = ssl.create_default_context

    def create_default_context() -> ssl.SSLContext:
        context = create()
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", create_default_context)


async def refused(context: ssl.SSLContext) -> Failure:
    """Return why a server is not spoken to; trying again would not help, and nothing of the request has left."""
    with Server(context) as server:
        outcome = await send(Exchange(request_to(f"https://localhost:{server.port}"), 10.0))
        assert server.requests == []
    assert isinstance(outcome, Failure)
    assert (outcome.may_have_left, outcome.may_retry) == (False, False)
    return outcome


@pytest.mark.parametrize(
    ("wrong", "says", "advice"),
    [
        pytest.param(
            {"days": (-2, -1)}, "certificate has expired", "check this machine's clock, or have", id="expired"
        ),
        pytest.param({"days": (1, 2)}, "not yet valid", "check this machine's clock, or have", id="not yet valid"),
        pytest.param(
            {"hosts": ["elsewhere.test"]}, "localhost", "does not name this host among its subject", id="another host"
        ),
        pytest.param(
            {"hosts": [], "common_name": "localhost"}, "localhost", "a common name does not count", id="common name"
        ),
        pytest.param({"extensions": {"extendedKeyUsage": "clientAuth"}}, "purpose", BLAME, id="for clients only"),
    ],
)
async def test_a_bad_certificate_is_told_from_an_unknown_authority(
    wrong: dict[str, Any], says: str, advice: str, ca: Authority, trusted: Path
) -> None:
    """What is wrong with a certificate is told, with what to do; the authority is not to blame, which is trusted."""
    wrong = dict(wrong)
    outcome = await refused(server_context(ca.issue(*wrong.pop("hosts", ["localhost"]), **wrong)))
    assert says in outcome.message
    assert advice in outcome.message
    assert "SSL_CERT_FILE" not in outcome.message


@pytest.mark.parametrize(
    ("of_authority", "of_server", "says"),
    [
        pytest.param({}, {"authorityKeyIdentifier": None}, "Authority Key Identifier", id="no key identifier"),
        pytest.param({"basicConstraints": "CA:TRUE"}, {}, "Basic Constraints", id="constraints that are not critical"),
    ],
)
@pytest.mark.usefixtures("strict")
async def test_a_certificate_that_breaks_rules_is_to_blame(
    of_authority: dict[str, str | None],
    of_server: dict[str, str | None],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What newer Pythons do not accept any more is named, and nobody is sent to set SSL_CERT_FILE, which is set."""
    authority = Authority(tmp_path, extensions=of_authority)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    outcome = await refused(server_context(authority.issue("localhost", extensions=of_server)))
    assert says.lower() in outcome.message.lower()
    assert BLAME in outcome.message
    assert "SSL_CERT_FILE" not in outcome.message


async def test_a_weak_key_is_to_blame(ca: Authority, trusted: Path) -> None:
    """A certificate whose key OpenSSL finds too weak is to blame, and not the authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if getattr(context, "security_level", 0) < 2:
        pytest.skip("this OpenSSL takes weak keys, or this Python does not say whether it does")
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.load_cert_chain(ca.issue("localhost", key=RSA_1024))
    outcome = await refused(context)
    assert "key too weak" in outcome.message
    assert BLAME in outcome.message


async def test_an_unknown_authority_is_told_with_what_to_do(localhost: Path) -> None:
    """A certificate of a private authority is not to blame: the authority's own has to be made known."""
    outcome = await refused(server_context(localhost))
    assert outcome.message.endswith("; if its CA is private, set SSL_CERT_FILE to the CA's PEM file")


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
async def test_an_empty_variable_is_named(variable: str, localhost: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is set, but empty, takes the default authorities away, which OpenSSL does not say."""
    monkeypatch.setenv(variable, "")
    outcome = await refused(server_context(localhost))
    assert outcome.message.endswith(f"; {variable} is set, but empty, so that its authorities are not trusted")


async def test_a_machine_without_authorities_is_told(localhost: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where OpenSSL's own places do not exist, as in a bare container, the error names them and what to install."""
    nowhere: Any = None  # which the stub does not know
    paths = ssl.DefaultVerifyPaths(
        nowhere, nowhere, "SSL_CERT_FILE", "/nowhere/cert.pem", "SSL_CERT_DIR", "/nowhere/certs"
    )
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    outcome = await refused(server_context(localhost))
    assert "this machine has no authorities to trust" in outcome.message
    assert "neither /nowhere/cert.pem nor /nowhere/certs exists" in outcome.message
    assert "ca-certificates" in outcome.message


@pytest.mark.parametrize("kind", ["no folder", "a folder", "a file's inside"])
async def test_a_key_log_that_cannot_be_written_is_named(
    kind: str, localhost: Path, trusted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSLKEYLOGFILE is Python's own business; where it cannot be written, the error says so, and is final."""
    path = {"no folder": tmp_path / "nowhere" / "log", "a folder": tmp_path, "a file's inside": trusted / "log"}[kind]
    monkeypatch.setenv("SSLKEYLOGFILE", str(path))
    outcome = await refused(server_context(localhost))
    assert f"SSLKEYLOGFILE names {path}, which cannot be written: " in outcome.message


async def test_a_key_log_that_can_be_written_does_no_harm(
    pace: Pace, tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the variable names a file, keys are written there, and the action runs."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "log"))
    with Server(tls) as server:
        assert await execute(server.url) == RESULT
    assert (tmp_path / "log").read_text(encoding="ascii")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_platform_that_wants_a_certificate_of_its_clients_is_told(
    version: ssl.TLSVersion, ca: Authority, localhost: Path, trusted: Path, pace: Pace
) -> None:
    """In both versions of TLS the error speaks of the client's certificate, and a poll is not sent again."""
    context = server_context(localhost, clients=ca.file)
    context.minimum_version = context.maximum_version = version
    with Server(context) as server:
        with pytest.raises(HttpClientError, match="certificate of its clients") as caught:
            await handle_at(server.url).result()
        assert caught.value.action_id == ACTION_ID
        assert (server.connections, server.requests) == (1, [])
