"""Real processes: APIs behind one port, conductors that share the work, and what happens when one of them goes."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from instar.cli.distributed.local_cloud import LocalCloud
from tests.cli.program import instar
from tests.distributed.conftest import Client, log_of, until
from tests.patience import PATIENCE_S, patience

# `host`: those run a file at a time in one worker, and so there is one cloud.
pytestmark = [pytest.mark.host, pytest.mark.slow]


def command(cloud: LocalCloud, *words: str) -> subprocess.CompletedProcess[str]:
    return instar(*words, "--config", cloud.config, "--dir", cloud.state.path)


def refusal(folder: Path) -> str:
    """What a conductor with these settings says, in one line, instead of starting."""
    refused = instar("conductor", "--config", folder / "c.toml", "--dir", folder / "state")
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    return refused.stderr


def test_what_one_api_accepts_the_other_shows(cloud: LocalCloud, client: Client) -> None:
    """Each API alone, for a moment: the port is the same."""
    cloud.processes.pause("api-2")
    try:
        cloud.processes.kill("api-2")
        server_id = client.create()
        cloud.processes.start("api-2")
        cloud.processes.kill("api-1")
        server = client.until(server_id, "ACTIVE")
    finally:
        cloud.processes.start("api-1")
    assert server["OS-EXT-SRV-ATTR:host"].startswith("sim-")
    client.compute("DELETE", f"/servers/{server_id}")


def test_questions_with_parts_that_may_be_left_out_are_answered(cloud: LocalCloud, client: Client) -> None:
    """PostgreSQL did not know the type of what is compared with NULL first, and answered 500."""
    server_id = client.create()
    client.until(server_id, "ACTIVE")
    actions = client.compute("GET", f"/servers/{server_id}/os-instance-actions").json()["instanceActions"]
    assert [one["action"] for one in actions] == ["create"]
    assert client.compute("GET", "/os-simple-tenant-usage?detailed=1").json()["tenant_usages"]
    assert client.compute("GET", "/os-keypairs").json()["keypairs"] == []
    client.compute("DELETE", f"/servers/{server_id}")


def test_the_survivor_of_a_killed_api_answers_every_new_connection(cloud: LocalCloud, client: Client) -> None:
    cloud.processes.kill("api-1")
    for _ in range(20):
        assert httpx.get(f"{cloud.url}/compute/", timeout=PATIENCE_S).status_code in (200, 300)


def test_operations_of_a_killed_conductor_go_on_at_the_other(cloud: LocalCloud, client: Client) -> None:
    servers = [client.create() for _ in range(8)]
    cloud.processes.kill("conductor-1")
    for server_id in servers:
        client.until(server_id, "ACTIVE")
    for server_id in servers:
        client.compute("DELETE", f"/servers/{server_id}")


def test_a_conductor_that_stops_hands_over_at_once(cloud: LocalCloud, client: Client) -> None:
    """Without waiting for its lease: it says so itself."""
    servers = [client.create() for _ in range(8)]
    cloud.processes.stop("conductor-2")
    stopped = time.monotonic()
    for server_id in servers:
        client.until(server_id, "ACTIVE")
    assert time.monotonic() - stopped < 25 * patience()
    assert "Traceback" not in log_of(cloud, "conductor-2")
    for server_id in servers:
        client.compute("DELETE", f"/servers/{server_id}")


def test_work_waits_for_the_agent_that_comes_back(cloud: LocalCloud, client: Client) -> None:
    cloud.processes.kill("simulated-1")
    server_id = client.create()
    cloud.processes.start("simulated-1")
    server = client.until(server_id, "ACTIVE")
    assert server["status"] == "ACTIVE"
    client.compute("DELETE", f"/servers/{server_id}")


def test_volumes_are_made_by_the_process_that_owns_them(cloud: LocalCloud, client: Client) -> None:
    volume = client.ask("POST", "/volume/v3/volumes", {"volume": {"size": 1, "name": "v"}}).json()["volume"]["id"]
    path = f"/volume/v3/volumes/{volume}"
    until(lambda: client.ask("GET", path).json()["volume"]["status"] == "available")
    assert list((cloud.state.path / "volumes").rglob(f"*{volume}*"))
    client.ask("DELETE", path)


def test_init_may_be_run_again_while_the_cloud_runs(cloud: LocalCloud, client: Client) -> None:
    before = cloud.state.clouds_yaml.read_text()
    again = command(cloud, "cloud", "init")
    assert again.returncode == 0, again.stderr
    assert cloud.state.clouds_yaml.read_text() == before
    assert stat.S_IMODE(cloud.state.clouds_yaml.stat().st_mode) == 0o600
    assert len(client.ask("GET", "/network/v2.0/networks").json()["networks"]) == 1


def test_no_secret_is_on_a_command_line(cloud: LocalCloud, client: Client) -> None:
    secrets = (cloud.rabbitmq.password, cloud.postgresql.url.partition(":")[2].partition("@")[0].rpartition(":")[2])
    for name in cloud.processes.names:
        words = Path(f"/proc/{cloud.processes.pid(name)}/cmdline").read_bytes().decode()
        assert not any(secret in words for secret in secrets), name


def test_an_embedded_cloud_is_refused_the_directory_and_the_database(cloud: LocalCloud, tmp_path: Path) -> None:
    refused = instar("up", "--dir", cloud.state.path, "--hypervisor", "simulated", "--port", "0")
    assert refused.returncode == 1 and "Another instar" in refused.stderr
    refused = instar("up", "--config", cloud.config, "--dir", tmp_path / "other", "--hypervisor", "simulated")
    assert refused.returncode == 1 and "many processes" in refused.stderr


def test_a_database_that_nobody_prepared_is_refused(cloud: LocalCloud, tmp_path: Path) -> None:
    cloud.postgresql.sql("CREATE DATABASE unprepared")
    (tmp_path / "c.toml").write_text(
        f'database = "{cloud.postgresql.url_of("unprepared")}"\nbus = "{cloud.rabbitmq.url()}"\n'
    )
    assert "instar cloud init" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [("", "database"), ('database = "postgresql://localhost/x"\n[api]\nport = "many"\n', "port")],
    ids=["none", "wrong"],
)
def test_settings_that_do_not_do_are_named(settings: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(settings)
    assert said in refusal(tmp_path)


def test_a_process_tells_its_service_manager_when_it_is_ready_and_when_it_ends(
    cloud: LocalCloud, tmp_path: Path
) -> None:
    """READY=1 comes when everything is up, and STOPPING=1 before the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "n"))
        told.settimeout(PATIENCE_S)
        words = ["conductor", "--config", str(cloud.config), "--dir", str(cloud.state.path)]
        process = subprocess.Popen(
            [sys.executable, "-m", "instar.cli", *words], env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "n")},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert told.recv(100) == b"READY=1"
            process.terminate()
            assert told.recv(100) == b"STOPPING=1"
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.wait()
