"""Users of the broker for hosts' agents, made by rabbitmqctl. For `instar admin bus-user`, private brokers and tests."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from instar.bus.permissions import Permissions
from instar.errors import StartupError

Control = Callable[..., str]  # rabbitmqctl: arguments, and `stdin`
_HASHING = "rabbit_password_hashing_sha256"  # the broker's own default
_SALT_BYTES = 4


class BusUser(NamedTuple):
    name: str
    password: str
    permissions: Permissions


def ensure_user(control: Control, vhost: str, user: str, permissions: Permissions, password: str) -> None:
    """The user is there, with this password and these permissions. Blocking. Raises StartupError.

    In one step, and the password only as its hash: nobody can log in before all is in force."""
    ensure_users(control, vhost, [BusUser(user, password, permissions)])


def ensure_users(control: Control, vhost: str, users: Iterable[BusUser]) -> None:
    """The same for many, in one call: rabbitmqctl takes half a second to begin. Blocking. Raises StartupError."""
    definitions: dict[str, list[dict[str, str]]] = {"users": [], "permissions": [], "topic_permissions": []}
    for name, password, may in users:
        of_user = {"user": name, "vhost": vhost}
        definitions["users"].append(
            {"name": name, "password_hash": _hash(password), "hashing_algorithm": _HASHING, "tags": ""}
        )
        definitions["permissions"].append(of_user | {"configure": may.configure, "write": may.write, "read": may.read})
        definitions["topic_permissions"] += [
            of_user | {"exchange": one.exchange, "write": one.write, "read": one.read} for one in may.topics
        ]
    control("import_definitions", stdin=msgspec.json.encode(definitions).decode())


def _hash(password: str) -> str:
    """As RabbitMQ keeps it: salt, and SHA-256 of salt and password. Passwords here are 256 random bits."""
    salt = secrets.token_bytes(_SALT_BYTES)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def remove_user(control: Control, user: str) -> None:
    """Its connections end. Blocking. Raises StartupError."""
    control("delete_user", user)


def password_in(path: Path) -> str:
    """What the file holds, for its owner alone; a new password where there is no file. Raises StartupError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise StartupError(f"The file {path} cannot be written: {error.strerror}.") from error
    password = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(password + "\n")
    return password
