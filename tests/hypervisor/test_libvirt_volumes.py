"""A volume whose server dies under a running libvirt guest."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from instar.model.states import PowerState
from instar.model.volume import VolumeDisk

from .libvirt_harness import LibvirtHarness
from .test_contract import definition
from .tiny_guest import write_image

pytestmark = pytest.mark.host
HELD_WITHIN_S = 60.0


async def test_a_guest_waits_for_a_volume_that_does_not_answer(private_daemon: PrivateDaemon, tmp_path: Path) -> None:
    """It boots from the volume, and again while nobody serves it: no error reaches it, and nobody takes it for paused."""
    host = await LibvirtHarness.opened(private_daemon, tmp_path / "host")
    try:
        connection = await host.volume(size_bytes=2 << 20)
        write_image(host.volume_file(connection))
        volume = VolumeDisk(str(uuid4()), connection, "vda", boot_index=0)
        guest = msgspec.structs.replace(definition(host), disks=(), volumes=(volume,))
        await host.hypervisor.ensure_running(guest)
        await host.wait_until_booted(guest.instance_id, boots=1)
        for boots, agent_is_away in ((2, False), (3, True)):
            await host.volume_dies(connection)
            await host.reset_guest(guest.instance_id)
            async with asyncio.timeout(HELD_WITHIN_S):
                while not await host.is_held_still(guest.instance_id):
                    await asyncio.sleep(0.02)
            assert (await host.hypervisor.observe(guest.instance_id)).power_state is PowerState.RUNNING
            if agent_is_away:
                await host.reopen()
            await host.volume_lives(connection)
            await host.wait_until_booted(guest.instance_id, boots=boots)
        assert all(event.event != "paused" for event in host.events)
    finally:
        await host.close()
