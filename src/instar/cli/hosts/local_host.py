"""One host that this machine plays: namespaces of its own, held by a first process that outlives every agent.

    CLOUD_DIR/hosts/NAME/     all that the host keeps: disks, records of its networks, its libvirtd's definitions, fences
    /run/instar-ID/           what a restart of the host forgets (ID: see HostPaths)

Made by `LocalHosts`, by `instar host`, and by tests, for which `power_off` is the crash of a host. Everything here blocks
for at most some seconds. How and why: docs/decisions/0008-several-hosts-on-one-machine.md.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import time
from importlib import resources
from pathlib import Path

from instar.cli.state_dir import MODE
from instar.errors import StartupError
from instar.hypervisor.libvirt.host_paths import HostPaths

START_MAX_S = 15.0
END_MAX_S = 30.0
POLL_S = 0.02
NAME_MAX = 63
EMULATOR = "qemu-system-"
OFF = "off"  # the file that keeps a host from being started
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")
PROGRAMS = ("unshare", "nsenter", "setpriv", "setsid", "tini", "hostname", "flock", "ip", "nft")
_NAME = re.compile(r"[a-z0-9](-?[a-z0-9])*")


def check_machine() -> None:
    """Raises StartupError where this machine cannot play hosts."""
    if os.geteuid() != 0:
        raise StartupError("More than one host with libvirt needs root: they live in namespaces of their own.")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise StartupError(f"The machine lacks {', '.join(missing)}, which several hosts need.")


def local_hosts_of(hosts_dir: Path) -> list[LocalHost]:
    """Every host that ever was in this directory, in the order of their numbers."""
    names = [path.name for path in hosts_dir.iterdir() if path.is_dir()] if hosts_dir.is_dir() else []
    hosts = [LocalHost(hosts_dir, name) for name in names if _NAME.fullmatch(name)]
    return sorted(hosts, key=lambda host: (len(host.name), host.name))


class LocalHost:
    """The host `name` of the cloud whose hosts are in `hosts_dir`. Raises StartupError for what cannot be a name."""

    def __init__(self, hosts_dir: Path, name: str) -> None:
        if not _NAME.fullmatch(name) or len(name) > NAME_MAX:
            raise StartupError(f"{name[:NAME_MAX]!r} cannot be the name of a host.")
        self.name = name
        paths = HostPaths(hosts_dir / name)
        self.directory = paths.state_dir
        self.runtime = paths.runtime

    @property
    def process(self) -> int | None:
        """The first process, as the machine numbers it; None when the host is off."""
        return next((pid for pid, words in _processes() if _is_init(words, str(self.directory))), None)

    @property
    def agent(self) -> int | None:
        """The process of the host's agent, as the machine numbers it."""
        marks = {"agent", str(self.directory.parent.parent), self.name}
        for pid, words in _processes():
            if Path(words[0]).name.startswith("python") and marks <= set(words):
                return pid
        return None

    @property
    def has_guests(self) -> bool:
        """Whether an emulator runs in it."""
        process = self.process
        if process is None:
            return False
        namespace = _namespace(process)
        return any(Path(words[0]).name.startswith(EMULATOR) and _namespace(pid) == namespace for pid, words in _processes())

    @property
    def is_off(self) -> bool:
        """Whether it was switched off, and must not be started by anybody but `power_on`."""
        return (self.directory / OFF).exists()

    def ensure_started(self) -> int:
        """The first process of the host, which runs. Raises StartupError, also where it is switched off meanwhile."""
        found = self.process
        if found is not None:
            return found
        self.directory.mkdir(mode=MODE, parents=True, exist_ok=True)
        script = str(resources.files("instar.cli.hosts") / "host.sh")
        command = ["setsid", "--fork", "unshare", *NAMESPACES, "--propagation", "private", "--fork"]
        with (self.directory / "host.log").open("wb") as output:
            subprocess.run(
                [*command, "/bin/sh", script, str(self.directory), str(self.runtime), self.name],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", timeout=START_MAX_S, check=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_MAX_S
        while (found := self.process) is None:
            if time.monotonic() > deadline:
                said = (self.directory / "host.log").read_text(errors="replace").strip()[-300:]
                raise StartupError(f"The namespaces of host {self.name} could not be made: {said or 'no reason given'}")
            time.sleep(POLL_S)
        if self.is_off:  # since its starter looked: there was nothing yet that could be killed
            self.kill()
            raise StartupError(f"The host {self.name} was switched off while it was started.")
        return found

    def inside(self, *command: str) -> list[str]:
        """`command` as it runs in the host. Raises StartupError when the host is off."""
        process = self.process
        if process is None:
            raise StartupError(f"The host {self.name} is not running.")
        return ["nsenter", "--target", str(process), *NAMESPACES, "--", *command]

    def power_off(self) -> None:
        """As if its plug were pulled: every process of it is killed, guests and libvirtd too. Stays so until `power_on`."""
        if not self.directory.is_dir():
            raise StartupError(f"There is no host {self.name} in {self.directory.parent}.")
        (self.directory / OFF).touch()
        self.kill()

    def power_on(self) -> None:
        """Whoever sees to the host starts it, within a second."""
        (self.directory / OFF).unlink(missing_ok=True)

    def kill(self) -> None:
        """Every process of the host is gone, and its namespaces with them."""
        while (process := self.process) is not None:
            _kill_and_wait(process)

    def remove(self) -> None:
        """Nothing of the host is left on the machine, its disks included."""
        self.kill()
        shutil.rmtree(self.runtime, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def rest(self) -> None:
        """Nothing of it runs, its disks stay. For a host without guests."""
        self.kill()
        shutil.rmtree(self.runtime, ignore_errors=True)


def _is_init(words: list[str], directory: str) -> bool:
    return Path(words[0]).name == "tini" and words[-1] == directory


def _namespace(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""  # ended meanwhile


def _processes() -> list[tuple[int, list[str]]]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                words = (path / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            except OSError:
                continue  # ended meanwhile
            found.append((int(path.name), words))
    return found


def _kill_and_wait(process: int) -> None:
    """The first process of a pid namespace ends after all others of it. Raises StartupError when it does not end."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(END_MAX_S * 1000):
            raise StartupError(f"A host's processes did not end within {END_MAX_S:g} seconds.")
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)
