"""Unmodified python-openstackclient and openstacksdk against a running cloud: the words of the first session."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from tests.api.compute_cloud import Cloud
from tests.fixtures.openstack_client import Runs, run_apart, run_openstack

DEADLINE_S = 180.0


async def openstack(
    cloud: Cloud, *words: str, admin: bool = False, status: int = 0, runs: Runs = run_openstack
) -> Any:
    """The JSON that a command prints; words where it prints no JSON."""
    who = "admin" if admin else "demo"
    environ = {
        "PATH": os.environ["PATH"], "HOME": "/nonexistent",
        "OS_AUTH_URL": f"{cloud.url}/identity/v3", "OS_USERNAME": who, "OS_PROJECT_NAME": who,
        "OS_PASSWORD": cloud.first.admin_password if admin else cloud.first.demo_password,
        "OS_USER_DOMAIN_NAME": "Default", "OS_PROJECT_DOMAIN_NAME": "Default", "OS_IDENTITY_API_VERSION": "3",
        "OS_COMPUTE_API_VERSION": "2.96",
    }  # fmt: skip
    said = await runs(environ, *words)
    assert said.status == status, (words, said)
    return said.json() if said.out.strip().startswith(("{", "[")) else said.out


@pytest.mark.slow
async def test_openstackclient_reads_and_makes_what_admins_need(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo, "first")
    as_json = ("-f", "json")
    flavors, servers, shown, events, keypair, services, hypervisors, zones, limits, quota = await asyncio.gather(
        openstack(cloud, "flavor", "list", *as_json),
        openstack(cloud, "server", "list", *as_json, runs=run_apart),
        openstack(cloud, "server", "show", "first", *as_json),
        openstack(cloud, "server", "event", "list", server_id, *as_json),
        openstack(cloud, "keypair", "create", "mine", *as_json),
        openstack(cloud, "compute", "service", "list", *as_json, admin=True),
        openstack(cloud, "hypervisor", "list", *as_json, admin=True),
        openstack(cloud, "availability", "zone", "list", "--compute", *as_json),
        openstack(cloud, "limits", "show", "--absolute", *as_json),
        openstack(cloud, "quota", "show", "--compute", *as_json),
    )
    assert flavors[0]["Name"] == "m1.nano"
    assert [(one["Name"], one["Status"], one["Flavor"]) for one in servers] == [("first", "ACTIVE", "m1.nano")]
    assert shown["id"] == server_id
    assert [one["Action"] for one in events] == ["create"]
    assert "PRIVATE KEY" in str(keypair) or keypair["fingerprint"]
    assert {one["State"] for one in services} == {"up"}
    assert len(hypervisors) == 2
    assert zones[0]["Zone Name"] == "nova"
    used = {one["Name"].replace("_", "").lower(): one["Value"] for one in limits}
    assert used["totalinstancesused"] == 1, limits
    assert any(one.get("Resource") == "instances" and one["Limit"] == 100 for one in quota)


@pytest.mark.slow
async def test_openstackclient_leads_a_server_through_its_life(cloud: Cloud) -> None:
    made = await openstack(
        cloud, "server", "create", "--image", cloud.image_id, "--flavor", "m1.nano", "--nic", "auto", "--wait",
        "--config-drive", "true", "--property", "a=b", "-f", "json", "life",
    )  # fmt: skip
    assert made["status"] == "ACTIVE"
    for words in (
        ("reboot", "--soft", "--wait"), ("reboot", "--hard", "--wait"), ("stop",), ("start",), ("lock",), ("unlock",),
        ("set", "--property", "c=d"), ("unset", "--property", "a"), ("set", "--name", "second"),
    ):  # fmt: skip
        name = "life"
        await openstack(cloud, "server", *words, name)
        if words[0] in ("stop", "start"):
            await cloud.until(cloud.demo, made["id"], "SHUTOFF" if words[0] == "stop" else "ACTIVE")
    server = (await cloud.demo.get(f"/servers/{made['id']}"))["server"]
    assert (server["name"], server["metadata"]) == ("second", {"c": "d"})
    actions = (await cloud.demo.get(f"/servers/{made['id']}/os-instance-actions"))["instanceActions"]
    event = await openstack(cloud, "server", "event", "show", made["id"], actions[0]["request_id"], "-f", "json")
    assert event["action"] == "unlock"
    await openstack(cloud, "console", "log", "show", "second")
    await openstack(cloud, "server", "delete", "--wait", "second")
    await cloud.gone(cloud.demo, made["id"])


@pytest.mark.slow
async def test_openstackclient_gives_servers_volumes_and_interfaces(cloud: Cloud) -> None:
    as_json = ("-f", "json")

    async def volume_is(name: str, status: str) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                (found,) = [
                    one for one in await openstack(cloud, "volume", "list", *as_json) if one["Name"] == name
                ]
                if found["Status"] == status:
                    return found  # type: ignore[no-any-return]

    await openstack(cloud, "volume", "create", "--size", "1", "data", *as_json)
    await openstack(cloud, "volume", "create", "--size", "1", "--image", cloud.image_id, "root", *as_json)
    create = ("server", "create", "--flavor", "m1.nano", "--network", cloud.network_id, "--wait", *as_json)
    await volume_is("root", "available")
    await volume_is("data", "available")
    first = await openstack(cloud, *create, "--volume", "root", "first")
    assert first["status"] == "ACTIVE"
    await openstack(cloud, *create, "--image", cloud.image_id, "--boot-from-volume", "1", "second")
    third = await openstack(
        cloud, *create, "--block-device", f"uuid={cloud.image_id},source_type=image,destination_type=volume,"
        "volume_size=1,boot_index=0,delete_on_termination=true",
        "--block-device", "source_type=blank,destination_type=volume,volume_size=1", "third",
    )  # fmt: skip
    assert len(third["volumes_attached"]) == 2, third
    added = await openstack(cloud, "server", "add", "volume", "first", "data", *as_json)
    assert added["Device"] == "/dev/vdb"
    (attachment,) = (await volume_is("data", "in-use"))["Attached to"]
    assert (attachment["server_id"], attachment["device"]) == (first["id"], "/dev/vdb")
    listed = await openstack(cloud, "server", "volume", "list", "first", *as_json)
    assert {one["Device"] for one in listed} == {"/dev/vda", "/dev/vdb"}
    await openstack(cloud, "server", "volume", "update", "--delete-on-termination", "first", "data")
    await openstack(cloud, "server", "remove", "volume", "first", "data")
    await volume_is("data", "available")

    async def ports() -> set[str]:
        found = await cloud.demo.get(f"/servers/{first['id']}/os-interface")
        return {one["port_id"] for one in found["interfaceAttachments"]}

    (own,) = await ports()
    port = await openstack(cloud, "port", "create", "--network", cloud.network_id, "mine", *as_json)
    await openstack(cloud, "server", "add", "port", "first", "mine")
    await openstack(cloud, "server", "add", "network", "first", cloud.network_id)
    await openstack(cloud, "server", "add", "fixed", "ip", "--fixed-ip-address", "10.78.0.55", "first", cloud.network_id)
    assert len(await ports()) == 4
    shown = await openstack(cloud, "server", "show", "first", *as_json)
    assert "10.78.0.55" in str(shown["addresses"])
    await openstack(cloud, "server", "remove", "port", "first", "mine")
    async with asyncio.timeout(DEADLINE_S):
        while len(await ports()) != 3:
            await asyncio.sleep(0.05)
    assert own in await ports() and port["id"] not in await ports()
    await openstack(cloud, "server", "remove", "network", "first", cloud.network_id)
    async with asyncio.timeout(DEADLINE_S):
        while await ports():
            await asyncio.sleep(0.05)
