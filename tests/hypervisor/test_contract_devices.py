"""The contract of a hypervisor on devices: NICs and volumes of guests that run, are paused or off. Every implementation
runs it. How many devices a guest has is what its diagnostics say."""

from __future__ import annotations

from uuid import uuid4

import msgspec
import pytest

from instar.errors import GuestAgentMissing, HypervisorError
from instar.model.guest import GuestDefinition
from instar.model.states import PowerState
from instar.model.volume import VolumeConnection, VolumeDisk

from .harness import Harness
from .test_contract import MIB, definition, port, provide, running


async def booted(host: Harness, guest: GuestDefinition) -> None:
    await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)


async def device_counts(host: Harness, guest: GuestDefinition) -> tuple[int, int]:
    counted = await host.hypervisor.diagnostics(guest.instance_id)
    return len(counted.nics), len(counted.disks)


def with_port(host: Harness, guest: GuestDefinition) -> tuple[GuestDefinition, str]:
    added = port(host, len(guest.ports))
    return msgspec.structs.replace(guest, ports=(*guest.ports, added)), added.id


def with_volume(guest: GuestDefinition, connection: VolumeConnection, device: str = "vdb") -> tuple[GuestDefinition, str]:
    volume = VolumeDisk(str(uuid4()), connection, device)
    return msgspec.structs.replace(guest, volumes=(*guest.volumes, volume)), volume.volume_id


# --- ports -----------------------------------------------------------------------------------------------------------


async def test_a_running_guest_gets_a_nic_and_loses_it(host: Harness) -> None:
    guest = definition(host, ports=1)
    await booted(host, guest)
    larger, port_id = with_port(host, guest)
    await host.hypervisor.ensure_ports(guest.instance_id, larger.ports)
    for _ in range(2):
        await host.hypervisor.ensure_port_plugged(larger, port_id)
        assert await device_counts(host, guest) == (2, 1)
    macs = {nic.mac_address for nic in (await host.hypervisor.diagnostics(guest.instance_id)).nics}
    assert macs == {definition.mac_address for definition in larger.ports}
    for _ in range(2):
        await host.hypervisor.ensure_port_unplugged(guest.instance_id, port_id)
        assert await device_counts(host, guest) == (1, 1)
    nics = (await host.hypervisor.diagnostics(guest.instance_id)).nics
    assert [nic.mac_address for nic in nics] == [guest.ports[0].mac_address]


async def test_a_nic_can_be_plugged_again(host: Harness) -> None:
    guest = definition(host)
    await booted(host, guest)
    larger, port_id = with_port(host, guest)
    await host.hypervisor.ensure_ports(guest.instance_id, larger.ports)
    for _ in range(2):
        await host.hypervisor.ensure_port_plugged(larger, port_id)
        await host.hypervisor.ensure_port_unplugged(guest.instance_id, port_id)
    assert await device_counts(host, guest) == (0, 1)


async def test_a_guest_that_is_off_gets_its_devices_when_it_starts(host: Harness) -> None:
    guest = definition(host)
    await provide(host, guest)
    larger, port_id = with_port(host, guest)
    larger, volume_id = with_volume(larger, await host.volume())
    await host.hypervisor.ensure_ports(guest.instance_id, larger.ports)
    await host.hypervisor.ensure_port_plugged(larger, port_id)
    await host.hypervisor.ensure_volume_attached(larger, volume_id)
    assert (await host.hypervisor.observe(guest.instance_id)).domain_id is None
    await host.hypervisor.ensure_running(larger)
    assert await device_counts(host, larger) == (1, 2)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await host.hypervisor.ensure_port_unplugged(guest.instance_id, port_id)
    await host.hypervisor.ensure_volume_detached(guest.instance_id, volume_id)
    await host.hypervisor.ensure_running(guest)
    assert await device_counts(host, guest) == (0, 1)


async def test_what_is_none_of_the_guests_is_not_plugged(host: Harness) -> None:
    guest = definition(host)
    await running(host, guest)
    with pytest.raises(HypervisorError):
        await host.hypervisor.ensure_port_plugged(guest, str(uuid4()))
    with pytest.raises(HypervisorError):
        await host.hypervisor.ensure_volume_attached(guest, str(uuid4()))
    await host.hypervisor.ensure_port_unplugged(guest.instance_id, str(uuid4()))
    await host.hypervisor.ensure_volume_detached(guest.instance_id, str(uuid4()))


async def test_a_guest_that_does_not_exist_has_no_devices_to_let_go_of(host: Harness) -> None:
    await host.hypervisor.ensure_port_unplugged(str(uuid4()), str(uuid4()))
    await host.hypervisor.ensure_volume_detached(str(uuid4()), str(uuid4()))


async def test_a_paused_guest_gets_devices_and_lets_go_of_them_only_when_it_runs(host: Harness) -> None:
    guest = definition(host)
    await booted(host, guest)
    await host.hypervisor.ensure_paused(guest.instance_id)
    larger, port_id = with_port(host, guest)
    larger, volume_id = with_volume(larger, await host.volume())
    await host.hypervisor.ensure_ports(guest.instance_id, larger.ports)
    await host.hypervisor.ensure_port_plugged(larger, port_id)
    await host.hypervisor.ensure_volume_attached(larger, volume_id)
    with pytest.raises(HypervisorError, match="paused"):
        await host.hypervisor.ensure_port_unplugged(guest.instance_id, port_id)
    with pytest.raises(HypervisorError, match="paused"):
        await host.hypervisor.ensure_volume_detached(guest.instance_id, volume_id)
    assert await device_counts(host, guest) == (1, 2)
    await host.hypervisor.ensure_running(larger)
    assert await device_counts(host, guest) == (1, 2)
    await host.hypervisor.ensure_port_unplugged(guest.instance_id, port_id)
    await host.hypervisor.ensure_volume_detached(guest.instance_id, volume_id)
    assert await device_counts(host, guest) == (0, 1)


async def test_a_guest_that_does_not_let_go_of_a_device_keeps_it(host: Harness) -> None:
    guest = definition(host, heeds_power_button=False, ports=1)
    await running(host, guest)
    with pytest.raises(HypervisorError, match="let go"):
        await host.hypervisor.ensure_port_unplugged(guest.instance_id, guest.ports[0].id)
    assert await device_counts(host, guest) == (1, 1)


# --- volumes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over_tcp", [False, True], ids=["socket", "tcp"])
async def test_a_running_guest_gets_a_volume_and_loses_it(host: Harness, over_tcp: bool) -> None:
    guest = definition(host)
    await booted(host, guest)
    larger, volume_id = with_volume(guest, await host.volume(over_tcp=over_tcp))
    for _ in range(2):
        await host.hypervisor.ensure_volume_attached(larger, volume_id)
        assert await device_counts(host, guest) == (0, 2)
    for _ in range(2):
        await host.hypervisor.ensure_volume_detached(guest.instance_id, volume_id)
        assert await device_counts(host, guest) == (0, 1)
    await host.hypervisor.ensure_volume_attached(larger, volume_id)
    assert await device_counts(host, guest) == (0, 2)


async def test_a_guest_without_disks_boots_from_its_volume(host: Harness) -> None:
    guest = definition(host)
    volume = VolumeDisk(str(uuid4()), await host.volume(), "vda", boot_index=0)
    guest = msgspec.structs.replace(guest, disks=(), volumes=(volume,))
    assert (await host.hypervisor.ensure_running(guest)).power_state == PowerState.RUNNING
    assert await device_counts(host, guest) == (0, 1)


async def test_a_suspended_guest_goes_on_with_its_volume(host: Harness) -> None:
    guest = definition(host)
    guest, volume_id = with_volume(guest, await host.volume())
    await booted(host, guest)
    await host.hypervisor.ensure_suspended(guest.instance_id)
    await host.hypervisor.ensure_running(guest)
    assert await device_counts(host, guest) == (0, 2)
    await host.hypervisor.ensure_volume_detached(guest.instance_id, volume_id)
    assert await device_counts(host, guest) == (0, 1)


async def test_another_process_detaches_what_the_one_before_attached(host: Harness) -> None:
    guest = definition(host)
    await booted(host, guest)
    larger, volume_id = with_volume(guest, await host.volume())
    await host.hypervisor.ensure_volume_attached(larger, volume_id)
    await host.reopen()
    await host.hypervisor.ensure_volume_attached(larger, volume_id)
    assert await device_counts(host, guest) == (0, 2)
    await host.hypervisor.ensure_volume_detached(guest.instance_id, volume_id)
    assert await device_counts(host, guest) == (0, 1)


# --- questions and small wishes --------------------------------------------------------------------------------------


async def test_diagnostics_of_a_running_guest_have_a_line_for_each_device(host: Harness) -> None:
    guest = definition(host, ports=2, config_drive=True)
    await booted(host, guest)
    counted = await host.hypervisor.diagnostics(guest.instance_id)
    assert counted.power_state == PowerState.RUNNING
    assert counted.driver
    assert counted.hypervisor
    assert len(counted.vcpu_times_ns) == guest.vcpus
    assert counted.uptime_s is not None and 0 <= counted.uptime_s < 300
    assert counted.memory_maximum_mib == guest.memory_mib
    assert {nic.mac_address for nic in counted.nics} == {port.mac_address for port in guest.ports}
    assert len(counted.disks) == 1
    assert counted.config_drive


async def test_nothing_is_counted_of_a_guest_that_does_not_run(host: Harness) -> None:
    guest = definition(host)
    with pytest.raises(HypervisorError):
        await host.hypervisor.diagnostics(guest.instance_id)
    await running(host, guest)
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    with pytest.raises(HypervisorError):
        await host.hypervisor.diagnostics(guest.instance_id)


async def test_a_guest_without_an_agent_gets_no_password(host: Harness) -> None:
    guest = definition(host, heeds_power_button=False)
    await running(host, guest)
    for _ in range(2):
        with pytest.raises(GuestAgentMissing) as caught:
            await host.hypervisor.set_password(guest.instance_id, "root", "s3cret")
        assert guest.instance_id in caught.value.message
        assert "s3cret" not in caught.value.message
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    with pytest.raises(GuestAgentMissing):
        await host.hypervisor.set_password(guest.instance_id, "root", "s3cret")


async def test_a_disk_and_volumes_have_places_of_their_own(host: Harness) -> None:
    guest = definition(host)
    for device in ("vda", "vdb", "vdb", "nonsense", "/dev/vdc"):
        guest, _ = with_volume(guest, await host.volume(size_bytes=MIB), device)
    assert (await running(host, guest)).power_state == PowerState.RUNNING
    assert await device_counts(host, guest) == (0, 6)
