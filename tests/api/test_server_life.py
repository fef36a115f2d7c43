"""A server through the public API, from create to delete, on a simulated host."""

from __future__ import annotations

import asyncio

from tests.api.compute_cloud import Cloud


async def test_a_server_is_built_shown_acted_on_and_deleted(cloud: Cloud) -> None:
    demo = cloud.demo
    server_id = await cloud.create(demo, "web", metadata={"a": "b"}, tags=["x"], description="what it is")
    server = await cloud.until(demo, server_id, "ACTIVE")
    assert server["name"] == "web"
    assert server["metadata"] == {"a": "b"}
    assert server["tags"] == ["x"]
    assert server["description"] == "what it is"
    assert server["flavor"]["original_name"] == "m1.nano"
    assert server["image"]["id"] == cloud.image_id
    assert server["addresses"]["private"][0]["OS-EXT-IPS:type"] == "fixed"
    assert server["OS-EXT-STS:power_state"] == 1
    assert server["OS-SRV-USG:launched_at"]
    for body, status in (
        ({"os-stop": None}, "SHUTOFF"),
        ({"os-start": None}, "ACTIVE"),
        ({"reboot": {"type": "HARD"}}, "ACTIVE"),
        ({"reboot": {"type": "SOFT"}}, "ACTIVE"),
    ):
        answer = await demo.call("POST", f"/servers/{server_id}/action", body)
        assert answer.status_code == 202, answer.text
        await cloud.until(demo, server_id, status)
    actions = (await demo.get(f"/servers/{server_id}/os-instance-actions"))["instanceActions"]
    assert [one["action"] for one in actions] == ["reboot", "reboot", "start", "stop", "create"]
    create = (await demo.get(f"/servers/{server_id}/os-instance-actions/{actions[-1]['request_id']}"))["instanceAction"]
    assert create["events"]
    assert {event["result"] for event in create["events"]} == {"Success"}
    assert "traceback" not in create["events"][0]
    assert "host" not in create["events"][0]
    assert (await demo.call("DELETE", f"/servers/{server_id}")).status_code == 204
    await cloud.gone(demo, server_id)
    assert (await demo.get("/servers"))["servers"] == []
    absolute = (await demo.get("/limits"))["limits"]["absolute"]
    assert (absolute["totalInstancesUsed"], absolute["totalCoresUsed"], absolute["totalRAMUsed"]) == (0, 0, 0)


async def test_the_console_is_read_by_lines_and_no_host_is_named_when_it_cannot_be(cloud: Cloud) -> None:
    demo = cloud.demo
    server_id = await cloud.created(demo)
    path = f"/servers/{server_id}/action"
    whole = (await demo.call("POST", path, {"os-getConsoleOutput": {}})).json()["output"]
    last = (await demo.call("POST", path, {"os-getConsoleOutput": {"length": 1}})).json()["output"]
    assert last == whole.split("\n")[-1]
    await demo.refused(400, "POST", path, {"os-getConsoleOutput": {"length": "all"}})
    await cloud.control.agent.close()
    answer = await demo.call("POST", path, {"os-getConsoleOutput": {}})
    assert answer.status_code == 503
    assert "sim-" not in answer.text and answer.headers["retry-after"] == "5"


async def test_two_deletes_at_once_delete_once(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    answers = await asyncio.gather(*(cloud.demo.call("DELETE", f"/servers/{server_id}") for _ in range(4)))
    assert {answer.status_code for answer in answers} <= {204, 404}
    await cloud.gone(cloud.demo, server_id)
    assert (await cloud.demo.get("/limits"))["limits"]["absolute"]["totalInstancesUsed"] == 0
    actions = (await cloud.demo.get(f"/servers/{server_id}/os-instance-actions"))["instanceActions"]
    assert [one["action"] for one in actions] == ["delete", "create"]


async def test_changes_that_come_at_once_are_all_kept(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    await asyncio.gather(*(cloud.demo.call("PUT", f"/servers/{server_id}/tags/t{n}") for n in range(6)))
    assert sorted((await cloud.demo.get(f"/servers/{server_id}/tags"))["tags"]) == [f"t{n}" for n in range(6)]
