"""A new SQLite database of a test is a copy of one that has all migrations: they take 20 ms, and a copy takes 2.

Tests of the store itself, of upgrades and of programs make theirs as a user does."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
import uuid
from pathlib import Path

from instar.store import sqlite as store_module

MAKE_THEIR_OWN = ("tests/store/", "tests/upgrade/", "tests/cli/", "tests/lifecycle/test_startup_trouble.py")
_template: Path | None = None
_making = threading.Lock()


def install() -> None:
    """In this process of pytest."""
    migrate = store_module.SqliteStore._open_and_migrate

    def open_and_migrate(self: store_module.SqliteStore) -> sqlite3.Connection:
        global _template
        if not self._path.exists() and not os.environ.get("PYTEST_CURRENT_TEST", "tests/store/").startswith(MAKE_THEIR_OWN):
            with _making:  # several stores may open at once, each in a thread
                if _template is None:
                    path = Path(tempfile.mkdtemp(prefix="instar-migrated-")) / "instar.db"
                    migrate(store_module.SqliteStore(path, durable=False)).close()
                    _template = path
            _copy(_template, self._path)
        return migrate(self)

    store_module.SqliteStore._open_and_migrate = open_and_migrate  # type: ignore[method-assign]


def remove() -> None:
    """What this process has made."""
    if _template is not None:
        shutil.rmtree(_template.parent, ignore_errors=True)


def _copy(template: Path, path: Path) -> None:
    """Whole, or not at all: others may open the same one at this moment."""
    new = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):  # what cannot be written here is found out by the store itself
        shutil.copyfile(template, new)
        new.chmod(0o600)
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
        new.unlink()
