"""What the demo sees of the guest past the cloud: its domain as libvirt has it, and what it says on its console log."""

from __future__ import annotations

import re
import time
from typing import NamedTuple
from xml.etree import ElementTree

import libvirt

from instar.errors import InstarError

_BOOT = re.compile(r"INSTAR-BOOT count=(\d+)")
_READY = re.compile(r"INSTAR-READY count=(\d+)")
_ADDRESS = re.compile(r"INSTAR-NET \S+ address=([0-9.]+)/")


DETACH_AGAIN = (libvirt.VIR_ERR_OPERATION_FAILED, libvirt.VIR_ERR_DEVICE_MISSING)


# Refusals are answers here; libvirt would print each of them.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


class DemoFailed(InstarError):
    """What was promised did not come true."""


class Console(NamedTuple):
    """What a console log tells: the last boot's number, the last boot that came up whole, addresses of the last boot."""

    boots: int
    ready: int
    addresses: list[str]


def read_console(log: str) -> Console:
    last_boot = log[log.rfind("INSTAR-BOOT") :] if "INSTAR-BOOT" in log else ""
    boots, ready = _BOOT.findall(log), _READY.findall(log)
    return Console(int(boots[-1]) if boots else 0, int(ready[-1]) if ready else 0, _ADDRESS.findall(last_boot))


class Domain:
    """The guest behind Instar's back. Every call opens a connection: the demo does little, and libvirtd may restart."""

    def __init__(self, uri: str, instance_id: str) -> None:
        self._uri = uri
        self._id = instance_id

    def running_id(self) -> int | None:
        """The domain id, which exists only while the guest runs."""
        connection = libvirt.open(self._uri)
        try:
            domain = connection.lookupByUUIDString(self._id)
            return int(domain.ID()) if domain.isActive() else None
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise
        finally:
            connection.close()

    def nics(self) -> list[str]:
        """Tap devices of the running domain."""
        connection = libvirt.open(self._uri)
        try:
            return [_tap(nic) for nic in _nics(connection.lookupByUUIDString(self._id))]
        finally:
            connection.close()

    def remove_nics(self, *, deadline_s: float) -> None:
        """Pull every NIC out of the running domain, as no cloud should. Raises DemoFailed when one stays."""
        connection = libvirt.open(self._uri)
        try:
            domain = connection.lookupByUUIDString(self._id)
            deadline = time.monotonic() + deadline_s
            while nics := _nics(domain):
                if time.monotonic() > deadline:
                    raise DemoFailed("The NIC could not be removed from the running domain.")
                for nic in nics:
                    try:
                        words = ElementTree.tostring(nic, encoding="unicode")
                        domain.detachDeviceFlags(words, libvirt.VIR_DOMAIN_AFFECT_LIVE)
                    except libvirt.libvirtError as error:
                        # The guest lets go in its own time; a second request for the same device is refused meanwhile.
                        if error.get_error_code() not in DETACH_AGAIN:
                            raise
                time.sleep(0.3)
        finally:
            connection.close()


def _nics(domain: libvirt.virDomain) -> list[ElementTree.Element]:
    tree = ElementTree.fromstring(domain.XMLDesc())  # noqa: S314 - libvirt's own words
    return tree.findall("devices/interface")


def _tap(nic: ElementTree.Element) -> str:
    target = nic.find("target")
    return target.get("dev", "") if target is not None else ""
