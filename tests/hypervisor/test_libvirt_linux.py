"""What only a real system in a guest can show: memory that goes on, devices that are seen, an agent that helps."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import socket
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from structlog.testing import capture_logs

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import ConfigDrive, DiskDefinition, GuestDefinition, ImageSource
from instar.model.volume import VolumeDisk

from .libvirt_harness import LibvirtHarness
from .linux_image import linux_image
from .test_contract import MIB, port
from .test_contract_copies import Reports, target_at
from .test_libvirt_copies import with_domain
from .test_libvirt_guest import wait_for_line

ANSWER_TIMEOUT_S = 300.0
PATIENT = LibvirtSettings(agent_timeout_s=120, unplug_timeout_s=120.0)  # with a guest that shares its processor


class Shell:
    """The shell on the guest's serial console."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def ask(self, command: str) -> str:
        return await asyncio.to_thread(self._ask, command)

    def _ask(self, command: str) -> str:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as console:
            console.settimeout(ANSWER_TIMEOUT_S)
            console.connect(str(self._path))
            # The echo of the command has the quotes, the answer has not.
            console.sendall(f"\necho 'BE''GIN'; {command}; echo 'E''ND'\n".encode())
            text = ""
            while (found := re.search(r"BEGIN\r?\n(.*?)\r?\n?END", text, re.DOTALL)) is None:
                received = console.recv(4096)
                assert received
                text += received.decode(errors="replace")
            return found[1]

    async def wait_for(self, command: str, expected: str) -> None:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while expected not in await self.ask(command):
                await asyncio.sleep(0.2)


def linux(image: ImageSource) -> GuestDefinition:
    instance_id = str(uuid4())
    meta_data = {"uuid": instance_id, "hostname": "linux", "meta": {"console_shell": "1"}}
    return GuestDefinition(
        instance_id=instance_id,
        name=f"instance-{instance_id[:8]}",
        vcpus=1,
        memory_mib=128,
        disks=(DiskDefinition("root", 96 * MIB, image=image),),
        config_drive=ConfigDrive(msgspec.json.encode(meta_data).decode(), "{}"),
    )


async def start(host: LibvirtHarness, guest: GuestDefinition) -> Shell:
    image = guest.disks[0].image
    assert image is not None
    await host.hypervisor.ensure_image(image)
    await host.hypervisor.ensure_disk(guest.instance_id, guest.disks[0])
    await host.hypervisor.ensure_running(guest)
    await wait_for_line(host, guest.instance_id, "INSTAR-READY")
    return Shell(host.paths.socket(guest.instance_id, "console.sock"))


@pytest.mark.host
@pytest.mark.guest
@pytest.mark.slow
async def test_a_linux_guest_keeps_its_memory_sees_its_devices_and_helps_by_its_agent(
    private_daemon: PrivateDaemon, tmp_path: Path
) -> None:
    image = await linux_image(tmp_path)
    host = await LibvirtHarness.opened(private_daemon, tmp_path / "host", PATIENT)
    try:
        guest = linux(image)
        shell = await start(host, guest)

        # Devices come and go.
        volume = VolumeDisk(str(uuid4()), await host.volume(), "vdb")
        larger = msgspec.structs.replace(guest, ports=(port(host, 0),), volumes=(volume,))
        await host.hypervisor.ensure_ports(guest.instance_id, larger.ports)
        await host.hypervisor.ensure_port_plugged(larger, larger.ports[0].id)
        await host.hypervisor.ensure_volume_attached(larger, volume.volume_id)
        await shell.wait_for("cat /sys/class/net/eth0/address", larger.ports[0].mac_address)
        await shell.wait_for("cat /sys/block/*/serial", volume.volume_id[:20])
        assert "1+0 records" in await shell.ask("echo on volume | dd of=/dev/vdb bs=512 count=1 conv=sync,fsync 2>&1")

        # The memory goes on, with the devices.
        await shell.ask("echo in memory > /tmp/note; sleep 100000 & true")
        await host.hypervisor.ensure_suspended(guest.instance_id)
        await host.hypervisor.ensure_running(larger)
        assert "in memory" in await shell.ask("cat /tmp/note")
        assert "sleep 100000" in await shell.ask("ps")
        assert "on volume" in await shell.ask("dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null")
        await host.hypervisor.ensure_volume_detached(guest.instance_id, volume.volume_id)
        await host.hypervisor.ensure_port_unplugged(guest.instance_id, larger.ports[0].id)
        assert "vdb" not in await shell.ask("ls /sys/block")
        assert "eth0" not in await shell.ask("ls /sys/class/net")
        assert host.volume_file(volume.connection).read_bytes().startswith(b"on volume")

        # The agent sets a password.
        before = await shell.ask("cat /etc/shadow")
        await host.hypervisor.set_password(guest.instance_id, "root", "it's: a \\secret")
        after = await shell.ask("cat /etc/shadow")
        assert before != after
        assert "root:$6$" in after
        with pytest.raises(HypervisorError, match="agent"):
            await host.hypervisor.set_password(guest.instance_id, "nobody-here", "secret")

        # A snapshot of the running guest, which its agent freezes for a moment, is a disk that boots.
        await shell.ask("echo on disk > /root/note")
        path = tmp_path / "snapshot"
        with capture_logs() as logs:
            taken = await host.hypervisor.take_snapshot(guest.instance_id, "root", target_at(path), Reports())
        assert [entry for entry in logs if entry["event"] == "snapshot.not_quiesced"] == []
        assert await asyncio.to_thread(with_domain, host, guest, lambda domain: domain.fsThaw()) == 0
        assert "alive" in await shell.ask("echo alive > /root/alive; cat /root/alive")
        await host.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
        content = await asyncio.to_thread(path.read_bytes)
        snapshot = ImageSource(
            "snapshot", path.as_uri(), "qcow2", hashlib.sha256(content).hexdigest(), len(content), taken.virtual_size_bytes
        )
        copy = linux(snapshot)
        shell = await start(host, copy)
        await wait_for_line(host, copy.instance_id, "INSTAR-BOOT count=2 ")
        assert "on disk" in await shell.ask("cat /root/note")
        assert "root:$6$" in await shell.ask("cat /etc/shadow")
    finally:
        await host.close()
