"""Folders of simulated hosts' sockets: those of processes that were killed do not stay."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from instar.hypervisor.simulated.socket_folder import SocketFolder
from tests.patience import PATIENCE_S

MAKES_ONE = (
    "import sys; from instar.hypervisor.simulated.socket_folder import SocketFolder\n"
    "folder = SocketFolder(); (folder.path / 'socket').touch(); print(folder.path, flush=True); sys.stdin.read()"
)


def test_a_folder_stays_while_its_process_lives_and_goes_after_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", MAKES_ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        of_other = Path(other.stdout.readline().strip())
        own, second = SocketFolder(), SocketFolder()
        assert set(tmp_path.iterdir()) == {of_other, own.path, second.path}
        assert (of_other / "socket").exists()
        second.remove()
    finally:
        other.kill()
        other.communicate(timeout=PATIENCE_S)
    assert of_other.exists()
    third = SocketFolder()
    assert set(tmp_path.iterdir()) == {own.path, third.path}
    own.remove()
    third.remove()
    assert not list(tmp_path.iterdir())


def test_what_is_not_such_a_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "kept").mkdir()
    (tmp_path / "instar-sim-sockets-link").symlink_to(tmp_path / "kept")
    (tmp_path / "instar-sim-sockets-file").write_text("x")
    before = set(tmp_path.iterdir())
    SocketFolder().remove()
    assert set(tmp_path.iterdir()) == before
