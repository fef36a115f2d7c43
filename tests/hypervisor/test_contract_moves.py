"""The contract of a hypervisor for moves: disks set aside, taken to another host and back, and live migration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from instar.errors import HypervisorError, MigrationAborted, StreamBroken
from instar.lifecycle.whereabouts import Side, runs, side_of
from instar.model.guest import (
    DiskOffer,
    GuestDefinition,
    GuestState,
    LiveMigrationOptions,
    LiveTarget,
    WorkProgress,
)
from instar.model.states import PowerState
from tests.patience import PATIENCE_S

from .apart_daemon import ApartDaemon
from .harness import Harness
from .libvirt_two_hosts import LibvirtTwoHosts
from .test_contract import MIB, definition, running
from .two_hosts import SimulatedApart, SimulatedTwoHosts, TwoHosts

OPTIONS = LiveMigrationOptions()
IMPLEMENTATIONS = [pytest.param("libvirt", marks=pytest.mark.host), "simulated", "simulated apart"]


@pytest.fixture(params=IMPLEMENTATIONS)
def open_hosts(request: pytest.FixtureRequest) -> Callable[[Path], Coroutine[Any, Any, TwoHosts]]:
    if request.param == "libvirt":
        daemons: tuple[ApartDaemon, ApartDaemon] = request.getfixturevalue("two_daemons")
        return lambda directory: LibvirtTwoHosts.opened(daemons, directory)
    return SimulatedApart.opened if request.param == "simulated apart" else SimulatedTwoHosts.opened


@pytest.fixture
async def hosts(
    open_hosts: Callable[[Path], Coroutine[Any, Any, TwoHosts]], tmp_path: Path
) -> AsyncIterator[TwoHosts]:
    opened = await open_hosts(tmp_path)
    try:
        yield opened
    finally:
        await opened.close()


def nobody(_progress: WorkProgress) -> None:
    """Reports of a call that the test does not look at."""


async def off_after_one_boot(host: Harness, guest: GuestDefinition) -> None:
    """Its own root disk says that it has booted once."""
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)


async def boot(host: Harness, guest: GuestDefinition, *, boots: int) -> None:
    """Start it where its disks are, and see on the console how often they have been booted from."""
    if guest.ports:
        await host.hypervisor.ensure_ports(guest.instance_id, guest.ports)
    await host.hypervisor.ensure_running(guest)
    await host.wait_until_booted(guest.instance_id, boots=boots)
    console = await host.hypervisor.console_output(guest.instance_id, length_bytes=100_000)
    assert f"count={boots + 1}".encode() not in console
    assert f"boots={boots + 1}".encode() not in console


async def set_aside_and_offered(source: Harness, guest: GuestDefinition, to: Harness) -> DiskOffer:
    await source.hypervisor.ensure_set_aside(guest.instance_id)
    return await source.hypervisor.offer_disks(guest.instance_id, await to.hypervisor.stream_address())


async def moved(hosts: TwoHosts, guest: GuestDefinition) -> DiskOffer:
    """The disks are on the target, the ones of before are aside at the source."""
    offer = await set_aside_and_offered(hosts.source, guest, hosts.target)
    await hosts.target.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    return offer


# --- aside -----------------------------------------------------------------------------------------------------------


async def test_what_is_set_aside_has_no_domain_and_no_port_and_is_in_the_census(hosts: TwoHosts) -> None:
    guest = definition(hosts.source, ports=1)
    await off_after_one_boot(hosts.source, guest)
    for _ in range(2):
        await hosts.source.hypervisor.ensure_set_aside(guest.instance_id)
        census = await hosts.source.hypervisor.census()
        assert census.set_aside == (guest.instance_id,)
        assert (census.guests, census.instance_dirs, census.taps, census.networks) == ({}, (), (), ())


async def test_the_disks_of_a_running_guest_are_not_set_aside(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    state = await running(hosts.source, guest)
    with pytest.raises(HypervisorError):
        await hosts.source.hypervisor.ensure_set_aside(guest.instance_id)
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state
    assert (await hosts.source.hypervisor.census()).set_aside == ()


async def test_what_was_set_aside_is_brought_back_and_boots(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    await hosts.source.hypervisor.ensure_set_aside(guest.instance_id)
    for _ in range(2):
        await hosts.source.hypervisor.ensure_brought_back(guest.instance_id)
    assert (await hosts.source.hypervisor.census()).set_aside == ()
    await boot(hosts.source, guest, boots=2)


async def test_nothing_aside_is_brought_back_or_removed_without_complaint(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    for instance_id in (guest.instance_id, str(uuid4())):
        await hosts.source.hypervisor.ensure_brought_back(instance_id)
        await hosts.source.hypervisor.ensure_nothing_aside(instance_id)
    await boot(hosts.source, guest, boots=2)


async def test_absence_of_the_instance_leaves_what_is_set_aside(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    await hosts.source.hypervisor.ensure_set_aside(guest.instance_id)
    await hosts.source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    await hosts.source.hypervisor.ensure_brought_back(guest.instance_id)
    await boot(hosts.source, guest, boots=2)


async def test_disks_that_are_not_set_aside_are_not_offered(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    with pytest.raises(HypervisorError):
        await hosts.source.hypervisor.offer_disks(
            guest.instance_id, await hosts.target.hypervisor.stream_address()
        )


# --- to another host -------------------------------------------------------------------------------------------------


async def test_received_disks_have_on_them_what_the_guest_wrote(hosts: TwoHosts) -> None:
    guest = definition(hosts.source, ports=1)
    await off_after_one_boot(hosts.source, guest)
    told: list[WorkProgress] = []
    offer = await set_aside_and_offered(hosts.source, guest, hosts.target)
    assert [(disk.name, disk.virtual_size_bytes) for disk in offer.disks] == [("root", 4 * MIB)]
    await hosts.target.hypervisor.receive_disks(guest.instance_id, offer, told.append)
    assert (told[-1].instance_id, told[-1].percent) == (guest.instance_id, 100)
    await boot(hosts.target, guest, boots=2)
    await hosts.source.hypervisor.ensure_nothing_aside(guest.instance_id)
    left = await hosts.source.hypervisor.census()
    assert (left.guests, left.instance_dirs, left.set_aside) == ({}, (), ())
    assert (await hosts.target.hypervisor.observe(guest.instance_id)).power_state is PowerState.RUNNING


async def test_the_image_of_a_received_disk_is_in_the_cache(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    await moved(hosts, guest)
    here, there = [await host.hypervisor.census() for host in (hosts.source, hosts.target)]
    assert there.cached_images == here.cached_images


async def test_receiving_again_leaves_what_the_guest_has_written_since(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    offer = await moved(hosts, guest)
    await boot(hosts.target, guest, boots=2)
    await hosts.target.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await hosts.target.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    await boot(hosts.target, guest, boots=3)


async def test_a_received_disk_can_be_made_larger(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    await moved(hosts, guest)
    larger = msgspec.structs.replace(guest.disks[0], size_bytes=8 * MIB)
    for _ in range(2):
        await hosts.target.hypervisor.ensure_disk_size(guest.instance_id, larger)
    await boot(hosts.target, guest, boots=2)


async def test_going_back_finds_the_disks_as_they_were(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    await moved(hosts, guest)
    await boot(hosts.target, guest, boots=2)
    await hosts.target.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    await hosts.source.hypervisor.ensure_brought_back(guest.instance_id)
    await boot(hosts.source, guest, boots=2)


async def test_a_source_that_cannot_be_reached_breaks_the_stream_and_leaves_no_disk(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    offer = await set_aside_and_offered(hosts.source, guest, hosts.target)
    await hosts.cut()
    with pytest.raises(StreamBroken) as caught:
        await hosts.target.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    assert "/" not in caught.value.message
    await hosts.mend()
    await hosts.target.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    await boot(hosts.target, guest, boots=2)


# --- on the same host ------------------------------------------------------------------------------------------------


async def test_on_the_same_host_the_disks_are_used_and_can_be_put_back(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    offer = await set_aside_and_offered(hosts.source, guest, hosts.source)
    await hosts.source.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    await boot(hosts.source, guest, boots=2)
    await hosts.source.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    census = await hosts.source.hypervisor.census()
    assert (census.instance_dirs, census.set_aside) == ((guest.instance_id,), (guest.instance_id,))
    await hosts.source.hypervisor.ensure_brought_back(guest.instance_id)
    await boot(hosts.source, guest, boots=2)


async def test_on_the_same_host_nothing_aside_keeps_the_disks(hosts: TwoHosts) -> None:
    guest = definition(hosts.source)
    await off_after_one_boot(hosts.source, guest)
    offer = await set_aside_and_offered(hosts.source, guest, hosts.source)
    await hosts.source.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    await hosts.source.hypervisor.ensure_set_aside(guest.instance_id)  # a repeat does not put the new disks aside
    await boot(hosts.source, guest, boots=2)
    for _ in range(2):
        await hosts.source.hypervisor.ensure_nothing_aside(guest.instance_id)
    await hosts.source.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await boot(hosts.source, guest, boots=3)


# --- while it runs ---------------------------------------------------------------------------------------------------


async def ready(hosts: TwoHosts, guest: GuestDefinition) -> LiveTarget:
    to = await hosts.target.hypervisor.stream_address()
    offer = await hosts.source.hypervisor.offer_live(guest.instance_id, to)
    return await hosts.target.hypervisor.ensure_ready_for_live(guest, offer)


async def running_and_ready(hosts: TwoHosts, *, ports: int = 0) -> tuple[GuestDefinition, GuestState, LiveTarget]:
    guest = definition(hosts.source, ports=ports)
    state = await running(hosts.source, guest)
    await hosts.source.wait_until_booted(guest.instance_id, boots=1)
    return guest, state, await ready(hosts, guest)


async def test_a_live_migration_keeps_the_guests_memory(hosts: TwoHosts) -> None:
    guest, _state, target = await running_and_ready(hosts, ports=1)
    mark = await hosts.boot_mark(hosts.source, guest.instance_id)
    told: list[WorkProgress] = []
    await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, told.append)
    assert not (await hosts.source.hypervisor.observe(guest.instance_id)).exists
    assert (await hosts.target.hypervisor.observe(guest.instance_id)).power_state is PowerState.RUNNING
    assert await side(hosts, guest) is Side.DEST
    assert await hosts.boot_mark(hosts.target, guest.instance_id) == mark
    assert await hosts.target.nic_count(guest.instance_id) == 1
    percents = [progress.percent for progress in told]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert told[-1].migration is not None
    await hosts.source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    left = await hosts.source.hypervisor.census()
    assert (left.guests, left.instance_dirs, left.taps, left.networks) == ({}, (), (), ())
    assert await hosts.boot_mark(hosts.target, guest.instance_id) == mark


async def test_a_guest_that_was_migrated_boots_from_its_disks_there(hosts: TwoHosts) -> None:
    guest, _state, target = await running_and_ready(hosts)
    await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, nobody)
    await hosts.source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    await hosts.target.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await boot(hosts.target, guest, boots=2)


async def test_a_guest_that_was_migrated_is_not_migrated_again(hosts: TwoHosts) -> None:
    guest, _state, target = await running_and_ready(hosts)
    await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, nobody)
    there = await hosts.target.hypervisor.observe(guest.instance_id)
    await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, nobody)
    assert await hosts.target.hypervisor.observe(guest.instance_id) == there


async def test_making_ready_twice_changes_nothing(hosts: TwoHosts) -> None:
    guest, _state, target = await running_and_ready(hosts, ports=1)
    census = await hosts.target.hypervisor.census()
    await ready(hosts, guest)
    assert await hosts.target.hypervisor.census() == census
    await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, nobody)


async def test_a_paused_guest_is_migrated_and_stays_paused(hosts: TwoHosts) -> None:
    guest, _state, target = await running_and_ready(hosts)
    mark = await hosts.boot_mark(hosts.source, guest.instance_id)
    await hosts.source.pause_guest(guest.instance_id)
    await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, nobody)
    assert (await hosts.target.hypervisor.observe(guest.instance_id)).power_state is PowerState.PAUSED
    assert (await hosts.target.hypervisor.ensure_running(guest)).power_state is PowerState.RUNNING
    assert await hosts.boot_mark(hosts.target, guest.instance_id) == mark


async def side(hosts: TwoHosts, guest: GuestDefinition) -> Side | None:
    """Where the guest is, as whoever has lost sight of its migration finds out."""
    states = [await host.hypervisor.observe(guest.instance_id) for host in (hosts.source, hosts.target)]
    return side_of(*states, was_paused=False)


async def migrating(hosts: TwoHosts, guest: GuestDefinition, target: LiveTarget) -> asyncio.Task[None]:
    """A live migration that has begun and is far from its end."""
    await hosts.slow_down()
    begun = asyncio.Event()
    task = asyncio.ensure_future(
        hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, lambda _progress: begun.set())
    )
    async with asyncio.timeout(PATIENCE_S):
        await begun.wait()
    return task


async def test_an_aborted_migration_leaves_the_guest_at_the_source(hosts: TwoHosts) -> None:
    guest, state, target = await running_and_ready(hosts, ports=1)
    task = await migrating(hosts, guest, target)
    assert await side(hosts, guest) is Side.SOURCE
    assert not runs(await hosts.target.hypervisor.observe(guest.instance_id))
    await hosts.source.hypervisor.abort_live(guest.instance_id)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(MigrationAborted):
            await task
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state
    assert await side(hosts, guest) is Side.SOURCE
    await hosts.target.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    left = await hosts.target.hypervisor.census()
    assert (left.guests, left.instance_dirs, left.taps, left.networks) == ({}, (), (), ())


async def test_a_forced_migration_ends_with_the_guest_at_the_target(hosts: TwoHosts) -> None:
    guest, _state, target = await running_and_ready(hosts)
    mark = await hosts.boot_mark(hosts.source, guest.instance_id)
    task = await migrating(hosts, guest, target)
    await hosts.source.hypervisor.force_live(guest.instance_id)
    async with asyncio.timeout(PATIENCE_S):
        await task
    assert (await hosts.target.hypervisor.observe(guest.instance_id)).power_state is PowerState.RUNNING
    assert await hosts.boot_mark(hosts.target, guest.instance_id) == mark


async def test_a_cancelled_migration_leaves_the_guest_at_the_source_and_can_be_tried_again(hosts: TwoHosts) -> None:
    guest, state, target = await running_and_ready(hosts)
    task = await migrating(hosts, guest, target)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state
    await hosts.mend()
    await hosts.source.hypervisor.migrate_live(guest, await ready(hosts, guest), OPTIONS, nobody)
    assert (await hosts.target.hypervisor.observe(guest.instance_id)).power_state is PowerState.RUNNING


async def test_a_target_that_goes_away_leaves_the_guest_at_the_source(hosts: TwoHosts) -> None:
    guest, state, target = await running_and_ready(hosts)
    task = await migrating(hosts, guest, target)
    await hosts.target.daemon_away()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(HypervisorError):
            await task
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state
    await hosts.target.daemon_back()


async def test_a_target_where_the_ports_are_missing_leaves_the_guest_at_the_source(hosts: TwoHosts) -> None:
    guest, state, target = await running_and_ready(hosts, ports=1)
    await hosts.target.hypervisor.ensure_no_ports(guest.instance_id)
    with pytest.raises(HypervisorError):
        await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, nobody)
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state


async def test_a_guest_that_is_off_is_not_migrated_live(hosts: TwoHosts) -> None:
    guest, _state, target = await running_and_ready(hosts)
    await hosts.source.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    with pytest.raises(HypervisorError):
        await hosts.source.hypervisor.offer_live(guest.instance_id, target.address)
    with pytest.raises(HypervisorError):
        await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, nobody)


async def test_abort_and_force_without_a_migration_do_nothing(hosts: TwoHosts) -> None:
    guest, state, _target = await running_and_ready(hosts)
    await hosts.source.hypervisor.abort_live(guest.instance_id)
    await hosts.source.hypervisor.force_live(guest.instance_id)
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state
