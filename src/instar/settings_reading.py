"""How settings are read (one TOML file, then INSTAR_<SECTION>_<NAME> variables on top), told to another process, and shown.

Called by every command that starts a process, and by `instar config show`."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import Meta

from instar.config import Settings
from instar.errors import StartupError

URLS = frozenset({"database", "bus"})  # settings that may have a password in them


def without_password(url: str) -> str:
    """The URL with stars where it has a password: for people and logs."""
    url = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)
    return re.sub(r"([?&](?:password|sslpassword)=)[^&]*", r"\1***", url)


class SettingInfo(NamedTuple):
    name: str  # section.name
    value: object
    default: object
    unit: str
    description: str


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from a TOML file (none: defaults) and the environment. Raises StartupError that names the setting."""
    try:
        tree: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
    except OSError as error:
        raise StartupError(f"The settings file cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"The settings file is not valid TOML: {error}.") from error
    for info in describe(Settings()):
        variable = "INSTAR_" + info.name.replace(".", "_").upper()
        if variable in environ:
            section, _, name = info.name.rpartition(".")
            target = tree.setdefault(section, {}) if section else tree
            text = environ[variable]
            if isinstance(target, dict):  # else the file is wrong there, and refused below
                parts = [part.strip() for part in text.split(",") if part.strip()]
                target[name] = parts if isinstance(info.default, tuple) else text
    try:
        return msgspec.convert(tree, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise StartupError(f"A setting is wrong: {error}.") from error


def environment_of(settings: Settings) -> dict[str, str]:
    """The INSTAR_* variables with which `load` gives these settings again, in another process."""
    variables = {}
    for info in describe(settings):
        if info.value != info.default:
            text = ",".join(map(str, info.value)) if isinstance(info.value, tuple) else str(info.value)
            variables["INSTAR_" + info.name.replace(".", "_").upper()] = text
    return variables


def describe(settings: Settings) -> Iterator[SettingInfo]:
    """Every setting with its value, default, unit and purpose, in the order of `config.py`."""
    yield from _describe(settings, "")


def _describe(struct: msgspec.Struct, prefix: str) -> Iterator[SettingInfo]:
    hints = get_type_hints(type(struct), include_extras=True)
    default = type(struct)()
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, msgspec.Struct):
            yield from _describe(value, f"{prefix}{name}.")
            continue
        meta = next(extra for extra in get_args(hints[name]) if isinstance(extra, Meta))
        unit = (meta.extra or {}).get("unit", "")
        yield SettingInfo(prefix + name, value, getattr(default, name), unit, meta.description or "")
