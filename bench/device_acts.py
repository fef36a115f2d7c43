"""Volumes and interfaces that come to a server and go again, timed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from bench.http_client import Connection
from bench.refs import BUILD_DEADLINE_S, Refs
from bench.server_acts import Took, timed

COMPUTE, VOLUME = "/compute/v2.1", "/volume/v3"


async def new_volume(connection: Connection, poll_s: float) -> str:
    """The id of a volume of 1 GiB that is available."""
    volume = {"volume": {"size": 1, "name": "bench"}}
    volume_id: str = (await connection.json("POST", f"{VOLUME}/volumes", volume, expect=202))["volume"]["id"]
    await volume_is(connection, volume_id, "available", poll_s)
    return volume_id


async def volume_is(connection: Connection, volume_id: str, status: str, poll_s: float) -> None:
    """Poll until the volume has the status."""
    async with asyncio.timeout(BUILD_DEADLINE_S):
        while True:
            volume: dict[str, Any] = (await connection.json("GET", f"{VOLUME}/volumes/{volume_id}"))["volume"]
            if volume["status"] == status:
                return
            await asyncio.sleep(poll_s)


async def device_trips(
    connection: Connection,
    refs: Refs,
    server_id: str,
    volume_id: str,
    poll_s: float,
    look_after_s: Callable[[str], float] = lambda _trip: 0.0,
) -> list[tuple[str, Took]]:
    """A volume and an interface are attached and detached. They have no task_state: what is waited for is the
    operation itself, and nothing is asked before `look_after_s` of the trip's name."""

    async def settled() -> None:
        await _none_in_flight(connection, server_id, poll_s)

    async def trip(what: str, path: str, body: dict[str, Any], key: str, field: str) -> list[tuple[str, Took]]:
        path = f"{COMPUTE}/servers/{server_id}/{path}"
        into, out = f"attach {what}", f"detach {what}"
        attached = await timed(connection, "POST", path, body, 200, settled, look_after_s=look_after_s(into))
        (one,) = (other for other in (await connection.json("GET", path))[key] if other[field] not in before)
        path = f"{path}/{one[field]}"
        detached = await timed(connection, "DELETE", path, None, 202, settled, look_after_s=look_after_s(out))
        return [(into, attached), (out, detached)]

    ports = (await connection.json("GET", f"{COMPUTE}/servers/{server_id}/os-interface"))["interfaceAttachments"]
    before = {port["port_id"] for port in ports}
    volume = {"volumeAttachment": {"volumeId": volume_id}}
    interface = {"interfaceAttachment": {"net_id": refs.network}}
    return [
        *await trip("volume", "os-volume_attachments", volume, "volumeAttachments", "volumeId"),
        *await trip("interface", "os-interface", interface, "interfaceAttachments", "port_id"),
    ]


async def _none_in_flight(connection: Connection, server_id: str, poll_s: float) -> None:
    """Raises RuntimeError where the last one failed."""
    async with asyncio.timeout(BUILD_DEADLINE_S):
        while True:
            if not (await connection.json("GET", "/instar/v1/operations"))["total"]:
                break
            await asyncio.sleep(poll_s)
    last = (await connection.json("GET", f"/instar/v1/servers/{server_id}/operations"))["operations"][0]
    if last["result"] != "Success":
        raise RuntimeError(f"{last['action']}: {last['message']}")
