"""Where the demo's guests are, past the cloud: the libvirtd and the network of their host, on one host or on several.

Guests are reached from their own host only (docs/decisions/0008-several-hosts-on-one-machine.md), so that pings and
pingers run inside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instar.cli.demo.guest import DemoFailed, Domain
from instar.cli.hosts.local_host import LocalHost, local_hosts_of
from instar.hypervisor.libvirt.private_daemon import SYSTEM_URI, PrivateDaemon, system_libvirtd_usable

PING_TIMEOUT_S = 10.0
PINGER_STOP_S = 5.0


class Places:
    """Of the cloud in `directory`. Every `host` here is the name of one, as the cloud has it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._apart = {host.name: host for host in local_hosts_of(directory / "hosts")}
        self._uri = "" if self._apart else _only_uri(directory)

    @property
    def several(self) -> bool:
        return len(self._apart) > 1

    def other(self, host: str) -> str:
        """A host that is not `host`."""
        return next(name for name in self._apart if name != host)

    def local(self, host: str) -> LocalHost:
        """To pull its plug. Raises KeyError where there is one host only."""
        return self._apart[host]

    def domain(self, host: str, instance_id: str) -> Domain:
        uri = PrivateDaemon(self._apart[host].directory).uri if self._apart else self._uri
        return Domain(uri, instance_id)

    def instance_dir(self, host: str, instance_id: str) -> Path:
        return (self._apart[host].directory if self._apart else self._directory) / "instances" / instance_id

    def answers_ping(self, host: str, address: str) -> bool:
        """One echo request from `host`. Raises DemoFailed when there is no program for it."""
        if shutil.which("ping"):
            command = ["ping", "-n", "-c", "1", "-W", "1", address]
        elif shutil.which("busybox"):
            command = ["busybox", "ping", "-c", "1", "-W", "1", address]
        else:
            raise DemoFailed("This machine has no ping: install iputils-ping or busybox.")
        argv = self._inside(host, *command)
        return subprocess.run(argv, capture_output=True, timeout=PING_TIMEOUT_S, check=False).returncode == 0

    @contextmanager
    def pinging(self, host: str, address: str) -> Iterator[list[float]]:
        """Every host pings `address` all the time; begins with the first answer that `host` has.

        Afterwards the list has when answers came, and at last when it ended, in rising order of monotonic seconds. A guest
        that moves is answered for by its old host, and then by its new one."""
        moments: list[float] = []
        pingers: dict[str, subprocess.Popen[bytes]] = {}
        said = b""
        try:
            for name in self._apart:
                command = self._inside(name, sys.executable, "-m", "instar.cli.demo.pinger", address)
                pingers[name] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", bufsize=0
                )
            said = _first_words(pingers[host], address)
            yield moments
        finally:
            ended = time.monotonic()
            said += b"".join(_end_pinger(pinger) for pinger in pingers.values())
        moments += [*sorted(moment for line in said.splitlines() if (moment := float(line)) < ended), ended]

    def _inside(self, host: str, *command: str) -> list[str]:
        return self._apart[host].inside(*command) if self._apart else list(command)


def _only_uri(directory: Path) -> str:
    return SYSTEM_URI if asyncio.run(system_libvirtd_usable()) else PrivateDaemon(directory).uri


def _first_words(pinger: subprocess.Popen[bytes], address: str) -> bytes:
    """Whole lines: it writes one at a time. Raises DemoFailed where nothing answers."""
    assert pinger.stdout is not None
    if select.select([pinger.stdout], [], [], PING_TIMEOUT_S)[0]:
        return os.read(pinger.stdout.fileno(), 65_536)
    raise DemoFailed(f"{address} does not answer ping.")


def _end_pinger(pinger: subprocess.Popen[bytes]) -> bytes:
    """It ends with its standard input; nsenter would not pass a signal on."""
    try:
        return pinger.communicate(timeout=PINGER_STOP_S)[0]
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pinger.pid, signal.SIGKILL)
        return pinger.communicate()[0]
