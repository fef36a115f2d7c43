"""A real cloud behind a real port, on simulated hosts: what the tests of the Compute API talk to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from instar.api.service import compute_service
from instar.cli.control_plane import ControlPlane
from instar.cli.state_dir import StateDir
from instar.config import (
    EngineSettings,
    HostSettings,
    IdentitySettings,
    LifecycleSettings,
    QuotaSettings,
    Settings,
    SimulatedSettings,
    StoreSettings,
)
from instar.consoles.proxy import ConsoleProxy
from instar.consoles.service import console_service, console_websockets
from instar.http.app import App, build_app
from instar.http.server import HttpServer
from instar.hypervisor.simulated.world import SimulatedWorld
from instar.identity.api import identity_service
from instar.identity.bootstrap import FirstCredentials, bootstrap
from instar.identity.local import LocalIdentity
from instar.streams.client import StreamClient
from instar.streams.identity import StreamIdentity
from instar.streams.server import StreamServer
from instar.volumes.local import remove_exports
from tests.patience import PATIENCE_S
from tests.rabbitmq_server import bus_of, ensure_bus

SETTINGS = Settings(
    hypervisor="simulated",
    store=StoreSettings(durable=False),
    engine=EngineSettings(poll_s=0.1, step_deadline_s=5),
    host=HostSettings(heartbeat_s=0.2, down_after_s=3, lost_after_s=3),
    lifecycle=LifecycleSettings(wait_soft_reboot_seconds=1, shutdown_grace_s=1),
    identity=IdentitySettings(argon2_time_cost=1, argon2_memory_kib=8),
    quota=QuotaSettings(instances=100, cores=200, ram=500_000, metadata_items=8, key_pairs=5, server_groups=3),
    simulated=SimulatedSettings(hosts=2),
)
LATEST = "2.96"
IMAGE_BYTES = 1 << 20


class Caller:
    """One user's view of the API: a token, and requests with a microversion."""

    def __init__(self, client: httpx.AsyncClient, token: str, user_id: str, project_id: str) -> None:
        self.client, self.token, self.user_id, self.project_id = client, token, user_id, project_id

    async def call(
        self, method: str, path: str, json: Any = None, *, version: str = LATEST, content: bytes | None = None
    ) -> httpx.Response:
        headers = {"x-auth-token": self.token, "openstack-api-version": f"compute {version}"} if self.token else {}
        url = f"/compute/v2.1{path}"
        return await self.client.request(method, url, json=json, content=content, headers=headers)

    async def get(self, path: str, *, version: str = LATEST) -> dict[str, Any]:
        answer = await self.call("GET", path, version=version)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refused(self, status: int, method: str, path: str, json: Any = None, *, version: str = LATEST) -> str:
        """The message of a fault that has this status and the API's shape."""
        answer = await self.call(method, path, json, version=version)
        assert answer.status_code == status, answer.text
        (fault,) = answer.json().values()
        assert fault["code"] == status
        return fault["message"]


class Cloud(NamedTuple):
    url: str
    app: App
    control: ControlPlane
    identity: LocalIdentity
    first: FirstCredentials
    admin: Caller
    demo: Caller
    nobody: Caller
    image_id: str
    network_id: str
    world: SimulatedWorld

    def server(self, name: str = "guest", **more: Any) -> dict[str, Any]:
        fields = {"name": name, "flavorRef": "1", "imageRef": self.image_id, "networks": [{"uuid": self.network_id}]}
        return {"server": fields | more}

    async def create(self, caller: Caller, name: str = "guest", *, version: str = LATEST, **more: Any) -> str:
        answer = await caller.call("POST", "/servers", self.server(name, **more), version=version)
        assert answer.status_code == 202, answer.text
        return answer.json()["server"]["id"]

    async def created(self, caller: Caller, name: str = "guest", *, version: str = LATEST, **more: Any) -> str:
        """The id of a server that is ACTIVE."""
        server_id = await self.create(caller, name, version=version, **more)
        await self.until(caller, server_id, "ACTIVE")
        return server_id

    async def until(self, caller: Caller, server_id: str, status: str) -> dict[str, Any]:
        server: dict[str, Any] = {}
        async with asyncio.timeout(PATIENCE_S):
            while server.get("status") != status or server["OS-EXT-STS:task_state"] is not None:
                server = (await caller.get(f"/servers/{server_id}"))["server"]
                assert server["status"] != "ERROR" or status == "ERROR", server
                await asyncio.sleep(0.01)
        return server

    async def act(self, caller: Caller, server_id: str, key: str, value: Any = None, *, version: str = LATEST) -> Any:
        """The answer of an action that is accepted."""
        answer = await caller.call("POST", f"/servers/{server_id}/action", {key: value}, version=version)
        assert answer.status_code in (200, 202, 204), (key, answer.text)
        return answer

    async def host_of(self, server_id: str) -> str | None:
        return (await self.admin.get(f"/servers/{server_id}"))["server"]["OS-EXT-SRV-ATTR:host"]

    async def gone(self, caller: Caller, server_id: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while (await caller.call("GET", f"/servers/{server_id}")).status_code != 404:
                await asyncio.sleep(0.01)

    async def login(self, name: str, password: str, project: str) -> Caller:
        return await _login(self.admin.client, name, password, project)

    async def new_user(self, name: str, role: str, project_id: str | None = None) -> Caller:
        """A user with one role in a project (none given: in a new one), logged in."""
        token = {"x-auth-token": self.admin.token}
        post = self.admin.client.post
        if project_id is None:
            made = await post("/identity/v3/projects", json={"project": {"name": f"of-{name}"}}, headers=token)
            project_id = made.json()["project"]["id"]
        user = (
            await post("/identity/v3/users", json={"user": {"name": name, "password": "a-password"}}, headers=token)
        ).json()["user"]
        roles = (await self.admin.client.get(f"/identity/v3/roles?name={role}", headers=token)).json()["roles"]
        path = f"/identity/v3/projects/{project_id}/users/{user['id']}/roles/{roles[0]['id']}"
        assert (await self.admin.client.put(path, headers=token)).status_code == 204
        return await _login(self.admin.client, name, "a-password", None, project_id)


async def _login(
    client: httpx.AsyncClient, name: str, password: str, project: str | None, project_id: str | None = None
) -> Caller:
    scope: dict[str, Any] = {"id": project_id} if project_id else {"name": project, "domain": {"id": "default"}}
    user = {"name": name, "domain": {"id": "default"}, "password": password}
    identity = {"methods": ["password"], "password": {"user": user}}
    answer = await client.post(
        "/identity/v3/auth/tokens", json={"auth": {"identity": identity, "scope": {"project": scope}}}
    )
    assert answer.status_code == 201, answer.text
    token = answer.json()["token"]
    return Caller(client, answer.headers["x-subject-token"], token["user"]["id"], token["project"]["id"])


@asynccontextmanager
async def running_cloud(directory: Path, settings: Settings = SETTINGS) -> AsyncIterator[Cloud]:
    state = StateDir(directory / "state")
    world = SimulatedWorld(state.simulated_log, settings.simulated)
    streams = StreamIdentity.open(state.path / "streams")
    server_streams, client_streams = StreamServer(streams, host="here", listen="127.0.0.1"), StreamClient(streams)
    await server_streams.open()
    world.streams = server_streams
    hosts = {f"sim-{number}": world.host(f"sim-{number}") for number in range(settings.simulated.hosts)}
    await asyncio.to_thread(ensure_bus, state.path)
    settings = msgspec.structs.replace(settings, bus=bus_of(state.path))
    control = ControlPlane(state, settings, hosts, boot_id=lambda: "boot-1")
    await control.open()
    identity = LocalIdentity(control.store, settings, state.path)
    await identity.start()
    first = await bootstrap(identity)
    assert first is not None
    compute = compute_service(control.cloud, control.lifecycle, control.hosts, identity)
    proxy = ConsoleProxy(
        control.lifecycle.consoles, client_streams, settings.console, base_url=settings.api.console_base_url
    )
    services = [identity_service(identity), *_more(control, settings), compute, console_service(settings.console)]
    app = build_app(services, identity, body_max_bytes=1 << 20, websockets=console_websockets(proxy))
    server = HttpServer(app, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{await server.start()}"
    identity.base_url = url
    try:
        image_file = directory / "image.raw"
        image_file.write_bytes(bytes(IMAGE_BYTES))
        image_id = await control.images.register("tiny", image_file, disk_format="raw", properties={})
        network_id = await control.networks.bootstrap("10.78.0.0/24")
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, verify=False) as client:
            admin = await _login(client, "admin", first.admin_password, "admin")
            demo = await _login(client, "demo", first.demo_password, "demo")
            nobody = Caller(client, "", "", "")
            yield Cloud(url, app, control, identity, first, admin, demo, nobody, _id(image_id), _id(network_id), world)
    finally:
        await server.stop(grace_s=1)
        await identity.close()
        await control.close()
        await client_streams.close()
        await server_streams.close()
        world.close()
        await asyncio.to_thread(remove_exports, state.path)


def _id(made: Any) -> str:
    return made if isinstance(made, str) else made.id


def _more(control: ControlPlane, settings: Settings) -> list[Any]:
    from instar.images.api import image_api
    from instar.networks.api import network_service
    from instar.volumes.api import volume_service

    return [
        image_api(control.images, list_limit_max=settings.api.list_limit_max), network_service(control.networks, settings),
        volume_service(control.volumes, list_limit_max=settings.api.list_limit_max),
    ]  # fmt: skip
