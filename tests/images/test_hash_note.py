"""A note of a file's hash holds for that file as it was, on this machine, for some time."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from instar.model import hash_note
from instar.model.hash_note import note_hash, was_hashed_lately

SHA256 = hashlib.sha256(b"data").hexdigest()


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"data")
    note_hash(path, SHA256, path.stat())
    if not os.listxattr(path):
        pytest.skip("the file system has no extended attributes")
    return path


def test_it_holds_under_every_name_of_the_file(noted: Path) -> None:
    os.link(noted, noted.with_name("other"))
    noted.chmod(0o444)
    assert was_hashed_lately(noted, SHA256)
    assert was_hashed_lately(noted.with_name("other"), SHA256)
    assert not was_hashed_lately(noted, hashlib.sha256(b"atad").hexdigest())


def test_it_does_not_hold_for_what_was_written_since(noted: Path) -> None:
    with noted.open("r+b") as file:
        file.write(b"atad")
    assert not was_hashed_lately(noted, SHA256)


def test_it_does_not_hold_for_a_copy(noted: Path) -> None:
    copy = noted.with_name("copy")
    shutil.copy2(noted, copy)
    assert os.listxattr(copy)
    assert not was_hashed_lately(copy, SHA256)


@pytest.mark.parametrize("note", ["", "x", f"{SHA256} now"])
def test_what_is_no_note_is_none(noted: Path, note: str) -> None:
    os.setxattr(noted, hash_note._NAME, note.encode())
    assert not was_hashed_lately(noted, SHA256)
    os.removexattr(noted, hash_note._NAME)
    assert not was_hashed_lately(noted, SHA256)


def test_it_ends_with_its_time_and_with_the_start_of_the_machine(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_note, "FRESH_S", 0.0)
    assert not was_hashed_lately(noted, SHA256)
    monkeypatch.undo()
    assert was_hashed_lately(noted, SHA256)
    monkeypatch.setattr(hash_note, "_boot_id", lambda: "another")
    assert not was_hashed_lately(noted, SHA256)
