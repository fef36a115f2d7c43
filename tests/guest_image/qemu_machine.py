"""A bare QEMU machine for the tests of the guest image: one CPU, 128 MiB, no hypervisor service in between."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

from tests.patience import patience

STOP_TIMEOUT_S = 30


class QemuMachine:
    """Starts on entry, ends its own process on exit. The serial console goes to `console`; ssh is at `ssh_port`."""

    def __init__(self, folder: Path, disk: Path, *extra: str, nics: int = 1) -> None:
        self._folder = folder
        self.console = folder / f"console-{time.monotonic_ns()}.log"
        self._monitor_path = folder / "monitor"
        self.ssh_port = free_port()
        network = [
            f"user,id=n0,hostfwd=tcp:127.0.0.1:{self.ssh_port}-:22",
            *(f"user,id=n{index},net=10.0.{index + 2}.0/24" for index in range(1, nics)),
        ]
        self._command = [
            "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,tb-size=64", "-cpu", "qemu64", "-m", "128",
            "-nodefaults", "-display", "none", "-serial", f"file:{self.console}",
            "-qmp", f"unix:{self._monitor_path},server=on,wait=off",
            "-drive", f"file={disk},if=none,id=root,format=qcow2", "-device", "virtio-blk-pci,drive=root",
            "-device", "pcie-root-port,id=port0,slot=10",
        ]  # fmt: skip
        for index, backend in enumerate(network):
            device = f"virtio-net-pci,netdev=n{index},mac=52:54:00:00:00:0{index},romfile="
            self._command += ["-netdev", backend, "-device", device]
        self._command += extra
        self.started_at = 0.0

    def __enter__(self) -> QemuMachine:
        self._monitor_path.unlink(missing_ok=True)
        self.console.touch()
        self.started_at = time.monotonic()
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(STOP_TIMEOUT_S)

    def wait_for_line(self, pattern: str, *, timeout_s: float = 90) -> re.Match[str]:
        """The first whole console line that matches. Fails with what the console said when none comes."""
        deadline = time.monotonic() + timeout_s * patience()
        while time.monotonic() < deadline:
            said = self.console.read_text(errors="replace").replace("\r", "")
            if found := re.search(rf"^{pattern}$\n", said, flags=re.MULTILINE):
                return found
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no line {pattern!r} on the console, which says:\n{self.console.read_text()[-2000:]}")

    def execute(self, command: str, **arguments: object) -> None:
        """One QMP command. Fails when QEMU refuses it."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(10 * patience())
            monitor.connect(str(self._monitor_path))
            answers = monitor.makefile("r")
            answers.readline()
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                monitor.sendall(json.dumps(request).encode())
                while "return" not in (answer := json.loads(answers.readline())):
                    assert "error" not in answer, answer

    def power_button(self) -> float:
        """Press it; seconds until the machine is off. Fails when it stays on."""
        pressed_at = time.monotonic()
        self.execute("system_powerdown")
        self._process.wait(STOP_TIMEOUT_S * patience())
        return time.monotonic() - pressed_at


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_config_drive(folder: Path, metadata: dict[str, object], user_data: str | None = None) -> Path:
    """An ISO image with label config-2, in OpenStack's layout."""
    latest = folder / "drive/openstack/latest"
    latest.mkdir(parents=True)
    (latest / "meta_data.json").write_text(json.dumps(metadata))
    if user_data is not None:
        (latest / "user_data").write_text(user_data)
    image = folder / "config.iso"
    options = ["-quiet", "-ldots", "-allow-lowercase", "-allow-multidot", "-l", "-V", "config-2", "-r", "-J"]
    subprocess.run(["genisoimage", "-o", str(image), *options, str(folder / "drive")], check=True)
    return image
