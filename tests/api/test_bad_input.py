"""Requests that must be refused, each with the status and the word that tells why (LIFECYCLE section 5)."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from instar.store.contract import Statement
from tests.api.compute_cloud import Cloud

UNKNOWN = "3f1c2b5e-0000-4000-8000-000000000000"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown flavor": ({"flavorRef": "no-such"}, "Flavor no-such"),
    "unknown image": ({"imageRef": UNKNOWN}, f"Image {UNKNOWN}"),
    "image that is no id": ({"imageRef": "tiny"}, "imageRef"),
    "unknown network": ({"networks": [{"uuid": UNKNOWN}]}, UNKNOWN),
    "unknown port": ({"networks": [{"port": UNKNOWN}]}, UNKNOWN),
    "unknown key": ({"key_name": "no-key"}, "no-key"),
    "unknown security group": ({"security_groups": [{"name": "no-group"}]}, "no-group"),
    "unknown zone": ({"availability_zone": "mars"}, "mars"),
    "blank name": ({"name": "   "}, "server.name"),
    "empty name": ({"name": ""}, "server.name"),
    "long name": ({"name": "x" * 256}, "server.name"),
    "name of control characters": ({"name": "a\nb"}, "server.name"),
    "name that is a number": ({"name": 7}, "server.name"),
    "unknown field": ({"colour": "red"}, "'colour' was unexpected"),
    "metadata key too long": ({"metadata": {"k" * 256: "v"}}, "metadata"),
    "metadata value too long": ({"metadata": {"k": "v" * 256}}, "metadata"),
    "metadata value no text": ({"metadata": {"k": 1}}, "metadata"),
    "user data no base64": ({"user_data": "$$$"}, "user_data"),
    "user data too long": ({"user_data": base64.b64encode(b"x" * 65_536).decode()}, "user_data"),
    "counts crossed": ({"min_count": 3, "max_count": 2}, "min_count"),
    "count of none": ({"min_count": 0}, "min_count"),
    "tag with a comma": ({"tags": ["a,b"]}, "tags"),
    "too many tags": ({"tags": [str(n) for n in range(51)]}, "tags"),
    "wrong address": ({"accessIPv4": "1.2.3"}, "accessIPv4"),
    "no image": ({"imageRef": ""}, "imageRef"),
    "network without anything": ({"networks": [{}]}, "networks[0]"),
    "fixed address that is none": ({"networks": [{"uuid": UNKNOWN, "fixed_ip": "x"}]}, "fixed_ip"),
    "networks of a wrong word": ({"networks": "all"}, "networks"),
    "personality after its time": ({"personality": []}, "personality"),
    "hostname with a space": ({"hostname": "a b"}, "hostname"),
    "hostname of several": ({"hostname": "web", "max_count": 2}, "single hostname"),
}  # fmt: skip


async def test_a_server_that_cannot_be_is_refused_with_the_reason(cloud: Cloud) -> None:
    for what, (fields, word) in REFUSED.items():
        message = await cloud.demo.refused(400, "POST", "/servers", cloud.server(**fields))
        assert word in message, (what, message)
        assert "Traceback" not in message and "/" + "src" not in message
    assert (await cloud.demo.get("/servers"))["servers"] == []


async def test_bodies_that_are_no_bodies(cloud: Cloud) -> None:
    for content in (b"", b"{", b"[]", b"null", b"\xff", b'{"server": []}', b"[" * 100_000):
        answer = await cloud.demo.call("POST", "/servers", content=content)
        assert answer.status_code == 400, (content[:20], answer.text)
        assert "badRequest" in answer.json()
    message = await cloud.demo.refused(400, "POST", "/servers", {"server": {"name": "x", "imageRef": "y"}})
    assert "'flavorRef' is a required property" in message


async def test_only_admins_choose_hosts(cloud: Cloud) -> None:
    await cloud.demo.refused(403, "POST", "/servers", cloud.server(availability_zone="nova:sim-1"))
    await cloud.demo.refused(403, "POST", "/servers", cloud.server(host="sim-1"))
    message = await cloud.admin.refused(400, "POST", "/servers", cloud.server(host="sim-77"))
    assert "sim-77" in message
    server_id = await cloud.created(cloud.admin, host="sim-1")
    assert (await cloud.admin.get(f"/servers/{server_id}"))["server"]["OS-EXT-SRV-ATTR:host"] == "sim-1"
    server_id = await cloud.created(cloud.admin, availability_zone="nova:sim-0")
    assert (await cloud.admin.get(f"/servers/{server_id}"))["server"]["OS-EXT-SRV-ATTR:host"] == "sim-0"


async def test_an_image_must_fit_the_flavor(cloud: Cloud) -> None:
    async def image_is(**columns: Any) -> None:
        sets = ", ".join(f"{name} = :{name}" for name in columns)
        await cloud.control.store.write(Statement(f"UPDATE images SET {sets}", columns))

    await image_is(min_disk_gib=5)
    assert "disk is too small" in await cloud.demo.refused(400, "POST", "/servers", cloud.server())
    await image_is(min_disk_gib=0, min_ram_mib=4096)
    assert "memory is too small" in await cloud.demo.refused(400, "POST", "/servers", cloud.server())
    await image_is(min_ram_mib=0, virtual_size_bytes=2 << 30)
    assert "disk is too small" in await cloud.demo.refused(400, "POST", "/servers", cloud.server())
    await image_is(virtual_size_bytes=1 << 20, status="deactivated")
    assert "not active" in await cloud.demo.refused(400, "POST", "/servers", cloud.server())


async def test_unknown_actions_and_wrong_ones(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/action"
    assert "no such action" in await cloud.demo.refused(400, "POST", path, {"os-explode": None})
    await cloud.demo.refused(400, "POST", path, {})
    await cloud.demo.refused(400, "POST", path, {"os-start": None, "os-stop": None})
    await cloud.demo.refused(400, "POST", path, {"reboot": {"type": "MEDIUM"}})
    await cloud.demo.refused(400, "POST", path, {"reboot": {}})
    await cloud.admin.refused(400, "POST", path, {"os-resetState": {"state": "happy"}})
    message = await cloud.demo.refused(409, "POST", path, {"os-start": None})
    assert f"Cannot 'start' instance {server_id} while it is in vm_state active" == message


async def test_a_locked_server_is_left_alone(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/action"
    assert (await cloud.demo.call("POST", path, {"lock": {"locked_reason": "mine"}})).status_code == 202
    server = (await cloud.demo.get(f"/servers/{server_id}"))["server"]
    assert (server["locked"], server["locked_reason"]) == (True, "mine")
    await cloud.demo.refused(409, "POST", path, {"os-stop": None})
    await cloud.demo.refused(409, "DELETE", f"/servers/{server_id}")
    await cloud.demo.refused(409, "PUT", f"/servers/{server_id}", {"server": {"name": "other"}})
    assert [one["id"] for one in (await cloud.demo.get("/servers?locked=true"))["servers"]] == [server_id]
    assert (await cloud.demo.get("/servers?locked=false"))["servers"] == []
    assert (await cloud.demo.call("POST", path, {"unlock": None})).status_code == 202
    assert (await cloud.demo.call("POST", path, {"os-stop": None})).status_code == 202
    await cloud.until(cloud.demo, server_id, "SHUTOFF")


async def test_quotas_hold_when_all_come_at_once(cloud: Cloud) -> None:
    quota = {"quota_set": {"instances": 4}}
    path = f"/os-quota-sets/{cloud.demo.project_id}"
    assert (await cloud.admin.call("PUT", path, quota)).status_code == 200
    answers = await asyncio.gather(*(cloud.demo.call("POST", "/servers", cloud.server(f"s{n}")) for n in range(12)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [202] * 4 + [403] * 8
    refused = next(answer for answer in answers if answer.status_code == 403).json()["forbidden"]["message"]
    assert refused == "Quota exceeded for instances: Requested 1, but already used 4 of 4 instances"
    keys = await asyncio.gather(
        *(cloud.demo.call("POST", "/os-keypairs", {"keypair": {"name": f"k{n}"}}, version="2.2") for n in range(8))
    )
    assert sorted(answer.status_code for answer in keys) == [201] * 5 + [403] * 3
    group = {"server_group": {"name": "g", "policy": "affinity"}}
    groups = await asyncio.gather(*(cloud.demo.call("POST", "/os-server-groups", group) for _ in range(6)))
    assert sorted(answer.status_code for answer in groups) == [200] * 3 + [403] * 3


async def test_fewer_servers_are_built_where_the_quota_has_room_for_some(cloud: Cloud) -> None:
    path = f"/os-quota-sets/{cloud.demo.project_id}"
    await cloud.admin.call("PUT", path, {"quota_set": {"instances": 3}})
    await cloud.demo.refused(403, "POST", "/servers", cloud.server(min_count=4, max_count=5))
    answer = await cloud.demo.call(
        "POST", "/servers", cloud.server("many", min_count=2, max_count=5, return_reservation_id=True)
    )
    reservation = answer.json()["reservation_id"]
    found = (await cloud.demo.get(f"/servers?reservation_id={reservation}&sort_key=display_name&sort_dir=asc"))["servers"]
    assert [one["name"] for one in found] == ["many-1", "many-2", "many-3"]


async def test_metadata_items_are_limited_and_checked(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo, metadata={"a": "1"})
    path = f"/servers/{server_id}/metadata"
    many = {str(n): "v" for n in range(8)}
    await cloud.demo.refused(403, "POST", path, {"metadata": many})
    await asyncio.gather(*(cloud.demo.call("POST", path, {"metadata": {f"k{n}": "v"}}) for n in range(5)))
    assert len((await cloud.demo.get(path))["metadata"]) == 6
    assert (await cloud.demo.call("PUT", path + "/a", {"meta": {"a": "2"}})).json() == {"meta": {"a": "2"}}
    await cloud.demo.refused(400, "PUT", path + "/a", {"meta": {"b": "2"}})
    assert (await cloud.demo.call("DELETE", path + "/a")).status_code == 204
    await cloud.demo.refused(404, "GET", path + "/a")
    assert (await cloud.demo.call("PUT", path, {"metadata": {"x": "y"}})).json() == {"metadata": {"x": "y"}}


@pytest.mark.parametrize("key", ["ssh-rsa AAAA", "not a key", "ssh-ed25519 " + "A" * 68, "ssh-rsa AAAA\nssh-rsa BBBB"])
async def test_keys_that_are_none(cloud: Cloud, key: str) -> None:
    await cloud.demo.refused(400, "POST", "/os-keypairs", {"keypair": {"name": "k", "public_key": key}})
