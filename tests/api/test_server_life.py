"""A server through the public API, from create to delete, on a simulated host."""

from __future__ import annotations

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
