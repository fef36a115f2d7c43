"""The records of moves as admins see them, live migrations in flight, and what a hypervisor counts of a guest."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.api.compute_cloud import Cloud
from tests.patience import PATIENCE_S


async def _in_flight(cloud: Cloud, server_id: str) -> dict[str, Any]:
    """A live migration that runs and does not end by itself."""
    cloud.world.host(str(await cloud.host_of(server_id))).faults.live_never_converges = True
    await cloud.act(cloud.admin, server_id, "os-migrateLive", {"host": None, "block_migration": "auto"})
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = (await cloud.admin.get(f"/servers/{server_id}/migrations"))["migrations"]
            if found and found[0]["status"] == "running" and found[0]["memory_total_bytes"]:
                return dict(found[0])
            await asyncio.sleep(0.02)


async def test_a_live_migration_in_flight_is_shown_and_aborted(three_hosts: Cloud) -> None:
    cloud = three_hosts
    admin, server_id = cloud.admin, await cloud.created(cloud.demo)
    host = await cloud.host_of(server_id)
    shown = await _in_flight(cloud, server_id)
    path = f"/servers/{server_id}/migrations"
    assert (shown["server_uuid"], shown["source_compute"]) == (server_id, host)
    assert 0 <= shown["memory_remaining_bytes"] <= shown["memory_total_bytes"]
    assert {"uuid", "user_id", "project_id", "disk_total_bytes", "dest_node"} <= shown.keys()
    old = (await admin.get(f"{path}/{shown['id']}", version="2.58"))["migration"]
    assert "uuid" not in old and old["id"] == shown["id"]
    listed = (await admin.get(f"/os-migrations?instance_uuid={server_id}"))["migrations"][0]
    assert listed["links"][0]["href"].endswith(f"/v2.1{path}/{shown['id']}")
    assert (await cloud.demo.get(f"/servers/{server_id}"))["server"]["status"] == "MIGRATING"
    await admin.refused(404, "DELETE", f"{path}/77")
    await admin.refused(404, "GET", f"{path}/77")
    await cloud.demo.refused(403, "DELETE", f"{path}/{shown['id']}")
    assert (await admin.call("DELETE", f"{path}/{shown['id']}", version="2.23")).status_code in (404, 405)
    assert (await admin.call("DELETE", f"{path}/{shown['id']}")).status_code == 202
    server = await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await cloud.host_of(server_id) == host
    assert "aborted" in server["fault"]["message"]
    assert (await admin.get("/os-migrations"))["migrations"][0]["status"] == "cancelled"
    message = await admin.refused(409, "DELETE", f"{path}/{shown['id']}")
    assert message == f"Cannot 'abort live migration' instance {server_id} while it is in task_state None"
    await admin.refused(404, "GET", f"{path}/{shown['id']}")
    assert (await admin.get(path))["migrations"] == []


async def test_a_live_migration_in_flight_is_forced(three_hosts: Cloud) -> None:
    cloud = three_hosts
    admin, server_id = cloud.admin, await cloud.created(cloud.demo)
    host = await cloud.host_of(server_id)
    shown = await _in_flight(cloud, server_id)
    path = f"/servers/{server_id}/migrations/{shown['id']}/action"
    await admin.refused(400, "POST", path, {"force_complete": {}})
    await admin.refused(400, "POST", path, {"abort": None})
    await admin.refused(404, "POST", path, {"force_complete": None}, version="2.21")
    assert (await admin.call("POST", path, {"force_complete": None})).status_code == 202
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await cloud.host_of(server_id) != host
    await admin.refused(409, "POST", path, {"force_complete": None})


async def test_all_moves_are_listed_filtered_and_paged(three_hosts: Cloud) -> None:
    cloud = three_hosts
    admin = cloud.admin
    first, second = [await cloud.created(cloud.demo, name) for name in ("one", "two")]
    host = await cloud.host_of(first)
    for server_id in (first, second):
        await cloud.act(admin, server_id, "migrate")
        await cloud.until(cloud.demo, server_id, "VERIFY_RESIZE")
    await cloud.act(cloud.demo, first, "confirmResize")
    await cloud.until(cloud.demo, first, "ACTIVE")
    shown = (await admin.get("/os-migrations"))["migrations"]
    assert [(one["instance_uuid"], one["status"]) for one in shown] == [(second, "finished"), (first, "confirmed")]
    one = shown[1]
    assert (one["source_compute"], one["migration_type"]) == (host, "migration")
    assert (one["user_id"], one["project_id"]) == (admin.user_id, admin.project_id)
    assert one["dest_compute"] == await cloud.host_of(first) and "links" not in one
    assert isinstance(one["old_instance_type_id"], int)
    for query, count in (
        (f"instance_uuid={first}", 1), ("status=finished", 1), (f"host={host}&instance_uuid={first}", 1),
        ("host=nowhere", 0), ("migration_type=evacuation", 0), (f"user_id={admin.user_id}", 2),
        ("project_id=none", 0), ("changes-since=2099-01-01T00:00:00Z", 0), ("changes-before=2099-01-01T00:00:00Z", 2),
        (f"source_compute={host}&instance_uuid={first}", 1),
    ):  # fmt: skip
        assert len((await admin.get(f"/os-migrations?{query}"))["migrations"]) == count, query
    page = await admin.get("/os-migrations?limit=1")
    assert page["migrations_links"][0]["href"].endswith(f"marker={shown[0]['uuid']}")
    rest = await admin.get(f"/os-migrations?limit=5&marker={shown[0]['uuid']}")
    assert [one["uuid"] for one in rest["migrations"]] == [shown[1]["uuid"]] and "migrations_links" not in rest
    for query, version in (
        ("marker=none", "2.59"), ("colour=red", "2.59"), ("changes-before=2020-01-01", "2.65"), ("user_id=x", "2.79"),
        ("instance_uuid=x", "2.59"), ("changes-since=yesterday", "2.59"),
        ("changes-since=2021-01-01T00:00:00Z&changes-before=2020-01-01T00:00:00Z", "2.66"),
    ):  # fmt: skip
        await admin.refused(400, "GET", f"/os-migrations?{query}", version=version)
    assert len((await admin.get("/os-migrations?colour=red&user_id=x", version="2.58"))["migrations"]) == 2
    for field, first_version in (("migration_type", 23), ("uuid", 59), ("user_id", 80)):
        for version, there in ((first_version - 1, False), (first_version, True)):
            found = (await admin.get("/os-migrations", version=f"2.{version}"))["migrations"]
            assert (field in found[0]) is there
    await cloud.demo.refused(403, "GET", "/os-migrations")


async def test_what_a_hypervisor_counts(three_hosts: Cloud) -> None:
    cloud = three_hosts
    server_id = await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/diagnostics"
    shown = await cloud.admin.get(path)
    assert (shown["state"], shown["driver"], shown["num_cpus"], shown["num_nics"]) == ("running", "simulated", 1, 1)
    assert shown["memory_details"]["maximum"] > 0
    assert {"mac_address", "rx_octets", "tx_rate"} <= shown["nic_details"][0].keys()
    old = await cloud.admin.get(path, version="2.47")
    assert old["memory"] == shown["memory_details"]["maximum"] * 1024
    await cloud.demo.refused(403, "GET", path)
    await cloud.act(cloud.demo, server_id, "os-stop")
    await cloud.until(cloud.demo, server_id, "SHUTOFF")
    message = await cloud.admin.refused(409, "GET", path)
    assert message == f"Cannot 'get_diagnostics' instance {server_id} while it is in vm_state stopped"


async def test_a_live_migration_that_still_prepares_is_aborted_since_2_65(three_hosts: Cloud) -> None:
    cloud = three_hosts
    admin, server_id = cloud.admin, await cloud.created(cloud.demo)
    host = await cloud.host_of(server_id)
    source = cloud.world.host(str(host)).faults
    source.hang_next("offer_live")
    await cloud.act(admin, server_id, "os-migrateLive", {"host": None, "block_migration": "auto"})
    path, found = f"/servers/{server_id}/migrations", []
    async with asyncio.timeout(PATIENCE_S):
        while not found:
            found = (await admin.get(path))["migrations"]
    assert found[0]["status"] == "preparing"
    one = f"{path}/{found[0]['id']}"
    message = await admin.refused(400, "DELETE", one, version="2.64")
    assert "preparing" in message
    assert (await admin.call("DELETE", one, version="2.65")).status_code == 202
    source.release()
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await cloud.host_of(server_id) == host
    assert (await admin.get("/os-migrations"))["migrations"][0]["status"] == "cancelled"
