"""A guest made with nothing but the host's own calls: what Instar's guests are measured against.

Its domain is the very definition that libvirt has of one of Instar's guests, under another identity, on the same bridge.
Blocking: called in a thread."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

META_DATA = '{"uuid": "%s", "name": "bare", "hostname": "bare", "availability_zone": "nova", "launch_index": 0}'
ISO_OPTIONS = ["-quiet", "-ldots", "-allow-lowercase", "-allow-multidot", "-l", "-r", "-J", "-V", "config-2"]


class BareGuest:
    """One guest: `build`, then `stop`, `start`, `reboot` as often as wanted, then `delete`, which may always be called.

    `pattern` is the instance whose domain is copied, `state_dir` the directory of its cloud, `base` the image below its
    disk (else the only one in the cache)."""

    def __init__(self, connection: Any, pattern: str, state_dir: Path, base: Path | None = None) -> None:
        self.id = str(uuid.uuid4())
        self._connection = connection
        self._directory = state_dir / "bare" / self.id
        self._base = base or next(path for path in (state_dir / "cache").iterdir() if len(path.name) == 64)
        domain = connection.lookupByUUIDString(pattern)
        self._xml = self._renamed(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), pattern)
        self._domain: Any = None

    def build(self, disk_bytes: int) -> None:
        """Overlay, config drive, define, create."""
        self._directory.mkdir(parents=True)
        self._overlay("root", disk_bytes)
        self._write_config_drive()
        self._domain = self._connection.defineXML(self._xml)
        self._domain.create()
        self._check(libvirt.VIR_DOMAIN_RUNNING)

    def stop(self) -> None:
        self._domain.destroy()

    def start(self) -> None:
        self._domain.create()
        self._check(libvirt.VIR_DOMAIN_RUNNING)

    def reboot(self) -> None:
        """What brings back a guest whose definition was damaged: destroy, define again, create."""
        self._domain.destroy()
        self._domain.undefine()
        self._domain = self._connection.defineXML(self._xml)
        self.start()

    def delete(self) -> None:
        domain, self._domain = self._domain, None
        if domain is not None:
            if domain.isActive():
                domain.destroy()
            domain.undefine()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _overlay(self, disk: str, disk_bytes: int) -> Path:
        path = self._directory / f"{disk}.qcow2"
        base = ["-b", str(self._base), "-F", "qcow2"]
        run("qemu-img", "create", "-q", "-f", "qcow2", *base, str(path), str(disk_bytes))
        return path

    def _check(self, state: int) -> None:
        if self._domain.state()[0] != state:
            raise RuntimeError("the bare guest does not run")

    def _write_config_drive(self) -> None:
        folder = self._directory / "tree" / "openstack" / "latest"
        folder.mkdir(parents=True)
        (folder / "meta_data.json").write_text(META_DATA % self.id)
        (folder / "network_data.json").write_text('{"links": [], "networks": [], "services": []}')
        drive, tree = self._directory / "config.iso", self._directory / "tree"
        run("genisoimage", "-o", str(drive), *ISO_OPTIONS, str(tree))
        shutil.rmtree(tree)

    def _renamed(self, xml: str, pattern: str) -> str:
        xml = xml.replace(f"/instances/{pattern}/", f"/bare/{self.id}/").replace(pattern, self.id)
        domain = ET.fromstring(xml)
        name, metadata = domain.find("name"), domain.find("metadata")
        assert name is not None
        name.text = f"bare-{self.id}"
        if metadata is not None:
            domain.remove(metadata)  # not of the cloud: its census must not see it
        for interface in domain.iter("interface"):
            _set(interface, "mac", "address", "52:54:00:" + ":".join(self.id[at : at + 2] for at in (0, 2, 4)))
            _set(interface, "target", "dev", f"bare{self.id[:8]}")
            alias = interface.find("alias")
            if alias is not None:
                interface.remove(alias)
        return ET.tostring(domain, encoding="unicode")


def _set(parent: ET.Element, tag: str, attribute: str, value: str) -> None:
    element = parent.find(tag)
    if element is None:
        element = ET.SubElement(parent, tag)
    element.set(attribute, value)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)
