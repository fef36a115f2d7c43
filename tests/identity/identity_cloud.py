"""What a test knows of the running identity service, and how it logs in and calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import httpx

from instar.config import IdentitySettings, Settings
from instar.http.app import App
from instar.identity.bootstrap import FirstCredentials
from instar.identity.local import LocalIdentity

CHEAP = Settings(identity=IdentitySettings(argon2_time_cost=1, argon2_memory_kib=8))


class Cloud(NamedTuple):
    url: str
    identity: LocalIdentity
    app: App
    first: FirstCredentials
    client: httpx.AsyncClient

    async def token(self, body: dict[str, Any]) -> str:
        answer = await self.client.post("/identity/v3/auth/tokens", json=body)
        assert answer.status_code == 201, answer.text
        return answer.headers["x-subject-token"]

    async def admin(self) -> str:
        return await self.token(by_password("admin", self.first.admin_password, "admin"))

    async def demo(self) -> str:
        return await self.token(by_password("demo", self.first.demo_password, "demo"))

    async def call(self, method: str, path: str, token: str = "", json: Any = None, **headers: str) -> httpx.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["x-auth-token"] = token
        return await self.client.request(method, "/identity/v3" + path, json=json, headers=sent)

    async def made(self, path: str, token: str, key: str, **fields: Any) -> dict[str, Any]:
        answer = await self.call("POST", path, token, {key: fields})
        assert answer.status_code == 201, answer.text
        return answer.json()[key]


def by_password(name: str, password: str, project: str | None = None) -> dict[str, Any]:
    auth: dict[str, Any] = {
        "identity": {
            "methods": ["password"],
            "password": {"user": {"name": name, "domain": {"id": "default"}, "password": password}},
        }
    }
    if project is not None:
        auth["scope"] = {"project": {"name": project, "domain": {"name": "Default"}}}
    return {"auth": auth}


