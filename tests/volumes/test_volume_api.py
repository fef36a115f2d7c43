"""The Block Storage API over real HTTP: what each resource answers, and what is refused with which words."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from instar.errors import NotFound, TooLarge
from instar.volumes.local import volumes_runtime
from instar.volumes.storage import volume_subject
from tests.volumes.export_client import qemu_io
from tests.volumes.volume_client import Client
from tests.volumes.volume_cloud import VolumeCloud

SERVER = "5e7d3c1a-9b20-4f6e-8a11-6d0c2b7f9e34"
HOST = {"host": "h1", "ip": "127.0.0.1", "mountpoint": "/dev/vdb"}


async def image(cloud: VolumeCloud, data: bytes, **fields: object) -> str:
    """A public raw image."""
    from instar.images.fields import Caller

    admin = Caller("admins", is_admin=True)
    body = {"name": "i", "disk_format": "raw", "container_format": "bare", "visibility": "public", **fields}
    record = await cloud.images.create(body, admin)

    async def chunks() -> object:
        yield data

    await cloud.images.upload(record.id, chunks(), admin)
    return record.id


async def attach(client: Client, volume_id: str, server: str = SERVER) -> str:
    body = {"attachment": {"volume_uuid": volume_id, "instance_uuid": server, "connector": HOST}}
    attachment = (await client.call("POST", "/attachments", 200, json=body))["attachment"]
    await client.call("POST", f"/attachments/{attachment['id']}/action", 204, json={"os-complete": None})
    return attachment["id"]


async def test_a_volume_is_made_shown_changed_and_deleted(member: Client, cloud: VolumeCloud) -> None:
    volume = await member.create(name="v", description="d", metadata={"a": "1"})
    assert (volume["size"], volume["bootable"], volume["volume_type"]) == (1, "false", "__DEFAULT__")
    assert "os-vol-host-attr:host" not in volume
    path = f"/volumes/{volume['id']}"
    await member.call("PUT", path, 200, json={"volume": {"name": "w", "description": None}})
    await member.call("POST", f"{path}/metadata", 200, json={"metadata": {"b": "2"}})
    await member.call("PUT", f"{path}/metadata/c", 200, json={"meta": {"c": "3"}})
    await member.call("DELETE", f"{path}/metadata/a", 200)
    await member.call("DELETE", f"{path}/metadata/a", 404)
    shown = await member.show(volume["id"])
    assert (shown["name"], shown["description"], shown["metadata"]) == ("w", None, {"b": "2", "c": "3"})
    old = (await member.http.get(path, headers={"openstack-api-version": "volume 3.0"})).json()["volume"]
    assert "shared_targets" in shown and "group_id" not in old
    assert (await member.http.get(f"/p1{path}")).status_code == 200
    assert (await member.http.get(f"/p9{path}")).status_code == 400
    await member.delete(volume["id"])
    assert cloud.files() == []


async def test_a_volume_of_an_image_boots_and_goes_back_into_an_image(member: Client, cloud: VolumeCloud) -> None:
    data = b"boot" * 1024 + bytes(1 << 20)
    image_id = await image(cloud, data, hw_disk_bus="virtio", min_disk=1)
    volume = await member.create(imageRef=image_id)
    assert volume["bootable"] == "true"
    assert volume["volume_image_metadata"]["hw_disk_bus"] == "virtio"
    assert volume["volume_image_metadata"]["image_id"] == image_id
    for disk_format in ("qcow2", "raw"):
        upload = {"image_name": "back", "disk_format": disk_format}
        told = await member.action(volume["id"], "os-volume_upload_image", upload)
        assert told["os-volume_upload_image"]["status"] == "uploading"
        await member.until(f"/volumes/{volume['id']}", "volume", "available")
        made = await cloud.images.image_fetch(told["os-volume_upload_image"]["image_id"], project_id="p1", is_admin=False)
        assert (made.status, made.virtual_size_bytes, made.properties) == ("active", 1 << 30, {"hw_disk_bus": "virtio"})
        again = await member.create(imageRef=made.id)
        attachment = await attach(member, again["id"])
        connection = await cloud.volumes.connect(attachment, host="h1", host_ip="", device="/dev/vdb")
        await qemu_io(connection, "read -P 98 0 1")  # b
        await qemu_io(connection, "read -P 0 512k 512k")


async def test_an_upload_that_fails_leaves_no_image(
    member: Client, cloud: VolumeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(image_id: str, data: Path) -> None:
        raise TooLarge("There is not enough space left to store the image.")

    monkeypatch.setattr(cloud.volumes.images, "image_fill", refuse)
    volume_id = (await member.create())["id"]
    told = await member.action(volume_id, "os-volume_upload_image", {"image_name": "back", "disk_format": "raw"})
    await member.until(f"/volumes/{volume_id}", "volume", "available")
    await cloud.volumes.owner.jobs.ended(volume_subject(volume_id))
    with pytest.raises(NotFound):
        await cloud.images.image_fetch(told["os-volume_upload_image"]["image_id"], project_id="p1", is_admin=True)


async def test_a_volume_grows_also_while_it_is_attached(member: Client, cloud: VolumeCloud) -> None:
    volume_id = (await member.create())["id"]
    await member.action(volume_id, "os-extend", {"new_size": 2})
    assert (await member.until(f"/volumes/{volume_id}", "volume", "available"))["size"] == 2
    attachment_id = await attach(member, volume_id)
    await member.action(volume_id, "os-extend", {"new_size": 3})
    assert (await member.until(f"/volumes/{volume_id}", "volume", "in-use"))["size"] == 3
    connection = await cloud.volumes.connect(attachment_id, host="h1", host_ip="", device="/dev/vdb")
    assert connection.size_bytes == 3 << 30
    await qemu_io(connection, "write -P 1 2G 64k", "read -P 1 2G 64k")
    assert "greater than" in (await member.action(volume_id, "os-extend", {"new_size": 3}, 400))["badRequest"]["message"]
    await member.action(volume_id, "os-extend", {"new_size": 5000}, 413)


async def test_attachments_tell_their_states_and_keep_their_key_from_users(
    member: Client, admin: Client, cloud: VolumeCloud
) -> None:
    volume_id = (await member.create())["id"]
    body = {"attachment": {"volume_uuid": volume_id, "instance_uuid": SERVER}}
    attachment = (await member.call("POST", "/attachments", 200, json=body))["attachment"]
    path = f"/attachments/{attachment['id']}"
    assert (attachment["status"], (await member.show(volume_id))["status"]) == ("reserved", "reserved")
    await member.call("POST", f"{path}/action", 400, json={"os-complete": None})
    told = (await member.call("PUT", path, 200, json={"attachment": {"connector": HOST}}))["attachment"]
    assert "export" not in str(told)
    told = (await admin.call("PUT", path, 200, json={"attachment": {"connector": HOST}}))["attachment"]
    assert told["connection_info"]["driver_volume_type"] == "nbd" and len(told["connection_info"]["export"]) > 30
    assert (await member.show(volume_id))["status"] == "attaching"
    await member.call("POST", f"{path}/action", 204, json={"os-complete": None})
    shown = await member.show(volume_id)
    assert shown["status"] == "in-use"
    assert [(one["server_id"], one["device"], one["host_name"]) for one in shown["attachments"]] == [
        (SERVER, "/dev/vdb", None)
    ]
    body = {"attachment": {"volume_uuid": volume_id, "instance_uuid": str(uuid.uuid4())}}
    assert "Invalid volume" in (await member.call("POST", "/attachments", 400, json=body))["badRequest"]["message"]
    await member.call("DELETE", f"/volumes/{volume_id}", 400)
    assert [one["id"] for one in (await member.call("GET", "/attachments"))["attachments"]] == [attachment["id"]]
    await member.call("DELETE", path, 200)
    await member.call("DELETE", path, 404)
    await member.delete(volume_id)
    assert not volumes_runtime(cloud.directory).exists()


async def test_the_older_actions_lead_through_the_same_states(member: Client, admin: Client) -> None:
    volume_id = (await member.create())["id"]

    async def now() -> str:
        return (await member.show(volume_id))["status"]

    await member.action(volume_id, "os-reserve")
    assert await now() == "reserved"
    await member.action(volume_id, "os-reserve", expect=400)
    await member.action(volume_id, "os-unreserve")
    assert await now() == "available"
    await member.action(volume_id, "os-reserve")
    told = await admin.action(volume_id, "os-initialize_connection", {"connector": HOST}, 200)
    assert told["connection_info"]["data"]["socket"]
    attach_to = {"instance_uuid": SERVER, "mountpoint": "/dev/vdc", "mode": "rw"}
    await member.action(volume_id, "os-attach", attach_to)
    assert await now() == "in-use"
    await member.action(volume_id, "os-begin_detaching")
    assert await now() == "detaching"
    await member.action(volume_id, "os-roll_detaching")
    assert await now() == "in-use"
    await member.action(volume_id, "os-begin_detaching")
    await member.action(volume_id, "os-terminate_connection", {"connector": HOST})
    await member.action(volume_id, "os-detach", {})
    assert await now() == "available"


async def test_a_volume_goes_back_to_its_latest_snapshot(member: Client, cloud: VolumeCloud) -> None:
    volume_id = (await member.create())["id"]

    async def write(pattern: int, verb: str = "write") -> None:
        attachment_id = await attach(member, volume_id)
        connection = await cloud.volumes.connect(attachment_id, host="h1", host_ip="", device="")
        await qemu_io(connection, f"{verb} -P {pattern} 0 64k")
        await member.call("DELETE", f"/attachments/{attachment_id}", 200)

    await write(1)
    snapshot = await member.snapshot(volume_id, name="s", metadata={"k": "v"})
    assert snapshot["metadata"] == {"k": "v"}
    await write(2)
    await member.action(volume_id, "revert", {"snapshot_id": snapshot["id"]})
    await member.until(f"/volumes/{volume_id}", "volume", "available")
    await write(1, "read")
    await member.call("DELETE", f"/volumes/{volume_id}", 400)
    await member.call("DELETE", f"/volumes/{volume_id}?cascade=true", 202)
    await member.gone(f"/volumes/{volume_id}")
    assert cloud.files() == []


async def test_lists_filter_sort_and_page(member: Client, other: Client, admin: Client) -> None:
    for name in ("a", "b", "c"):
        await member.create(name=name, metadata={"n": name})
    await other.create(name="z")

    async def names(client: Client, query: str) -> list[str]:
        return [one["name"] for one in (await client.call("GET", f"/volumes/detail?{query}"))["volumes"]]

    assert await names(member, "sort=name:asc") == ["a", "b", "c"]
    assert await names(member, "") == ["c", "b", "a"]
    assert await names(member, "name=b") == ["b"]
    assert await names(member, "metadata={'n': 'c'}") == ["c"]
    assert await names(member, "all_tenants=1&sort=name:asc") == ["a", "b", "c"]
    assert await names(admin, "all_tenants=1&sort=name:asc") == ["a", "b", "c", "z"]
    page = await member.call("GET", "/volumes?limit=2&sort=name:asc&with_count=true")
    assert ([one["name"] for one in page["volumes"]], page["count"]) == (["a", "b"], 3)
    rest = (await member.http.get(page["volumes_links"][0]["href"])).json()
    assert [one["name"] for one in rest["volumes"]] == ["c"] and "volumes_links" not in rest
    summary = (await member.call("GET", "/volumes/summary"))["volume-summary"]
    assert (summary["total_count"], summary["total_size"]) == (3, 3)
    for wrong in ("limit=x", "sort=nope:asc", "sort=name:up", "bootable=perhaps", "metadata=5"):
        await member.call("GET", f"/volumes?{wrong}", 400)


async def test_types_are_made_by_admins_and_seen_by_those_who_may(member: Client, admin: Client) -> None:
    body = {"volume_type": {"name": "gold", "os-volume-type-access:is_public": False, "extra_specs": {"k": "v"}}}
    kind = (await admin.call("POST", "/types", 200, json=body))["volume_type"]
    path = f"/types/{kind['id']}"
    await admin.call("POST", "/types", 409, json=body)
    await member.call("GET", path, 404)
    await member.call("POST", "/volumes", 400, json={"volume": {"size": 1, "volume_type": "gold"}})
    await admin.call("POST", f"{path}/action", 202, json={"addProjectAccess": {"project": "p1"}})
    assert (await member.call("GET", path))["volume_type"]["extra_specs"] == {}
    assert (await admin.call("GET", f"{path}/extra_specs"))["extra_specs"] == {"k": "v"}
    await admin.call("PUT", f"{path}/extra_specs/multiattach", 200, json={"multiattach": "<is> True"})
    volume = await member.create(volume_type="gold")
    assert (volume["volume_type"], volume["multiattach"]) == ("gold", True)
    await admin.call("DELETE", path, 409)
    await member.delete(volume["id"])
    await admin.call("DELETE", path, 202)
    default = (await member.call("GET", "/types/default"))["volume_type"]
    await admin.call("DELETE", f"/types/{default['id']}", 400)


async def test_quotas_are_set_counted_and_refused(member: Client, admin: Client) -> None:
    await admin.call("PUT", "/os-quota-sets/p1", 200, json={"quota_set": {"volumes": 2, "gigabytes": 4}})
    await member.create(2)
    over = await member.call("POST", "/volumes", 413, json={"volume": {"size": 3}})
    assert "gigabytes" in over["overLimit"]["message"]
    await member.create(1)
    over = await member.call("POST", "/volumes", 413, json={"volume": {"size": 1}})
    assert over["overLimit"]["message"].startswith("Quota exceeded for volumes: Requested 1, but already used 2 of 2")
    usage = (await member.call("GET", "/os-quota-sets/p1?usage=True"))["quota_set"]
    assert usage["gigabytes"] == {"limit": 4, "in_use": 3, "reserved": 0, "allocated": 0}
    limits = (await member.call("GET", "/limits"))["limits"]["absolute"]
    assert (limits["maxTotalVolumes"], limits["totalVolumesUsed"], limits["totalGigabytesUsed"]) == (2, 2, 3)
    await admin.call("DELETE", "/os-quota-sets/p1", 200)
    await admin.call("PUT", "/os-quota-class-sets/default", 200, json={"quota_class_set": {"snapshots": 1}})
    assert (await member.call("GET", "/os-quota-sets/p1"))["quota_set"]["snapshots"] == 1


async def test_two_who_grow_volumes_at_once_do_not_both_get_the_last_room(member: Client, admin: Client) -> None:
    await admin.call("PUT", "/os-quota-sets/p1", 200, json={"quota_set": {"gigabytes": 10}})
    volumes = [(await member.create())["id"] for _ in range(4)]
    body = {"os-extend": {"new_size": 4}}
    answers = await asyncio.gather(*[member.http.post(f"/volumes/{one}/action", json=body) for one in volumes])
    assert sorted(answer.status_code for answer in answers) == [202, 202, 413, 413]


BAD = [
    ({"size": "many"}, "size", "many"),
    ({"size": 0}, "size", "0"),
    ({"size": 1, "name": "x" * 256}, "name", "xxx"),
    ({"size": 1, "metadata": {"k": 5}}, "metadata", "5"),
    ({"size": 1, "snapshot_id": "../../etc"}, "snapshot_id", "../../etc"),
    ({"size": 1, "availability_zone": "mars"}, "zone", "mars"),
    ({"size": 1, "imageRef": SERVER}, "image", SERVER),
    ({"size": 1, "source_volid": SERVER}, "Volume", SERVER),
    ({"size": 1, "volume_type": "platinum"}, "volume_type", "platinum"),
]


@pytest.mark.parametrize(("fields", "name", "value"), BAD, ids=[f"{name}-{value[:9]}" for _, name, value in BAD])
async def test_bad_input_names_field_and_value(
    fields: dict[str, object], name: str, value: str, member: Client, cloud: VolumeCloud
) -> None:
    message = (await member.call("POST", "/volumes", 400, json={"volume": fields}))["badRequest"]["message"]
    assert name in message and value in message, message
    assert cloud.files() == []


async def test_a_volume_too_small_for_its_image_is_refused(member: Client, cloud: VolumeCloud) -> None:
    image_id = await image(cloud, b"x" * 1024, min_disk=2)
    answer = await member.call("POST", "/volumes", 400, json={"volume": {"size": 1, "imageRef": image_id}})
    assert "cannot be smaller than the 2GB" in answer["badRequest"]["message"]


async def test_bad_actions_and_versions_are_refused(member: Client, admin: Client) -> None:
    volume_id = (await member.create())["id"]
    for body in ({}, {"os-fly": None}, {"os-extend": None}, {"os-extend": {"new_size": 2, "x": 1}}, {"a": 1, "b": 2}):
        await member.call("POST", f"/volumes/{volume_id}/action", 400, json=body)
    for version, status in (("3.0", 200), ("3.54", 200), ("3.999", 406), ("x", 400)):
        answer = await member.http.get("/volumes", headers={"openstack-api-version": f"volume {version}"})
        assert answer.status_code == status
    assert (await member.http.get("/attachments", headers={"openstack-api-version": "volume 3.26"})).status_code == 404
    await member.action(volume_id, "os-reset_status", {"status": "error"}, 403)
    await admin.action(volume_id, "os-reset_status", {"status": "creating"})
    await member.call("DELETE", f"/volumes/{volume_id}", 400)
    await admin.action(volume_id, "os-force_delete", None)
    await member.gone(f"/volumes/{volume_id}")


async def test_read_only_attachments_cannot_write(member: Client, cloud: VolumeCloud) -> None:
    volume_id = (await member.create())["id"]
    body = {"attachment": {"volume_uuid": volume_id, "instance_uuid": SERVER, "mode": "ro", "connector": HOST}}
    attachment = (await member.call("POST", "/attachments", 200, json=body))["attachment"]
    connection = await cloud.volumes.connect(attachment["id"], host="h1", host_ip="", device="")
    assert connection.read_only
    await qemu_io(connection, "read -P 0 0 64k")
    with pytest.raises(AssertionError):
        await qemu_io(connection.__class__(export=connection.export, socket=connection.socket), "write 0 64k")


def test_nothing_of_a_volume_is_readable_for_others(directory: Path) -> None:
    async def look() -> None:
        cloud = VolumeCloud(directory)
        await cloud.start()
        await cloud.stop()

    asyncio.run(look())
    assert (directory / "volumes").stat().st_mode & 0o077 == 0
