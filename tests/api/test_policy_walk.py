"""Every route and every action, as reader, member, admin, another project, and nobody."""

from __future__ import annotations

from typing import Any

from instar.api.policy import COMPUTE_POLICY
from instar.api.resource import ApiRoute
from instar.api.servers.actions import ServerActions
from instar.api.service import api_routes
from instar.http.policy import ADMIN, MEMBER, READER
from tests.api.compute_cloud import Caller, Cloud

# At which microversion a route is walked: the newest one at which it exists.
NEWEST = 96


def _version(route: ApiRoute) -> str:
    return f"2.{route.until or NEWEST}"


def _path(route: ApiRoute, server_id: str, project_id: str) -> str:
    values = {
        "{server_id}": server_id, "{flavor_id}": "1", "{name}": "default", "{project_id}": project_id,
        "{tenant_id}": project_id, "{id}": "7", "{service_id}": "7", "{key}": "k", "{tag}": "t",
        "{request_id}": "req-x", "{network}": "private", "{port_id}": "p", "{alias}": "os-keypairs",
        "{console_token}": "t", "{migration_id}": "7",
    }  # fmt: skip
    path = route.path
    for name, value in values.items():
        path = path.replace(name, value)
    assert "{" not in path, path
    return path


async def _status(caller: Caller, route: ApiRoute, path: str) -> int:
    body: Any = None if route.method in ("GET", "DELETE") else {}
    return (await caller.call(route.method, path, body, version=_version(route))).status_code


async def test_every_route_asks_for_its_role(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    reader = await cloud.new_user("reading", "reader", cloud.demo.project_id)
    member = await cloud.new_user("working", "member", cloud.demo.project_id)
    routes = api_routes(_compute(cloud))
    assert len(routes) > 80
    for route in routes:
        if (route.method, route.path) == ("DELETE", "/servers/{server_id}"):
            continue  # its own test below: it works
        path = _path(route, server_id, cloud.demo.project_id)
        rule = COMPUTE_POLICY[route.policy]
        assert rule in (READER, MEMBER, ADMIN), route
        assert await _status(cloud.nobody, route, path) == 401, route
        for caller, allowed in ((reader, rule is READER), (member, rule in (READER, MEMBER))):
            status = await _status(caller, route, path)
            assert (status == 403) is not allowed, (route, status)
            assert status < 500, (route, status)
        status = await _status(cloud.admin, route, path)
        assert status not in (401, 403) and status < 500, (route, status)


async def test_every_action_asks_for_its_role(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    reader = await cloud.new_user("reading", "reader", cloud.demo.project_id)
    actions = ServerActions(_compute(cloud), COMPUTE_POLICY).actions
    assert set(actions) >= {"reboot", "os-start", "os-stop", "lock", "unlock", "os-resetState", "os-getConsoleOutput"}
    for key, action in actions.items():
        path = f"/servers/{server_id}/action"
        assert (await cloud.nobody.call("POST", path, {key: None})).status_code == 401
        await reader.refused(403, "POST", path, {key: "not a body"})
        if COMPUTE_POLICY[action.policy] is ADMIN:
            await cloud.demo.refused(403, "POST", path, {key: None})


async def test_another_project_finds_nothing(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo, tags=["t"], metadata={"k": "v"})
    group = (
        await cloud.demo.call("POST", "/os-server-groups", {"server_group": {"name": "g", "policy": "affinity"}})
    ).json()["server_group"]["id"]
    stranger = await cloud.new_user("stranger", "member")
    for route in api_routes(_compute(cloud)):
        if "{server_id}" not in route.path or COMPUTE_POLICY[route.policy] is ADMIN:
            continue
        path = _path(route, server_id, stranger.project_id)
        if route.path.endswith("/os-volume_attachments/{id}"):
            path = path.removesuffix("7") + server_id  # else it would be a swap, which is for admins
        bodies: dict[str, Any] = {
            "/servers/{server_id}": {"server": {"name": "mine"}}, "/servers/{server_id}/action": {"os-stop": None},
            "/servers/{server_id}/metadata": {"metadata": {}}, "/servers/{server_id}/metadata/{key}": {"meta": {"k": "x"}},
            "/servers/{server_id}/tags": {"tags": []},
            "/servers/{server_id}/os-volume_attachments": {"volumeAttachment": {"volumeId": server_id}},
            "/servers/{server_id}/os-volume_attachments/{id}": {"volumeAttachment": {"volumeId": server_id}},
            "/servers/{server_id}/os-interface": {"interfaceAttachment": {}},
            "/servers/{server_id}/remote-consoles": {"remote_console": {"protocol": "vnc", "type": "novnc"}},
        }  # fmt: skip
        body = bodies.get(route.path) if route.method in ("PUT", "POST") else None
        answer = await stranger.call(route.method, path, body, version=_version(route))
        assert answer.status_code == 404, (route, answer.text)
    assert (await stranger.call("GET", f"/os-server-groups/{group}")).status_code == 404
    assert (await stranger.call("DELETE", f"/os-server-groups/{group}")).status_code == 404
    assert (await stranger.get("/servers"))["servers"] == []
    assert (await stranger.get("/os-server-groups"))["server_groups"] == []
    await stranger.refused(403, "GET", "/servers?all_tenants=1")
    await stranger.refused(403, "GET", f"/os-quota-sets/{cloud.demo.project_id}")
    await stranger.refused(403, "GET", f"/limits?tenant_id={cloud.demo.project_id}")
    await stranger.refused(403, "GET", f"/os-simple-tenant-usage/{cloud.demo.project_id}")
    await stranger.refused(403, "GET", f"/os-keypairs?user_id={cloud.demo.user_id}")
    assert (await cloud.admin.get(f"/servers/{server_id}"))["server"]["id"] == server_id
    hidden = "OS-EXT-SRV-ATTR:host"
    assert hidden in (await cloud.admin.get(f"/servers/{server_id}"))["server"]
    assert hidden not in (await cloud.demo.get(f"/servers/{server_id}"))["server"]


async def test_nothing_that_needs_no_token_says_more_than_versions(cloud: Cloud) -> None:
    open_routes = [
        route.path
        for service in cloud.app.services
        if service.catalog_type == "compute"
        for route in service.routes
        if not service.policy[route.policy].needs_token
    ]
    assert open_routes == ["/", "/v2.1"]
    for path in ("/compute/", "/compute/v2.1", "/compute/v2.1/"):
        assert (await cloud.admin.client.get(path)).status_code == 200


def _compute(cloud: Cloud) -> Any:
    from instar.api.host_directory import HostDirectory
    from instar.api.resource import Compute

    control = cloud.control
    return Compute(
        control.store, control.settings, control.lifecycle, control.images, control.networks, cloud.identity,
        HostDirectory(control.store, control.hosts), control.volumes,
    )  # fmt: skip
