"""The Image API alone, served over real HTTP with tokens that stand in a table. Run as a program it is a cloud to kill."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from instar.config import ImageSettings
from instar.errors import Unauthorized
from instar.http.answer import Answer, json_answer
from instar.http.app import App, Service, build_app
from instar.http.faults import identity_fault
from instar.http.policy import OPEN, Policy
from instar.http.request import Request
from instar.http.routing import Route
from instar.http.server import HttpServer
from instar.identity.contract import Authenticated
from instar.images.api import image_api
from instar.images.local import LocalImages
from instar.store.sqlite import SqliteStore

BODY_MAX_BYTES = 1 << 20
LIST_LIMIT_MAX = 1000

_IMPLIED = {
    "admin": {"admin", "manager", "member", "reader"},
    "member": {"member", "reader"},
    "reader": {"reader"},
    "nobody": set(),
}


class TokenTable:
    """An identity whose tokens read `<role>@<project>`."""

    async def authenticate_token(self, token: str) -> Authenticated:
        role, at, project = token.partition("@")
        if not at or role not in _IMPLIED:
            raise Unauthorized()
        return Authenticated(
            user_id=f"user-{role}-{project}",
            user_name=role,
            user_domain_id="default",
            project_id=project,
            project_name=project,
            project_domain_id="default",
            roles=frozenset(_IMPLIED[role]),
            expires_at=4e9,
        )

    async def project_exists(self, project_id: str) -> bool:
        return True


async def _identity_version(request: Request) -> Answer:
    links = [{"rel": "self", "href": f"{request.base_url}/v3/"}]
    return json_answer({"version": {"id": "v3.14", "status": "stable", "links": links}})


async def _login(request: Request) -> Answer:
    """Whatever the password, the user name is the role; the catalog has the image service."""
    auth = (await request.json(dict[str, Any]))["auth"]
    role, project = auth["identity"]["password"]["user"]["name"], auth["scope"]["project"]["name"]
    endpoints = [
        {"id": kind, "interface": kind, "region": "R", "region_id": "R", "url": f"{request.origin}/image"}
        for kind in ("public", "internal", "admin")
    ]
    domain = {"id": "default", "name": "Default"}
    token = {
        "methods": ["password"],
        "user": {"id": role, "name": role, "domain": domain},
        "project": {"id": project, "name": project, "domain": domain},
        "roles": [{"id": role, "name": role}],
        "issued_at": "2026-01-01T00:00:00.000000Z",
        "expires_at": "2099-01-01T00:00:00.000000Z",
        "catalog": [{"id": "image", "type": "image", "name": "image", "endpoints": endpoints}],
    }
    return json_answer({"token": token}, 201, [(b"x-subject-token", f"{role}@{project}".encode())])


def _identity_api() -> Service:
    """As much of an Identity API as clients need to find the image service."""
    routes = [
        Route("GET", "/v3", "open", _identity_version),
        Route("POST", "/v3/auth/tokens", "open", _login),
    ]
    return Service("identity", "identity", "/identity", routes, Policy({"open": OPEN}), identity_fault)


class ImageCloud:
    """Store, image service and HTTP server below one directory."""

    def __init__(self, directory: Path, settings: ImageSettings | None = None) -> None:
        self.directory = directory
        self.store = SqliteStore(directory / "instar.db", durable=False)
        self.images = LocalImages(self.store, directory, settings or ImageSettings())
        self.app: App = build_app(
            [image_api(self.images, list_limit_max=LIST_LIMIT_MAX), _identity_api()],
            TokenTable(),
            body_max_bytes=BODY_MAX_BYTES,
        )
        self._server = HttpServer(self.app, "127.0.0.1", 0)
        self.url = ""

    async def start(self) -> None:
        await self.store.open()
        await self.images.open()
        self.url = f"http://127.0.0.1:{await self._server.start()}"

    async def stop(self) -> None:
        await self._server.stop(grace_s=1)
        await self.images.close()
        await self.store.close()

    def files(self) -> list[str]:
        """Names of all stored and incoming data."""
        root = self.directory / "images"
        files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        return sorted(str(path) for path in files if path.parts[0] != "locks")


async def _serve(directory: Path) -> None:
    cloud = ImageCloud(directory)
    await cloud.start()
    print(cloud.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
