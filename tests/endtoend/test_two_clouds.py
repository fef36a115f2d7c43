"""Clouds side by side, restarts, and the directories that a cloud refuses."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.endtoend.conftest import CloudMaker
from tests.endtoend.running_cloud import INSTAR, RunningCloud

pytestmark = pytest.mark.slow

REFUSAL_MAX_S = 300.0


def refusal(directory: Path, *options: str) -> str:
    """The one line with which `instar up` ends on this directory."""
    argv = [INSTAR, "up", "--dir", directory, "--port", "0", "--hypervisor", "simulated", *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=REFUSAL_MAX_S, check=False)
    assert done.returncode == 1 and "ready:" not in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if not line[:4].isdigit()]  # log lines begin with the year
    return line


def build(cloud: RunningCloud, name: str) -> dict[str, Any]:
    (image,) = cloud.demo.other("GET", "/image/v2/images?name=tiny").json()["images"]
    body = {"name": name, "flavorRef": "1", "imageRef": image["id"], "networks": "auto"}
    answer = cloud.demo.call("POST", "/servers", {"server": body})
    assert answer.status_code == 202, answer.text
    return cloud.settled(answer.json()["server"]["id"], "ACTIVE")


def test_two_clouds_side_by_side_know_nothing_of_each_other(make_cloud: CloudMaker) -> None:
    one, other = make_cloud("simulated"), make_cloud("simulated", "--hosts", "2")
    one.start()
    other.start()
    assert one.url != other.url
    server = build(one, "mine")
    assert other.admin.get("/servers?all_tenants=1")["servers"] == []
    assert other.admin.call("GET", f"/servers/{server['id']}").status_code == 404
    stranger = other.admin.http.get(f"{one.url}/compute/v2.1/servers", headers={"x-auth-token": other.admin.token})
    assert stranger.status_code == 401
    assert len(other.admin.get("/os-hypervisors")["hypervisors"]) == 2
    assert one.admin.findings() == other.admin.findings() == []


def test_a_second_process_on_the_same_directory_is_refused_and_told_who_has_it(make_cloud: CloudMaker) -> None:
    cloud = make_cloud("simulated")
    cloud.start()
    assert refusal(cloud.directory) == (
        f"instar: Another instar (pid {cloud.pid}) runs on {cloud.directory}: stop it, or choose another --dir."
    )
    cloud.admin.get("/servers")


def test_a_restart_keeps_guests_records_and_passwords(make_cloud: CloudMaker) -> None:
    cloud = make_cloud("simulated")
    cloud.start()
    clouds_yaml = cloud.directory / "clouds.yaml"
    assert clouds_yaml.stat().st_mode & 0o777 == 0o600
    before, server = cloud.admin.token, build(cloud, "kept")
    actions = cloud.admin.get(f"/servers/{server['id']}/os-instance-actions")
    assert cloud.terminate() == 0
    cloud.start()
    assert cloud.admin.get(f"/servers/{server['id']}/os-instance-actions") == actions
    again = cloud.settled(server["id"], "ACTIVE")
    assert (again["addresses"], again["OS-SRV-USG:launched_at"]) == (
        server["addresses"], server["OS-SRV-USG:launched_at"],
    )  # fmt: skip
    assert cloud.admin.http.get("/compute/v2.1/servers", headers={"x-auth-token": before}).status_code == 200
    cloud.kill()
    cloud.start()
    assert [one["name"] for one in cloud.demo.get("/servers")["servers"]] == ["kept"]
    assert clouds_yaml.stat().st_mode & 0o777 == 0o600
    assert cloud.admin.findings() == []
    assert cloud.terminate() == 0


def test_a_database_of_a_newer_version_is_refused(make_cloud: CloudMaker) -> None:
    cloud = make_cloud("simulated")
    cloud.start()
    assert cloud.terminate() == 0
    with sqlite3.connect(cloud.directory / "instar.db") as connection:
        connection.execute("INSERT INTO migrations VALUES (9999, 'future')")
    connection.close()
    assert "The database has schema 9999" in refusal(cloud.directory)


@pytest.mark.host
def test_what_is_read_only_is_refused(make_cloud: CloudMaker) -> None:
    """Root writes to files of any mode: only a mount says no."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    cloud = make_cloud("simulated")
    cloud.start()
    assert cloud.terminate() == 0
    for path, words in (
        (cloud.directory / "instar.db", ("The database instar.db cannot be used", "read")),
        (cloud.directory, ("cannot be used: Read-only file system",)),
    ):
        subprocess.run(["mount", "--bind", path, path], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
            said = refusal(cloud.directory)
        finally:
            subprocess.run(["umount", path], check=True)
        assert all(word in said for word in words), said
    cloud.start()
