"""The contract of a hypervisor on a guest's memory: paused, suspended, and going on. Every implementation runs it."""

from __future__ import annotations

import pytest

from instar.errors import HypervisorError
from instar.model.guest import GuestState
from instar.model.states import PowerState

from .harness import Harness
from .test_contract import WAIT_S, definition, running


async def test_a_paused_guest_keeps_its_id_and_goes_on(host: Harness) -> None:
    guest = definition(host)
    first = await running(host, guest)
    for _ in range(2):
        paused = await host.hypervisor.ensure_paused(guest.instance_id)
        assert paused == GuestState(exists=True, power_state=PowerState.PAUSED, domain_id=first.domain_id)
    assert await host.hypervisor.ensure_running(guest) == first


async def test_a_guest_that_does_not_run_is_neither_paused_nor_suspended(host: Harness) -> None:
    guest = definition(host)
    for ensure in (host.hypervisor.ensure_paused, host.hypervisor.ensure_suspended):
        with pytest.raises(HypervisorError):
            await ensure(guest.instance_id)
    await running(host, guest)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    for ensure in (host.hypervisor.ensure_paused, host.hypervisor.ensure_suspended):
        with pytest.raises(HypervisorError):
            await ensure(guest.instance_id)
    assert (await host.hypervisor.observe(guest.instance_id)).power_state == PowerState.SHUTDOWN


async def test_a_suspended_guest_is_off_and_goes_on_from_its_memory(host: Harness) -> None:
    guest = definition(host, ports=1, config_drive=True)
    first = await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    for _ in range(2):
        state = await host.hypervisor.ensure_suspended(guest.instance_id)
        assert state == GuestState(exists=True, power_state=PowerState.SHUTDOWN)
    again = await host.hypervisor.ensure_running(guest)
    assert again.power_state == PowerState.RUNNING
    assert again.domain_id not in (None, first.domain_id)
    assert await host.nic_count(guest.instance_id) == 1
    # It hears the button at once, for it did not boot; and the next boot is its second.
    assert (await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=WAIT_S)).domain_id is None
    await host.hypervisor.ensure_running(guest)
    await host.wait_until_booted(guest.instance_id, boots=2)


async def test_a_guest_that_was_paused_when_it_was_suspended_runs_again(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.hypervisor.ensure_paused(guest.instance_id)
    await host.hypervisor.ensure_suspended(guest.instance_id)
    assert (await host.hypervisor.ensure_running(guest)).power_state == PowerState.RUNNING


async def test_another_process_lets_a_suspended_guest_go_on(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await host.hypervisor.ensure_suspended(guest.instance_id)
    await host.reopen()
    assert (await host.hypervisor.ensure_suspended(guest.instance_id)).domain_id is None
    await host.hypervisor.ensure_running(guest)
    assert (await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=WAIT_S)).domain_id is None
    await host.hypervisor.ensure_running(guest)
    await host.wait_until_booted(guest.instance_id, boots=2)


async def test_a_hard_reboot_of_a_suspended_guest_drops_its_memory(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    await host.hypervisor.ensure_suspended(guest.instance_id)
    await host.hypervisor.ensure_restarted(guest, was_domain_id=None)
    await host.wait_until_booted(guest.instance_id, boots=2)


async def test_nothing_is_left_of_a_suspended_guest_that_is_removed(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    await host.hypervisor.ensure_suspended(guest.instance_id)
    await host.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    assert await host.hypervisor.observe(guest.instance_id) == GuestState(exists=False)
    with pytest.raises(HypervisorError):
        await host.hypervisor.ensure_suspended(guest.instance_id)
