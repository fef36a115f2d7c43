"""The guest image on the libvirt driver: it boots, reads its config drive, hears the power button, survives damage."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from uuid import uuid4

import pytest

from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from instar.model.guest import ConfigDrive, DiskDefinition, GuestDefinition

from .libvirt_harness import LibvirtHarness
from .linux_image import linux_image

BOOT_TIMEOUT_S = 300.0  # of a machine that does much else; 10 s where it does not


async def wait_for_line(host: LibvirtHarness, instance_id: str, pattern: str) -> re.Match[str]:
    async with asyncio.timeout(BOOT_TIMEOUT_S):
        while True:
            text = (await host.hypervisor.console_output(instance_id, length_bytes=100_000)).decode(errors="replace")
            if found := re.search(pattern, text):
                return found
            await asyncio.sleep(0.1)


@pytest.mark.host
@pytest.mark.guest
@pytest.mark.slow
async def test_a_linux_guest_boots_reads_its_config_drive_and_reboots(
    private_daemon: PrivateDaemon, tmp_path: Path
) -> None:
    image = await linux_image(tmp_path)
    instance_id = str(uuid4())
    meta_data = json.dumps({"uuid": instance_id, "hostname": "first-guest", "name": "first-guest"})
    guest = GuestDefinition(
        instance_id=instance_id,
        name="instance-00000001",
        vcpus=1,
        memory_mib=128,
        disks=(DiskDefinition("root", 128 << 20, image=image),),
        config_drive=ConfigDrive(meta_data=meta_data, network_data="{}"),
    )
    host = await LibvirtHarness.opened(private_daemon, tmp_path / "host")
    try:
        await host.hypervisor.ensure_image(image)
        await host.hypervisor.ensure_disk(instance_id, guest.disks[0])
        state = await host.hypervisor.ensure_running(guest)
        assert state.domain_id is not None
        await wait_for_line(host, instance_id, rf"INSTAR-BOOT count=1 .*{instance_id}.*hostname=first-guest")
        await wait_for_line(host, instance_id, "INSTAR-READY")
        result = await host.hypervisor.await_soft_reboot(instance_id, was_domain_id=state.domain_id, wait_s=300)
        assert result.outcome == "shut_down"
        await host.lose_config_drive(instance_id)
        again = await host.hypervisor.ensure_restarted(guest, was_domain_id=state.domain_id)
        assert again.domain_id != state.domain_id
        await wait_for_line(host, instance_id, "INSTAR-BOOT count=2 .*hostname=first-guest")
    finally:
        await host.close()
