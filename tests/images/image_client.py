"""One caller of the Image API, for tests: each call names the status that it expects."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.patience import PATIENCE_S


class Client:
    """One caller. Answers are checked for the status that is expected."""

    def __init__(self, url: str, token: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=f"{url}/image", headers={"x-auth-token": token}, timeout=PATIENCE_S, verify=False
        )

    async def call(self, method: str, path: str, expect: int, **more: Any) -> httpx.Response:
        answer = await self._http.request(method, path, **more)
        assert answer.status_code == expect, f"{method} {path}: {answer.status_code} {answer.text[:400]}"
        return answer

    async def create(self, name: str = "one", *, expect: int = 201, **fields: Any) -> Any:
        body = {"name": name, "disk_format": "raw", "container_format": "bare", **fields}
        return (await self.call("POST", "/v2/images", expect, json=body)).json() if expect == 201 else (
            await self.call("POST", "/v2/images", expect, json=body)
        )

    async def show(self, image_id: str) -> Any:
        return (await self.call("GET", f"/v2/images/{image_id}", 200)).json()

    async def upload(self, image_id: str, data: Any, *, expect: int = 204, **headers: str) -> httpx.Response:
        content_type = {"content-type": "application/octet-stream"}
        return await self.call(
            "PUT", f"/v2/images/{image_id}/file", expect, content=data, headers=content_type | headers
        )

    async def add(self, name: str = "one", data: bytes = b"x" * 1024, **fields: Any) -> Any:
        """An active image."""
        image = await self.create(name, **fields)
        await self.upload(image["id"], data)
        return await self.show(image["id"])

    async def patch(self, image_id: str, *operations: dict[str, Any], expect: int = 200) -> httpx.Response:
        content_type = {"content-type": "application/openstack-images-v2.1-json-patch"}
        return await self.call("PATCH", f"/v2/images/{image_id}", expect, json=operations, headers=content_type)

    async def names(self, query: str = "") -> list[str]:
        answer = await self.call("GET", f"/v2/images{query}", 200)
        return [image["name"] for image in answer.json()["images"]]

    async def wait_for_status(self, image_id: str, status: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while (await self.show(image_id))["status"] != status:
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        await self._http.aclose()
