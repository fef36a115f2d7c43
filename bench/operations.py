"""What the control plane adds to each operation: simulated hosts take no time, so all of it is ours."""

from __future__ import annotations

import asyncio
import statistics
from typing import Any

from bench.http_client import Connection
from bench.process import cloud
from bench.refs import BUILD_DEADLINE_S, Refs, build, refs_of
from bench.server_acts import MICROVERSION, Act, Took, act, delete, remove_snapshots, timed
from bench.table import Sheet

TURNS = 40
POLL_S = 0.001
COMPUTE, VOLUME = "/compute/v2.1", "/volume/v3"
_Timing = dict[str, list[Took]]


async def operations() -> Sheet:
    """One server at a time through its whole life; medians and 95th percentiles over TURNS servers."""
    times: _Timing = {}
    async with cloud() as one:
        connection = one.connect(microversion=MICROVERSION)
        refs = await refs_of(connection)
        flavors = await _flavors(connection)
        volume = await _volume(connection)
        for turn in range(TURNS):
            await _life(connection, refs, flavors, volume, times, turn)
        await connection.close()
    rows = [_row(name, took) for name, took in times.items()]
    return Sheet((f"operation, {TURNS} times", "answer, median", "settled, median", "settled, p95"), rows)


def _row(name: str, took: list[Took]) -> tuple[str, str, str, str]:
    accepted = [one.accepted_s * 1000 for one in took]
    settled = [one.settled_s * 1000 for one in took]
    p95 = statistics.quantiles(settled, n=20)[-1]
    return name, *(f"{value:,.1f} ms" for value in (statistics.median(accepted), statistics.median(settled), p95))


async def _life(
    connection: Connection, refs: Refs, flavors: list[str], volume: str, times: _Timing, turn: int
) -> None:
    built = await build(connection, refs, f"operations-{turn}", POLL_S)
    times.setdefault("create", []).append(Took(built.accepted_s, built.active_s))
    for one in _acts(refs, flavors):
        took = await act(connection, built.id, one, POLL_S)
        times.setdefault(one.name, []).append(took)
    times.setdefault("evacuate", []).append(await _evacuate(connection, built.id))
    for name, took in await _devices(connection, refs, built.id, volume):
        times.setdefault(name, []).append(took)
    await remove_snapshots(connection, built.id)
    times.setdefault("delete", []).append(await delete(connection, built.id, POLL_S))


def _acts(refs: Refs, flavors: list[str]) -> list[Act]:
    small, larger, largest = flavors[:3]
    assert small == refs.flavor
    return [
        Act("pause", {"pause": None}, "PAUSED"),
        Act("unpause", {"unpause": None}, "ACTIVE"),
        Act("suspend", {"suspend": None}, "SUSPENDED"),
        Act("resume", {"resume": None}, "ACTIVE"),
        Act("createImage", {"createImage": {"name": "copy"}}, "ACTIVE"),
        Act("shelve, with offload", {"shelve": None}, "SHELVED_OFFLOADED"),
        Act("unshelve", {"unshelve": None}, "ACTIVE"),
        Act("resize", {"resize": {"flavorRef": larger}}, "VERIFY_RESIZE"),
        Act("confirm resize", {"confirmResize": None}, "ACTIVE", 204),
        Act("resize", {"resize": {"flavorRef": largest}}, "VERIFY_RESIZE"),
        Act("revert resize", {"revertResize": None}, "ACTIVE"),
        Act("migrate", {"migrate": None}, "VERIFY_RESIZE"),
        Act("confirm resize", {"confirmResize": None}, "ACTIVE", 204),
        Act("live migrate", {"os-migrateLive": {"host": None, "block_migration": "auto"}}, "ACTIVE"),
        Act("rebuild", {"rebuild": {"imageRef": refs.image}}, "ACTIVE"),
        Act("rescue", {"rescue": {}}, "RESCUE", 200),
        Act("unrescue", {"unrescue": None}, "ACTIVE"),
        Act("reboot soft", {"reboot": {"type": "SOFT"}}, "ACTIVE"),
        Act("reboot hard", {"reboot": {"type": "HARD"}}, "ACTIVE"),
        Act("stop", {"os-stop": None}, "SHUTOFF"),
        Act("start", {"os-start": None}, "ACTIVE"),
    ]


async def _flavors(connection: Connection) -> list[str]:
    """Ids of the flavors, the smallest first."""
    flavors = (await connection.json("GET", f"{COMPUTE}/flavors/detail"))["flavors"]
    return [flavor["id"] for flavor in sorted(flavors, key=lambda flavor: (flavor["ram"], flavor["disk"]))]


async def _evacuate(connection: Connection, server_id: str) -> Took:
    """The host is declared down for it, and up again afterwards."""
    server = (await connection.json("GET", f"{COMPUTE}/servers/{server_id}"))["server"]
    host = server["OS-EXT-SRV-ATTR:host"]
    services = (await connection.json("GET", f"{COMPUTE}/os-services?host={host}&binary=nova-compute"))["services"]
    path = f"{COMPUTE}/os-services/{services[0]['id']}"
    await connection.json("PUT", path, {"forced_down": True})
    try:
        return await act(connection, server_id, Act("evacuate", {"evacuate": {}}, "ACTIVE", 200), POLL_S)
    finally:
        await connection.json("PUT", path, {"forced_down": False})


# --- volumes ------------------------------------------------------------------------------------------------------------


async def _volume(connection: Connection) -> str:
    volume = {"volume": {"size": 1, "name": "bench"}}
    volume_id: str = (await connection.json("POST", f"{VOLUME}/volumes", volume, expect=202))["volume"]["id"]
    await _until(connection, volume_id, "available")
    return volume_id


async def _until(connection: Connection, volume_id: str, status: str) -> None:
    async with asyncio.timeout(BUILD_DEADLINE_S):
        while True:
            volume: dict[str, Any] = (await connection.json("GET", f"{VOLUME}/volumes/{volume_id}"))["volume"]
            if volume["status"] == status:
                return
            await asyncio.sleep(POLL_S)


async def _devices(connection: Connection, refs: Refs, server_id: str, volume_id: str) -> list[tuple[str, Took]]:
    """They have no task_state: what is waited for is the operation itself."""

    async def settled() -> None:
        await _none_in_flight(connection, server_id)

    async def trip(what: str, path: str, body: dict[str, Any], key: str, field: str) -> list[tuple[str, Took]]:
        path = f"{COMPUTE}/servers/{server_id}/{path}"
        attached = await timed(connection, "POST", path, body, 200, settled)
        (one,) = (other for other in (await connection.json("GET", path))[key] if other[field] not in before)
        detached = await timed(connection, "DELETE", f"{path}/{one[field]}", None, 202, settled)
        return [(f"attach {what}", attached), (f"detach {what}", detached)]

    ports = (await connection.json("GET", f"{COMPUTE}/servers/{server_id}/os-interface"))["interfaceAttachments"]
    before = {port["port_id"] for port in ports}
    volume = {"volumeAttachment": {"volumeId": volume_id}}
    interface = {"interfaceAttachment": {"net_id": refs.network}}
    return [
        *await trip("volume", "os-volume_attachments", volume, "volumeAttachments", "volumeId"),
        *await trip("interface", "os-interface", interface, "interfaceAttachments", "port_id"),
    ]


async def _none_in_flight(connection: Connection, server_id: str) -> None:
    """Raises RuntimeError where the last one failed."""
    async with asyncio.timeout(BUILD_DEADLINE_S):
        while True:
            if not (await connection.json("GET", "/instar/v1/operations"))["total"]:
                break
            await asyncio.sleep(POLL_S)
    last = (await connection.json("GET", f"/instar/v1/servers/{server_id}/operations"))["operations"][0]
    if last["result"] != "Success":
        raise RuntimeError(f"{last['action']}: {last['message']}")
