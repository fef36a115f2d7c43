"""What Instar adds to libvirt: each operation through the API against the bare calls that do the same, in turns, on one
libvirtd. Guests never get to boot: they are gone as soon as they run."""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt

from bench.bare_libvirt import BareGuest
from bench.http_client import Connection
from bench.process import Cloud, cloud
from bench.refs import Refs, build, gone, image_and_flavor, reach
from bench.table import Row, Skipped
from instar.hypervisor.libvirt.private_daemon import SYSTEM_URI, PrivateDaemon, system_libvirtd_usable

TURNS = 12
WARM_UP = 1
POLL_S = 0.005
DISK_BYTES = 1 << 30  # of the smallest flavor
PROGRAMS = ("libvirtd", "qemu-system-x86_64", "qemu-img", "genisoimage", "ip", "nft", "dnsmasq")
OPERATIONS = ("create", "stop", "start", "reboot hard", "delete")
ACTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "stop": ({"os-stop": None}, "SHUTOFF"),
    "start": ({"os-start": None}, "ACTIVE"),
    "reboot hard": ({"reboot": {"type": "HARD"}}, "ACTIVE"),
}
_Timing = dict[str, list[float]]


async def libvirt_overhead() -> list[Row]:
    """Medians of both ways and their ratio. Raises Skipped where guests cannot be made."""
    check_host()
    # Guests that are stopped have not booted, and would not hear the power button.
    async with cloud("libvirt", environ={"INSTAR_LIFECYCLE_SHUTDOWN_GRACE_S": "0"}) as one:
        connection = one.connect()
        ours, bare = await _measured(one, connection)
        await connection.close()
    return [row for name in OPERATIONS for row in _rows(name, ours[name], bare[name])]


def check_host() -> None:
    """Raises Skipped where guests cannot be made."""
    if os.geteuid() != 0:
        raise Skipped("real guests need root")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise Skipped(f"not installed here: {', '.join(missing)}")


async def open_libvirt(one: Cloud) -> Any:
    """A connection to the libvirtd that the cloud has its guests on."""
    uri = SYSTEM_URI if await system_libvirtd_usable() else PrivateDaemon(one.directory).uri
    return await asyncio.to_thread(libvirt.open, uri)


def _rows(name: str, ours: list[float], bare: list[float]) -> list[Row]:
    """The ratio of the best is what is left when other work on the machine disturbs neither."""
    budget = 1.25 if name == "create" else None
    middle, bare_middle = statistics.median(ours), statistics.median(bare)
    return [
        Row(f"{name}: bare calls, median of {TURNS}", bare_middle * 1000, "ms"),
        Row(f"{name}: through the API, median of {TURNS}", middle * 1000, "ms"),
        Row(f"{name}: ratio of the medians", middle / bare_middle, "×", at_most=budget),
        Row(f"{name}: ratio of the best", min(ours) / min(bare), "×", at_most=budget),
    ]


async def _measured(one: Cloud, connection: Connection) -> tuple[_Timing, _Timing]:
    image, flavor = await image_and_flavor(connection)
    networks = (await connection.json("GET", "/network/v2.0/networks?name=private"))["networks"]
    refs = Refs(image, flavor, networks[0]["id"])
    ours: _Timing = {name: [] for name in OPERATIONS}
    bare: _Timing = {name: [] for name in OPERATIONS}
    # One that stays, stopped: the image is in the cache, and the network has its bridge, for both ways.
    keeper = (await build(connection, refs, "keeper", POLL_S)).id
    await _act(connection, keeper, "stop")
    to_libvirt = await open_libvirt(one)
    try:
        for turn in range(-WARM_UP, TURNS):
            for kind, timing in (("bare", await _bare(to_libvirt, keeper, one.directory)),
                                 ("ours", await _ours(connection, refs, turn))):  # fmt: skip
                for name, took in timing.items():
                    if turn >= 0:
                        (bare if kind == "bare" else ours)[name].append(took)
    finally:
        await asyncio.to_thread(to_libvirt.close)
    await _delete(connection, keeper)
    return ours, bare


async def _ours(connection: Connection, refs: Refs, turn: int) -> dict[str, float]:
    built = await build(connection, refs, f"ours-{turn}", POLL_S)
    took = {"create": built.active_s}
    for name in ("stop", "start", "reboot hard"):
        took[name] = await _act(connection, built.id, name)
    took["delete"] = await _delete(connection, built.id)
    return took


async def _bare(to_libvirt: Any, keeper: str, directory: Path) -> dict[str, float]:
    guest = await asyncio.to_thread(BareGuest, to_libvirt, keeper, directory)
    try:
        took = {"create": await _timed(lambda: guest.build(DISK_BYTES))}
        took["stop"] = await _timed(guest.stop)
        took["start"] = await _timed(guest.start)
        took["reboot hard"] = await _timed(guest.reboot)
        took["delete"] = await _timed(guest.delete)
    finally:
        await asyncio.to_thread(guest.delete)
    return took


async def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    await asyncio.to_thread(call)
    return time.perf_counter() - began


async def _act(connection: Connection, server_id: str, name: str) -> float:
    body, status = ACTIONS[name]
    began = time.perf_counter()
    await connection.json("POST", f"/compute/v2.1/servers/{server_id}/action", body, expect=202)
    await reach(connection, server_id, status, POLL_S)
    return time.perf_counter() - began


async def _delete(connection: Connection, server_id: str) -> float:
    began = time.perf_counter()
    await connection.json("DELETE", f"/compute/v2.1/servers/{server_id}", expect=204)
    await gone(connection, server_id, POLL_S)
    return time.perf_counter() - began
