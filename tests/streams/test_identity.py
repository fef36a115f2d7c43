from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from instar.errors import StartupError
from instar.streams.identity import StreamIdentity


def test_identity_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda _: StreamIdentity.open(directory).certificate, range(8)))
    assert len(found) == 1
    assert "PRIVATE" not in found.pop()
    assert [path.name for path in directory.iterdir()] == ["stream.pem"]
    assert stat.S_IMODE((directory / "stream.pem").stat().st_mode) == 0o600


def test_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    StreamIdentity.open(tmp_path)
    (tmp_path / "stream.pem").chmod(0o644)
    with pytest.raises(StartupError, match="0600"):
        StreamIdentity.open(tmp_path)
