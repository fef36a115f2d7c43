"""Hosts on one machine: each a network namespace whose LinuxNetwork runs in a process inside it, on one underlay."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from instar.hypervisor.linux_network.names import CloudNames
from instar.model.network import PortDefinition
from tests.patience import patience

from .conftest import Guest, command
from .host_process import Call

CALL_MAX_S = 30.0
PROGRAM = Path(__file__).with_name("host_process.py")


class Host:
    """One host, `address` in the underlay. Made, it has no agent yet: see `start`, and `close` in any case."""

    def __init__(self, folder: Path, bridge: str, address: str, cloud_id: str) -> None:
        self.address, self.names = address, CloudNames(cloud_id)
        self.namespace = "instarhost" + uuid.uuid4().hex[:8]
        self._folder, self._cloud_id = folder / self.namespace, cloud_id
        command("ip", "netns", "add", self.namespace)
        underlay = "tu" + self.namespace[-8:]
        command("ip", "link", "add", underlay, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        command("ip", "link", "set", underlay, "master", bridge, "up")
        for line in ("link set lo up", "link set eth0 up", f"addr add {address}/24 dev eth0"):
            self.ip(*line.split())

    def start(self) -> None:
        """The agent's process."""
        # `ip netns exec` mounts the sysfs of the namespace.
        argv = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--propagation", "private"]
        argv += [sys.executable, str(PROGRAM), str(self._folder), self._cloud_id, self.address]
        log = self._folder.with_suffix(".log").open("ab")
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        log.close()
        assert self._answer() == "ready"

    def ip(self, *words: str, check: bool = True) -> str:
        return command("ip", "-n", self.namespace, *words, check=check)

    def run(self, *argv: str, check: bool = True) -> str:
        return command("ip", "netns", "exec", self.namespace, *argv, check=check)

    def ensure(self, instance_id: str, *ports: PortDefinition) -> None:
        self.call(Call("ensure_ports", instance_id, ports))

    def ensure_none(self, instance_id: str) -> None:
        self.call(Call("ensure_no_ports", instance_id))

    def call(self, call: Call) -> object:
        assert self._process.stdin
        self._process.stdin.write(msgspec.json.encode(call) + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> object:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], CALL_MAX_S * patience())
        answer = msgspec.json.decode(self._process.stdout.readline() or b'["died"]') if ready else ["silent"]
        assert not isinstance(answer, list) or not answer or answer[0] not in ("failed", "died", "silent"), (
            answer, self._folder.with_suffix(".log").read_text()[-2000:])  # fmt: skip
        return answer

    def plug(self, port: PortDefinition) -> Guest:
        return Guest(port, self.names.bridge(port.network.id), host=self.namespace)

    def links(self) -> list[str]:
        return [line.split(": ")[1].split("@")[0] for line in self.ip("-o", "link").splitlines()]

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.call(Call("remove_everything"))
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        command("ip", "netns", "del", self.namespace, check=False)


class Underlay:
    """The wire between hosts."""

    def __init__(self) -> None:
        self.bridge = "tw" + uuid.uuid4().hex[:8]
        command("ip", "link", "add", self.bridge, "type", "bridge")
        command("ip", "link", "set", self.bridge, "up")

    def close(self) -> None:
        command("ip", "link", "del", self.bridge, check=False)


def eventually(check: Callable[[], bool], within_s: float = 5.0) -> bool:
    began = time.monotonic()
    while not check():
        if time.monotonic() - began > within_s * patience():
            return False
    return True
