"""Moves of real guests between two hosts that this machine plays, each with agents, libvirtds and namespaces of their own.

What is printed beside the whole time is how long the hosts were at work for it: shutting down, sending and receiving disks
and memory, starting, as the journal has it of each step. The rest is the control plane. There is no bare work to hold it
against: what libvirt and QEMU move between hosts goes through streams of agents, encrypted, where no ssh is."""

from __future__ import annotations

import asyncio
import os
import statistics
from typing import Any, NamedTuple

from bench.bare_life import wait_for_boots
from bench.http_client import Connection
from bench.libvirt_life import DATA_MIB, POLL_S, upload
from bench.libvirt_overhead import check_host
from bench.process import Cloud, cloud
from bench.refs import Refs, build
from bench.server_acts import MICROVERSION, Act, Took, act, delete
from bench.table import Sheet, Skipped
from instar.cli.hosts.local_host import check_machine
from instar.errors import StartupError

TURNS = int(os.environ.get("INSTAR_BENCH_TURNS", "5"))
HOSTS = ("host-1", "host-2")
COMPUTE = "/compute/v2.1"


class Moved(NamedTuple):
    """Seconds: all of it, and what of it was the hosts' work."""

    settled_s: float
    hosts_s: float


async def libvirt_moves() -> Sheet:
    """Medians over TURNS guests. Raises Skipped where guests or hosts cannot be made."""
    check_host()
    try:
        check_machine()
    except StartupError as error:
        raise Skipped(error.message) from None
    times: dict[str, list[Moved]] = {}
    async with cloud("libvirt", hosts=len(HOSTS)) as one:
        connection = one.connect(microversion=MICROVERSION)
        image = await upload(one, connection)
        flavors = sorted((await connection.json("GET", f"{COMPUTE}/flavors/detail"))["flavors"], key=lambda f: f["ram"])
        networks = (await connection.json("GET", "/network/v2.0/networks?name=private"))["networks"]
        refs = Refs(image, flavors[0]["id"], networks[0]["id"])
        # Ones that stay: both hosts have the image and the network.
        keepers = [(await build(connection, refs._replace(host=host), f"keeper-{host}", POLL_S)).id for host in HOSTS]
        for turn in range(TURNS):
            await _life(one, connection, refs, times, turn)
        for keeper in keepers:
            await delete(connection, keeper, POLL_S)
        await connection.close()
    rows = [_row(name, moved) for name, moved in times.items()]
    columns = (f"{DATA_MIB} MiB below the disk, {TURNS} guests", "settled", "hosts at work", "control plane", "ratio")
    return Sheet(columns, rows)


def _row(name: str, moved: list[Moved]) -> tuple[str, ...]:
    settled = statistics.median(one.settled_s for one in moved)
    hosts = statistics.median(one.hosts_s for one in moved)
    rest = statistics.median(one.settled_s - one.hosts_s for one in moved)
    ratio = statistics.median(one.settled_s / one.hosts_s for one in moved)
    return (name, *(f"{each * 1000:,.0f} ms" for each in (settled, hosts, rest)), f"{ratio:.2f}")


async def _life(one: Cloud, connection: Connection, refs: Refs, times: dict[str, list[Moved]], turn: int) -> None:
    server = (await build(connection, refs._replace(host=HOSTS[0]), f"moved-{turn}", POLL_S)).id

    async def do(name: str, deed: Act) -> None:
        took = await act(connection, server, deed, POLL_S)
        times.setdefault(name, []).append(await _moved(connection, server, took))

    migrate = Act("migrate", {"migrate": None}, "VERIFY_RESIZE")
    await _booted(one, connection, server, 1)
    await do("migrate", migrate)
    await _booted(one, connection, server, 2)
    await do("confirm", Act("confirm", {"confirmResize": None}, "ACTIVE", 204))
    await do("migrate", migrate)
    await do("revert", Act("revert", {"revertResize": None}, "ACTIVE"))
    await _booted(one, connection, server, 3)
    live = {"os-migrateLive": {"host": None, "block_migration": "auto"}}
    await do("live migrate", Act("live migrate", live, "ACTIVE"))
    await _evacuate(connection, server, times)
    await delete(connection, server, POLL_S)


async def _evacuate(connection: Connection, server: str, times: dict[str, list[Moved]]) -> None:
    """The host is declared down for it, and up again afterwards."""
    host = await _host(connection, server)
    services = (await connection.json("GET", f"{COMPUTE}/os-services?host={host}&binary=nova-compute"))["services"]
    path = f"{COMPUTE}/os-services/{services[0]['id']}"
    await connection.json("PUT", path, {"forced_down": True})
    try:
        took = await act(connection, server, Act("evacuate", {"evacuate": {}}, "ACTIVE", 200), POLL_S)
    finally:
        await connection.json("PUT", path, {"forced_down": False})
    times.setdefault("evacuate", []).append(await _moved(connection, server, took))


async def _moved(connection: Connection, server: str, took: Took) -> Moved:
    operations: list[dict[str, Any]]
    operations = (await connection.json("GET", f"/instar/v1/servers/{server}/operations"))["operations"]
    return Moved(took.settled_s, sum(step["hypervisor_us"] for step in operations[0]["steps"]) / 1e6)


async def _host(connection: Connection, server: str) -> str:
    host: str = (await connection.json("GET", f"{COMPUTE}/servers/{server}"))["server"]["OS-EXT-SRV-ATTR:host"]
    return host


async def _booted(one: Cloud, connection: Connection, server: str, times: int) -> None:
    """It hears the power button. What it said on other hosts went with its disk."""
    console = one.directory / "hosts" / await _host(connection, server) / "instances" / server / "console.log"
    await asyncio.to_thread(wait_for_boots, console, times)
