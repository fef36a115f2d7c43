"""Whether a path names the same directory here as where somebody else saw it: another machine may have one of that name.

A file in it says so, which whoever owns the directory has made with a random name for it. (The kernel's id of this start of
the machine would not do: hosts that one machine plays have ids of their own, and see the same directory.)
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

FILE = "place"


def ensure_place(directory: Path) -> str:
    """The directory's name as nothing else in the world has it; made at the first call. Blocking. Raises OSError."""
    if not (found := place_of(directory)):
        draft = directory / f".{FILE}.{secrets.token_hex(8)}"
        draft.write_text(secrets.token_hex(16), encoding="ascii")
        try:
            with contextlib.suppress(FileExistsError):  # another process was first: its name is the one
                os.link(draft, directory / FILE)
        finally:
            draft.unlink()
        found = place_of(directory)
    return found


def place_of(directory: Path) -> str:
    """The same of a directory of somebody else; empty when there is none here. Blocking."""
    try:
        return (directory / FILE).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def leave_place(directory: Path) -> None:
    """The directory is gone, with its name, when nothing else is in it. Blocking."""
    with contextlib.suppress(OSError):  # others are in it, or it never was
        if {path.name for path in directory.iterdir()} <= {FILE}:
            (directory / FILE).unlink(missing_ok=True)
            directory.rmdir()
