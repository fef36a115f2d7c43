"""One directory, one cloud, one process."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from instar.cli.clouds_yaml import Passwords, read_passwords, write_clouds
from instar.cli.state_dir import StateDir
from instar.errors import StartupError


def test_a_second_lock_is_refused_and_names_the_process_that_has_it(tmp_path: Path) -> None:
    first, second = StateDir(tmp_path), StateDir(tmp_path)
    first.lock()
    try:
        with pytest.raises(StartupError, match=rf"pid {os.getpid()}\b"):
            second.lock()
    finally:
        first.unlock()
    second.lock()
    second.unlock()


def test_a_process_that_was_killed_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from instar.cli.state_dir import StateDir;"
        "StateDir(Path(sys.argv[1])).lock(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    state = StateDir(tmp_path)
    state.lock()
    state.unlock()


def test_the_cloud_id_stays_the_same(tmp_path: Path) -> None:
    made = StateDir(tmp_path / "a").cloud_id
    assert len(made) == 8
    assert StateDir(tmp_path / "a").cloud_id == made
    assert StateDir(tmp_path / "b").cloud_id != made


def test_a_directory_that_cannot_be_made_is_a_startup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="cannot be used"):
        StateDir(tmp_path / "file" / "below")


def test_clouds_yaml_is_for_its_owner_alone_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "clouds.yaml"
    write_clouds(path, "http://127.0.0.1:1", "RegionOne", Passwords("one", "two"))
    write_clouds(path, "http://127.0.0.1:2", "RegionOne", Passwords("one", "two"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_passwords(path) == Passwords("one", "two")
    clouds = yaml.safe_load(path.read_text())["clouds"]
    assert set(clouds) == {"instar", "instar-demo"}
    assert clouds["instar-demo"]["auth"]["auth_url"] == "http://127.0.0.1:2/identity/v3"
    assert clouds["instar-demo"]["auth"]["project_name"] == "demo"


def test_a_foreign_clouds_yaml_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "clouds.yaml"
    path.write_text("clouds: {mine: {}}")
    with pytest.raises(StartupError, match="move it away"):
        read_passwords(path)
