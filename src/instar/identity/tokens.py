"""Tokens: signed, expiring, and small. What can change (roles, enabled) is not in them but looked up: see `local.py`."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path
from typing import Any
from uuid import uuid4

import jwt
import msgspec

from instar.errors import StartupError, Unauthorized

ALGORITHM = "HS256"  # one key, made and used by this cloud alone; no other algorithm is accepted
ISSUER = "instar"
KEY_BYTES = 32


class Claims(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a token carries. At most one of project, domain and system is its scope. Times in seconds since the epoch.

    `epoch` and `project_epoch` are those of the user and the project when it was issued: a newer one in the database
    (password changed, user or project disabled) refuses the token."""

    sub: str
    jti: str
    iat: int
    exp: int
    epoch: int
    methods: list[str]
    project: str = ""
    project_epoch: int = 0
    domain: str = ""
    system: bool = False
    application_credential: str = ""


class TokenSigner:
    """Signs and verifies with a key of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, claims: Claims) -> str:
        payload: dict[str, Any] = msgspec.to_builtins(claims)
        return jwt.encode({**payload, "iss": ISSUER}, self._key, algorithm=ALGORITHM)

    def verify(self, token: str) -> Claims:
        """Raises Unauthorized for a token that is forged, malformed or expired."""
        try:
            payload = jwt.decode(
                token, self._key, algorithms=[ALGORITHM], issuer=ISSUER,
                options={"require": ["exp", "iat", "jti", "sub"], "verify_iat": False},
            )  # fmt: skip
            return msgspec.convert(payload, Claims)
        except (jwt.InvalidTokenError, msgspec.ValidationError, ValueError) as error:
            raise Unauthorized() from error


def new_token_id() -> str:
    return uuid4().hex


def load_key(path: Path) -> bytes:
    """The key in `path`, made at the first call, readable by its owner alone. Blocking: call it in a thread.

    Raises StartupError when it cannot be read or others can read it."""
    try:
        if not path.exists():
            _make_key(path)
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StartupError(f"The token key {path.name} can be read by others: chmod 600 it, or delete it.")
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise StartupError(f"The token key {path.name} cannot be used: {error.__class__.__name__}.") from error
    if len(key) != KEY_BYTES:
        raise StartupError(f"The token key {path.name} must have {KEY_BYTES} bytes, in hexadecimal.")
    return key


def _make_key(path: Path) -> None:
    """Written whole under another name first: a crash leaves no half key, and two starts agree on one."""
    draft = path.with_name(f"{path.name}.{uuid4().hex}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
