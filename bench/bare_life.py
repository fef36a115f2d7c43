"""What an operator would do to a guest by hand, with libvirt and qemu-img alone: the measure of Instar's operations.

Only what the end asks for: no record, no packet filter, no lease, no checksum, no config drive of a guest that has one, and
no definition anew of one that only starts again. A copy of a disk is one `qemu-img convert` with its defaults, or libvirt's
backup job; a second row has it with `sync` of the file besides, because a copy that a power failure takes is none, above
all where the disk itself goes next.

Blocking: called in a thread. The guest is the tiny one of the tests, which hears the power button when it has booted, and
lets go of devices."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from bench.bare_libvirt import BareGuest, run

POLL_S = 0.002
DEADLINE_S = 60.0
DISK_BYTES = 1 << 30


class BareLife(BareGuest):
    """See BareGuest. Copies of the disk go to `copies` beside it, and are removed by `forget_copy`."""

    @property
    def _root(self) -> Path:
        return self._directory / "root.qcow2"

    @property
    def _copy(self) -> Path:
        return self._directory / "copy.qcow2"

    def wait_booted(self, count: int) -> None:
        wait_for_boots(self._directory / "console.log", count)

    # --- one method for each operation --------------------------------------------------------------------------------

    def create(self) -> None:
        self.build(DISK_BYTES)

    def pause(self) -> None:
        self._domain.suspend()

    def unpause(self) -> None:
        self._domain.resume()

    def suspend(self) -> None:
        self._domain.managedSave(libvirt.VIR_DOMAIN_SAVE_RUNNING)

    def resume(self) -> None:
        self.start()

    def copy_running(self) -> None:
        """By a backup job, as QEMU does it while the guest goes on."""
        backup = ET.Element("domainbackup", mode="push")
        disk = ET.SubElement(ET.SubElement(backup, "disks"), "disk", name="vda", type="file")
        ET.SubElement(disk, "target", file=str(self._copy))
        ET.SubElement(disk, "driver", type="qcow2")
        self._domain.backupBegin(ET.tostring(backup, encoding="unicode"), None, 0)
        self._until(lambda: self._domain.jobStats()["type"] == libvirt.VIR_DOMAIN_JOB_NONE)
        ended = self._domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
        if ended["type"] != libvirt.VIR_DOMAIN_JOB_COMPLETED:
            raise RuntimeError("the backup job failed")

    def convert(self) -> None:
        self._convert(self._root)

    def sync_copy(self) -> None:
        """What `sync FILE` does."""
        with self._copy.open("rb") as file:
            os.fsync(file.fileno())

    def forget_copy(self) -> None:
        self._copy.unlink(missing_ok=True)

    def shut_down(self) -> None:
        self._domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        self._until(lambda: self._domain.state()[0] == libvirt.VIR_DOMAIN_SHUTOFF)

    def reboot_soft(self) -> None:
        self.shut_down()
        self.start()

    def attach_volume(self) -> None:
        """A disk in a file beside the guest's own."""
        self._attach(_disk(self._directory / "volume.qcow2"))

    def detach_volume(self) -> None:
        self._detach("disk", _disk(self._directory / "volume.qcow2"))

    def attach_served_volume(self) -> None:
        """The same file over NBD, by a process that serves it: as volumes are that other hosts reach, too."""
        file = self._directory / "volume.qcow2"
        run(
            "qemu-storage-daemon", "--daemonize", "--pidfile", str(self._server),
            "--blockdev", f"driver=qcow2,node-name=volume,file.driver=file,file.filename={file}",
            "--nbd-server", f"addr.type=unix,addr.path={self._directory / 'volume.sock'}",
            "--export", "type=nbd,id=volume,node-name=volume,name=volume,writable=on",
        )  # fmt: skip
        self._attach(_served_disk(self._directory / "volume.sock"))

    def detach_served_volume(self) -> None:
        self._detach("disk", _served_disk(self._directory / "volume.sock"))
        self._end_server()

    def delete(self) -> None:
        self._end_server()
        super().delete()

    def make_volume(self) -> None:
        run("qemu-img", "create", "-q", "-f", "qcow2", str(self._directory / "volume.qcow2"), str(DISK_BYTES))

    def attach_interface(self) -> None:
        self._attach(self._second_interface())

    def detach_interface(self) -> None:
        self._detach("interface", self._second_interface())

    def shelve(self) -> None:
        self.shut_down()
        self.convert()

    def unshelve(self) -> None:
        """A copy of what the shelve made, as for a host elsewhere; the disk on top of it."""
        self._domain.undefine()
        shelved = self._copy.rename(self._directory / "shelved.qcow2")
        self._convert(shelved)
        self._root.unlink()
        base, self._base = self._base, shelved
        self._overlay("root", DISK_BYTES)
        self._base = base
        self._define(self._xml)

    def rescue(self) -> None:
        self.shut_down()
        path = self._overlay("rescue", DISK_BYTES)
        self._define(_with_rescue(self._xml, path))

    def unrescue(self) -> None:
        self.shut_down()
        self._define(self._xml)
        (self._directory / "rescue.qcow2").unlink()

    def rebuild(self) -> None:
        self._domain.destroy()
        self._root.unlink()
        self._overlay("root", DISK_BYTES)
        self._define(self._xml)

    def resize(self) -> None:
        """More memory, on the host where it is."""
        self.shut_down()
        domain = ET.fromstring(self._xml)
        for tag in ("memory", "currentMemory"):
            element = domain.find(tag)
            assert element is not None
            element.text = str(int(element.text or "0") * 2)
        self._define(ET.tostring(domain, encoding="unicode"))

    def revert(self) -> None:
        self._domain.destroy()
        self._define(self._xml)

    @property
    def _server(self) -> Path:
        return self._directory / "volume.pid"

    def _end_server(self) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(self._server.read_text()), signal.SIGTERM)  # it removes the file

    def _second_interface(self) -> ET.Element:
        """As the first, with a MAC and a tap of its own."""
        first = ET.fromstring(self._xml).find("devices/interface")
        assert first is not None
        for tag in ("alias", "address", "target"):
            for element in first.findall(tag):
                first.remove(element)
        mac = first.find("mac")
        assert mac is not None
        mac.set("address", "52:54:01:" + ":".join(self.id[at : at + 2] for at in (0, 2, 4)))
        return first

    def _attach(self, device: ET.Element) -> None:
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
        self._domain.attachDeviceFlags(ET.tostring(device, encoding="unicode"), flags)

    def _detach(self, kind: str, device: ET.Element) -> None:
        """Until the guest has let go of it."""
        before = self._count(kind)
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
        self._domain.detachDeviceFlags(ET.tostring(device, encoding="unicode"), flags)
        self._until(lambda: self._count(kind) < before)

    def _count(self, kind: str) -> int:
        return len(ET.fromstring(self._domain.XMLDesc()).findall(f"devices/{kind}"))

    def _convert(self, source: Path) -> None:
        run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", str(source), str(self._copy))

    def _define(self, xml: str) -> None:
        self._domain = self._connection.defineXML(xml)
        self.start()

    def _until(self, done: Any) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the bare guest is not ready after {DEADLINE_S:g} s")
            time.sleep(POLL_S)


def _disk(path: Path) -> ET.Element:
    disk = ET.Element("disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="qcow2", cache="none", io="threads", discard="unmap")
    ET.SubElement(disk, "source", file=str(path))
    ET.SubElement(disk, "target", dev="vdb", bus="virtio")
    return disk


def _served_disk(socket: Path) -> ET.Element:
    disk = ET.Element("disk", type="network", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="raw", cache="none", discard="unmap")
    source = ET.SubElement(disk, "source", protocol="nbd", name="volume")
    ET.SubElement(source, "host", transport="unix", socket=str(socket))
    ET.SubElement(disk, "target", dev="vdb", bus="virtio")
    return disk


def wait_for_boots(console: Path, count: int) -> None:
    """Blocking, until the tiny guest has said `count` times that it booted."""
    deadline = time.monotonic() + DEADLINE_S
    while not console.exists() or console.read_bytes().count(b"TINY boots=") < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the guest has not booted {count} times: {console}")
        time.sleep(POLL_S)


def _with_rescue(xml: str, path: Path) -> str:
    """The rescue disk first, the guest's own second."""
    domain = ET.fromstring(xml)
    devices = domain.find("devices")
    assert devices is not None
    first = next(disk for disk in devices.findall("disk") if disk.get("device", "disk") == "disk")
    second = copy.deepcopy(first)
    for tag in ("alias", "address", "boot"):
        for element in second.findall(tag):
            second.remove(element)
    source, target = first.find("source"), second.find("target")
    assert source is not None
    assert target is not None
    source.set("file", str(path))
    target.set("dev", "vdb")
    devices.insert(list(devices).index(first) + 1, second)
    return ET.tostring(domain, encoding="unicode")
