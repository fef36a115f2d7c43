"""How tests look at a guest past the cloud: its console, its address, its ssh door, its domain and its process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.private_daemon import SYSTEM_URI, PrivateDaemon
from tests.endtoend.host_leftovers import processes
from tests.endtoend.running_cloud import RunningCloud, wait_until

BOOT_MAX_S = 90.0
SSH_OPTIONS = (
    "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes",
)  # fmt: skip


class Guest:
    """A server of a cloud with real guests, seen from the host."""

    def __init__(self, cloud: RunningCloud, server_id: str, key: Path | None = None) -> None:
        self.cloud, self.id, self._key = cloud, server_id, key

    # --- from outside -----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        (network,) = self.cloud.admin.get(f"/servers/{self.id}")["server"]["addresses"].values()
        address: str = network[0]["addr"]
        return address

    def console(self) -> str:
        answer = self.cloud.admin.act(self.id, {"os-getConsoleOutput": {}})
        assert answer.status_code == 200, answer.text
        output: str = answer.json()["output"]
        return output

    def wait_for_line(self, pattern: str, within_s: float = BOOT_MAX_S) -> re.Match[str]:
        """The last match of `pattern` on the console, once there is one."""
        found: list[re.Match[str]] = []

        def is_there() -> bool:
            found[:] = re.finditer(pattern, self.console())
            return bool(found)

        try:
            wait_until(is_there, within_s, every_s=0.25)
        except AssertionError:
            raise AssertionError(f"no {pattern} within {within_s:g} s on the console:\n{self.console()}") from None
        return found[-1]

    def boots(self) -> int:
        """How often it has booted, by what it said on its console."""
        counts = re.findall(r"INSTAR-BOOT count=(\d+)", self.console())
        return int(counts[-1]) if counts else 0

    def wait_for_boot(self, count: int) -> None:
        """The boot with this number is over: the network and ssh are up."""
        self.wait_for_line(rf"INSTAR-READY count={count} ")
        self.wait_for_line(rf"(?s)INSTAR-BOOT count={count} .*INSTAR-NET eth0 address=")  # not that of an earlier boot

    def near(self, *command: str) -> list[str]:
        """`command` as it runs where the guest can be reached from."""
        return list(command)

    def pings(self) -> bool:
        argv = self.near("busybox", "ping", "-c", "1", "-W", "1", self.address)
        return subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode == 0

    def ssh(self, command: str, *, may_end: bool = False) -> str:
        patience = f"ConnectTimeout={5 if may_end else 30}"  # who asks whether it is up asks again
        options = [word for option in (*SSH_OPTIONS, patience) for word in ("-o", option)]
        done = subprocess.run(
            self.near("ssh", *options, "-i", str(self._key), f"root@{self.address}", command),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert may_end or done.returncode == 0, done.stderr
        return done.stdout.strip()

    # --- past the cloud ---------------------------------------------------------------------------------------------

    @property
    def domain_id(self) -> int:
        with libvirt_of(self.cloud) as connection:
            return int(connection.lookupByUUIDString(self.id).ID())

    def nics(self) -> list[str]:
        """The XML of each NIC of the running domain."""
        with libvirt_of(self.cloud) as connection:
            tree = ElementTree.fromstring(connection.lookupByUUIDString(self.id).XMLDesc())
        return [ElementTree.tostring(nic, encoding="unicode") for nic in tree.findall("devices/interface")]

    def lose_nic(self) -> None:
        """The NIC is unplugged from the running domain, behind the cloud's back."""
        (nic,) = self.nics()
        with libvirt_of(self.cloud) as connection:
            connection.lookupByUUIDString(self.id).detachDeviceFlags(nic, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        wait_until(lambda: not self.nics(), 30, every_s=0.2)

    def lose_domain(self) -> None:
        """The domain is destroyed and its definition forgotten, behind the cloud's back."""
        with libvirt_of(self.cloud) as connection:
            domain = connection.lookupByUUIDString(self.id)
            domain.destroy()
            domain.undefine()

    def kill_process(self) -> None:
        os.kill(self.process(), signal.SIGKILL)

    def process(self) -> int:
        (pid,) = [pid for pid, words in processes() if "qemu-system" in words.split()[0] and self.id in words]
        return pid


@contextmanager
def libvirt_of(cloud: RunningCloud) -> Iterator[Any]:
    """A connection to the libvirtd that this cloud uses."""
    private = (HostPaths(cloud.directory).runtime / "run" / "libvirt-sock").exists()
    connection = libvirt.open(PrivateDaemon(cloud.directory).uri if private else SYSTEM_URI)
    try:
        yield connection
    finally:
        connection.close()


def domains_of(cloud: RunningCloud) -> set[str]:
    """UUIDs of the domains that are defined or running. Of this cloud alone where its libvirtd is its own."""
    with libvirt_of(cloud) as connection:
        return {domain.UUIDString() for domain in connection.listAllDomains()}
