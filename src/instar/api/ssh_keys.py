"""Public keys as users give them, and key pairs made for them. Used by the key pair resource; blocks: call in a thread."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from instar.errors import BadRequest

KEY_MAX_LENGTH = 16_384
RSA_BITS = 2048  # what the oldest guests still accept
CERTIFICATE_DAYS = 3650
_SSH_TYPES = frozenset(
    {
        "ssh-rsa", "ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
        "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
    }
)  # fmt: skip


class KeyMaterial(NamedTuple):
    """`private_key` is there only for a pair that was made here; it is shown once and never kept."""

    public_key: str
    fingerprint: str
    private_key: str | None = None


def _colons(digest: str) -> str:
    return ":".join(re.findall("..", digest))


def import_ssh(text: str) -> KeyMaterial:
    """An OpenSSH public key line. Raises BadRequest for anything else, such as a private key or a second line."""
    line = text.strip()
    refusal = BadRequest("Keypair data is invalid: failed to generate fingerprint")
    if len(line) > KEY_MAX_LENGTH or "\n" in line or "\r" in line:
        raise refusal
    parts = line.split(None, 2)
    if len(parts) < 2 or parts[0] not in _SSH_TYPES:
        raise refusal
    try:
        blob = base64.b64decode(parts[1], validate=True)
    except (binascii.Error, ValueError) as error:
        raise refusal from error
    kind = parts[0].encode()
    if blob[: 4 + len(kind)] != len(kind).to_bytes(4, "big") + kind:
        raise refusal
    try:
        serialization.load_ssh_public_key(f"{parts[0]} {parts[1]}".encode())
    except UnsupportedAlgorithm:
        pass  # a kind of key that is known to guests but not to our library
    except ValueError as error:
        raise refusal from error
    return KeyMaterial(line, _colons(hashlib.md5(blob, usedforsecurity=False).hexdigest()))


def import_x509(text: str) -> KeyMaterial:
    """A PEM certificate. Raises BadRequest for anything else."""
    if len(text) > KEY_MAX_LENGTH:
        raise BadRequest("Keypair data is invalid: the certificate is too long")
    try:
        certificate = x509.load_pem_x509_certificate(text.encode())
    except (ValueError, UnicodeEncodeError) as error:
        raise BadRequest("Keypair data is invalid: failed to generate X509 fingerprint") from error
    # SHA-1 is how clients know a certificate's fingerprint; nothing is decided by it.
    return KeyMaterial(text, _colons(certificate.fingerprint(hashes.SHA1()).hex()))  # noqa: S303


def generate_ssh() -> KeyMaterial:
    """A new RSA pair: public key as an OpenSSH line, private key as PEM."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    made = import_ssh(public.decode() + " Generated-by-Instar")
    return made._replace(private_key=_pem(key, serialization.PrivateFormat.TraditionalOpenSSL))


def generate_x509(user_name: str) -> KeyMaterial:
    """A new certificate for logging in to Windows guests, signed by its own key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, user_name[:64] or "user")])
    principal = x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), _der_text(f"{user_name[:64]}@localhost"))
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([principal]), critical=False)
        .sign(key, hashes.SHA256())
    )
    made = import_x509(certificate.public_bytes(serialization.Encoding.PEM).decode())
    return made._replace(private_key=_pem(key, serialization.PrivateFormat.PKCS8))


def _pem(key: rsa.RSAPrivateKey, form: serialization.PrivateFormat) -> str:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


def _der_text(text: str) -> bytes:
    data = text.encode()
    return bytes((0x0C, len(data))) + data if len(data) < 128 else bytes((0x0C, 0x81, len(data))) + data
