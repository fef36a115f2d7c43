"""The one TOML file of a cloud, written from settings: for clouds that a program makes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from instar.config import Settings
from instar.settings_reading import describe


def settings_toml(settings: Settings) -> str:
    """Every setting that is not as by default, as a TOML document that `load` reads."""
    top: list[str] = []
    sections: dict[str, list[str]] = {}
    for info in describe(settings):
        if info.value != info.default:
            section, _, name = info.name.rpartition(".")
            lines = sections.setdefault(section, []) if section else top
            lines.append(f"{name} = {_value(info.value)}")
    for section, lines in sections.items():
        top += ["", f"[{section}]", *lines]
    return "\n".join(top) + "\n"


def write_settings(path: Path, settings: Settings) -> None:
    """Replace the file at once, for its owner's eyes alone: addresses of servers may hold passwords."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "w", encoding="utf-8") as stream:
        stream.write(settings_toml(settings))
    new.replace(path)


def _value(value: object) -> str:
    """Strings, numbers and lists are written alike in TOML and in JSON."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
