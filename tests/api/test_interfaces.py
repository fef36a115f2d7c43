"""`os-interface`: interfaces are attached and detached, and what cannot be is refused."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.api.compute_cloud import Caller, Cloud
from tests.patience import PATIENCE_S


async def network_api(caller: Caller, method: str, path: str, json: Any = None) -> dict[str, Any]:
    answer = await caller.client.request(
        method, f"/network/v2.0{path}", json=json, headers={"x-auth-token": caller.token}
    )
    assert answer.status_code < 300, answer.text
    return answer.json() if answer.content else {}


async def interfaces(caller: Caller, server_id: str) -> list[dict[str, Any]]:
    return (await caller.get(f"/servers/{server_id}/os-interface"))["interfaceAttachments"]


async def until_gone(caller: Caller, server_id: str, port_id: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while port_id in {one["port_id"] for one in await interfaces(caller, server_id)}:
            await asyncio.sleep(0.01)


async def attach(caller: Caller, server_id: str, **wanted: Any) -> dict[str, Any]:
    body = {"interfaceAttachment": wanted}
    answer = await caller.call("POST", f"/servers/{server_id}/os-interface", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["interfaceAttachment"]


async def test_an_interface_comes_and_goes(cloud: Cloud) -> None:
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    made = await attach(demo, server_id, net_id=cloud.network_id, tag="second")
    assert (made["net_id"], made["port_state"], made["tag"]) == (cloud.network_id, "ACTIVE", "second")
    assert made in await interfaces(demo, server_id)  # it is there when the answer comes
    addresses = (await demo.get(f"/servers/{server_id}"))["server"]["addresses"]["private"]
    assert made["fixed_ips"][0]["ip_address"] in {one["addr"] for one in addresses}
    port = (await network_api(demo, "GET", f"/ports/{made['port_id']}"))["port"]
    assert (port["device_id"], port["status"]) == (server_id, "ACTIVE")
    answer = await demo.call("DELETE", f"/servers/{server_id}/os-interface/{made['port_id']}")
    assert (answer.status_code, answer.content) == (202, b"")
    await until_gone(demo, server_id, made["port_id"])
    ports = (await network_api(demo, "GET", f"/ports?device_id={server_id}"))["ports"]
    assert made["port_id"] not in {one["id"] for one in ports}
    await demo.refused(404, "DELETE", f"/servers/{server_id}/os-interface/{made['port_id']}")
    actions = (await demo.get(f"/servers/{server_id}/os-instance-actions"))["instanceActions"]
    assert [action["action"] for action in actions] == ["detach_interface", "attach_interface", "create"]


async def test_a_port_that_a_user_brings_is_free_again_afterwards(cloud: Cloud) -> None:
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    port = (await network_api(demo, "POST", "/ports", {"port": {"network_id": cloud.network_id}}))["port"]
    made = await attach(demo, server_id, port_id=port["id"])
    assert (made["port_id"], made["mac_addr"]) == (port["id"], port["mac_address"])
    body = {"interfaceAttachment": {"port_id": port["id"]}}
    assert port["id"] in await demo.refused(409, "POST", f"/servers/{server_id}/os-interface", body)
    await demo.call("DELETE", f"/servers/{server_id}/os-interface/{port['id']}")
    await until_gone(demo, server_id, port["id"])
    async with asyncio.timeout(PATIENCE_S):
        while (await network_api(demo, "GET", f"/ports/{port['id']}"))["port"]["device_id"]:
            await asyncio.sleep(0.01)
    await attach(demo, server_id, port_id=port["id"])


async def test_an_address_of_ones_own_choice(cloud: Cloud) -> None:
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    wanted = {"net_id": cloud.network_id, "fixed_ips": [{"ip_address": "10.78.0.77"}]}
    made = await attach(demo, server_id, **wanted)
    assert made["fixed_ips"][0]["ip_address"] == "10.78.0.77"
    body = {"interfaceAttachment": wanted}
    assert "10.78.0.77" in await demo.refused(400, "POST", f"/servers/{server_id}/os-interface", body)
    assert len(await interfaces(demo, server_id)) == 2


async def test_bad_input_is_named(cloud: Cloud) -> None:
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/os-interface"

    async def refused(status: int, *, version: str = "2.96", **wanted: Any) -> str:
        return await demo.refused(status, "POST", path, {"interfaceAttachment": wanted}, version=version)

    await refused(400, net_id=cloud.network_id, port_id=server_id)
    await refused(400, fixed_ips=[{"ip_address": "10.78.0.9"}])
    assert "ip_address" in await refused(400, net_id=cloud.network_id, fixed_ips=[{"ip_address": "x"}])
    assert "fixed_ips" in await refused(400, net_id=cloud.network_id, fixed_ips=[])
    assert "net_id" in await refused(400, net_id="7")
    assert "tag" in await refused(400, net_id=cloud.network_id, tag="x", version="2.48")
    assert server_id in await refused(404, net_id=server_id)
    assert server_id in await refused(404, port_id=server_id)
    await cloud.admin.call("POST", f"/servers/{server_id}/action", {"os-resetState": {"state": "error"}})
    await cloud.until(demo, server_id, "ERROR")
    assert "attach_interface" in await refused(409, net_id=cloud.network_id)
    assert len(await interfaces(demo, server_id)) == 1
    assert len((await network_api(demo, "GET", f"/ports?device_id={server_id}"))["ports"]) == 1


async def test_a_host_that_refuses_leaves_no_port(cloud: Cloud) -> None:
    demo, server_id = cloud.demo, await cloud.created(cloud.demo)
    made = await attach(demo, server_id)
    server = (await cloud.admin.get(f"/servers/{server_id}"))["server"]
    faults = cloud.world.host(server["OS-EXT-SRV-ATTR:host"]).faults
    faults.keeps_devices = True
    await demo.call("DELETE", f"/servers/{server_id}/os-interface/{made['port_id']}")
    async with asyncio.timeout(PATIENCE_S):
        while "fault" not in (await demo.get(f"/servers/{server_id}"))["server"]:
            await asyncio.sleep(0.01)
    assert len(await interfaces(demo, server_id)) == 2
