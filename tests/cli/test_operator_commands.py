"""Commands that show: what a running cloud tells to admins, to a server's own project, and to nobody else."""

from __future__ import annotations

import time
import uuid
from typing import Any

import httpx
import pytest
import yaml

from tests.cli.program import Up, instar
from tests.patience import PATIENCE_S


def login(cloud: Up, name: str) -> httpx.Client:
    auth = yaml.safe_load((cloud.directory / "clouds.yaml").read_text())["clouds"][name]["auth"]
    user = {"name": auth["username"], "password": auth["password"], "domain": {"name": "Default"}}
    scope = {"project": {"name": auth["project_name"], "domain": {"name": "Default"}}}
    body = {"auth": {"identity": {"methods": ["password"], "password": {"user": user}}, "scope": scope}}
    url = cloud.said.splitlines()[-1].removeprefix("ready: ")
    token = httpx.post(f"{url}/identity/v3/auth/tokens", json=body).headers["x-subject-token"]
    headers = {"x-auth-token": token, "openstack-api-version": "compute 2.37"}
    return httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, verify=False)


@pytest.fixture(scope="module")
def server(cloud: Up) -> dict[str, Any]:
    """A server of the project demo, built."""
    with login(cloud, "instar-demo") as member:
        image = member.get("/image/v2/images", params={"name": "tiny"}).json()["images"][0]["id"]
        wanted = {"name": "seen", "imageRef": image, "flavorRef": "1", "networks": "none"}
        made = member.post("/compute/v2.1/servers", json={"server": wanted})
        assert made.status_code == 202, made.text
        path = f"/compute/v2.1/servers/{made.json()['server']['id']}"
        deadline = time.monotonic() + PATIENCE_S
        while (shown := member.get(path).json()["server"])["status"] == "BUILD" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert shown["status"] == "ACTIVE", shown
        return {"id": shown["id"], "request_id": made.headers["x-openstack-request-id"]}


def test_hosts_are_listed_with_what_is_claimed(cloud: Up, server: dict[str, Any]) -> None:
    time.sleep(0.1)
    shown = instar("admin", "hosts", "--dir", cloud.directory)
    assert shown.returncode == 0, shown.stderr
    assert "2 hosts, 2 up" in shown.stdout
    assert "sim-0" in shown.stdout and "sim-1" in shown.stdout


def test_the_audit_of_a_healthy_cloud_finds_nothing(cloud: Up, server: dict[str, Any]) -> None:
    audited = instar("admin", "audit", "--dir", cloud.directory)
    assert (audited.returncode, audited.stdout) == (0, "2 hosts asked, 0 findings\n"), audited.stderr


def test_the_diagram_of_a_create_is_drawn_for_its_own_project(cloud: Up, server: dict[str, Any]) -> None:
    drawn = instar("server", "diagram", server["id"], "--dir", cloud.directory, "--os-cloud", "instar-demo")
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.startswith(f"title create of {server['id']}")
    assert "note over database: vm_state active, task_state null" in drawn.stdout
    assert "sim-" not in drawn.stdout  # the names of hosts are for admins


def test_an_admin_sees_the_host_and_may_name_the_request(cloud: Up, server: dict[str, Any]) -> None:
    arguments = ("server", "diagram", server["id"], "--dir", cloud.directory, "--format", "mermaid")
    drawn = instar(*arguments, "--action", server["request_id"])
    assert drawn.stdout.startswith("sequenceDiagram")
    assert "on sim-" in drawn.stdout
    missing = instar(*arguments, "--action", f"req-{uuid.uuid4()}")
    assert missing.returncode == 1
    assert "could not be found" in missing.stderr


def test_another_projects_server_does_not_exist(cloud: Up) -> None:
    with login(cloud, "instar") as admin, login(cloud, "instar-demo") as member:
        image = admin.get("/image/v2/images", params={"name": "tiny"}).json()["images"][0]["id"]
        wanted = {"name": "admins", "imageRef": image, "flavorRef": "1", "networks": "none"}
        made = admin.post("/compute/v2.1/servers", json={"server": wanted}).json()["server"]["id"]
        for path in ("diagram", "operations"):
            assert admin.get(f"/instar/v1/servers/{made}/{path}").status_code == 200
            assert member.get(f"/instar/v1/servers/{made}/{path}").status_code == 404
        assert admin.delete(f"/compute/v2.1/servers/{made}").status_code == 204


@pytest.mark.parametrize(
    "path", ["/instar/v1/audit", "/instar/v1/hosts", "/instar/v1/operations", "/instar/v1/dead-letters"]
)
def test_members_are_refused_and_strangers_asked_who_they_are(cloud: Up, path: str) -> None:
    with login(cloud, "instar-demo") as member:
        assert member.get(path).status_code == 403
        assert httpx.get(f"{member.base_url}{path}".replace("//instar", "/instar")).status_code == 401


def test_every_step_tells_whose_time_it_took(cloud: Up, server: dict[str, Any]) -> None:
    with login(cloud, "instar-demo") as member:
        newest = member.get(f"/instar/v1/servers/{server['id']}/operations").json()["operations"][0]
    assert newest["action"] == "create"
    assert {step["participant"] for step in newest["steps"]} >= {"scheduler", "compute"}
    assert all(step["host"] is None for step in newest["steps"])
    assert all(0 <= step["hypervisor_us"] <= step["finished_at"] - step["started_at"] + 1000 for step in newest["steps"])


def test_a_format_that_is_none_is_refused(cloud: Up, server: dict[str, Any]) -> None:
    with login(cloud, "instar-demo") as member:
        assert member.get(f"/instar/v1/servers/{server['id']}/diagram", params={"format": "png"}).status_code == 400


def test_settings_are_shown_with_unit_and_purpose(tmp_path: Any) -> None:
    (tmp_path / "c.toml").write_text("[quota]\ncores = 7\n")
    shown = instar("config", "show", "--config", tmp_path / "c.toml", INSTAR_QUOTA_INSTANCES="33")
    rows = {line.split()[0]: line for line in shown.stdout.splitlines() if line.strip()}
    assert rows["quota.cores"].split()[1:4] == ["7", "20", "vcpus"]
    assert rows["quota.instances"].split()[1:3] == ["33", "10"]
    assert "scheduling.filters" in rows and "simulated.hosts" in rows


def test_no_cloud_is_an_error_of_one_line(tmp_path: Any) -> None:
    asked = instar("admin", "hosts", "--dir", tmp_path)
    assert asked.returncode == 1
    assert len(asked.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", [[], ["up"], ["down"], ["demo"], ["image", "build-guest"], ["server", "diagram"],
                                     ["admin", "hosts"], ["admin", "audit"], ["config", "show"]])  # fmt: skip
def test_every_command_has_help(command: list[str]) -> None:
    helped = instar(*command, "--help")
    assert helped.returncode == 0
    assert len(helped.stdout.splitlines()) > 5


def test_a_cloud_of_one_process_has_no_dead_letters(cloud: Up) -> None:
    assert "0 dead letters" in instar("admin", "dead-letters", "--dir", cloud.directory).stdout
    assert instar("admin", "dead-letters", "--purge", "--dir", cloud.directory).stdout == "0 dropped\n"


def test_a_password_in_a_url_is_not_shown() -> None:
    shown = instar("config", "show", INSTAR_BUS="amqp://instar:secret@broker/cloud").stdout
    assert "amqp://instar:***@broker/cloud" in shown
    assert "secret" not in shown


def test_a_host_is_drained_and_its_server_runs_elsewhere(cloud: Up, server: dict[str, Any]) -> None:
    with login(cloud, "instar") as admin:
        path = f"/compute/v2.1/servers/{server['id']}"
        host = admin.get(path).json()["server"]["OS-EXT-SRV-ATTR:host"]
        drained = instar("admin", "drain", host, "--dir", cloud.directory)
        assert drained.returncode == 0, drained.stdout + drained.stderr
        assert f"{host}: done (auto): 1 moved, 0 moving, 0 waiting, 0 left" in drained.stdout
        shown = admin.get(path).json()["server"]
        assert (shown["status"], shown["OS-EXT-SRV-ATTR:host"] == host) == ("ACTIVE", False)
    told = instar("admin", "drain", host, "--status", "--dir", cloud.directory)
    assert (told.returncode, told.stdout) == (0, f"{host}: done (auto): 1 moved, 0 moving, 0 waiting, 0 left\n")
    assert "disabled (drain (auto))" in instar("admin", "hosts", "--dir", cloud.directory).stdout
    for arguments, reason in (((host, "--abort"), "is not being drained"), (("nowhere",), "could not be found")):
        refused = instar("admin", "drain", *arguments, "--dir", cloud.directory)
        assert (refused.returncode, reason in refused.stderr) == (1, True), refused.stderr
    with login(cloud, "instar-demo") as member:
        assert member.post(f"/instar/v1/hosts/{host}/drain", json={}).status_code == 403
