"""clouds.yaml: how OpenStack's clients find this cloud, readable by its owner alone. Written at each start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import yaml

from instar.errors import StartupError

ADMIN_CLOUD, DEMO_CLOUD = "instar", "instar-demo"


class Passwords(msgspec.Struct, frozen=True):
    admin: str
    demo: str


def read_passwords(path: Path) -> Passwords | None:
    """The passwords that an earlier start wrote down; None when there is no file. Raises StartupError."""
    try:
        clouds = yaml.safe_load(path.read_text(encoding="utf-8"))["clouds"]
        return Passwords(clouds[ADMIN_CLOUD]["auth"]["password"], clouds[DEMO_CLOUD]["auth"]["password"])
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise StartupError(f"{path} is not a clouds.yaml that Instar wrote: move it away.") from error


def write_clouds(path: Path, url: str, region: str, passwords: Passwords) -> None:
    """Replace the file at once, 0600 from its first byte on."""
    clouds = {
        "clouds": {
            ADMIN_CLOUD: _cloud(url, region, "admin", passwords.admin),
            DEMO_CLOUD: _cloud(url, region, "demo", passwords.demo),
        }
    }
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "w", encoding="utf-8") as stream:
        yaml.safe_dump(clouds, stream, sort_keys=False)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)


def _cloud(url: str, region: str, name: str, password: str) -> dict[str, Any]:
    return {
        "auth": {
            "auth_url": f"{url}/identity/v3",
            "username": name,
            "password": password,
            "project_name": name,
            "user_domain_name": "Default",
            "project_domain_name": "Default",
        },
        "region_name": region,
        "identity_api_version": "3",
    }
