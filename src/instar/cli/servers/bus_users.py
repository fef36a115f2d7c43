"""Users of the broker for hosts' agents, made by rabbitmqctl. For `instar admin bus-user`, private brokers and tests."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from instar.bus.permissions import Permissions
from instar.errors import StartupError

Control = Callable[..., str]  # rabbitmqctl: arguments, and `stdin`


def ensure_user(control: Control, vhost: str, user: str, permissions: Permissions, password: str) -> None:
    """The user is there, with this password and no more than these permissions. Blocking. Raises StartupError."""
    users = {line.split("\t")[0] for line in control("list_users", "--no-table-headers").splitlines()}
    control("change_password" if user in users else "add_user", user, stdin=password + "\n")
    control("set_user_tags", user)
    control("clear_topic_permissions", "--vhost", vhost, user)
    for topic in permissions.topics:
        control("set_topic_permissions", "--vhost", vhost, user, topic.exchange, topic.write, topic.read)
    # Last: before it the user may do nothing, and without the lines above more than it should.
    control("set_permissions", "--vhost", vhost, user, permissions.configure, permissions.write, permissions.read)


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
