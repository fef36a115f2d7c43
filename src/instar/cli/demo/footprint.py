"""What a cloud has on this machine outside of its records: the demo looks for it at the end, and nothing may be left.

Only things that carry the cloud's own names are counted: other clouds may come and go on the same machine meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import libvirt

from instar.cli.hosts.local_host import local_hosts_of
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.private_daemon import SYSTEM_URI
from instar.hypervisor.linux_network.names import NETNS_DIR, CloudNames
from instar.volumes.local import volumes_runtime

COMMAND_TIMEOUT_S = 15.0


class Footprint:
    """Of the cloud in `directory` with `cloud_id`. `taps`: names of tap devices that its guests had."""

    def __init__(self, directory: Path, cloud_id: str) -> None:
        self.directory = directory
        self.instance_ids: set[str] = set()
        self.taps: set[str] = set()
        self._names = CloudNames(cloud_id)
        self._runtime = HostPaths(directory).runtime
        self._volumes = volumes_runtime(directory)
        self._host_runtimes: set[Path] = set()  # of the hosts that were there when somebody looked

    def found(self) -> list[str]:
        """Everything of the cloud that is here now, a line each."""
        return [
            *(f"process {pid}: {line}" for pid, line in self._processes()),
            *(f"network interface {name}" for name in self._links()),
            *(f"network namespace {name}" for name in self._namespaces()),
            *(f"nft table {name}" for name in self._tables()),
            *(f"domain {name}" for name in self._domains()),
            *(f"directory {path}" for path in self._directories() if path.exists()),
        ]

    def end_by_force(self) -> None:
        """Kill the processes of the cloud and remove its runtime directory: for when it could not be removed in order."""
        for pid, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for runtime in (self._runtime, self._volumes, *self._host_runtimes):
            shutil.rmtree(runtime, ignore_errors=True)

    def _directories(self) -> list[Path]:
        self._host_runtimes |= {host.runtime for host in local_hosts_of(self.directory / "hosts")}
        return [self.directory, self._runtime, self._volumes, self._names.run_dir, *sorted(self._host_runtimes)]

    def _processes(self) -> list[tuple[int, str]]:
        marks = [*map(str, self._directories()), self._names.tag]
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue  # ended meanwhile
            if any(mark in word for word in words for mark in marks):
                found.append((int(entry.name), " ".join(words)[:120]))
        return found

    def _links(self) -> list[str]:
        names = [link["ifname"] for link in json.loads(_output("ip", "-j", "link") or "[]")]
        return [name for name in names if self._names.tag in name or name in self.taps]

    def _namespaces(self) -> list[str]:
        try:
            return [entry.name for entry in NETNS_DIR.iterdir() if self._names.tag in entry.name]
        except FileNotFoundError:
            return []

    def _tables(self) -> list[str]:
        listed = json.loads(_output("nft", "-j", "list", "tables") or "{}").get("nftables", [])
        names = [entry["table"]["name"] for entry in listed if "table" in entry]
        return [name for name in names if self._names.tag in name]

    def _domains(self) -> list[str]:
        """In the system's libvirtd; a private one is seen as a process."""
        if not Path("/run/systemd/system").is_dir():
            return []
        try:
            connection = libvirt.openReadOnly(SYSTEM_URI)
        except libvirt.libvirtError:
            return []
        try:
            return [one.name() for one in connection.listAllDomains() if one.UUIDString() in self.instance_ids]
        finally:
            connection.close()


def _output(*argv: str) -> str:
    """Standard output; empty when the program is not there or fails, as where nothing could have been made with it."""
    if shutil.which(argv[0]) is None:
        return ""
    return subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False).stdout
