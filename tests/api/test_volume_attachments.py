"""`os-volume_attachments`: what is shown at which version, what is refused, and the volume's own view of it."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.api.compute_cloud import Caller, Cloud
from tests.patience import PATIENCE_S


async def volume_api(caller: Caller, method: str, path: str, json: Any = None) -> dict[str, Any]:
    answer = await caller.client.request(
        method, f"/volume/v3/{caller.project_id}{path}", json=json, headers={"x-auth-token": caller.token}
    )
    assert answer.status_code < 300, answer.text
    return answer.json() if answer.content else {}


async def until_volume(caller: Caller, volume_id: str, status: str) -> dict[str, Any]:
    volume: dict[str, Any] = {}
    async with asyncio.timeout(PATIENCE_S):
        while volume.get("status") != status:
            volume = (await volume_api(caller, "GET", f"/volumes/{volume_id}"))["volume"]
            await asyncio.sleep(0.01)
    return volume


async def new_volume(caller: Caller, size: int = 1, **more: Any) -> str:
    volume = (await volume_api(caller, "POST", "/volumes", {"volume": {"size": size} | more}))["volume"]
    await until_volume(caller, volume["id"], "available")
    return volume["id"]


async def attach(caller: Caller, server_id: str, volume_id: str, *, version: str = "2.96", **more: Any) -> dict[str, Any]:
    body = {"volumeAttachment": {"volumeId": volume_id} | more}
    answer = await caller.call("POST", f"/servers/{server_id}/os-volume_attachments", body, version=version)
    assert answer.status_code == 200, answer.text
    await until_volume(caller, volume_id, "in-use")
    return answer.json()["volumeAttachment"]


async def test_a_volume_is_attached_shown_and_detached(cloud: Cloud) -> None:
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    volume_id, path = await new_volume(demo), f"/servers/{server_id}/os-volume_attachments"
    made = await attach(demo, server_id, volume_id, tag="data", delete_on_termination=True)
    assert made == {
        "id": volume_id, "volumeId": volume_id, "serverId": server_id, "device": "/dev/vdb", "tag": "data",
        "delete_on_termination": True,
    }  # fmt: skip
    (listed,) = (await demo.get(path))["volumeAttachments"]
    assert listed == (await demo.get(f"{path}/{volume_id}"))["volumeAttachment"]
    assert "id" not in listed and listed["attachment_id"] and listed["bdm_uuid"]
    (old,) = (await demo.get(path, version="2.1"))["volumeAttachments"]
    assert old == {"id": volume_id, "volumeId": volume_id, "serverId": server_id, "device": "/dev/vdb"}
    server = (await demo.get(f"/servers/{server_id}"))["server"]
    assert server["os-extended-volumes:volumes_attached"] == [{"id": volume_id, "delete_on_termination": True}]
    shown = await until_volume(demo, volume_id, "in-use")
    (attachment,) = shown["attachments"]
    assert (attachment["server_id"], attachment["device"], attachment["volume_id"]) == (server_id, "/dev/vdb", volume_id)
    answer = await demo.call("DELETE", f"{path}/{volume_id}")
    assert (answer.status_code, answer.content) == (202, b"")
    await until_volume(demo, volume_id, "available")
    assert (await demo.get(path))["volumeAttachments"] == []
    await demo.refused(404, "GET", f"{path}/{volume_id}")
    await demo.refused(404, "DELETE", f"{path}/{volume_id}")
    actions = (await demo.get(f"/servers/{server_id}/os-instance-actions"))["instanceActions"]
    assert [action["action"] for action in actions] == ["detach_volume", "attach_volume", "create"]


async def test_fields_of_newer_versions_are_unknown_to_older_ones(cloud: Cloud) -> None:
    server_id, volume_id = await cloud.created(cloud.demo), await new_volume(cloud.demo)
    path = f"/servers/{server_id}/os-volume_attachments"
    for version, more in (("2.48", {"tag": "x"}), ("2.78", {"delete_on_termination": True}), ("2.96", {"size": 1})):
        wanted = {"volumeAttachment": {"volumeId": volume_id} | more}
        if version == "2.48":
            version = "2.40"  # tags were not accepted from 2.33 to 2.41
        assert next(iter(more)) in await cloud.demo.refused(400, "POST", path, wanted, version=version)


async def test_bad_input_is_named(cloud: Cloud) -> None:
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    path, volume_id = f"/servers/{server_id}/os-volume_attachments", await new_volume(cloud.demo)

    async def refused(status: int, **wanted: Any) -> str:
        return await demo.refused(status, "POST", path, {"volumeAttachment": wanted})

    assert "volumeId" in await refused(400)
    assert "volumeId" in await refused(400, volumeId="7")
    assert "tag" in await refused(400, volumeId=volume_id, tag="a/b")
    assert "/dev/../x" in await refused(400, volumeId=volume_id, device="/dev/../x")
    assert "/dev/vda" in await refused(409, volumeId=volume_id, device="/dev/vda")
    await refused(404, volumeId=server_id)
    await attach(demo, server_id, volume_id, tag="one")
    assert "already attached" in await refused(400, volumeId=volume_id)
    assert "'one'" in await refused(400, volumeId=await new_volume(demo), tag="one")
    other = await cloud.created(demo, "other")
    body = {"volumeAttachment": {"volumeId": volume_id}}
    assert volume_id in await demo.refused(400, "POST", f"/servers/{other}/os-volume_attachments", body)
    stranger = await cloud.new_user("stranger", "member")
    foreign = await new_volume(stranger)
    await refused(404, volumeId=foreign)
    assert (await demo.get(path + "?limit=0&offset=1"))["volumeAttachments"] == []
    await demo.refused(400, "GET", path + "?offset=x")


async def test_an_attachment_is_updated_and_swapped(cloud: Cloud) -> None:
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    volume_id, path = await new_volume(demo), f"/servers/{server_id}/os-volume_attachments"
    await attach(demo, server_id, volume_id)

    def body(volume: str, **more: Any) -> dict[str, Any]:
        return {"volumeAttachment": {"volumeId": volume} | more}

    one = f"{path}/{volume_id}"
    assert (await demo.call("PUT", one, body(volume_id, delete_on_termination=True))).status_code == 202
    assert (await demo.get(one))["volumeAttachment"]["delete_on_termination"] is True
    assert "device" in await demo.refused(400, "PUT", one, body(volume_id, device="/dev/vdz"))
    await demo.refused(400, "PUT", one, body(volume_id, delete_on_termination=True), version="2.84")
    await demo.refused(403, "PUT", one, body(await new_volume(demo)))
    small, large = await new_volume(demo, 1), await new_volume(demo, 2)
    await demo.refused(403, "PUT", one, body(small), version="2.84")
    assert (await cloud.admin.call("PUT", one, body(large))).status_code == 202
    await until_volume(demo, large, "in-use")
    await until_volume(demo, volume_id, "available")
    (found,) = (await demo.get(path))["volumeAttachments"]
    assert (found["volumeId"], found["device"]) == (large, "/dev/vdb")
    assert "less than" in await cloud.admin.refused(400, "PUT", f"{path}/{large}", body(small))
