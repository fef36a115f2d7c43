"""What builds name: image, flavor, and a network with room for thousands of servers."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

from bench.http_client import Connection

BUILD_DEADLINE_S = 60.0
CIDR = "10.128.0.0/16"  # no simulated guest sends a packet to it


class Refs(NamedTuple):
    image: str
    flavor: str
    network: str
    volume: str = ""
    host: str = ""  # admins may say

    def body(self, name: str) -> dict[str, Any]:
        server: dict[str, Any] = {
            "name": name, "imageRef": self.image, "flavorRef": self.flavor, "networks": [{"uuid": self.network}],
        }  # fmt: skip
        if self.host:
            server["availability_zone"] = f"nova:{self.host}"
        return {"server": server}


class Built(NamedTuple):
    """Times in seconds from the request on."""

    id: str
    accepted_s: float
    active_s: float


async def image_and_flavor(connection: Connection) -> tuple[str, str]:
    """The guest image `tiny` and the smallest flavor."""
    images = (await connection.json("GET", "/image/v2/images?name=tiny"))["images"]
    if not images:
        raise RuntimeError("the cloud has no image `tiny`: it could not be built on this machine")
    flavors = (await connection.json("GET", "/compute/v2.1/flavors/detail"))["flavors"]
    return images[0]["id"], min(flavors, key=lambda flavor: flavor["ram"])["id"]


async def large_network(connection: Connection) -> str:
    """A network with 65,000 addresses: the one that a cloud begins with has 250."""
    network = {"network": {"name": "bench"}}
    network_id: str = (await connection.json("POST", "/network/v2.0/networks", network, expect=201))["network"]["id"]
    subnet = {"subnet": {"network_id": network_id, "cidr": CIDR, "ip_version": 4}}
    await connection.json("POST", "/network/v2.0/subnets", subnet, expect=201)
    return network_id


async def refs_of(connection: Connection) -> Refs:
    image, flavor = await image_and_flavor(connection)
    return Refs(image, flavor, await large_network(connection))


async def build(connection: Connection, refs: Refs, name: str, poll_s: float) -> Built:
    """One server from POST to ACTIVE. Raises RuntimeError when it ends in ERROR."""
    began = time.perf_counter()
    answer = await connection.json("POST", "/compute/v2.1/servers", refs.body(name), expect=202)
    accepted = time.perf_counter() - began
    server_id: str = answer["server"]["id"]
    await reach(connection, server_id, "ACTIVE", poll_s)
    return Built(server_id, accepted, time.perf_counter() - began)


async def reach(connection: Connection, server_id: str, status: str, poll_s: float) -> None:
    """Poll until the server has the status and no task. Raises RuntimeError when it gets into ERROR, or never there."""
    server: dict[str, Any] = {}
    try:
        async with asyncio.timeout(BUILD_DEADLINE_S):
            while True:
                server = (await connection.json("GET", f"/compute/v2.1/servers/{server_id}"))["server"]
                if server["OS-EXT-STS:task_state"] is None:
                    if server["status"] == status:
                        return
                    if server["status"] == "ERROR":
                        raise RuntimeError(f"{server['name']}: {server['fault']['message']}")
                await asyncio.sleep(poll_s)
    except TimeoutError:
        actions = await connection.json("GET", f"/compute/v2.1/servers/{server_id}/os-instance-actions")
        last = actions["instanceActions"][0]
        raise RuntimeError(
            f"{server['name']} did not become {status} in {BUILD_DEADLINE_S:g} s: it is {server['status']}, its last "
            f"action was {last['action']} ({last['message']}), its fault {server.get('fault')}"
        ) from None


async def gone(connection: Connection, server_id: str, poll_s: float) -> None:
    """Poll until the server is deleted."""
    async with asyncio.timeout(BUILD_DEADLINE_S):
        while True:
            status, _ = await connection.request("GET", f"/compute/v2.1/servers/{server_id}")
            if status == 404:
                return
            await asyncio.sleep(poll_s)
