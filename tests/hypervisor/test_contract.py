"""The contract of a hypervisor (src/instar/hypervisor/contract.py), as one suite for every implementation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from uuid import uuid4

import msgspec
import pytest

from instar.errors import HypervisorError, HypervisorUnavailable
from instar.model.guest import ConfigDrive, DiskDefinition, GuestDefinition, GuestState
from instar.model.network import FixedIp, PortDefinition
from instar.model.states import PowerState
from tests.patience import PATIENCE_S, patience

from .harness import Harness

WAIT_S = 60.0  # a deadline, not a duration: everything here takes well under two seconds on an idle machine
MIB = 1 << 20


def definition(
    host: Harness, *, heeds_power_button: bool = True, ports: int = 0, config_drive: bool = False
) -> GuestDefinition:
    image = host.image(heeds_power_button=heeds_power_button)
    instance_id = str(uuid4())
    return GuestDefinition(
        instance_id=instance_id,
        name=f"instance-{instance_id[:8]}",
        vcpus=1,
        memory_mib=32,
        disks=(DiskDefinition(name="root", size_bytes=4 * MIB, image=image),),
        ports=tuple(port(host, index) for index in range(ports)),
        config_drive=ConfigDrive(meta_data="{}", network_data="{}") if config_drive else None,
        display_name="näme <&> \x01",
    )


def port(host: Harness, index: int) -> PortDefinition:
    network = host.network()
    address = FixedIp(subnet_id=network.subnets[0].id, ip_address=f"10.213.77.{index + 10}", prefix_length=24)
    return PortDefinition(
        id=str(uuid4()), network=network, mac_address=f"fa:16:3e:00:00:{index + 1:02x}", fixed_ips=(address,)
    )


async def provide(host: Harness, guest: GuestDefinition) -> None:
    """Everything that must be there before the guest can run."""
    for disk in guest.disks:
        if disk.image is not None:
            await host.hypervisor.ensure_image(disk.image)
        await host.hypervisor.ensure_disk(guest.instance_id, disk)
    if guest.ports:
        await host.hypervisor.ensure_ports(guest.instance_id, guest.ports)


async def running(host: Harness, guest: GuestDefinition) -> GuestState:
    await provide(host, guest)
    return await host.hypervisor.ensure_running(guest)


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


# --- running ---------------------------------------------------------------------------------------------------------


async def test_a_guest_that_was_never_defined_does_not_exist(host: Harness) -> None:
    assert await host.hypervisor.observe(str(uuid4())) == GuestState(exists=False)


async def test_ensure_running_returns_when_the_guest_runs(host: Harness) -> None:
    guest = definition(host)
    state = await running(host, guest)
    assert state.exists
    assert state.power_state == PowerState.RUNNING
    assert state.domain_id is not None
    assert await host.hypervisor.observe(guest.instance_id) == state


async def test_ensure_running_of_a_running_guest_changes_nothing(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    assert await host.hypervisor.ensure_running(guest) == first


async def test_ensure_running_resumes_a_paused_guest_without_starting_it_again(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    await host.pause_guest(guest.instance_id)
    assert (await host.hypervisor.observe(guest.instance_id)).power_state == PowerState.PAUSED
    assert await host.hypervisor.ensure_running(guest) == first


async def test_ensure_running_without_its_disk_fails_and_starts_nothing(host: Harness) -> None:
    guest = definition(host)
    with pytest.raises(HypervisorError) as caught:
        await host.hypervisor.ensure_running(guest)
    assert "/" not in caught.value.message
    assert (await host.hypervisor.observe(guest.instance_id)).domain_id is None


async def test_every_start_has_another_domain_id(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    second = await host.hypervisor.ensure_running(guest)
    assert second.domain_id != first.domain_id


async def test_two_guests_start_at_the_same_time(host: Harness) -> None:
    guests = [definition(host), definition(host)]
    states = await asyncio.gather(*(running(host, guest) for guest in guests))
    assert len({state.domain_id for state in states}) == 2


# --- stopping --------------------------------------------------------------------------------------------------------


async def test_ensure_stopped_presses_the_power_button_and_the_guest_ends_by_itself(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    started = time.monotonic()
    state = await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=WAIT_S)
    assert state == GuestState(exists=True, power_state=PowerState.SHUTDOWN)
    assert time.monotonic() - started < WAIT_S / 2


async def test_ensure_stopped_destroys_a_deaf_guest_after_the_grace_time(host: Harness) -> None:
    guest = definition(host, heeds_power_button=False)
    await running(host, guest)
    started = time.monotonic()
    state = await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0.5)
    assert time.monotonic() - started >= 0.5
    assert state == GuestState(exists=True, power_state=PowerState.SHUTDOWN)


async def test_ensure_stopped_without_grace_destroys_at_once_and_may_be_repeated(host: Harness) -> None:
    guest = definition(host, heeds_power_button=False)
    await running(host, guest)
    for _ in range(2):
        state = await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
        assert state == GuestState(exists=True, power_state=PowerState.SHUTDOWN)


async def test_ensure_stopped_stops_a_paused_guest(host: Harness) -> None:
    guest = definition(host, heeds_power_button=False)
    await running(host, guest)
    await host.pause_guest(guest.instance_id)
    state = await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0.2)
    assert state.domain_id is None


async def test_ensure_stopped_of_an_unknown_guest_is_success(host: Harness) -> None:
    assert await host.hypervisor.ensure_stopped(str(uuid4()), grace_s=0) == GuestState(exists=False)


# --- rebooting -------------------------------------------------------------------------------------------------------


async def test_soft_reboot_waits_until_the_guest_has_shut_down(host: Harness) -> None:
    guest = definition(host)
    state = await running(host, guest)
    assert state.domain_id is not None
    await host.wait_until_booted(guest.instance_id, boots=1)
    result = await host.hypervisor.await_soft_reboot(
        guest.instance_id, was_domain_id=state.domain_id, wait_s=WAIT_S
    )
    assert result.outcome == "shut_down"
    assert result.state.power_state == PowerState.SHUTDOWN
    again = await host.hypervisor.ensure_running(guest)
    await host.wait_until_booted(guest.instance_id, boots=2)
    assert again.domain_id != state.domain_id


async def test_soft_reboot_of_a_deaf_guest_times_out_and_leaves_it_running(host: Harness) -> None:
    guest = definition(host, heeds_power_button=False)
    state = await running(host, guest)
    assert state.domain_id is not None
    result = await host.hypervisor.await_soft_reboot(guest.instance_id, was_domain_id=state.domain_id, wait_s=0.3)
    assert result.outcome == "timed_out"
    assert result.state == state


async def test_soft_reboot_does_not_press_a_guest_that_runs_under_another_id(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    assert first.domain_id is not None
    second = await host.hypervisor.ensure_restarted(guest, was_domain_id=first.domain_id)
    await host.wait_until_booted(guest.instance_id, boots=1)
    result = await host.hypervisor.await_soft_reboot(
        guest.instance_id, was_domain_id=first.domain_id, wait_s=WAIT_S
    )
    assert result.outcome == "restarted"
    assert result.state == second
    assert await host.hypervisor.observe(guest.instance_id) == second


async def test_soft_reboot_of_a_guest_that_is_down_says_so_at_once(host: Harness) -> None:
    guest = definition(host)
    state = await running(host, guest)
    assert state.domain_id is not None
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    result = await host.hypervisor.await_soft_reboot(guest.instance_id, was_domain_id=state.domain_id, wait_s=0)
    assert result.outcome == "shut_down"


async def test_ensure_restarted_gives_a_running_guest_another_id_and_keeps_its_disk(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    second = await host.hypervisor.ensure_restarted(guest, was_domain_id=first.domain_id)
    assert second.power_state == PowerState.RUNNING
    assert second.domain_id not in (None, first.domain_id)
    await host.wait_until_booted(guest.instance_id, boots=2)


async def test_ensure_restarted_leaves_a_guest_alone_that_already_has_another_id(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    second = await host.hypervisor.ensure_restarted(guest, was_domain_id=first.domain_id)
    assert await host.hypervisor.ensure_restarted(guest, was_domain_id=first.domain_id) == second
    assert await host.hypervisor.ensure_restarted(guest, was_domain_id=None) == second


async def test_ensure_restarted_starts_a_stopped_guest(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    state = await host.hypervisor.ensure_restarted(guest, was_domain_id=None)
    assert state.power_state == PowerState.RUNNING


async def test_ensure_restarted_brings_back_a_guest_whose_process_was_killed(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await host.kill_guest(guest.instance_id)
    state = await host.hypervisor.ensure_restarted(guest, was_domain_id=first.domain_id)
    assert state.power_state == PowerState.RUNNING
    await host.wait_until_booted(guest.instance_id, boots=2)


async def test_ensure_restarted_brings_back_a_lost_domain_with_its_disk(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await host.lose_domain(guest.instance_id)
    assert await host.hypervisor.observe(guest.instance_id) == GuestState(exists=False)
    state = await host.hypervisor.ensure_restarted(guest, was_domain_id=first.domain_id)
    assert state.power_state == PowerState.RUNNING
    await host.wait_until_booted(guest.instance_id, boots=2)


async def test_ensure_restarted_brings_back_network_devices_and_config_drive(host: Harness) -> None:
    guest = definition(host, ports=1, config_drive=True)
    first = await running(host, guest)
    assert await host.nic_count(guest.instance_id) == 1
    await host.detach_nics(guest.instance_id)
    await host.lose_config_drive(guest.instance_id)
    assert await host.nic_count(guest.instance_id) == 0
    await host.hypervisor.ensure_restarted(guest, was_domain_id=first.domain_id)
    assert await host.nic_count(guest.instance_id) == 1


async def test_ensure_restarted_applies_the_new_definition(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    with_port = msgspec.structs.replace(guest, ports=(port(host, 3),))
    await host.hypervisor.ensure_restarted(with_port, was_domain_id=first.domain_id)
    assert await host.nic_count(guest.instance_id) == 1


# --- images and disks ------------------------------------------------------------------------------------------------


async def test_many_callers_get_one_copy_of_an_image(host: Harness) -> None:
    image = host.image()
    await asyncio.gather(*(host.hypervisor.ensure_image(image) for _ in range(8)))
    assert (await host.hypervisor.census()).cached_images == (image.sha256,)


async def test_an_image_with_a_wrong_checksum_is_not_cached(host: Harness) -> None:
    image = host.broken_image()
    with pytest.raises(HypervisorError) as caught:
        await host.hypervisor.ensure_image(image)
    assert "/" not in caught.value.message
    assert (await host.hypervisor.census()).cached_images == ()


async def test_a_disk_needs_its_image_in_the_cache(host: Harness) -> None:
    disk = DiskDefinition(name="root", size_bytes=4 * MIB, image=host.image())
    with pytest.raises(HypervisorError):
        await host.hypervisor.ensure_disk(str(uuid4()), disk)


async def test_ensure_disk_keeps_what_the_guest_has_written(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await host.hypervisor.ensure_disk(guest.instance_id, guest.disks[0])
    await host.hypervisor.ensure_running(guest)
    await host.wait_until_booted(guest.instance_id, boots=2)


async def test_disks_of_a_running_guest_are_not_removed(host: Harness) -> None:
    guest = definition(host)
    state = await running(host, guest)
    with pytest.raises(HypervisorError):
        await host.hypervisor.ensure_no_disks(guest.instance_id)
    assert await host.hypervisor.observe(guest.instance_id) == state
    assert guest.instance_id in (await host.hypervisor.census()).instance_dirs


async def test_an_additional_disk_without_an_image_is_made_blank(host: Harness) -> None:
    guest = definition(host)
    guest = msgspec.structs.replace(
        guest, disks=(*guest.disks, DiskDefinition(name="ephemeral0", size_bytes=8 * MIB))
    )
    assert (await running(host, guest)).power_state == PowerState.RUNNING


# --- absence and census ----------------------------------------------------------------------------------------------


async def test_ensure_absent_leaves_nothing_and_may_be_repeated(host: Harness) -> None:
    guest = definition(host, ports=1, config_drive=True)
    await running(host, guest)
    for _ in range(2):
        await host.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
        census = await host.hypervisor.census()
        assert (census.guests, census.instance_dirs, census.taps, census.networks) == ({}, (), (), ())


async def test_ensure_absent_keeps_the_disks_when_told(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await host.hypervisor.ensure_absent(guest.instance_id, keep_disks=True)
    assert await host.hypervisor.observe(guest.instance_id) == GuestState(exists=False)
    await host.hypervisor.ensure_running(guest)
    await host.wait_until_booted(guest.instance_id, boots=2)


async def test_ensure_absent_of_an_unknown_guest_is_success(host: Harness) -> None:
    await host.hypervisor.ensure_absent(str(uuid4()), keep_disks=False)


async def test_census_lists_what_stands_on_the_host(host: Harness) -> None:
    guest = definition(host, ports=1)
    state = await running(host, guest)
    census = await host.hypervisor.census()
    assert census.guests == {guest.instance_id: state}
    assert census.instance_dirs == (guest.instance_id,)
    assert census.taps == (guest.ports[0].tap_name,)
    assert census.networks == (guest.ports[0].network.id,)
    image = guest.disks[0].image
    assert image is not None
    assert census.cached_images == (image.sha256,)


async def test_census_lists_disks_without_a_guest(host: Harness) -> None:
    guest = definition(host)
    await provide(host, guest)
    census = await host.hypervisor.census()
    assert (census.guests, census.instance_dirs) == ({}, (guest.instance_id,))


async def test_two_hosts_do_not_see_each_others_guests(
    hypervisor_factory: Callable[[], object],
) -> None:
    first: Harness = await hypervisor_factory()  # type: ignore[misc]
    second: Harness = await hypervisor_factory()  # type: ignore[misc]
    guest = definition(first)
    await running(first, guest)
    assert (await second.hypervisor.census()).guests == {}


async def test_inventory_says_what_the_host_has(host: Harness) -> None:
    before = await host.hypervisor.inventory()
    assert before.vcpus > 0
    assert before.memory_mib > 0
    assert before.disk_gib >= before.free_disk_gib >= 0
    assert before.hypervisor_type
    assert before.hypervisor_version > 0
    assert before.running_vms == 0
    await running(host, definition(host))
    assert (await host.hypervisor.inventory()).running_vms == 1


# --- console ---------------------------------------------------------------------------------------------------------


async def test_console_output_is_the_end_of_the_log(host: Harness) -> None:
    guest = definition(host)
    assert await host.hypervisor.console_output(guest.instance_id, length_bytes=100) == b""
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    everything = await host.hypervisor.console_output(guest.instance_id, length_bytes=100_000)
    assert len(everything) > 10
    assert await host.hypervisor.console_output(guest.instance_id, length_bytes=10) == everything[-10:]
    assert await host.hypervisor.console_output(guest.instance_id, length_bytes=0) == b""


async def test_console_output_outlives_a_stop(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    assert await host.hypervisor.console_output(guest.instance_id, length_bytes=1000)


# --- events ----------------------------------------------------------------------------------------------------------


async def test_a_killed_guest_is_told_with_its_state(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await wait_for(lambda: any(event.event == "started" for event in host.events))
    await host.kill_guest(guest.instance_id)
    await wait_for(lambda: any(event.event == "crashed" for event in host.events))
    last = host.events[-1]
    assert last.instance_id == guest.instance_id
    assert last.state.domain_id is None


async def test_a_paused_guest_is_told(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.pause_guest(guest.instance_id)
    await wait_for(lambda: any(event.event == "paused" for event in host.events))
    assert host.events[-1].state.power_state == PowerState.PAUSED


async def test_a_guest_that_goes_by_itself_is_told(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.lose_domain(guest.instance_id)
    await wait_for(lambda: any(not event.state.exists for event in host.events))


# --- trouble ---------------------------------------------------------------------------------------------------------


async def test_another_process_finds_the_guests_of_the_one_before(host: Harness) -> None:
    guest = definition(host)
    state = await running(host, guest)
    await host.reopen()
    assert await host.hypervisor.observe(guest.instance_id) == state
    assert (await host.hypervisor.census()).guests == {guest.instance_id: state}
    assert await host.hypervisor.ensure_running(guest) == state


async def test_a_daemon_that_is_away_is_said_at_once_and_guests_go_on(host: Harness) -> None:
    guest = definition(host)
    state = await running(host, guest)
    await host.daemon_away()
    started = time.monotonic()
    with pytest.raises(HypervisorUnavailable):
        await host.hypervisor.observe(guest.instance_id)
    with pytest.raises(HypervisorUnavailable):
        await host.hypervisor.inventory()
    assert time.monotonic() - started < 5.0 * patience()
    await host.daemon_back()
    assert await host.hypervisor.observe(guest.instance_id) == state


async def test_a_stop_that_waits_ends_when_the_daemon_goes_away(host: Harness) -> None:
    guest = definition(host, heeds_power_button=False)
    await running(host, guest)
    stopping = asyncio.ensure_future(host.hypervisor.ensure_stopped(guest.instance_id, grace_s=WAIT_S))
    await asyncio.sleep(0.2)
    await host.daemon_away()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(HypervisorUnavailable):
            await stopping
    await host.daemon_back()
    assert (await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)).domain_id is None


async def test_a_guest_that_ended_while_the_daemon_was_away_is_told(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await wait_for(lambda: any(event.event == "started" for event in host.events))
    await host.daemon_away()
    await host.kill_guest(guest.instance_id)
    await host.daemon_back()
    await wait_for(lambda: host.events[-1].state.domain_id is None)


async def test_an_instance_id_that_is_no_uuid_is_refused(host: Harness) -> None:
    for instance_id in ("../../etc", "", "a" * 36):
        with pytest.raises(HypervisorError):
            await host.hypervisor.ensure_no_disks(instance_id)
