"""The whole life of real guests, each operation through the API against the bare libvirt and qemu-img work that does the
same, in turns on one libvirtd. The disk has DATA_MIB of random data, so that what moves data has something to move."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.bare_life import BareLife, wait_for_boots
from bench.device_acts import device_trips, new_volume
from bench.http_client import Connection
from bench.libvirt_overhead import check_host, open_libvirt
from bench.process import Cloud, cloud
from bench.refs import Refs, build
from bench.server_acts import MICROVERSION, Act, act, delete, remove_snapshots
from bench.table import Sheet
from tests.hypervisor.tiny_guest import write_image

TURNS = int(os.environ.get("INSTAR_BENCH_TURNS", "5"))
POLL_S = 0.002
DATA_MIB = 256
BUDGET = 1.25
OVER_MAX_S = 0.060  # of what is shorter than a guest's start: docs/decisions/0020-the-measure-of-short-operations.md
LOOK_AFTER = 0.6  # of the bare work's time: the API is not asked before whether it is done


class Deed(NamedTuple):
    """An operation, the bare work that it is held against, and how many boots the console tells of before it begins:
    of our guest it may be another number, as a revert brings back the log of before the resize. Nothing is done for
    `rest_s` before it."""

    act: Act
    name: str
    bare: str
    bare_work: Callable[[BareLife], None]
    boots: int
    our_boots: int | None = None
    copies: bool = False
    rest_s: float = 0.0


def _deeds(image: str, larger: str) -> list[Deed]:
    """In the order in which they are done."""
    return [
        Deed(Act("pause", {"pause": None}, "PAUSED"), "pause", "suspend", BareLife.pause, 1),
        Deed(Act("unpause", {"unpause": None}, "ACTIVE"), "unpause", "resume", BareLife.unpause, 1),
        Deed(Act("suspend", {"suspend": None}, "SUSPENDED"), "suspend", "managedSave", BareLife.suspend, 1),
        Deed(Act("resume", {"resume": None}, "ACTIVE"), "resume", "create", BareLife.resume, 1),
        Deed(Act("createImage", {"createImage": {"name": "running"}}, "ACTIVE"), "createImage, running",
             "backupBegin", BareLife.copy_running, 1, copies=True),
        Deed(Act("stop", {"os-stop": None}, "SHUTOFF"), "stop", "shutdown", BareLife.shut_down, 1),
        Deed(Act("createImage", {"createImage": {"name": "stopped"}}, "SHUTOFF"), "createImage, stopped",
             "convert", BareLife.convert, 1, copies=True),
        Deed(Act("start", {"os-start": None}, "ACTIVE"), "start", "create", BareLife.start, 1),
        Deed(Act("reboot soft", {"reboot": {"type": "SOFT"}}, "ACTIVE"), "reboot soft",
             "shutdown, create", BareLife.reboot_soft, 2),
        Deed(Act("reboot hard", {"reboot": {"type": "HARD"}}, "ACTIVE"), "reboot hard",
             "destroy, undefine, define, create", BareLife.reboot, 3),
        Deed(Act("rescue", {"rescue": {}}, "RESCUE", 200), "rescue",
             "shutdown, overlay, define, create", BareLife.rescue, 4),
        Deed(Act("unrescue", {"unrescue": None}, "ACTIVE"), "unrescue",
             "shutdown, define, create", BareLife.unrescue, 5),
        Deed(Act("resize", {"resize": {"flavorRef": larger}}, "VERIFY_RESIZE"), "resize, same host",
             "shutdown, define, create", BareLife.resize, 6),
        Deed(Act("revert", {"revertResize": None}, "ACTIVE"), "revert resize",
             "destroy, define, create", BareLife.revert, 7),
        Deed(Act("rebuild", {"rebuild": {"imageRef": image}}, "ACTIVE"), "rebuild",
             "destroy, overlay, define, create", BareLife.rebuild, 8, 7),
        Deed(Act("shelve", {"shelve": None}, "SHELVED_OFFLOADED"), "shelve, with offload",
             "shutdown, convert", BareLife.shelve, 9, 8, copies=True),
        Deed(Act("unshelve", {"unshelve": None}, "ACTIVE"), "unshelve",
             "convert, overlay, define, create", BareLife.unshelve, 0),
        # Nobody has read the image when it is wanted again at once; here somebody has, a second later.
        Deed(Act("shelve", {"shelve": None}, "SHELVED_OFFLOADED"), "shelve again",
             "shutdown, convert", BareLife.shelve, 10, 1, copies=True),
        Deed(Act("unshelve", {"unshelve": None}, "ACTIVE"), "unshelve, later",
             "convert, overlay, define, create", BareLife.unshelve, 0, rest_s=1.0),
    ]  # fmt: skip


# Beside the deeds. Devices come and go after the deed DEVICES_AFTER, when the guest has booted DEVICES_BOOTS times.
OTHERS = (
    ("create", "overlay, drive, define, create"),
    ("attach volume", "attachDevice"),
    ("detach volume", "detachDevice"),
    ("attach interface", "attachDevice"),
    ("detach interface", "detachDevice"),
    ("delete", "destroy, undefine, remove"),
)
DEVICES_AFTER, DEVICES_BOOTS = "start", 2
SYNCED, SERVED = ", sync", ", served"


class Times(NamedTuple):
    """Seconds, by the name of the operation; and what the shelves wrote for each byte of the image."""

    ours: dict[str, list[float]]
    bare: dict[str, list[float]]
    written: list[float]


async def libvirt_life() -> Sheet:
    """Medians over TURNS guests. Raises Skipped where guests cannot be made."""
    check_host()
    times = Times({}, {}, [])
    async with cloud("libvirt") as one:
        connection = one.connect(microversion=MICROVERSION)
        image = await upload(one, connection)
        flavors = sorted((await connection.json("GET", "/compute/v2.1/flavors/detail"))["flavors"], key=lambda f: f["ram"])
        networks = (await connection.json("GET", "/network/v2.0/networks?name=private"))["networks"]
        refs = Refs(image, flavors[0]["id"], networks[0]["id"])
        deeds = _deeds(image, flavors[1]["id"])
        await _measure(one, connection, refs, deeds, times, await new_volume(connection, POLL_S))
        await connection.close()
    rows = []
    for deed in deeds:
        rows.append(_row(deed.name, deed.bare, times))
        if deed.copies:
            rows.append(_row(deed.name, deed.bare + SYNCED, times, deed.name + SYNCED))
    for name, bare in OTHERS:
        rows.append(_row(name, bare, times))
        if name.endswith("volume"):
            rows.append(_row(name, bare + SERVED, times, name + SERVED))
    written = f"{statistics.median(times.written):.3f} bytes were written to storage for each byte of a shelved image"
    how = "(write_bytes of the process and of the programs that it ran, over the size of the image's file)"
    measure = f"≤ {BUDGET}, or + {OVER_MAX_S * 1000:.0f} ms"
    columns = (f"{DATA_MIB} MiB of data, {TURNS} guests", "bare work", "bare", "API", "ratio", "best", measure)
    return Sheet(columns, rows, (written, how))


def _row(name: str, work: str, times: Times, bare_name: str | None = None) -> tuple[str, ...]:
    """The ratio of the best is what is left when other work on the machine disturbs neither."""
    all_ours, all_bare = times.ours[name], times.bare[bare_name or name]
    ours, bare = statistics.median(all_ours), statistics.median(all_bare)
    ratio, best = ours / bare, min(all_ours) / min(all_bare)
    over_s = ours - bare
    holds = "holds" if ratio <= BUDGET else f"+ {over_s * 1000:.0f} ms" if over_s <= OVER_MAX_S else "MISSED"
    return (name, work, f"{bare * 1000:,.0f} ms", f"{ours * 1000:,.0f} ms", f"{ratio:.2f}", f"{best:.2f}", holds)


async def _measure(
    one: Cloud, connection: Connection, refs: Refs, deeds: list[Deed], times: Times, volume: str
) -> None:
    # One that stays, stopped: the image is in the cache, and the network has its bridge, for both ways.
    keeper = (await build(connection, refs, "keeper", POLL_S)).id
    await asyncio.to_thread(wait_for_boots, _console(one, keeper), 1)
    await act(connection, keeper, Act("stop", {"os-stop": None}, "SHUTOFF"), POLL_S)
    base = next(path for path in (one.directory / "cache").iterdir() if len(path.name) == 64)
    to_libvirt = await open_libvirt(one)
    try:
        for turn in range(TURNS):
            guest = await asyncio.to_thread(BareLife, to_libvirt, keeper, one.directory, base)
            await asyncio.to_thread(_bare_life, guest, deeds, times.bare)
            await _our_life(one, connection, refs._replace(volume=volume), deeds, times, turn)
            # Guests' disks are the same each time: their shelved images must not be found in the cache.
            await asyncio.to_thread(_empty_cache, base)
    finally:
        await asyncio.to_thread(to_libvirt.close)
    await delete(connection, keeper, POLL_S)


def _empty_cache(base: Path) -> None:
    for path in base.parent.iterdir():
        if len(path.name) == len(base.name) and path != base:
            path.unlink()


def _bare_life(guest: BareLife, deeds: list[Deed], times: dict[str, list[float]]) -> None:
    def timed(name: str, work: Callable[[BareLife], None], before_s: float = 0.0) -> float:
        began = time.perf_counter()
        work(guest)
        took_s = before_s + time.perf_counter() - began
        times.setdefault(name, []).append(took_s)
        return took_s

    try:
        timed("create", BareLife.create)
        for deed in deeds:
            if deed.boots:
                guest.wait_booted(deed.boots)
            if deed.act.name != "unshelve":
                guest.forget_copy()
            time.sleep(deed.rest_s)
            took_s = timed(deed.name, deed.bare_work)
            if deed.copies:
                timed(deed.name + SYNCED, BareLife.sync_copy, took_s)
            if deed.name == DEVICES_AFTER:
                guest.wait_booted(DEVICES_BOOTS)
                guest.make_volume()
                timed("attach volume", BareLife.attach_volume)
                timed("detach volume", BareLife.detach_volume)
                timed("attach volume" + SERVED, BareLife.attach_served_volume)
                timed("detach volume" + SERVED, BareLife.detach_served_volume)
                timed("attach interface", BareLife.attach_interface)
                timed("detach interface", BareLife.detach_interface)
        timed("delete", BareLife.delete)
    finally:
        guest.delete()


async def _our_life(
    one: Cloud, connection: Connection, refs: Refs, deeds: list[Deed], times: Times, turn: int
) -> None:
    built = await build(connection, refs, f"life-{turn}", POLL_S)
    server = built.id
    times.ours.setdefault("create", []).append(built.active_s)
    for deed in deeds:
        boots = deed.boots if deed.our_boots is None else deed.our_boots
        if boots:
            await asyncio.to_thread(wait_for_boots, _console(one, server), boots)
        await asyncio.sleep(deed.rest_s)
        written = one.written_bytes
        took = await act(connection, server, deed.act, POLL_S, look_after_s=_look_after_s(times, deed.name))
        times.ours.setdefault(deed.name, []).append(took.settled_s)
        if deed.act.name == "shelve":
            times.written.append((one.written_bytes - written) / await _shelved_bytes(connection, server))
        if deed.act.name == "createImage":
            await remove_snapshots(connection, server)
        if deed.name == DEVICES_AFTER:
            await asyncio.to_thread(wait_for_boots, _console(one, server), DEVICES_BOOTS)
            for name, each in await device_trips(
                connection, refs, server, refs.volume, POLL_S, lambda trip: _look_after_s(times, trip)
            ):
                times.ours.setdefault(name, []).append(each.settled_s)
    took = await delete(connection, server, POLL_S, look_after_s=_look_after_s(times, "delete"))
    times.ours.setdefault("delete", []).append(took.settled_s)


def _look_after_s(times: Times, name: str) -> float:
    """A client that asks every two milliseconds keeps half a processor busy, which the bare work has for itself: it begins
    when the work may be nearly done, by what the bare work took a moment ago. What is done sooner counts as done then."""
    return LOOK_AFTER * times.bare[name][-1]


async def _shelved_bytes(connection: Connection, server_id: str) -> int:
    (image,) = (await connection.json("GET", f"/image/v2/images?instance_uuid={server_id}"))["images"]
    size: int = image["size"]
    return size


def _console(one: Cloud, server_id: str) -> Path:
    return one.directory / "instances" / server_id / "console.log"


async def upload(one: Cloud, connection: Connection) -> str:
    """The id of an image of the tiny guest, with DATA_MIB of random data behind it."""
    body: dict[str, Any] = {"name": "loaded", "disk_format": "qcow2", "container_format": "bare"}
    image_id: str = (await connection.json("POST", "/image/v2/images", body, expect=201))["id"]
    with tempfile.TemporaryDirectory(prefix="instar-bench-", dir=one.directory) as directory:
        path = await asyncio.to_thread(_make_image, Path(directory))
        data = await asyncio.to_thread(path.read_bytes)
    await connection.json("PUT", f"/image/v2/images/{image_id}/file", data, expect=204)
    return image_id


def _make_image(directory: Path) -> Path:
    raw, image = directory / "raw", directory / "image.qcow2"
    write_image(raw)
    with raw.open("ab") as file:
        for _ in range(DATA_MIB):
            file.write(os.urandom(1 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)], check=True, timeout=60)
    return image
