"""Servers with block devices: every source and destination that makes sense, what is shown, and what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.api.compute_cloud import Cloud
from tests.api.test_volume_attachments import new_volume, until_volume, volume_api
from tests.patience import PATIENCE_S

UNKNOWN = "3f1c2b5e-0000-4000-8000-000000000000"


async def boot_volume(cloud: Cloud, size: int = 1) -> str:
    return await new_volume(cloud.demo, size, imageRef=cloud.image_id)


def root(**device: Any) -> dict[str, Any]:
    """The body's fields of a server that boots from this device."""
    return {"imageRef": "", "block_device_mapping_v2": [{"boot_index": 0} | device]}


async def attached(cloud: Cloud, server_id: str) -> list[dict[str, Any]]:
    return (await cloud.demo.get(f"/servers/{server_id}/os-volume_attachments"))["volumeAttachments"]


async def test_a_server_boots_from_a_volume_that_is_there(cloud: Cloud) -> None:
    volume_id = await boot_volume(cloud)
    wanted = root(uuid=volume_id, source_type="volume", destination_type="volume", tag="root")
    server_id = await cloud.created(cloud.demo, **wanted)
    server = (await cloud.demo.get(f"/servers/{server_id}"))["server"]
    assert server["image"] == ""
    assert server["os-extended-volumes:volumes_attached"] == [{"id": volume_id, "delete_on_termination": False}]
    (shown,) = await attached(cloud, server_id)
    assert (shown["device"], shown["tag"], shown["volumeId"]) == ("/dev/vda", "root", volume_id)
    volume = await until_volume(cloud.demo, volume_id, "in-use")
    assert volume["attachments"][0]["server_id"] == server_id
    assert "root" in await cloud.demo.refused(400, "DELETE", f"/servers/{server_id}/os-volume_attachments/{volume_id}")
    await cloud.demo.call("DELETE", f"/servers/{server_id}")
    await cloud.gone(cloud.demo, server_id)
    await until_volume(cloud.demo, volume_id, "available")


@pytest.mark.parametrize("ends", [False, True])
async def test_a_volume_is_made_of_an_image(cloud: Cloud, ends: bool) -> None:
    wanted = root(
        uuid=cloud.image_id, source_type="image", destination_type="volume", volume_size=2, delete_on_termination=ends,
        volume_type="__DEFAULT__",
    )  # fmt: skip
    server_id = await cloud.created(cloud.demo, **wanted)
    (shown,) = await attached(cloud, server_id)
    volume = await until_volume(cloud.demo, shown["volumeId"], "in-use")
    assert (volume["size"], volume["bootable"]) == (2, "true")
    await cloud.demo.call("DELETE", f"/servers/{server_id}")
    await cloud.gone(cloud.demo, server_id)
    left = (await volume_api(cloud.demo, "GET", "/volumes"))["volumes"]
    assert bool(left) is not ends


async def test_snapshots_and_blank_volumes_besides_an_image(cloud: Cloud) -> None:
    volume_id = await boot_volume(cloud)
    body = {"snapshot": {"volume_id": volume_id, "name": "s"}}
    snapshot = (await volume_api(cloud.demo, "POST", "/snapshots", body))["snapshot"]["id"]
    async with asyncio.timeout(PATIENCE_S):
        while (await volume_api(cloud.demo, "GET", f"/snapshots/{snapshot}"))["snapshot"]["status"] != "available":
            await asyncio.sleep(0.01)
    server_id = await cloud.created(cloud.demo, block_device_mapping_v2=[
        {"uuid": cloud.image_id, "source_type": "image", "destination_type": "local", "boot_index": "0"},
        {"uuid": snapshot, "source_type": "snapshot", "destination_type": "volume", "boot_index": -1},
        {"source_type": "blank", "destination_type": "volume", "volume_size": "1", "device_name": "/dev/vdx"},
    ])  # fmt: skip
    shown = await attached(cloud, server_id)
    assert [one["device"] for one in shown] == ["/dev/vdb", "/dev/vdx"]
    server = (await cloud.demo.get(f"/servers/{server_id}"))["server"]
    assert server["image"]["id"] == cloud.image_id
    booted = await cloud.created(cloud.demo, "other", **root(uuid=snapshot, source_type="snapshot"))
    assert [one["device"] for one in await attached(cloud, booted)] == ["/dev/vda"]


async def test_the_old_syntax_still_boots(cloud: Cloud) -> None:
    volume_id = await boot_volume(cloud)
    mapping = [{"volume_id": volume_id, "device_name": "vda", "delete_on_termination": "1"}]
    server_id = await cloud.created(cloud.demo, imageRef="", block_device_mapping=mapping, version="2.1", networks=[])
    (shown,) = await attached(cloud, server_id)
    assert (shown["volumeId"], shown["device"], shown["delete_on_termination"]) == (volume_id, "/dev/vda", True)


async def test_several_servers_get_volumes_of_their_own(cloud: Cloud) -> None:
    wanted = root(uuid=cloud.image_id, source_type="image", destination_type="volume", volume_size=1)
    await cloud.created(cloud.demo, min_count=2, **wanted)
    servers = (await cloud.demo.get("/servers/detail"))["servers"]
    for server in servers:
        await cloud.until(cloud.demo, server["id"], "ACTIVE")
    ids = {(await attached(cloud, server["id"]))[0]["volumeId"] for server in servers}
    assert (len(servers), len(ids)) == (2, 2)


async def test_a_server_of_volumes_becomes_an_image_and_a_server_again(cloud: Cloud) -> None:
    """createImage makes snapshots and an image without data; a server of that image has volumes of those snapshots."""
    wanted = root(uuid=cloud.image_id, source_type="image", destination_type="volume", volume_size=1)
    server_id = await cloud.created(cloud.demo, **wanted)
    answer = await cloud.demo.call("POST", f"/servers/{server_id}/action", {"createImage": {"name": "copy"}})
    assert answer.status_code == 202, answer.text
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    headers = {"x-auth-token": cloud.demo.token}
    image = (await cloud.demo.client.get(f"/image/v2/images/{answer.json()['image_id']}", headers=headers)).json()
    assert (image["status"], image["bdm_v2"]) == ("active", "True")
    (device,) = json.loads(image["block_device_mapping"])
    snapshot = (await volume_api(cloud.demo, "GET", f"/snapshots/{device['snapshot_id']}"))["snapshot"]
    assert snapshot["status"] == "available"
    again = await cloud.created(cloud.demo, "again", imageRef=image["id"])
    (shown,) = await attached(cloud, again)
    volume = await until_volume(cloud.demo, shown["volumeId"], "in-use")
    assert volume["snapshot_id"] == device["snapshot_id"]


async def test_a_rebuild_gives_the_root_volume_another_image_since_2_93(cloud: Cloud) -> None:
    wanted = root(uuid=cloud.image_id, source_type="image", destination_type="volume", volume_size=1)
    server_id = await cloud.created(cloud.demo, **wanted)
    (shown,) = await attached(cloud, server_id)
    path = f"/servers/{server_id}/action"
    answer = await cloud.demo.call("POST", path, {"rebuild": {"imageRef": cloud.image_id}}, version="2.92")
    assert answer.status_code == 202, answer.text  # the volume stays as it is
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    other = await cloud.created(cloud.demo, "other")
    copy = (await cloud.act(cloud.demo, other, "createImage", {"name": "copy"})).json()["image_id"]
    await cloud.until(cloud.demo, other, "ACTIVE")
    rebuild = {"rebuild": {"imageRef": copy, "name": "anew"}}
    message = await cloud.demo.refused(400, "POST", path, rebuild, version="2.92")
    assert "Unable to rebuild with a different image for a volume-backed server." in message
    answer = await cloud.demo.call("POST", path, rebuild, version="2.93")
    assert answer.status_code == 202, answer.text
    assert answer.json()["server"]["image"] == ""
    server = await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert (server["name"], server["image"]) == ("anew", "")
    assert [one["volumeId"] for one in await attached(cloud, server_id)] == [shown["volumeId"]]
    volume = await until_volume(cloud.demo, shown["volumeId"], "in-use")
    assert volume["volume_image_metadata"]["image_id"] == copy


async def test_what_cannot_be_is_refused_and_takes_nothing(cloud: Cloud) -> None:
    blank, volume_id = await new_volume(cloud.demo), await boot_volume(cloud)
    image, boots = {"uuid": cloud.image_id, "source_type": "image"}, {"uuid": volume_id, "source_type": "volume"}
    new = image | {"destination_type": "volume", "volume_size": 1}
    local = {"source_type": "blank", "destination_type": "local"}
    refused: list[tuple[dict[str, Any], str]] = [
        (root(source_type="volume"), "uuid"),
        (root(uuid="7", source_type="volume"), "'7'"),
        (root(uuid=UNKNOWN, source_type="volume"), UNKNOWN),
        (root(uuid=UNKNOWN, source_type="snapshot"), UNKNOWN),
        (root(uuid=UNKNOWN, source_type="image", destination_type="volume", volume_size=1), UNKNOWN),
        (root(uuid=blank, source_type="volume"), "not bootable"),
        (root(**image, destination_type="volume"), "volume_size"),
        (root(**image, destination_type="volume", volume_size=0), "volume_size"),
        (root(**boots, destination_type="local"), "destination_type"),
        (root(**boots, volume_type="x"), "volume_type"),
        (root(source_type="blank", destination_type="volume", volume_size=1), "boot_index"),
        (root(**boots) | {"imageRef": cloud.image_id}, "boot_index"),
        ({"imageRef": "", "block_device_mapping_v2": [new | {"boot_index": 1}]}, "boot_index"),
        ({"imageRef": "", "block_device_mapping_v2": [new | {"boot_index": None}]}, "boot_index"),
        ({"imageRef": "", "block_device_mapping_v2": []}, "imageRef"),
        ({"block_device_mapping_v2": [boots, boots]}, volume_id),
        ({"block_device_mapping_v2": [local | {"guest_format": "swap", "volume_size": 1}]}, "swap"),
        ({"block_device_mapping_v2": [local | {"volume_size": 1}]}, "ephemeral"),
        ({"block_device_mapping_v2": [boots | {"device_name": "/dev/vda"}]}, "/dev/vda"),
        ({"block_device_mapping_v2": [boots | {"tag": "a/b"}]}, "tag"),
        ({"block_device_mapping_v2": [boots], "block_device_mapping": [{"volume_id": volume_id}]}, "syntaxes"),
        ({"block_device_mapping": [{"device_name": "vdb"}]}, "volume_id"),
        ({"block_device_mapping": "vda"}, "block_device_mapping"),
        ({"block_device_mapping_v2": [boots], "min_count": 2}, "multiple instances"),
    ]  # fmt: skip
    for fields, word in refused:
        message = await cloud.demo.refused(400, "POST", "/servers", cloud.server(**fields))
        assert word in message, (fields, message)
    assert (await cloud.demo.get("/servers"))["servers"] == []
    for one in (blank, volume_id):
        await until_volume(cloud.demo, one, "available")
    assert len((await volume_api(cloud.demo, "GET", "/volumes"))["volumes"]) == 2


async def test_a_volume_that_somebody_else_got_first_is_refused(cloud: Cloud) -> None:
    volume_id = await boot_volume(cloud)
    wanted = root(uuid=volume_id, source_type="volume")
    answers = await asyncio.gather(
        *(cloud.demo.call("POST", "/servers", cloud.server(f"s{number}", **wanted)) for number in range(3))
    )
    assert sorted(answer.status_code for answer in answers) == [202, 400, 400]
    assert len((await cloud.demo.get("/servers"))["servers"]) == 1
