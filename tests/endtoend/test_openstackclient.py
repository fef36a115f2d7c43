"""The unmodified openstackclient against `instar up`, command by command, as the README's first session has them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.endtoend.openstack_shell import CommandFailed, OpenstackShell, run_openstack
from tests.endtoend.running_cloud import RunningCloud, wait_until

pytestmark = pytest.mark.slow

USER_DATA = "#!/bin/sh\necho hello\n"
CREATE = "server create --image tiny --flavor m1.nano --network private"


@pytest.fixture(scope="module")
def admin(simulated_cloud: RunningCloud) -> OpenstackShell:
    return simulated_cloud.shell("instar", OS_COMPUTE_API_VERSION="2.96")


@pytest.fixture(scope="module")
def demo(simulated_cloud: RunningCloud) -> OpenstackShell:
    return simulated_cloud.shell("instar-demo", OS_COMPUTE_API_VERSION="2.96")


@pytest.fixture
def web(demo: OpenstackShell) -> Iterator[str]:
    """A server of project demo; its name."""
    create(demo, "web")
    yield "web"
    demo.said("server", "unlock", "web")  # a test that failed may have left it locked
    delete(demo, "web")


def test_a_server_with_everything_that_a_user_gives_it(admin: OpenstackShell, demo: OpenstackShell, tmp_path: Path) -> None:
    key = demo.show("keypair create --private-key", str(tmp_path / "key"), "mine")
    assert key["name"] == "mine" and (tmp_path / "key").read_text().startswith("-----BEGIN")
    assert demo.names("keypair list") == ["mine"]
    assert demo.show("keypair show mine")["fingerprint"] == key["fingerprint"]
    user_data = tmp_path / "user-data"
    user_data.write_text(USER_DATA)
    made = demo.show(
        f"{CREATE} --wait --key-name mine --config-drive true --property role=web --user-data", str(user_data), "first"
    )  # fmt: skip
    assert made["status"] == "ACTIVE"
    shown = demo.show("server show first")
    assert shown["id"] == made["id"]
    assert (shown["key_name"], shown["config_drive"], shown["properties"]) == ("mine", "True", {"role": "web"})
    as_admin = admin.show("server show", made["id"])
    assert base64.b64decode(as_admin["OS-EXT-SRV-ATTR:user_data"]).decode() == USER_DATA
    assert [list(addresses) for addresses in shown["addresses"].values()] == [shown["addresses"]["private"]]
    assert shown["OS-EXT-STS:task_state"] is None
    rows = demo.show("server list")
    assert [(row["Name"], row["Status"], row["Flavor"]) for row in rows] == [("first", "ACTIVE", "m1.nano")]
    assert demo.names("server list --long --status ACTIVE") == ["first"]
    demo.do("server delete --wait first")
    demo.do("keypair delete mine")
    assert demo.show("server list") == [] and demo.show("keypair list") == []
    with pytest.raises(CommandFailed, match=r"No Server found"):
        demo.show("server show first")


def test_a_server_is_rebooted_stopped_started_and_its_events_tell(demo: OpenstackShell, web: str) -> None:
    for command in ("server reboot --soft --wait", "server reboot --hard --wait"):
        assert "Complete" in demo.said(*command.split(), web)
        assert demo.show("server show", web)["status"] == "ACTIVE"
    demo.do("server stop", web)
    _wait_for(demo, web, "SHUTOFF")
    demo.do("server start", web)
    _wait_for(demo, web, "ACTIVE")
    events = demo.show("server event list", web)
    assert [event["Action"] for event in events] == ["start", "stop", "reboot", "reboot", "create"]
    assert len({event["Request ID"] for event in events}) == 5
    create = demo.show("server event show", web, events[-1]["Request ID"])
    assert create["action"] == "create" and create["message"] is None
    steps = create["events"]
    assert len(steps) >= 8 and {step["result"] for step in steps} == {"Success"}
    assert "login" in demo.said("console", "log", "show", web) or demo.said("console", "log", "show", web).strip()


def test_a_server_is_changed_by_set_and_unset(demo: OpenstackShell, web: str) -> None:
    demo.do("server set --property tier=front --property zone=a --tag blue --description", "what-it-is-for", web)
    shown = demo.show("server show", web)
    assert shown["properties"] == {"tier": "front", "zone": "a"}
    assert shown["tags"] == ["blue"] and shown["description"] == "what-it-is-for"
    demo.do("server unset --property tier --tag blue --description", web)
    shown = demo.show("server show", web)
    assert (shown["properties"], shown["tags"]) == ({"zone": "a"}, [])
    demo.do("server set --name web2", web)
    assert demo.names("server list") == ["web2"]
    demo.do("server set --name", web, "web2")


def test_a_lock_holds_and_an_admin_sets_states(admin: OpenstackShell, demo: OpenstackShell, web: str) -> None:
    server_id = demo.show("server show", web)["id"]
    demo.do("server lock --reason", "do-not-touch", web)
    assert demo.show("server show", web)["locked_reason"] == "do-not-touch"
    assert demo.names("server list --locked") == [web]
    assert "409" in demo.said("server", "stop", web)
    demo.do("server unlock", web)
    assert "403" in demo.said("server", "set", "--auto-approve", "--state", "error", web)
    admin.do("server set --auto-approve --state error", server_id)
    assert demo.show("server show", web)["status"] == "ERROR"
    admin.do("server set --auto-approve --state active", server_id)
    assert demo.show("server show", web)["status"] == "ACTIVE"
    assert web in admin.names("server list --all-projects")


def test_images_are_made_from_files_shown_and_deleted(demo: OpenstackShell, tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    file.write_bytes(b"\0" * 1_048_576)
    made = demo.show("image create --disk-format raw --property colour=red --file", str(file), "mine")
    assert made["status"] in ("active", "queued")
    shown = demo.show("image show mine")
    assert (shown["status"], shown["size"], shown["disk_format"]) == ("active", 1_048_576, "raw")
    assert shown["properties"]["colour"] == "red"
    assert set(demo.names("image list")) == {"mine", "tiny"}
    copy = tmp_path / "copy"
    demo.do("image save --file", str(copy), "mine")
    assert copy.read_bytes() == file.read_bytes()
    demo.do("image delete mine")
    assert demo.names("image list") == ["tiny"]


def test_flavors(admin: OpenstackShell, demo: OpenstackShell) -> None:
    made = admin.show("flavor create --ram 256 --disk 2 --vcpus 2 --property hw:cpu_policy=shared --private c2")
    assert (made["ram"], made["vcpus"], made["disk"]) == (256, 2, 2)
    assert admin.show("flavor show c2")["properties"] == {"hw:cpu_policy": "shared"}
    assert "c2" not in demo.names("flavor list") and "c2" in admin.names("flavor list --all")
    admin.do("flavor set --project demo c2")
    assert "c2" in demo.names("flavor list")
    assert "403" in demo.said("flavor", "delete", "c2")
    admin.do("flavor delete c2")
    assert "c2" not in admin.names("flavor list --all")


def test_networks_subnets_and_ports(demo: OpenstackShell) -> None:
    assert demo.names("network list") == ["private"]
    assert demo.show("network create backend")["status"] == "ACTIVE"
    subnet = demo.show(
        "subnet create --network backend --subnet-range 10.5.0.0/24 --dns-nameserver 192.0.2.53 "
        "--allocation-pool start=10.5.0.10,end=10.5.0.20 backend-v4"
    )
    assert subnet["gateway_ip"] == "10.5.0.1"
    assert demo.show("subnet show backend-v4")["allocation_pools"] == [{"start": "10.5.0.10", "end": "10.5.0.20"}]
    assert demo.names("subnet list --network backend") == ["backend-v4"]
    port = demo.show("port create --network backend --fixed-ip subnet=backend-v4,ip-address=10.5.0.12 door")
    assert port["fixed_ips"][0]["ip_address"] == "10.5.0.12"
    assert demo.show("port show door")["mac_address"] == port["mac_address"]
    assert demo.names("port list --network backend") == ["door"]
    shown = demo.show("server create --image tiny --flavor m1.nano --port door --wait by-port")
    assert shown["addresses"] == {"backend": ["10.5.0.12"]}
    assert "409" in demo.said("network", "delete", "backend")
    delete(demo, "by-port")
    assert demo.names("port list --network backend") == ["door"], "a port that the user made is kept"
    demo.do("port delete door")
    demo.do("subnet delete backend-v4")
    demo.do("network delete backend")
    assert demo.names("network list") == ["private"]


def test_security_groups(demo: OpenstackShell) -> None:
    assert demo.names("security group list") == ["default"]
    demo.show("security group create web-access")
    rule = demo.show("security group rule create --protocol tcp --dst-port 80 --remote-ip 10.0.0.0/8 web-access")
    assert (rule["protocol"], rule["port_range_min"]) == ("tcp", 80)
    assert rule["id"] in demo.names("security group rule list web-access", "ID")
    shown = create(demo, "guarded", "--security-group", "web-access")
    assert [group["name"] for group in shown["security_groups"]] == ["web-access"]
    delete(demo, "guarded")
    demo.do("security group rule delete", rule["id"])
    demo.do("security group delete web-access")


def test_what_an_operator_asks(admin: OpenstackShell, demo: OpenstackShell, web: str) -> None:
    assert admin.show("token issue")["id"].count(".") == 2
    catalog = {row["Type"] for row in demo.show("catalog list")}
    assert {"identity", "compute", "image", "network"} <= catalog
    services = admin.show("compute service list")
    assert {(row["Binary"], row["State"], row["Status"]) for row in services} >= {("nova-compute", "up", "enabled")}
    assert {row["Host"] for row in services if row["Binary"] == "nova-compute"} == {"sim-0", "sim-1", "sim-2"}
    hypervisors = admin.show("hypervisor list")
    assert [row["Hypervisor Hostname"] for row in hypervisors] == ["sim-0", "sim-1", "sim-2"]
    assert {row["State"] for row in hypervisors} == {"up"}
    assert admin.show("hypervisor show sim-1")["status"] == "enabled"
    assert [row["Zone Name"] for row in demo.show("availability zone list --compute")] == ["nova"]
    limits = {row["Name"]: row["Value"] for row in demo.show("limits show --absolute")}
    assert (limits["instances"], limits["instances_used"]) == (10, 1)
    quota = {row["Resource"]: row["Limit"] for row in demo.show("quota show")}
    assert (quota["instances"], quota["cores"], quota["ports"]) == (10, 20, 500)
    assert "403" in demo.said("hypervisor", "list")
    assert web in admin.names(f"server list --all-projects --host {_host_of(admin, web)}")


def test_a_disabled_host_and_an_aggregate_steer_where_servers_go(admin: OpenstackShell) -> None:
    admin.show("aggregate create --zone lab --property ssd=true fast")
    admin.show("aggregate add host fast sim-2")
    assert {row["Zone Name"] for row in admin.show("availability zone list --compute")} == {"nova", "lab"}
    create(admin, "lab1", "--availability-zone", "lab")
    shown = admin.show("server show lab1")
    assert (shown["OS-EXT-SRV-ATTR:host"], shown["OS-EXT-AZ:availability_zone"]) == ("sim-2", "lab")
    admin.do("compute service set --disable --disable-reason", "to-be-cleaned", "sim-2", "nova-compute")
    failed = admin.said(*CREATE.split(), "--wait", "--availability-zone", "lab", "lab2")
    assert "Error creating server" in failed
    fault = admin.show("server show lab2")["fault"]
    assert fault["message"].startswith("No valid host was found.") and "enabled" in fault["message"]
    admin.do("compute service set --enable sim-2 nova-compute")
    delete(admin, "lab1", "lab2")
    admin.show("aggregate remove host fast sim-2")
    admin.do("aggregate delete fast")


def test_an_anti_affinity_group_spreads_its_servers(admin: OpenstackShell) -> None:
    group = admin.show("server group create --policy anti-affinity apart")
    hosts = set()
    for name in ("a0", "a1", "a2"):
        create(admin, name, "--hint", f"group={group['id']}")
        hosts.add(admin.show("server show", name)["OS-EXT-SRV-ATTR:host"])
    assert len(hosts) == 3
    admin.show(f"{CREATE} --hint group={group['id']} a3")
    _wait_for(admin, "a3", "ERROR")
    assert len(admin.show("server group show apart")["members"]) >= 3
    delete(admin, "a0", "a1", "a2", "a3")
    admin.do("server group delete apart")


def test_exit_codes_are_a_scripts_friends(simulated_cloud: RunningCloud) -> None:
    environ = simulated_cloud.environ("instar-demo")
    done = run_openstack(environ, *CREATE.split(), "--wait", "-f", "json", "one")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :])["status"] == "ACTIVE"
    assert run_openstack(environ, "server", "delete", "one").returncode == 0
    done = run_openstack(environ, "server", "show", "no-such-server")
    assert done.returncode == 1 and "Traceback" not in done.stderr


def create(shell: OpenstackShell, name: str, *more: str) -> dict[str, Any]:
    """`--wait` of the client looks every five seconds: too seldom for every test."""
    shell.show(CREATE, *more, name)
    _wait_for(shell, name, "ACTIVE")
    shown: dict[str, Any] = shell.show("server show", name)
    return shown


def delete(shell: OpenstackShell, *names: str) -> None:
    shell.do("server delete", *names)
    wait_until(lambda: not set(names) & set(shell.names("server list")), 10)


def _host_of(admin: OpenstackShell, name: str) -> str:
    (row,) = [row for row in admin.show("server list --all-projects --long") if row["Name"] == name]
    (host,) = [value for column, value in row.items() if column in ("Host", "OS-EXT-SRV-ATTR:host")]
    return str(host)


def _wait_for(shell: OpenstackShell, name: str, status: str) -> None:
    wait_until(lambda: shell.show("server show", name)["status"] == status, 10)
