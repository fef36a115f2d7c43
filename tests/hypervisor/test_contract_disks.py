"""The contract of a hypervisor on single disks: size, removal, keeping and restoring. Every implementation runs it."""

from __future__ import annotations

import msgspec
import pytest

from instar.errors import HypervisorError
from instar.model.guest import DiskDefinition, GuestDefinition
from instar.model.states import PowerState

from .harness import Harness
from .test_contract import MIB, definition, provide, running


async def booted_and_off(host: Harness) -> GuestDefinition:
    """A guest whose disk has been booted once, and is off."""
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    return guest


async def boots_as(host: Harness, guest: GuestDefinition, boots: int) -> None:
    await host.hypervisor.ensure_running(guest)
    await host.wait_until_booted(guest.instance_id, boots=boots)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)


async def test_a_disk_grows_and_keeps_what_is_on_it(host: Harness) -> None:
    guest = await booted_and_off(host)
    for size_mib in (8, 8, 2):
        larger = msgspec.structs.replace(guest.disks[0], size_bytes=size_mib * MIB)
        await host.hypervisor.ensure_disk_size(guest.instance_id, larger)
    await boots_as(host, guest, 2)


async def test_a_disk_that_is_missing_is_made_in_its_size(host: Harness) -> None:
    guest = definition(host)
    image = guest.disks[0].image
    assert image is not None
    await host.hypervisor.ensure_image(image)
    await host.hypervisor.ensure_disk_size(guest.instance_id, guest.disks[0])
    await boots_as(host, guest, 1)


async def test_a_running_guests_disks_are_left_alone(host: Harness) -> None:
    guest = definition(host)
    state = await running(host, guest)
    disk = msgspec.structs.replace(guest.disks[0], size_bytes=8 * MIB)
    with pytest.raises(HypervisorError):
        await host.hypervisor.ensure_disk_size(guest.instance_id, disk)
    for ensure in (
        host.hypervisor.ensure_no_disk,
        host.hypervisor.ensure_disk_kept,
        host.hypervisor.ensure_disk_restored,
    ):
        with pytest.raises(HypervisorError):
            await ensure(guest.instance_id, "root")
    assert await host.hypervisor.observe(guest.instance_id) == state


async def test_one_disk_is_removed_and_the_others_stay(host: Harness) -> None:
    guest = await booted_and_off(host)
    await host.hypervisor.ensure_disk(guest.instance_id, DiskDefinition("rescue", MIB))
    for _ in range(2):
        await host.hypervisor.ensure_no_disk(guest.instance_id, "rescue")
    with_rescue = msgspec.structs.replace(guest, disks=(*guest.disks, DiskDefinition("rescue", MIB)))
    with pytest.raises(HypervisorError):
        await host.hypervisor.ensure_running(with_rescue)
    await boots_as(host, guest, 2)


async def test_a_disk_that_is_not_used_may_go_while_the_guest_runs(host: Harness) -> None:
    guest = definition(host)
    state = await running(host, guest)
    await host.hypervisor.ensure_disk(guest.instance_id, DiskDefinition("rescue", MIB))
    await host.hypervisor.ensure_no_disk(guest.instance_id, "rescue")
    assert await host.hypervisor.observe(guest.instance_id) == state


async def test_a_disk_that_was_kept_comes_back_in_place_of_another(host: Harness) -> None:
    guest = await booted_and_off(host)
    for _ in range(2):
        await host.hypervisor.ensure_disk_kept(guest.instance_id, "root")
    await provide(host, guest)
    await boots_as(host, guest, 1)  # a new disk, that was never booted
    await host.hypervisor.ensure_disk_kept(guest.instance_id, "root")  # again: the kept one stays the one that was kept
    for _ in range(2):
        await host.hypervisor.ensure_disk_restored(guest.instance_id, "root")
    await boots_as(host, guest, 2)


async def test_a_kept_disk_is_removed_by_its_name(host: Harness) -> None:
    guest = await booted_and_off(host)
    await host.hypervisor.ensure_disk_kept(guest.instance_id, "root")
    await provide(host, guest)
    for _ in range(2):
        await host.hypervisor.ensure_no_disk(guest.instance_id, "rootkept")
    await host.hypervisor.ensure_disk_restored(guest.instance_id, "root")
    await boots_as(host, guest, 1)


async def test_what_was_never_there_is_neither_kept_nor_restored_nor_removed(host: Harness) -> None:
    guest = definition(host)
    await host.hypervisor.ensure_disk_kept(guest.instance_id, "root")
    await host.hypervisor.ensure_disk_restored(guest.instance_id, "root")
    await host.hypervisor.ensure_no_disk(guest.instance_id, "root")
    await provide(host, guest)
    assert (await host.hypervisor.ensure_running(guest)).power_state == PowerState.RUNNING
