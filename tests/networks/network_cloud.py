"""The Network API over real HTTP, where clients log in with a real identity service, and one caller of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx

from instar.config import IdentitySettings, NetworkSettings, Settings, StoreSettings
from instar.errors import Unauthorized
from instar.http.app import App, build_app
from instar.http.server import HttpServer
from instar.identity.api import identity_service
from instar.identity.bootstrap import FirstCredentials, bootstrap
from instar.identity.local import LocalIdentity
from instar.model.context import Authenticated
from instar.model.network import RequestedNetwork
from instar.networks.api import network_service
from instar.networks.local import LocalNetworks
from instar.store.sqlite import SqliteStore
from tests.patience import PATIENCE_S

SETTINGS = Settings(
    store=StoreSettings(durable=False),
    identity=IdentitySettings(argon2_time_cost=1, argon2_memory_kib=8),
    network=NetworkSettings(ports=40, networks=12, subnets=20, security_groups=6, security_group_rules=30),
)
SHARED_CIDR = "10.77.0.0/24"
_IMPLIED = {
    "admin": {"admin", "manager", "member", "reader"},
    "member": {"member", "reader"},
    "reader": {"reader"},
    "nobody": set(),
}


class _Tokens:
    """Tokens that read `<role>@<project>`, and those of the real identity service where there is one."""

    def __init__(self, identity: LocalIdentity | None) -> None:
        self._identity = identity

    async def authenticate_token(self, token: str) -> Authenticated:
        role, at, project = token.partition("@")
        if not at and self._identity is not None:
            return await self._identity.authenticate_token(token)
        if role not in _IMPLIED:
            raise Unauthorized()
        return Authenticated(
            user_id=f"user-{role}", user_name=role, user_domain_id="default", project_id=project, project_name=project,
            project_domain_id="default", roles=frozenset(_IMPLIED[role]), expires_at=4e9,
        )  # fmt: skip


class Caller:
    """One caller; each call names the status that it expects."""

    def __init__(self, client: httpx.AsyncClient, token: str) -> None:
        self.client, self.token = client, token

    async def call(self, method: str, path: str, expect: int, json: Any = None, **more: Any) -> Any:
        headers = {"x-auth-token": self.token} if self.token else {}
        answer = await self.client.request(method, f"/network/v2.0{path}", json=json, headers=headers, **more)
        assert answer.status_code == expect, f"{method} {path}: {answer.status_code} {answer.text[:600]}"
        return answer.json() if answer.content else None

    async def refused(self, status: int, method: str, path: str, json: Any = None) -> tuple[str, str]:
        """Type and message of an error in the API's shape."""
        error = (await self.call(method, path, status, json))["NeutronError"]
        assert set(error) == {"type", "message", "detail"}
        return error["type"], error["message"]

    async def make(self, kind: str, **fields: Any) -> dict[str, Any]:
        return (await self.call("POST", f"/{kind.replace('_', '-')}s", 201, {kind: fields}))[kind]

    async def change(self, kind: str, record_id: str, **fields: Any) -> dict[str, Any]:
        return (await self.call("PUT", f"/{kind.replace('_', '-')}s/{record_id}", 200, {kind: fields}))[kind]

    async def show(self, kind: str, record_id: str) -> dict[str, Any]:
        return (await self.call("GET", f"/{kind.replace('_', '-')}s/{record_id}", 200))[kind]

    async def list(self, kind: str, query: str = "") -> list[dict[str, Any]]:
        return (await self.call("GET", f"/{kind.replace('_', '-')}s{query}", 200))[f"{kind}s"]

    async def delete(self, kind: str, record_id: str, expect: int = 204) -> None:
        await self.call("DELETE", f"/{kind.replace('_', '-')}s/{record_id}", expect)

    async def lan(self, cidr: str = "192.168.5.0/24", **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """A network with a subnet."""
        network = await self.make("network", name="lan")
        return network, await self.make("subnet", network_id=network["id"], ip_version=4, cidr=cidr, **fields)


class Cloud(NamedTuple):
    url: str
    app: App
    store: SqliteStore
    networks: LocalNetworks
    first: FirstCredentials | None  # where there is a real identity service
    client: httpx.AsyncClient
    shared_id: str
    told: list[set[str]]  # what the hosts' side was told, call by call

    def as_role(self, token: str) -> Caller:
        return Caller(self.client, token)

    @property
    def member(self) -> Caller:
        return self.as_role("member@p1")

    @property
    def admin(self) -> Caller:
        return self.as_role("admin@p0")

    @property
    def other(self) -> Caller:
        """A member of another project."""
        return self.as_role("member@p2")

    async def serve(self, network_id: str, *, project_id: str = "p1", **more: Any) -> tuple[str, str]:
        """A server of the project, bound to a host: its id and that of its port."""
        instance_id = str(uuid4())
        requested = more.pop("requested", (RequestedNetwork(network_id=network_id),))
        await self.networks.allocate(
            instance_id, project_id=project_id, hostname="guest", requested=requested, security_groups=("default",),
            availability_zone="nova",
        )  # fmt: skip
        (port,) = await self.networks.bind(instance_id, host="h1")
        return instance_id, port.definition.id


@asynccontextmanager
async def running_cloud(directory: Path, *, with_identity: bool = False) -> AsyncIterator[Cloud]:
    store = SqliteStore(directory / "instar.db", durable=False)
    await store.open()
    told: list[set[str]] = []

    async def changed(instance_ids: set[str]) -> None:
        told.append(instance_ids)

    networks = LocalNetworks(store, SETTINGS.network, changed)
    identity = LocalIdentity(store, SETTINGS, directory) if with_identity else None
    first = None
    services = [network_service(networks, SETTINGS)]
    if identity is not None:
        await identity.start()
        first = await bootstrap(identity)
        services.append(identity_service(identity))
    shared_id = await networks.bootstrap(SHARED_CIDR)
    app = build_app(services, _Tokens(identity), body_max_bytes=SETTINGS.api.body_max_bytes)
    server = HttpServer(app, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{await server.start()}"
    if identity is not None:
        identity.base_url = url
    try:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, verify=False) as client:
            yield Cloud(url, app, store, networks, first, client, shared_id, told)
    finally:
        await server.stop(grace_s=1)
        await networks.close()
        if identity is not None:
            await identity.close()
        await store.close()
