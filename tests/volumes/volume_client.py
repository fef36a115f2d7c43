"""One caller of the Block Storage API, for tests: each call names the status that it expects."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.patience import PATIENCE_S


class Client:
    """One caller. Answers are checked for the status that is expected."""

    def __init__(self, url: str, token: str) -> None:
        headers = {"x-auth-token": token, "openstack-api-version": "volume latest"}
        self.http = httpx.AsyncClient(base_url=f"{url}/volume/v3", headers=headers, timeout=PATIENCE_S, verify=False)

    async def call(self, method: str, path: str, expect: int = 200, **more: Any) -> Any:
        answer = await self.http.request(method, path, **more)
        assert answer.status_code == expect, f"{method} {path}: {answer.status_code} {answer.text[:400]}"
        return answer.json() if answer.content else None

    async def create(self, size: int = 1, *, wait: str = "available", **fields: Any) -> Any:
        """A volume of this size that has been made."""
        volume = (await self.call("POST", "/volumes", 202, json={"volume": {"size": size, **fields}}))["volume"]
        return await self.until(f"/volumes/{volume['id']}", "volume", wait)

    async def snapshot(self, volume_id: str, **fields: Any) -> Any:
        body = {"snapshot": {"volume_id": volume_id, **fields}}
        snapshot = (await self.call("POST", "/snapshots", 202, json=body))["snapshot"]
        return await self.until(f"/snapshots/{snapshot['id']}", "snapshot", "available")

    async def show(self, volume_id: str) -> Any:
        return (await self.call("GET", f"/volumes/{volume_id}"))["volume"]

    async def action(self, volume_id: str, name: str, body: Any = None, expect: int = 202) -> Any:
        return await self.call("POST", f"/volumes/{volume_id}/action", expect, json={name: body})

    async def delete(self, volume_id: str) -> None:
        await self.call("DELETE", f"/volumes/{volume_id}", 202)
        await self.gone(f"/volumes/{volume_id}")

    async def until(self, path: str, key: str, status: str) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            while (record := (await self.call("GET", path))[key])["status"] != status:
                assert not record["status"].startswith("error"), record
                await asyncio.sleep(0.02)
        return record

    async def gone(self, path: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while (await self.http.get(path)).status_code != 404:
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        await self.http.aclose()
