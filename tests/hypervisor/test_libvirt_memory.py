"""Saved memory on libvirt: what cannot be restored is said and kept, and volumes are reached where they are today."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.memory import with_sources_of
from instar.hypervisor.libvirt.private_daemon import PrivateDaemon

from .libvirt_harness import LibvirtHarness
from .test_contract import definition, running

SAVED = """<domain><devices>
<disk type='file'><source file='/a'/><serial>root</serial></disk>
<disk type='network'><driver name='qemu'/><source protocol='nbd' name='one' index='1'><host transport='unix' socket='/s'/>
<reconnect delay='10'/></source><serial>v1</serial></disk></devices></domain>"""


@pytest.mark.host
async def test_memory_that_cannot_be_restored_is_said_and_dropped_by_a_hard_reboot(
    private_daemon: PrivateDaemon, tmp_path: Path
) -> None:
    host = await LibvirtHarness.opened(private_daemon, tmp_path / "host")
    try:
        guest = definition(host)
        await running(host, guest)
        await host.wait_until_booted(guest.instance_id, boots=1)
        await host.hypervisor.ensure_suspended(guest.instance_id)
        drive = host.paths.disk(guest.instance_id, "root")
        shutil.copy(drive, tmp_path / "root.qcow2")
        drive.write_bytes(b"damaged")
        for _ in range(2):
            with pytest.raises(HypervisorError, match=r"saved memory .* cannot be restored .*hard reboot") as caught:
                await host.hypervisor.ensure_running(guest)
            assert "/" not in caught.value.message
            assert (await host.hypervisor.ensure_suspended(guest.instance_id)).domain_id is None
        shutil.copy(tmp_path / "root.qcow2", drive)
        await host.hypervisor.ensure_restarted(guest, was_domain_id=None)
        await host.wait_until_booted(guest.instance_id, boots=2)
    finally:
        await host.close()


def test_a_guest_goes_on_with_its_volumes_where_they_are_reached_today() -> None:
    assert with_sources_of(SAVED, SAVED) is None
    assert with_sources_of(SAVED, "<domain><devices/></domain>") is None
    renewed = with_sources_of(SAVED, SAVED.replace("'/s'", "'/elsewhere'").replace("'/a'", "'/b'"))
    assert renewed is not None
    disks = ET.fromstring(renewed).findall("devices/disk")
    assert [host.get("socket") for disk in disks for host in disk.findall("source/host")] == ["/elsewhere"]
    assert ET.tostring(disks[0]) == ET.tostring(ET.fromstring(SAVED).findall("devices/disk")[0])
    assert [child.tag for child in disks[1]] == ["driver", "source", "serial"]
