"""Visibility, and images shared with single projects."""

from __future__ import annotations

import asyncio

import pytest

from instar.errors import NotFound


async def test_private_image_does_not_exist_for_others(member, other, admin):
    image = await member.add(visibility="private")
    path = f"/v2/images/{image['id']}"
    for method, below, body in [
        ("GET", "", None), ("DELETE", "", None), ("GET", "/file", None), ("GET", "/members", None),
        ("POST", "/members", {"member": "p2"}), ("PUT", "/members/p2", {"status": "accepted"}),
        ("GET", "/members/p2", None), ("DELETE", "/members/p2", None), ("PUT", "/tags/x", None),
        ("DELETE", "/tags/x", None), ("POST", "/actions/deactivate", None), ("POST", "/actions/reactivate", None),
    ]:  # fmt: skip
        await other.call(method, path + below, 404, json=body)
    await other.upload(image["id"], b"x", expect=404)
    await other.patch(image["id"], {"op": "replace", "path": "/name", "value": "mine"}, expect=404)
    assert await member.show(image["id"]) == image == await admin.show(image["id"])


@pytest.mark.parametrize("visibility", ["community", "public"])
async def test_visible_image_is_changed_by_its_owner_alone(visibility, member, other, admin):
    image = await member.add()
    await admin.patch(image["id"], {"op": "replace", "path": "/visibility", "value": visibility})
    path = f"/v2/images/{image['id']}"
    assert (await other.show(image["id"]))["name"] == "one"
    await other.call("GET", f"{path}/file", 200)
    await other.call("DELETE", path, 403)
    await other.patch(image["id"], {"op": "replace", "path": "/name", "value": "mine"}, expect=403)
    await other.upload(image["id"], b"x", expect=403)
    await other.call("PUT", f"{path}/tags/x", 403)
    await other.call("POST", f"{path}/actions/deactivate", 403)
    await member.patch(image["id"], {"op": "replace", "path": "/name", "value": "mine"})
    await member.patch(image["id"], {"op": "replace", "path": "/visibility", "value": "private"})
    await other.call("GET", path, 404)


async def test_admin_gives_an_image_to_another_project(member, other, admin):
    image = await member.create(visibility="private")
    await admin.patch(image["id"], {"op": "replace", "path": "/owner", "value": "p2"})
    await member.call("GET", f"/v2/images/{image['id']}", 404)
    assert (await other.show(image["id"]))["owner"] == "p2"


async def test_member_accepts_uses_and_rejects(member, other, as_role, cloud):
    image = await member.add("shared one")
    members = f"/v2/images/{image['id']}/members"
    await other.call("GET", f"/v2/images/{image['id']}", 404)
    added = (await member.call("POST", members, 200, json={"member": "p2"})).json()
    assert (added["member_id"], added["image_id"], added["status"]) == ("p2", image["id"], "pending")
    await member.call("POST", members, 409, json={"member": "p2"})

    assert (await other.show(image["id"]))["name"] == "shared one"  # seen by its id, not yet in lists
    assert await other.names() == []
    assert await other.names("?visibility=shared&member_status=pending") == ["shared one"]
    await cloud.images.image_fetch(image["id"], project_id="p2", is_admin=False)

    await member.call("PUT", f"{members}/p2", 403, json={"status": "accepted"})
    await other.call("PUT", f"{members}/p2", 400, json={"status": "perhaps"})
    await other.call("PUT", f"{members}/p2", 400, json={})
    accepted = (await other.call("PUT", f"{members}/p2", 200, json={"status": "accepted"})).json()
    assert accepted["status"] == "accepted"
    assert await other.names() == ["shared one"]
    await other.call("GET", f"/v2/images/{image['id']}/file", 200)
    await other.call("DELETE", f"/v2/images/{image['id']}", 403)

    await other.call("POST", members, 403, json={"member": "p3"})
    await other.call("DELETE", f"{members}/p2", 403)
    await member.call("POST", members, 200, json={"member": "p3"})
    assert [one["member_id"] for one in (await member.call("GET", members, 200)).json()["members"]] == ["p2", "p3"]
    assert [one["member_id"] for one in (await other.call("GET", members, 200)).json()["members"]] == ["p2"]
    await other.call("GET", f"{members}/p3", 404)
    await as_role("member@p4").call("GET", members, 404)

    await other.call("PUT", f"{members}/p2", 200, json={"status": "rejected"})
    assert await other.names() == []
    assert await other.names("?visibility=shared&member_status=rejected") == ["shared one"]
    assert await other.names("?member_status=all") == ["shared one"]
    await member.call("DELETE", f"{members}/p2", 204)
    await member.call("DELETE", f"{members}/p2", 404)
    await other.call("GET", f"/v2/images/{image['id']}", 404)
    with pytest.raises(NotFound):
        await cloud.images.image_fetch(image["id"], project_id="p2", is_admin=False)


async def test_only_shared_images_have_members(member, other):
    image = await member.create(visibility="private")
    members = f"/v2/images/{image['id']}/members"
    await member.call("POST", members, 403, json={"member": "p2"})
    await member.patch(image["id"], {"op": "replace", "path": "/visibility", "value": "shared"})
    await member.call("POST", members, 200, json={"member": "p2"})
    await other.call("GET", f"/v2/images/{image['id']}", 200)
    await member.patch(image["id"], {"op": "replace", "path": "/visibility", "value": "private"})
    await other.call("GET", f"/v2/images/{image['id']}", 404)
    await member.call("POST", members, 403, json={"member": ""})


async def test_number_of_members_is_bounded_also_at_once(member):
    image = await member.create()
    members = f"/v2/images/{image['id']}/members"
    for start in range(0, 120, 20):
        await asyncio.gather(
            *(member.call("POST", members, 200, json={"member": f"m{start + number}"}) for number in range(20))
        )
    answers = await asyncio.gather(*(member._http.post(members, json={"member": f"x{number}"}) for number in range(20)))
    assert sorted(answer.status_code for answer in answers) == [200] * 8 + [403] * 12
