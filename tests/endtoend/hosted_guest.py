"""A guest on one of several hosts, reached through the host where it runs now, and what its inside says of its life."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from instar.cli.hosts.local_host import LocalHost
from tests.endtoend.guest_access import Guest
from tests.endtoend.host_leftovers import processes
from tests.endtoend.running_cloud import RunningCloud, wait_until

UP_MAX_S = 120.0  # a boot on a machine with other things to do
PING_EVERY_S = 0.05
# Counts in the memory of a process alone: a guest that booted anew, or was copied, does not have it.
COUNT = """
[ ! -e /run/counter ] || exit 0
counting='n=0; while :; do n=$((n + 1)); echo $n > /run/counter.new; mv /run/counter.new /run/counter; usleep 200000; done'
setsid sh -c "$counting" < /dev/null > /dev/null 2>&1 &
"""
PULSE = "cat /proc/sys/kernel/random/boot_id /proc/uptime; cat /run/counter 2> /dev/null || echo 0"
PING = "ping -i {every:g} {address} > /run/pings 2>&1 < /dev/null & echo $! > /run/pings.pid; cat /proc/uptime"
PINGED = """cat /proc/uptime; read -r pid < /run/pings.pid; kill -INT $pid
while kill -0 $pid 2> /dev/null; do usleep 50000; done; cat /run/pings"""


class Pulse(NamedTuple):
    """A sign of life: which boot it is, for how long it is up, and how far its counter is (0: it has none)."""

    boot_id: str
    uptime_s: float
    counter: int


class HostedGuest(Guest):
    """A server of `instar up --hosts N`, with a key that opens its door."""

    def __init__(self, cloud: RunningCloud, server_id: str, key: Path) -> None:
        super().__init__(cloud, server_id, key)
        self._seen_boot = ""

    @property
    def host(self) -> str:
        return str(self.cloud.admin.get(f"/servers/{self.id}")["server"]["OS-EXT-SRV-ATTR:host"])

    def near(self, *command: str) -> list[str]:
        return LocalHost(self.cloud.directory / "hosts", self.host).inside(*command)

    def emulators(self) -> list[int]:
        """Every process on this machine, whichever the host, that runs this guest."""
        return [pid for pid, words in processes() if "qemu-system" in words.split()[0] and self.id in words]

    # --- how it lives -----------------------------------------------------------------------------------------------

    def pulse(self) -> Pulse:
        boot_id, uptime, counter = self.ssh(PULSE).splitlines()
        return Pulse(boot_id, float(uptime.split()[0]), int(counter))

    def wait_for_new_boot(self) -> None:
        """Up again, and it is not the boot that was seen last."""

        def is_up() -> bool:
            boot_id = self.ssh("cat /proc/sys/kernel/random/boot_id", may_end=True)
            if not boot_id or boot_id == self._seen_boot:
                return False
            self._seen_boot = boot_id
            return True

        try:
            wait_until(is_up, UP_MAX_S, every_s=0.3)
        except AssertionError:
            raise AssertionError(f"no new boot within {UP_MAX_S:g} s; its console: {self.console()[-2000:]}") from None

    def start_counting(self) -> None:
        self.ssh(COUNT)
        wait_until(lambda: self.pulse().counter > 0, 20)

    def check_goes_on(self, before: Pulse) -> None:
        """The same boot as before, its clock went on, and what runs in it runs."""
        now = self.pulse()
        assert now.boot_id == before.boot_id and now.uptime_s >= before.uptime_s and now.counter >= before.counter
        wait_until(lambda: self.pulse().counter > now.counter, 20)

    # --- what it keeps ----------------------------------------------------------------------------------------------

    def write(self, path: str, text: str) -> None:
        self.ssh(f"echo {text} > {path} && sync")

    def read(self, path: str) -> str:
        """Empty when there is no such file."""
        return self.ssh(f"cat {path} 2> /dev/null", may_end=True)

    def disk_mib(self, name: str = "vda") -> int:
        return int(self.ssh(f"cat /sys/block/{name}/size")) // 2048

    def root_mib(self) -> int:
        """The size of the root file system, not of its disk."""
        return int(self.ssh("df -m / | tail -n 1").split()[1])

    def device_of(self, volume_id: str) -> str | None:
        """The name of the disk that is this volume."""
        for line in self.ssh("grep -H . /sys/block/*/serial", may_end=True).splitlines():
            found = re.fullmatch(r"/sys/block/(\w+)/serial:(\S+)", line)
            if found is not None and volume_id.startswith(found[2]):
                return found[1]
        return None

    def nic_names(self) -> set[str]:
        return set(self.ssh("ls /sys/class/net").split()) - {"lo"}

    # --- whom it reaches --------------------------------------------------------------------------------------------

    def reaches(self, other: HostedGuest) -> bool:
        return "1 packets received" in self.ssh(f"ping -c 1 -W 1 {other.address}", may_end=True)

    def start_pinging(self, other: HostedGuest) -> float:
        """Returns this guest's uptime at the start, for `longest_silence`."""
        return float(self.ssh(PING.format(every=PING_EVERY_S, address=other.address)).split()[0])

    def longest_silence(self, began_s: float) -> float:
        """Seconds between two answers that came after one another, from the start of the pings to now."""
        said = self.ssh(PINGED)
        took_s = float(said.split()[0]) - began_s
        sent = re.search(r"(\d+) packets transmitted", said)
        answers = re.findall(r"seq=(\d+) ttl=\d+ time=([\d.]+) ms", said)
        assert sent is not None and len(answers) > 5, said
        every_s = took_s / int(sent[1])  # a guest whose processor is emulated does not keep to it
        at = sorted(int(number) * every_s + float(time_ms) / 1000 for number, time_ms in answers)
        return max(after - before for before, after in zip([0.0, *at], [*at, took_s], strict=True))
