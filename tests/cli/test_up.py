"""`instar up`: one line when it answers, one process for a directory, and everything there again after a restart."""

from __future__ import annotations

import signal
import sqlite3
import stat
from pathlib import Path

import httpx
import pytest
import yaml

from tests.cli.program import Up, instar, running

SIMULATED = ("--hypervisor", "simulated")


def test_it_says_once_where_it_answers_and_it_does(cloud: Up) -> None:
    lines = cloud.said.splitlines()
    ready = [line for line in lines if line.startswith("ready: ")]
    assert ready == lines[-1:]
    url = ready[0].removeprefix("ready: ")
    types = {service["type"] for service in httpx.get(url, follow_redirects=True).json()["services"]}
    assert {"identity", "compute", "image", "network", "instar"} <= types
    assert f"export OS_CLIENT_CONFIG_FILE={cloud.directory / 'clouds.yaml'}" in cloud.said


def test_what_is_secret_is_for_its_owner_alone(cloud: Up) -> None:
    for name in ("clouds.yaml", "token.key", "instar.db"):
        assert stat.S_IMODE((cloud.directory / name).stat().st_mode) & 0o077 == 0, name
    clouds = yaml.safe_load((cloud.directory / "clouds.yaml").read_text())["clouds"]
    passwords = [one["auth"]["password"] for one in clouds.values()]
    log = cloud.log.read_text()
    assert not any(password in log for password in passwords)


def test_a_second_one_on_the_same_directory_is_refused_and_names_the_pid(cloud: Up) -> None:
    second = instar("up", "--dir", cloud.directory, "--port", "0", *SIMULATED)
    assert second.returncode == 1
    assert f"pid {cloud.process.pid}" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    assert second.stdout == ""


@pytest.mark.slow
def test_two_directories_run_side_by_side(cloud: Up, tmp_path: Path) -> None:
    with running(tmp_path / "other", tmp_path / "log", *SIMULATED) as other:
        assert other.said.splitlines()[-1] != cloud.said.splitlines()[-1]
        assert other.stop() == 0


@pytest.mark.slow
def test_sigterm_ends_it_well_and_a_restart_keeps_passwords_and_records(tmp_path: Path) -> None:
    with running(tmp_path / "state", tmp_path / "log", *SIMULATED) as first:
        assert first.stop() == 0
    before = yaml.safe_load((tmp_path / "state" / "clouds.yaml").read_text())["clouds"]["instar"]["auth"]
    with running(tmp_path / "state", tmp_path / "log", *SIMULATED) as second:
        after = yaml.safe_load((tmp_path / "state" / "clouds.yaml").read_text())["clouds"]["instar"]["auth"]
        assert after["password"] == before["password"]
        hosts = instar("admin", "hosts", "--dir", second.directory)
        assert hosts.returncode == 0, hosts.stderr
        assert second.stop(signal.SIGINT) == 0


@pytest.mark.slow
def test_a_kill_leaves_a_directory_that_starts_again(tmp_path: Path) -> None:
    with running(tmp_path / "state", tmp_path / "log", *SIMULATED) as first:
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    with running(tmp_path / "state", tmp_path / "log", *SIMULATED) as second:
        assert second.stop() == 0


@pytest.mark.slow
def test_a_database_of_a_newer_version_is_refused_in_one_line(tmp_path: Path) -> None:
    with running(tmp_path / "state", tmp_path / "log", *SIMULATED) as first:
        assert first.stop() == 0
    database = sqlite3.connect(tmp_path / "state" / "instar.db")
    database.execute("INSERT INTO migrations VALUES (9999, 'from_the_future')")
    database.commit()
    database.close()
    refused = instar("up", "--dir", tmp_path / "state", "--port", "0", *SIMULATED)
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("instar: The database has schema 9999")
    assert "Traceback" not in refused.stderr


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "instar.db").write_bytes(b"this is no database, whatever its name says" * 100)
    refused = instar("up", "--dir", tmp_path / "state", "--port", "0", *SIMULATED)
    assert refused.returncode == 1
    assert "instar.db cannot be used" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[api]\nlist_limit_max = 0\n")
    refused = instar("up", "--dir", tmp_path / "state", "--config", tmp_path / "c.toml")
    assert refused.returncode == 1
    assert "list_limit_max" in refused.stderr


def test_thousands_of_hosts_are_for_simulated_ones(tmp_path: Path) -> None:
    refused = instar("up", "--dir", tmp_path / "state", "--hosts", "1000")
    assert refused.returncode == 1
    assert "at most 64" in refused.stderr


def test_down_refuses_a_running_cloud(cloud: Up) -> None:
    refused = instar("down", "--dir", cloud.directory, "--delete")
    assert refused.returncode == 1
    assert f"pid {cloud.process.pid}" in refused.stderr
    assert (cloud.directory / "instar.db").exists()


@pytest.mark.slow
def test_down_deletes_what_is_a_cloud_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday").write_text("")
    refused = instar("down", "--dir", tmp_path / "photos", "--delete")
    assert refused.returncode == 1
    assert (tmp_path / "photos" / "holiday").exists()
    with running(tmp_path / "state", tmp_path / "log", *SIMULATED) as up:
        assert up.stop() == 0
    assert instar("down", "--dir", tmp_path / "state", "--delete").returncode == 0
    assert not (tmp_path / "state").exists()
