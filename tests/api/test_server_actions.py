"""Every action through the public API: accepted, to its end state, and with the answer that clients wait for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.api.compute_cloud import Cloud
from tests.patience import PATIENCE_S


async def test_a_guest_sleeps_and_wakes(three_hosts: Cloud) -> None:
    cloud = three_hosts
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    for key, status in (
        ("pause", "PAUSED"), ("unpause", "ACTIVE"), ("suspend", "SUSPENDED"), ("resume", "ACTIVE"), ("os-stop", "SHUTOFF"),
        ("os-start", "ACTIVE"),
    ):  # fmt: skip
        answer = await cloud.act(demo, server_id, key)
        assert (answer.status_code, answer.content) == (202, b"")
        await cloud.until(demo, server_id, status)


async def _image(cloud: Cloud, image_id: str) -> dict[str, Any]:
    headers = {"x-auth-token": cloud.demo.token}
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = await cloud.demo.client.get(f"/image/v2/images/{image_id}", headers=headers)
            assert answer.status_code == 200, answer.text
            if answer.json()["status"] == "active":
                return dict(answer.json())
            await asyncio.sleep(0.02)


async def test_images_are_made_and_backups_rotate(three_hosts: Cloud) -> None:
    cloud = three_hosts
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    faked = {"colour": "red", "instance_uuid": "another", "backup_type": "daily"}
    made = await cloud.act(demo, server_id, "createImage", {"name": "snap", "metadata": faked}, version="2.44")
    location = made.headers["location"]
    assert made.content == b"" and location.startswith(f"{cloud.url}/image/v2/images/")
    image = await _image(cloud, location.rpartition("/")[2])
    assert (image["name"], image["colour"], image["image_type"]) == ("snap", "red", "snapshot")
    assert image["instance_uuid"] == server_id and "backup_type" not in image
    await cloud.until(demo, server_id, "ACTIVE")
    ids = []
    for name in ("first", "second", "third"):
        backup = {"name": name, "backup_type": "daily", "rotation": 2}
        ids.append((await cloud.act(demo, server_id, "createBackup", backup)).json()["image_id"])
        await _image(cloud, ids[-1])
        await cloud.until(demo, server_id, "ACTIVE")
    headers = {"x-auth-token": demo.token}
    assert (await demo.client.get(f"/image/v2/images/{ids[0]}", headers=headers)).status_code == 404
    none = await cloud.act(demo, server_id, "createBackup", {"name": "x", "backup_type": "daily", "rotation": 0})
    assert none.content == b"" and "location" not in none.headers
    await cloud.until(demo, server_id, "ACTIVE")
    assert (await demo.client.get(f"/image/v2/images/{ids[2]}", headers=headers)).status_code == 404
    many = {str(number): "x" for number in range(9)}
    path = f"/servers/{server_id}/action"
    await demo.refused(403, "POST", path, {"createImage": {"name": "much", "metadata": many}})
    await demo.refused(400, "POST", path, {"createImage": {"name": "wrong", "metadata": {"status": "active"}}})


async def test_a_shelved_server_leaves_its_host_and_comes_back(three_hosts: Cloud) -> None:
    cloud = three_hosts
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    path, zone = f"/servers/{server_id}/action", {"availability_zone": "nova"}
    before = (await demo.get(f"/servers/{server_id}"))["server"]
    before_host = await cloud.host_of(server_id)
    await cloud.act(demo, server_id, "shelve")
    await cloud.until(demo, server_id, "SHELVED")
    message = await demo.refused(409, "POST", path, {"unshelve": zone})
    assert message == f"Cannot 'unshelve' instance {server_id} while it is in vm_state shelved"
    await demo.refused(403, "POST", path, {"shelveOffload": None})
    await cloud.act(demo, server_id, "unshelve")
    await cloud.until(demo, server_id, "ACTIVE")
    await cloud.act(demo, server_id, "shelve")
    await cloud.until(demo, server_id, "SHELVED")
    await cloud.act(cloud.admin, server_id, "shelveOffload")
    away = await cloud.until(demo, server_id, "SHELVED_OFFLOADED")
    assert (away["hostId"], await cloud.host_of(server_id)) == ("", None)
    assert "mars" in await demo.refused(400, "POST", path, {"unshelve": {"availability_zone": "mars"}})
    await demo.refused(403, "POST", path, {"unshelve": {"host": "sim-1"}})
    assert "sim-9" in await cloud.admin.refused(400, "POST", path, {"unshelve": {"host": "sim-9"}})
    made = await cloud.admin.call("POST", "/os-aggregates", {"aggregate": {"name": "e", "availability_zone": "east"}})
    empty = f"/os-aggregates/{made.json()['aggregate']['id']}/action"
    free = next(host for host in ("sim-0", "sim-1", "sim-2") if host != before_host)
    assert (await cloud.admin.call("POST", empty, {"add_host": {"host": free}})).status_code == 200
    other = {"host": before_host, "availability_zone": "east"}
    assert '"east"' in await cloud.admin.refused(409, "POST", path, {"unshelve": other})
    for version, body in (("2.77", {}), ("2.77", {"host": "sim-1"}), ("2.91", {"colour": "red"}), ("2.91", "nova")):
        await cloud.admin.refused(400, "POST", path, {"unshelve": body}, version=version)
    await cloud.act(cloud.admin, server_id, "unshelve", {"host": free, "availability_zone": None})
    back = await cloud.until(demo, server_id, "ACTIVE")
    assert await cloud.host_of(server_id) == free
    assert (back["addresses"], back["pinned_availability_zone"]) == (before["addresses"], None)
    await cloud.act(demo, server_id, "shelve")
    await cloud.until(demo, server_id, "SHELVED")
    await cloud.act(cloud.admin, server_id, "shelveOffload")
    await cloud.until(demo, server_id, "SHELVED_OFFLOADED")
    await cloud.act(demo, server_id, "unshelve", zone, version="2.77")
    back = await cloud.until(demo, server_id, "ACTIVE")
    assert back["pinned_availability_zone"] == "nova"


async def _flavor(cloud: Cloud, name: str, *, vcpus: int = 2, ram: int = 1024, disk: int = 2, version: str = "2.1") -> str:
    body = {"flavor": {"name": name, "vcpus": vcpus, "ram": ram, "disk": disk}}
    answer = await cloud.admin.call("POST", "/flavors", body, version=version)
    assert answer.status_code == 200, answer.text
    return answer.json()["flavor"]["id"]


async def test_a_server_is_resized_confirmed_and_reverted(three_hosts: Cloud) -> None:
    cloud = three_hosts
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/action"
    bigger, none = await _flavor(cloud, "bigger"), await _flavor(cloud, "diskless", disk=0)
    nano = (await demo.get(f"/servers/{server_id}", version="2.46"))["server"]["flavor"]["id"]
    for flavor, word in (("no-such", "no-such"), (nano, "must change"), (none, "no root disk")):
        assert word in await demo.refused(400, "POST", path, {"resize": {"flavorRef": flavor}})
    await demo.refused(409, "POST", path, {"confirmResize": None})
    await cloud.act(demo, server_id, "resize", {"flavorRef": bigger, "OS-DCF:diskConfig": "MANUAL"})
    resized = await cloud.until(demo, server_id, "VERIFY_RESIZE")
    assert (resized["flavor"]["original_name"], resized["OS-DCF:diskConfig"]) == ("bigger", "MANUAL")
    assert resized["progress"] in range(101)
    await cloud.act(demo, server_id, "revertResize")
    assert (await cloud.until(demo, server_id, "ACTIVE"))["flavor"]["original_name"] == "m1.nano"
    await cloud.act(demo, server_id, "resize", {"flavorRef": bigger})
    await cloud.until(demo, server_id, "VERIFY_RESIZE")
    assert (await cloud.act(demo, server_id, "confirmResize")).status_code == 204
    assert (await cloud.until(demo, server_id, "ACTIVE"))["flavor"]["original_name"] == "bigger"
    assert "smaller" in await demo.refused(400, "POST", path, {"resize": {"flavorRef": nano}})
    absolute = (await demo.get("/limits"))["limits"]["absolute"]
    assert (absolute["totalCoresUsed"], absolute["totalRAMUsed"]) == (2, 1024)


async def test_admins_move_servers_and_choose_where_to(three_hosts: Cloud) -> None:
    cloud = three_hosts
    admin, server_id = cloud.admin, await cloud.created(cloud.demo)
    path, first = f"/servers/{server_id}/action", await cloud.host_of(server_id)
    other = "sim-1" if first != "sim-1" else "sim-2"
    for key, body in (
        ("migrate", {"host": "nowhere"}), ("os-migrateLive", {"host": "nowhere", "block_migration": "auto"}),
        ("evacuate", {"host": "nowhere"}), ("migrate", {"host": first}),
    ):  # fmt: skip
        assert body["host"] in await admin.refused(400, "POST", path, {key: body}), key
        await cloud.demo.refused(403, "POST", path, {key: body})
    await cloud.act(admin, server_id, "migrate", {"host": other})
    await cloud.until(cloud.demo, server_id, "VERIFY_RESIZE")
    await cloud.act(cloud.demo, server_id, "confirmResize")
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await cloud.host_of(server_id) == other
    await cloud.act(admin, server_id, "os-migrateLive", {"host": first, "block_migration": "auto"})
    async with asyncio.timeout(PATIENCE_S):
        while await cloud.host_of(server_id) != first:
            await asyncio.sleep(0.02)
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    old = {"host": None, "block_migration": True, "disk_over_commit": False}
    await cloud.act(admin, server_id, "os-migrateLive", old, version="2.24")
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    for version, body in (
        ("2.24", {"host": None, "block_migration": True}), ("2.25", old), ("2.24", old | {"block_migration": "auto"}),
        ("2.29", {"host": other, "block_migration": "auto", "force": True}), ("2.25", {"host": None}),
        ("2.68", {"host": other, "block_migration": "auto", "force": True}),
        ("2.30", {"host": None, "block_migration": "auto", "force": True}),
    ):  # fmt: skip
        await admin.refused(400, "POST", path, {"os-migrateLive": body}, version=version)


async def _down(cloud: Cloud, host: str, *, down: bool = True) -> None:
    services = (await cloud.admin.get(f"/os-services?host={host}"))["services"]
    answer = await cloud.admin.call("PUT", f"/os-services/{services[0]['id']}", {"forced_down": down})
    assert answer.status_code == 200, answer.text
    assert answer.json()["service"]["state"] == "down"


async def test_a_server_is_evacuated_from_a_host_that_is_forced_down(three_hosts: Cloud) -> None:
    cloud = three_hosts
    admin = cloud.admin
    server_id, second, third = [await cloud.created(cloud.demo, name) for name in ("one", "two", "three")]
    ids = (server_id, second, third)
    hosts = {one: await cloud.host_of(one) for one in ids}
    host = str(hosts[server_id])
    path = f"/servers/{server_id}/action"
    assert "still in use" in await admin.refused(400, "POST", path, {"evacuate": {}})
    await _down(cloud, host)
    assert host in await admin.refused(400, "POST", path, {"evacuate": {"host": host}})
    for version, body in (
        ("2.13", {}), ("2.14", {"onSharedStorage": False}), ("2.28", {"force": True}), ("2.68", {"force": False}),
        ("2.29", {"force": True}),
    ):  # fmt: skip
        await admin.refused(400, "POST", path, {"evacuate": body}, version=version)
    answer = await cloud.act(admin, server_id, "evacuate", {"adminPass": "secret"})
    assert (answer.status_code, answer.content) == (200, b"")
    stopped = await cloud.until(cloud.demo, server_id, "SHUTOFF")
    assert stopped["OS-EXT-STS:power_state"] == 4
    assert await cloud.host_of(server_id) != host
    await cloud.act(cloud.demo, server_id, "os-start")
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    moved = str(await cloud.host_of(server_id))
    body = {"host": moved, "binary": "nova-compute", "forced_down": True}
    assert (await admin.call("PUT", "/os-services/force-down", body, version="2.11")).status_code == 200
    answer = await cloud.act(admin, server_id, "evacuate", {"onSharedStorage": False, "adminPass": "s"}, version="2.13")
    assert answer.json() == {"adminPass": "s"}
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await cloud.host_of(server_id) not in (host, moved)
    migrations = (await admin.get(f"/os-migrations?instance_uuid={server_id}"))["migrations"]
    assert [(one["migration_type"], one["status"]) for one in migrations] == [("evacuation", "done")] * 2


async def test_a_server_is_rebuilt(three_hosts: Cloud, tmp_path: Path) -> None:
    cloud = three_hosts
    demo, server_id = cloud.demo, await cloud.created(cloud.demo, metadata={"a": "b"})
    path = f"/servers/{server_id}/action"
    file = tmp_path / "second.raw"
    await asyncio.to_thread(file.write_bytes, b"x" * (1 << 20))
    image_id = (await cloud.control.images.register("second", file, disk_format="raw", properties={})).id
    unknown = "3f1c2b5e-0000-4000-8000-000000000000"
    for body, word in (
        ({"imageRef": unknown}, unknown), ({"imageRef": "tiny"}, "imageRef"), ({}, "'imageRef' is a required property"),
        ({"imageRef": image_id, "name": " "}, "rebuild.name"), ({"imageRef": image_id, "key_name": "none"}, "none"),
        ({"imageRef": image_id, "user_data": "$"}, "rebuild.user_data"),
        ({"imageRef": image_id, "accessIPv4": "1.2"}, "rebuild.accessIPv4"),
        ({"imageRef": image_id, "flavorRef": "1"}, "'flavorRef' was unexpected"),
        ({"imageRef": image_id, "hostname": "a b"}, "rebuild.hostname"),
        ({"imageRef": image_id, "personality": []}, "'personality' was unexpected"),
    ):  # fmt: skip
        assert word in await demo.refused(400, "POST", path, {"rebuild": body}), body
    for field, value, first in (
        ("description", "d", 19), ("key_name", None, 54), ("user_data", None, 57), ("hostname", "h", 90),
        ("trusted_image_certificates", ["c"], 63),
    ):  # fmt: skip
        body = {"rebuild": {"imageRef": image_id, field: value}}
        message = await demo.refused(400, "POST", path, body, version=f"2.{first - 1}")
        assert f"'{field}' was unexpected" in message
    answer = await cloud.act(
        demo, server_id, "rebuild",
        {"imageRef": image_id, "name": "new", "metadata": {"c": "d"}, "adminPass": "pw", "user_data": "aGk=",
         "description": "what", "hostname": "newhost"},
    )  # fmt: skip
    shown = answer.json()["server"]
    assert answer.status_code == 202 and answer.headers["location"].endswith(server_id)
    assert (shown["status"], shown["image"]["id"], shown["adminPass"]) == ("REBUILD", image_id, "pw")
    assert (shown["user_data"], shown["key_name"], shown["metadata"]) == ("aGk=", None, {"c": "d"})
    rebuilt = await cloud.until(demo, server_id, "ACTIVE")
    assert (rebuilt["name"], rebuilt["image"]["id"], rebuilt["metadata"]) == ("new", image_id, {"c": "d"})
    assert (rebuilt["description"], rebuilt["OS-EXT-SRV-ATTR:hostname"]) == ("what", "newhost")
    assert "fault" not in rebuilt


async def test_a_server_is_rescued_and_its_password_changed(three_hosts: Cloud) -> None:
    cloud = three_hosts
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/action"
    unknown = "3f1c2b5e-0000-4000-8000-000000000000"
    assert unknown in await demo.refused(400, "POST", path, {"rescue": {"rescue_image_ref": unknown}})
    assert "rescue.adminPass" in await demo.refused(400, "POST", path, {"rescue": {"adminPass": 7}})
    answer = await cloud.act(demo, server_id, "rescue", {"adminPass": "pw"})
    assert (answer.status_code, answer.json()) == (200, {"adminPass": "pw"})
    await cloud.until(demo, server_id, "RESCUE")
    await cloud.act(demo, server_id, "unrescue")
    await cloud.until(demo, server_id, "ACTIVE")
    assert len((await cloud.act(demo, server_id, "rescue")).json()["adminPass"]) == 12
    await cloud.until(demo, server_id, "RESCUE")
    await cloud.act(demo, server_id, "unrescue")
    await cloud.until(demo, server_id, "ACTIVE")
    assert "runs no guest agent" in await demo.refused(409, "POST", path, {"changePassword": {"adminPass": "secret"}})
    assert "'adminPass' is a required" in await demo.refused(400, "POST", path, {"changePassword": {}})


async def test_a_deleted_server_waits_to_be_restored_and_users_do_not_list_it(three_hosts: Cloud) -> None:
    cloud = three_hosts
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    assert (await demo.call("DELETE", f"/servers/{server_id}")).status_code == 204
    await cloud.until(demo, server_id, "SOFT_DELETED")
    for caller, query, count in (
        (demo, "", 0), (demo, "?status=SOFT_DELETED", 0), (cloud.admin, "?all_tenants=1", 0),
        (cloud.admin, "?all_tenants=1&status=SOFT_DELETED", 1), (cloud.admin, "?all_tenants=1&deleted=1", 1),
        (cloud.admin, "?all_tenants=1&vm_state=soft-delete", 1), (cloud.admin, "?all_tenants=1&soft_deleted=1", 1),
        (demo, "?vm_state=soft-delete", 0), (demo, "?changes-since=2020-01-01T00:00:00Z", 1),
    ):  # fmt: skip
        assert len((await caller.get(f"/servers{query}"))["servers"]) == count, query
    await cloud.act(demo, server_id, "restore")
    await cloud.until(demo, server_id, "ACTIVE")
    await demo.refused(409, "POST", f"/servers/{server_id}/action", {"restore": None})
    await demo.call("DELETE", f"/servers/{server_id}")
    await cloud.until(demo, server_id, "SOFT_DELETED")
    await cloud.act(demo, server_id, "forceDelete")
    await cloud.gone(demo, server_id)
    await demo.refused(404, "POST", f"/servers/{server_id}/action", {"restore": None})


async def test_what_the_state_forbids_is_a_conflict_in_the_apis_words(three_hosts: Cloud) -> None:
    cloud = three_hosts
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/action"
    for key, name in (
        ("unpause", "unpause"), ("resume", "resume"), ("os-start", "start"), ("unshelve", "unshelve"),
        ("confirmResize", "confirmResize"), ("revertResize", "revertResize"), ("unrescue", "unrescue"),
        ("restore", "restore"), ("shelveOffload", "shelveOffload"),
    ):  # fmt: skip
        message = await cloud.admin.refused(409, "POST", path, {key: None})
        assert message == f"Cannot '{name}' instance {server_id} while it is in vm_state active", key
    await cloud.act(demo, server_id, "pause")
    await cloud.until(demo, server_id, "PAUSED")
    bigger = await _flavor(cloud, "bigger")
    for key, value, name in (
        ("pause", None, "pause"), ("suspend", None, "suspend"), ("resize", {"flavorRef": bigger}, "resize"),
        ("migrate", None, "migrate"), ("rebuild", {"imageRef": cloud.image_id}, "rebuild"), ("rescue", None, "rescue"),
        ("changePassword", {"adminPass": "x"}, "changePassword"), ("os-stop", None, "stop"),
    ):  # fmt: skip
        message = await cloud.admin.refused(409, "POST", path, {key: value})
        assert message == f"Cannot '{name}' instance {server_id} while it is in vm_state paused", key
    await cloud.act(demo, server_id, "lock")
    assert "is locked" in await demo.refused(409, "POST", path, {"unpause": None})
    await cloud.act(cloud.admin, server_id, "unpause")
    await cloud.until(demo, server_id, "ACTIVE")


async def test_what_is_no_action_any_more(three_hosts: Cloud) -> None:
    cloud = three_hosts
    path = f"/servers/{await cloud.created(cloud.demo)}/action"
    for key in ("injectNetworkInfo", "resetNetwork"):
        await cloud.admin.refused(410, "POST", path, {key: None}, version="2.1")
    for key in ("addFixedIp", "removeFixedIp", "addFloatingIp", "removeFloatingIp"):
        await cloud.demo.refused(400, "POST", path, {key: {}}, version="2.43")
        await cloud.demo.refused(404, "POST", path, {key: {}}, version="2.44")


async def test_bodies_of_actions_are_refused_by_path_and_rule(three_hosts: Cloud) -> None:
    cloud = three_hosts
    path = f"/servers/{await cloud.created(cloud.demo)}/action"
    for key, value, word in (
        ("createImage", {}, "createImage: 'name' is a required property"),
        ("createImage", {"name": ""}, "createImage.name"),
        ("createImage", {"name": "x" * 256}, "createImage.name"),
        ("createImage", {"name": "x", "metadata": {"k": 1}}, "createImage.metadata"),
        ("createImage", None, "createImage"),
        ("createBackup", {"name": "x", "rotation": 1}, "'backup_type' is a required"),
        ("createBackup", {"name": "x", "backup_type": "d", "rotation": -1}, "createBackup.rotation"),
        ("createBackup", {"name": "x", "backup_type": "d", "rotation": "many"}, "createBackup.rotation"),
        ("resize", {}, "resize: 'flavorRef' is a required property"),
        ("resize", {"flavorRef": ""}, "resize.flavorRef"),
        ("resize", {"flavorRef": "1", "OS-DCF:diskConfig": "SOME"}, "resize.OS-DCF:diskConfig"),
        ("migrate", {"host": "a b"}, "migrate.host"),
        ("migrate", {"node": "x"}, "'node' was unexpected"),
        ("os-migrateLive", {"host": "sim-1", "block_migration": "perhaps"}, "os-migrateLive.block_migration"),
        ("evacuate", {"host": ""}, "evacuate.host"),
        ("rescue", {"image": "x"}, "'image' was unexpected"),
        ("changePassword", {"adminPass": None}, "changePassword.adminPass"),
    ):  # fmt: skip
        assert word in await cloud.admin.refused(400, "POST", path, {key: value}), (key, value)


async def test_ports_of_a_server_join_and_leave_security_groups(three_hosts: Cloud) -> None:
    cloud = three_hosts
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    path, port = f"/servers/{server_id}/action", (await cloud.control.networks.ports_of(server_id))[0]
    store = cloud.control.store
    for key, value, status in (
        ("addSecurityGroup", {"name": "none"}, 404), ("addSecurityGroup", {}, 400),
        ("removeSecurityGroup", {"name": ""}, 400), ("removeSecurityGroup", {"name": "none"}, 404),
    ):  # fmt: skip
        await demo.refused(status, "POST", path, {key: value})

    async def groups() -> tuple[int, list[str]]:
        rows = await store.read("SELECT group_id FROM port_security_groups WHERE port_id = :id", {"id": port.definition.id})
        server = (await demo.get(f"/servers/{server_id}"))["server"]
        return len(rows), [one["name"] for one in server["security_groups"]]

    for key, count in (
        ("addSecurityGroup", 1), ("removeSecurityGroup", 0), ("addSecurityGroup", 1), ("addSecurityGroup", 1),
    ):  # fmt: skip
        assert (await cloud.act(demo, server_id, key, {"name": "default"})).status_code == 202
        assert await groups() == (count, ["default"] * count)
    await cloud.act(demo, server_id, "removeSecurityGroup", {"name": "default"})
    await demo.refused(404, "POST", path, {"removeSecurityGroup": {"name": "default"}})
    await cloud.control.networks.refresh.settled()
