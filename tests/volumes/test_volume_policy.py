"""Every route as each role and as another project. A route that is not in the table fails the test."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from tests.volumes.volume_client import Client
from tests.volumes.volume_cloud import VolumeCloud

CALLERS = ("", "nobody@p1", "reader@p1", "member@p1", "member@p2", "admin@p0")
OPEN = (200,) * 6
READ = (401, 403, 200, 200, 404, 200)  # another project's record is not found
LOOK = (401, 403, 200, 200, 200, 200)  # everybody's
ADMIN = (401, 403, 403, 403, 403, 200)


def change(status: int, other: int = 404) -> tuple[int, ...]:
    """What members do to what is theirs."""
    return (401, 403, 403, status, other, status)


def admins(status: int) -> tuple[int, ...]:
    return (*ADMIN[:5], status)


V, S, T, A = "/v3/volumes", "/v3/snapshots", "/v3/types", "/v3/attachments"
ONE_V, ONE_S, ONE_T, ONE_A = f"{V}/{{volume_id}}", f"{S}/{{snapshot_id}}", f"{T}/{{type_id}}", f"{A}/{{attachment_id}}"
Q, C = "/v3/os-quota-sets/{project_id}", "/v3/os-quota-class-sets/{name}"
META, ITEM = {"metadata": {"k": "v"}}, {"meta": {"k": "v"}}

WALK: dict[tuple[str, str], tuple[Any, tuple[int, ...]]] = {
    ("GET", "/"): (None, (300,) * 6),
    ("GET", "/v3"): (None, OPEN),
    ("GET", V): (None, LOOK),
    ("GET", f"{V}/detail"): (None, LOOK),
    ("GET", f"{V}/summary"): (None, LOOK),
    ("POST", V): ({"volume": {"size": 1}}, change(202, 202)),
    ("GET", ONE_V): (None, READ),
    ("PUT", ONE_V): ({"volume": {"name": "n"}}, change(200)),
    ("DELETE", ONE_V): (None, change(400)),  # it has a snapshot
    ("POST", f"{ONE_V}/action"): ({"os-set_bootable": {"bootable": True}}, change(200)),
    ("GET", S): (None, LOOK),
    ("GET", f"{S}/detail"): (None, LOOK),
    ("POST", S): ({"snapshot": {"volume_id": "{volume_id}", "force": True}}, change(202)),
    ("GET", ONE_S): (None, READ),
    ("PUT", ONE_S): ({"snapshot": {"name": "n"}}, change(200)),
    ("DELETE", ONE_S): (None, change(202)),
    ("POST", f"{ONE_S}/action"): ({"os-reset_status": {"status": "available"}}, admins(202)),
    ("GET", T): (None, LOOK),
    ("POST", T): ({"volume_type": {"name": "{random}"}}, ADMIN),
    ("GET", ONE_T): (None, (401, 403, 404, 404, 404, 200)),  # the type is private
    ("PUT", ONE_T): ({"volume_type": {"description": "n"}}, ADMIN),
    ("DELETE", ONE_T): (None, admins(202)),
    ("GET", f"{ONE_T}/encryption"): (None, (401, 403, 404, 404, 404, 200)),
    ("GET", f"{ONE_T}/extra_specs"): (None, (401, 403, 404, 404, 404, 200)),
    ("POST", f"{ONE_T}/extra_specs"): ({"extra_specs": {"k": "v"}}, ADMIN),
    ("GET", f"{ONE_T}/extra_specs/{{key}}"): (None, (401, 403, 404, 404, 404, 200)),
    ("PUT", f"{ONE_T}/extra_specs/{{key}}"): ({"k": "v"}, ADMIN),
    ("DELETE", f"{ONE_T}/extra_specs/{{key}}"): (None, admins(202)),
    ("GET", f"{ONE_T}/os-volume-type-access"): (None, ADMIN),
    ("POST", f"{ONE_T}/action"): ({"addProjectAccess": {"project": "p7"}}, admins(202)),
    ("GET", A): (None, LOOK),
    ("GET", f"{A}/detail"): (None, LOOK),
    ("POST", A): (
        {"attachment": {"volume_uuid": "{volume_id}", "instance_uuid": "{instance_id}"}}, change(200),
    ),
    ("GET", ONE_A): (None, READ),
    ("PUT", ONE_A): ({"attachment": {"connector": {"host": "h"}}}, change(200)),
    ("DELETE", ONE_A): (None, change(200)),
    ("POST", f"{ONE_A}/action"): ({"os-complete": None}, change(400)),  # it has no host
    ("GET", Q): (None, (401, 403, 200, 200, 403, 200)),
    ("GET", f"{Q}/defaults"): (None, (401, 403, 200, 200, 403, 200)),
    ("GET", f"{Q}/detail"): (None, (401, 403, 200, 200, 403, 200)),
    ("PUT", Q): ({"quota_set": {"volumes": 500}}, ADMIN),
    ("DELETE", Q): (None, ADMIN),
    ("GET", C): (None, ADMIN),
    ("PUT", C): ({"quota_class_set": {"snapshots": 500}}, ADMIN),
    ("GET", "/v3/limits"): (None, LOOK),
    ("GET", "/v3/os-availability-zone"): (None, LOOK),
    ("GET", "/v3/extensions"): (None, LOOK),
}  # fmt: skip
for _one in (ONE_V, ONE_S):
    WALK |= {
        ("GET", f"{_one}/metadata"): (None, READ),
        ("POST", f"{_one}/metadata"): (META, change(200)),
        ("PUT", f"{_one}/metadata"): (META, change(200)),
        ("GET", f"{_one}/metadata/{{key}}"): (None, READ),
        ("PUT", f"{_one}/metadata/{{key}}"): (ITEM, change(200)),
        ("DELETE", f"{_one}/metadata/{{key}}"): (None, change(200)),
    }

# What an action asks of its caller: (body, member's status, is for admins).
ACTIONS = [
    ("os-extend", {"new_size": 1}, 400, False),
    ("os-volume_upload_image", {"image_name": "n", "disk_format": "vhd"}, 400, False),
    ("os-reserve", None, 202, False),
    ("os-unreserve", None, 202, False),
    ("os-attach", {}, 400, False),
    ("os-detach", {}, 202, False),
    ("os-begin_detaching", None, 400, False),
    ("os-roll_detaching", None, 202, False),
    ("os-initialize_connection", {"connector": {"host": "h"}}, 400, False),
    ("os-terminate_connection", {"connector": {}}, 202, False),
    ("os-update_readonly_flag", {"readonly": False}, 202, False),
    ("os-set_bootable", {"bootable": True}, 200, False),
    ("os-set_image_metadata", {"metadata": {"k": "v"}}, 200, False),
    ("os-unset_image_metadata", {"key": "k"}, 200, False),
    ("os-show_image_metadata", None, 200, False),
    ("os-retype", {"new_type": "__DEFAULT__"}, 202, False),
    ("revert", {"snapshot_id": str(uuid.uuid4())}, 400, False),
    ("os-reset_status", {"status": "available"}, 202, True),
    ("os-force_detach", {}, 202, True),
    ("os-force_delete", None, 202, True),
]


def test_every_route_is_walked(cloud: VolumeCloud) -> None:
    service = next(one for one in cloud.app.services if one.catalog_type == "block-storage")
    routes = {(route.method, route.path) for route in service.routes}
    assert routes == {
        path for method, one in WALK for path in [(method, one), (method, one.replace("/v3/", "/v3/{url_project_id}/"))]
    }
    asked_inside = {"volume:volumes:extend", "volume:volumes:upload", "volume:volumes:attach", "volume:volumes:admin",
                    "volume:snapshots:admin"}  # fmt: skip
    assert {route.policy for route in service.routes} | asked_inside == set(service.policy)


async def things(owner: Client, admin: Client) -> dict[str, str]:
    """One of everything, of project p1."""
    await admin.call("PUT", "/os-quota-sets/p1", 200, json={"quota_set": {"volumes": 500, "snapshots": 500}})
    volume = await owner.create(metadata={"k": "v"}, volume_type="multiattach")  # so that it can be attached again
    snapshot = await owner.snapshot(volume["id"], metadata={"k": "v"})
    taken = await owner.create()
    body = {"attachment": {"volume_uuid": taken["id"], "instance_uuid": str(uuid.uuid4())}}
    attachment = (await owner.call("POST", "/attachments", 200, json=body))["attachment"]
    return {
        "volume_id": volume["id"], "snapshot_id": snapshot["id"], "attachment_id": attachment["id"], "key": "k",
        "project_id": "p1", "name": "default", "instance_id": str(uuid.uuid4()),
    }  # fmt: skip


async def test_every_route_as_each_caller(
    cloud: VolumeCloud, as_role: Callable[[str], Client], member: Client, admin: Client
) -> None:
    wrong = []
    ids = await things(member, admin)
    for (method, path), (body, statuses) in WALK.items():
        for token, status in zip(CALLERS, statuses, strict=True):
            ids["random"] = uuid.uuid4().hex
            if "type_id" in path:
                fields = {"name": ids["random"], "os-volume-type-access:is_public": False, "extra_specs": {"k": "v"}}
                made = await admin.call("POST", "/types", 200, json={"volume_type": fields})
                ids["type_id"] = made["volume_type"]["id"]
            request = {} if body is None else {"json": filled(body, ids)}
            url = f"{cloud.url}/volume{path.format(**ids)}"
            answer = await as_role(token).http.request(method, url, **request)
            if method == "DELETE" and answer.is_success:
                ids |= await things(member, admin)
            if answer.status_code != status:
                wrong.append(f"{method} {path} as {token!r}: {answer.status_code}, not {status}: {answer.text[:100]}")
    assert not wrong, "\n".join(wrong)


def filled(body: Any, ids: dict[str, str]) -> Any:
    if isinstance(body, dict):
        return {key: filled(value, ids) for key, value in body.items()}
    return body.format(**ids) if isinstance(body, str) else body


async def test_every_action_as_each_caller(
    cloud: VolumeCloud, as_role: Callable[[str], Client], member: Client, admin: Client
) -> None:
    await admin.call("PUT", "/os-quota-sets/p1", 200, json={"quota_set": {"volumes": 500}})
    for action, body, status, for_admins in ACTIONS:
        reader = status if action == "os-show_image_metadata" else 403
        statuses = (401, 403, 403, 403, 403, status) if for_admins else (401, 403, reader, status, 404, status)
        volume = await member.create()
        for token, expected in zip(CALLERS, statuses, strict=True):
            await member.action(volume["id"], "os-set_image_metadata", {"metadata": {"k": "v"}}, 200)
            if action == "os-reserve":
                await member.action(volume["id"], "os-unreserve")
            await as_role(token).action(volume["id"], action, body, expected)


def test_every_action_is_walked(cloud: VolumeCloud) -> None:
    from instar.volumes.action_routes import VolumeActions
    from instar.volumes.api import POLICY

    assert {one[0] for one in ACTIONS} == set(VolumeActions(cloud.volumes, POLICY)._actions)
