"""Live migration of libvirt guests beyond the contract: shared storage, layers, volumes, what an agent's death leaves."""

from __future__ import annotations

import asyncio
import os
import signal
from uuid import uuid4

import msgspec
import pytest

from instar.errors import HypervisorError, MigrationAborted
from instar.hypervisor.libvirt import ownership
from instar.model.guest import DiskDefinition, WorkProgress
from instar.model.states import PowerState
from instar.model.volume import VolumeDisk
from tests.patience import PATIENCE_S

from .libvirt_two_hosts import LibvirtTwoHosts, StreamHost
from .test_contract import MIB, definition, running
from .test_contract_moves import OPTIONS, boot, migrating, nobody, ready, running_and_ready, set_aside_and_offered
from .test_libvirt_moves import holds, hosts, root, sharing_hosts, write

__all__ = ["hosts", "sharing_hosts"]
pytestmark = pytest.mark.host


def sockets_left(hosts: LibvirtTwoHosts) -> list[str]:
    directories = [host.daemon._runtime / "run" / "instar" for host in (hosts.source, hosts.target)]
    return [path.name for directory in directories if directory.is_dir() for path in directory.iterdir()]


async def test_disks_with_layers_and_without_an_image_go_along_and_no_socket_stays(hosts: LibvirtTwoHosts) -> None:
    guest = msgspec.structs.replace(
        definition(hosts.source, config_drive=True),
        disks=(*definition(hosts.source).disks, DiskDefinition(name="ephemeral0", size_bytes=3 * MIB)),
    )
    await running(hosts.source, guest)
    await hosts.source.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    write(root(hosts.source, guest), 5, 2 * MIB, 65_536)
    offer = await set_aside_and_offered(hosts.source, guest, hosts.source)
    await hosts.source.hypervisor.receive_disks(guest.instance_id, offer, nobody)
    await hosts.source.hypervisor.ensure_nothing_aside(guest.instance_id)
    write(root(hosts.source, guest), 6, 3 * MIB, 65_536)
    write(hosts.source.paths.disk(guest.instance_id, "ephemeral0"), 7, 1 * MIB, 65_536)
    await hosts.source.hypervisor.ensure_running(guest)
    config_drive = hosts.source.paths.config_drive(guest.instance_id).read_bytes()
    await hosts.source.hypervisor.migrate_live(guest, await ready(hosts, guest), OPTIONS, nobody)
    await hosts.source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    assert hosts.target.paths.config_drive(guest.instance_id).read_bytes() == config_drive
    await hosts.target.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    assert holds(root(hosts.target, guest), 5, 2 * MIB, 65_536)
    assert holds(root(hosts.target, guest), 6, 3 * MIB, 65_536)
    assert holds(hosts.target.paths.disk(guest.instance_id, "ephemeral0"), 7, 1 * MIB, 65_536)
    await hosts.target.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    assert sockets_left(hosts) == []


async def test_on_shared_storage_no_disk_is_copied_and_the_target_owns_it_then(sharing_hosts: LibvirtTwoHosts) -> None:
    hosts = sharing_hosts
    guest, _state, target = await running_and_ready(hosts)
    assert target.shared_storage
    was, told = root(hosts.source, guest).stat().st_ino, list[WorkProgress]()
    await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, told.append)
    assert told[-1].migration is not None
    assert told[-1].migration.disk_total == 0
    await hosts.source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    assert root(hosts.target, guest).stat().st_ino == was
    await hosts.target.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await boot(hosts.target, guest, boots=2)


async def test_on_shared_storage_an_aborted_migration_leaves_disk_and_ownership(sharing_hosts: LibvirtTwoHosts) -> None:
    hosts = sharing_hosts
    guest, state, target = await running_and_ready(hosts)
    task = await migrating(hosts, guest, target)
    await hosts.source.hypervisor.abort_live(guest.instance_id)
    with pytest.raises(MigrationAborted):
        await task
    await hosts.target.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state
    await hosts.source.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await boot(hosts.source, guest, boots=2)
    await hosts.source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    assert not root(hosts.source, guest).parent.exists()


async def test_on_shared_storage_the_source_never_removes_disks_that_the_target_has_open(
    sharing_hosts: LibvirtTwoHosts,
) -> None:
    """The source's agent died before it could write down that the guest had arrived."""
    hosts = sharing_hosts
    guest, _state, target = await running_and_ready(hosts)
    await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, nobody)
    directory = root(hosts.source, guest).parent
    ownership.write_owner(directory, ownership.Ownership("first", going_to="second"))
    await hosts.source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    assert ownership.is_owned_by(directory, "second")
    await hosts.target.hypervisor.ensure_stopped(guest.instance_id, grace_s=0)
    await boot(hosts.target, guest, boots=2)


async def test_shared_storage_that_is_not_recognised_costs_no_disk(sharing_hosts: LibvirtTwoHosts) -> None:
    """A file system may show the other host's new file late: then the directory is not what the target takes it for."""
    hosts = sharing_hosts
    guest, state, _target = await running_and_ready(hosts)
    offer = await hosts.source.hypervisor.offer_live(guest.instance_id, await hosts.target.hypervisor.stream_address())
    late = msgspec.structs.replace(offer, marker=f"{guest.instance_id}/.offer-{'0' * 32}")
    owner = root(hosts.source, guest).with_name(ownership.OWNER)
    for said in (owner.read_bytes(), b""):
        owner.write_bytes(said)
        with pytest.raises(HypervisorError):
            await hosts.target.hypervisor.ensure_ready_for_live(guest, late)
    assert root(hosts.source, guest).exists()
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state


async def relayed(host: StreamHost) -> int:
    """The one process by which a guest of this host reaches its volume; a new one may be on its way."""
    async with asyncio.timeout(PATIENCE_S):
        while len(found := await asyncio.to_thread(host.relays)) != 1:
            await asyncio.sleep(0.05)
    return found[0]


async def test_volumes_go_along_by_their_connections_at_the_target(hosts: LibvirtTwoHosts) -> None:
    """One that is seen on both hosts, and one of another machine: by a relay that outlives agents and is watched."""
    source, target = hosts.source, hosts.target
    near, far = await source.volume(), await source.volume_afar()
    volumes = (VolumeDisk(str(uuid4()), near, "vdb"), VolumeDisk(str(uuid4()), far, "vdc"))
    guest = msgspec.structs.replace(definition(source), volumes=volumes[:1])
    await running(source, guest)
    guest = msgspec.structs.replace(guest, volumes=volumes)
    await source.hypervisor.ensure_volume_attached(guest, volumes[1].volume_id)
    relay = await relayed(source)
    await source.reopen()
    assert await relayed(source) == relay
    refused = msgspec.structs.replace(far, gateway=msgspec.structs.replace(far.gateway, secret="0" * 64))
    for wrong in (refused, msgspec.structs.replace(far, gateway=None)):
        more = VolumeDisk(str(uuid4()), wrong, "vdd")
        with pytest.raises(HypervisorError):
            await source.hypervisor.ensure_volume_attached(
                msgspec.structs.replace(guest, volumes=(*volumes, more)), more.volume_id
            )
    await source.hypervisor.migrate_live(guest, await ready(hosts, guest), OPTIONS, nobody)
    assert (await target.hypervisor.observe(guest.instance_id)).power_state is PowerState.RUNNING
    await source.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    assert source.relays() == []
    relay = await relayed(target)
    os.kill(relay, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while await relayed(target) == relay:
            await asyncio.sleep(0.05)
    for volume in volumes:
        await target.hypervisor.ensure_volume_detached(guest.instance_id, volume.volume_id)
    assert target.relays() == []


async def test_a_guest_that_was_held_still_in_vain_goes_on(hosts: LibvirtTwoHosts) -> None:
    """The agent was killed between the pause and the end: the next call finds what is written of it."""
    guest, state, target = await running_and_ready(hosts)
    directory = root(hosts.source, guest).parent
    owner = ownership.owner_of(directory)
    assert owner is not None
    ownership.write_owner(directory, msgspec.structs.replace(owner, held_still=True))
    await hosts.source.pause_guest(guest.instance_id)
    await hosts.cut_off_target()
    with pytest.raises(HypervisorError):
        await hosts.source.hypervisor.migrate_live(guest, target, OPTIONS, nobody)
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state


async def test_a_migration_whose_streams_break_leaves_the_guest_at_the_source(hosts: LibvirtTwoHosts) -> None:
    """As when either agent dies: what it carried ends with it."""
    guest, state, target = await running_and_ready(hosts)
    task = await migrating(hosts, guest, target)
    async with asyncio.timeout(PATIENCE_S):
        while not (await hosts.target.hypervisor.observe(guest.instance_id)).exists:
            await asyncio.sleep(0.05)
    assert (await hosts.target.hypervisor.observe(guest.instance_id)).domain_id is None  # it has not come yet
    hosts.target.server.revoke("")
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(HypervisorError):
            await task
    assert await hosts.source.hypervisor.observe(guest.instance_id) == state
    assert (await hosts.target.hypervisor.observe(guest.instance_id)).domain_id is None
    await hosts.mend()
    await hosts.source.hypervisor.migrate_live(guest, await ready(hosts, guest), OPTIONS, nobody)
    assert (await hosts.target.hypervisor.observe(guest.instance_id)).power_state is PowerState.RUNNING
