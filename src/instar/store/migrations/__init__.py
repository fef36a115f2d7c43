"""Forward migrations: files `NNNN_subject.sql`, applied in order, each in one transaction, never changed afterwards."""

from __future__ import annotations

import re
from importlib import resources
from typing import NamedTuple


class Migration(NamedTuple):
    number: int
    name: str
    statements: tuple[str, ...]


def _statements(text: str) -> tuple[str, ...]:
    """Statements of a migration: separated by `;` at the end of a line, comments dropped."""
    code = re.sub(r"--.*$", "", text, flags=re.MULTILINE)
    return tuple(part.strip() for part in re.split(r";\s*$", code, flags=re.MULTILINE) if part.strip())


def all_migrations() -> list[Migration]:
    """Every migration of this version, in order."""
    found = []
    for entry in resources.files(__name__).iterdir():
        match = re.fullmatch(r"(\d{4})_(\w+)\.sql", entry.name)
        if match:
            found.append(Migration(int(match[1]), match[2], _statements(entry.read_text(encoding="utf-8"))))
    return sorted(found)
