"""Certificates for the servers of the tests, good ones and every kind of bad one, made by the program ``openssl``.

No package is needed for them, as the one that is usual (cryptography) has no wheel for some of the Pythons that the
tests run on. A certificate is a PEM file that has its key, too, as ``ssl.SSLContext.load_cert_chain`` and nginx read
them. One takes about 15 ms to make.
"""

from __future__ import annotations

import ipaddress
import secrets
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

EC = ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")
"""A key as it should be, and quick to make; in openssl's words."""

RSA_1024 = ("rsa:1024",)
"""A key that OpenSSL's default security level (2: at least 112 bits of security) finds too weak."""

SERVER = {
    "basicConstraints": "critical,CA:FALSE",
    "subjectKeyIdentifier": "hash",
    "authorityKeyIdentifier": "keyid",
    "keyUsage": "critical,digitalSignature",
    "extendedKeyUsage": "serverAuth,clientAuth",
}
"""The extensions of a good certificate (RFC 5280, 4.2), but for the hosts, in the words of openssl's x509v3_config."""

CA = {
    "basicConstraints": "critical,CA:TRUE",
    "subjectKeyIdentifier": "hash",
    "keyUsage": "critical,keyCertSign,cRLSign",
}
"""The extensions of a good authority's own certificate."""

CONFIG = """\
[req]
distinguished_name = subject
[subject]
[ca]
default_ca = authority
[authority]
database = {folder}/index.txt
new_certs_dir = {folder}
rand_serial = yes
unique_subject = no
default_md = sha256
policy = subject_of
x509_extensions = extensions
[subject_of]
commonName = optional
organizationName = optional
[extensions]
{extensions}
"""


class Authority:
    """A certificate authority that only the tests know.

    Args:
        folder: Where it keeps its files, in a folder of its own.
        extensions: What its own certificate has otherwise than ``CA``; None leaves one out.
        key: The key that it signs with, in openssl's words.
    """

    def __init__(
        self, folder: Path, *, extensions: Mapping[str, str | None] | None = None, key: Sequence[str] = EC
    ) -> None:
        self.folder: Path = Path(tempfile.mkdtemp(prefix="authority-", dir=folder))
        (self.folder / "index.txt").touch()  # openssl's list of what it has issued
        self._count = 0
        subject = f"/O=zamp-sdk tests/CN=authority {secrets.token_hex(4)}"
        self.itself: Path = self._sign(subject, {**CA, **(extensions or {})}, key, (-1, 30), is_itself=True)
        """Its own certificate with its key."""
        self.file: Path = self.folder / "ca.pem"
        """Its own certificate alone, for those who are to trust it."""
        pem = self.itself.read_text(encoding="ascii")
        self.file.write_text(pem[pem.index("-----BEGIN CERTIFICATE") :], encoding="ascii")

    def issue(
        self,
        *hosts: str,
        common_name: str = "",
        days: tuple[float, float] = (-1, 30),
        extensions: Mapping[str, str | None] | None = None,
        key: Sequence[str] = EC,
    ) -> Path:
        """Issue a certificate and return its file; without more it is a good one, for a server or for a client.

        Args:
            hosts: Names and addresses that it is for.
            common_name: What may stand in its subject beside them.
            days: From when and until when it is good, in days from now.
            extensions: What it has otherwise than ``SERVER``, as ``{"authorityKeyIdentifier": None}``, which leaves
                one out.
            key: What key it has, in openssl's words.
        """
        names = ",".join(f"{'IP' if _is_address(host) else 'DNS'}:{host}" for host in hosts)
        subject = "/O=zamp-sdk tests" + (f"/CN={common_name}" if common_name else "")
        return self._sign(subject, {**SERVER, "subjectAltName": names or None, **(extensions or {})}, key, days)

    def _sign(
        self,
        subject: str,
        extensions: Mapping[str, str | None],
        key: Sequence[str],
        days: tuple[float, float],
        *,
        is_itself: bool = False,
    ) -> Path:
        self._count += 1
        certificate = self.folder / f"{self._count}.pem"
        config, private, request = (self.folder / name for name in ("openssl.cnf", "key.pem", "request.pem"))
        # A key identifier that is not mentioned is added by openssl.
        lines = [f"{name} = {value or 'none'}" for name, value in extensions.items() if value or "Identifier" in name]
        config.write_text(CONFIG.format(folder=self.folder, extensions="\n".join(lines)), encoding="ascii")
        asked = ("-nodes", "-keyout", private, "-out", request, "-subj", subject)
        _openssl("req", "-config", config, "-new", "-newkey", *key, *asked)
        begin, end = (f"{datetime.now(timezone.utc) + timedelta(days=day):%Y%m%d%H%M%SZ}" for day in days)
        signer = ("-selfsign", "-keyfile", private) if is_itself else ("-cert", self.file, "-keyfile", self.itself)
        signed = ("-startdate", begin, "-enddate", end, "-in", request, "-out", certificate)
        _openssl("ca", "-config", config, "-batch", "-notext", *signer, *signed)
        pem = private.read_text(encoding="ascii") + certificate.read_text(encoding="ascii")
        certificate.write_text(pem, encoding="ascii")
        return certificate


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
