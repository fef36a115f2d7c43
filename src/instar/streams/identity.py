"""A key and a self-signed certificate, made once for each directory: who a host (or the API's process) is to its peers.

No authority signs anything: each side is told the other's certificate over the bus and trusts exactly that one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from instar.errors import StartupError
from instar.model.stream import StreamAddress

VALID = timedelta(days=3650)
RENEW_BEFORE = timedelta(days=365)
CLOCK_SKEW = timedelta(days=1)


class StreamIdentity:
    """`certificate` is what peers are told (PEM); the key never leaves its file."""

    def __init__(self, file: Path, certificate: str) -> None:
        self._file = file
        self.certificate = certificate

    @classmethod
    def open(cls, directory: Path) -> StreamIdentity:
        """The identity kept in `directory`, made now if there is none or if it ends within a year. Blocks for
        milliseconds. Raises StartupError when others can read the key, or when the file is not ours."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = directory / "stream.pem"
        if not file.exists():
            _make(file, replace=False)
        certificate = _read(file)
        if certificate.not_valid_after_utc - datetime.now(UTC) < RENEW_BEFORE:
            _make(file, replace=True)
            certificate = _read(file)
        return cls(file, certificate.public_bytes(serialization.Encoding.PEM).decode())

    def address(self, host: str) -> StreamAddress:
        """What a client without a server is granted things by."""
        return StreamAddress(host=host, address="", port=0, certificate=self.certificate)

    def server_context(self, trusted: list[str]) -> ssl.SSLContext:
        """For a server: only the given certificates (PEM) get through the handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # no session is taken up later: each connection shows its certificate
        return self._finish(context, trusted)

    def client_context(self, trusted: str) -> ssl.SSLContext:
        """For a client: only a server with the given certificate (PEM) is spoken to."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the certificate itself is pinned, names mean nothing
        return self._finish(context, [trusted])

    def _finish(self, context: ssl.SSLContext, trusted: list[str]) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._file)
        if trusted:
            context.load_verify_locations(cadata="\n".join(trusted))
        return context


def normalized(certificate: str) -> str:
    """One certificate as PEM, and nothing that a peer may have written around it. Raises ValueError."""
    return x509.load_pem_x509_certificate(certificate.encode()).public_bytes(serialization.Encoding.PEM).decode()


def fingerprint(certificate: str) -> bytes:
    """SHA-256 of a certificate (PEM). Raises ValueError."""
    return x509.load_pem_x509_certificate(certificate.encode()).fingerprint(hashes.SHA256())


def _read(file: Path) -> x509.Certificate:
    if file.stat().st_mode & 0o077:
        raise StartupError(f"{file} can be read by others: it holds a private key and must have mode 0600.")
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError as error:
        raise StartupError(f"{file} holds no certificate: remove it, and a new one is made.") from error


def _make(file: Path, *, replace: bool) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own: OpenSSL looks up what it trusts by the name.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"instar-stream-{secrets.token_hex(8)}")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALID)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        if replace:
            part.replace(file)
        else:
            with contextlib.suppress(FileExistsError):  # another process was first: its identity is the one
                os.link(part, file)
    finally:
        part.unlink(missing_ok=True)
