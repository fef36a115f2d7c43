"""What the control plane adds to each operation: simulated hosts take no time, so all of it is ours."""

from __future__ import annotations

import statistics

from bench.device_acts import device_trips, new_volume
from bench.http_client import Connection
from bench.process import cloud
from bench.refs import Refs, build, refs_of
from bench.server_acts import MICROVERSION, Act, Took, act, delete, remove_snapshots
from bench.table import Sheet

TURNS = 40
POLL_S = 0.001
COMPUTE = "/compute/v2.1"
_Timing = dict[str, list[Took]]


async def operations() -> Sheet:
    """One server at a time through its whole life; medians and 95th percentiles over TURNS servers."""
    times: _Timing = {}
    async with cloud() as one:
        connection = one.connect(microversion=MICROVERSION)
        refs = await refs_of(connection)
        flavors = await _flavors(connection)
        volume = await new_volume(connection, POLL_S)
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
    for name, took in await device_trips(connection, refs, built.id, volume, POLL_S):
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
