"""A private libvirtd for one state directory, where no service manager runs one (containers, tests).

`instar up` asks `system_libvirtd_usable` first. If not: `PrivateDaemon(state_dir).ensure_running()` starts one or adopts
the one that an earlier process left; it outlives its starter, because guests need it. `ensure_stopped` ends it with its
guests. How and why: docs/decisions/0003-private-libvirtd.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree as ET

import libvirt
import structlog

from instar.errors import StartupError
from instar.file_lock import lock_within
from instar.hypervisor.libvirt.host_paths import HostPaths

SYSTEM_URI = "qemu:///system"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
LOCK_TIMEOUT_S = 60.0
END_ROUNDS_MAX = 5
POLL_S = 0.02  # no event tells that a socket of another process has begun to listen
LOG_MAX_BYTES = 4 << 20
PROGRAMS = ("libvirtd", "tini", "unshare", "setsid", "qemu-system-x86_64", "qemu-img")
LIBVIRT_DIRECTORIES = tuple(map(Path, ("/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/etc/libvirt")))

# As root without relabelling: base images stay as they are, and no service (virtlogd, machined) is needed.
QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
stdio_handler = "file"
cgroup_controllers = []
"""
LIBVIRTD_CONF = """\
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_rw_perms = "0700"
unix_sock_ro_perms = "0700"
listen_tls = 0
listen_tcp = 0
log_level = 4
"""

log = structlog.get_logger()


async def system_libvirtd_usable(*, timeout_s: float = 30.0) -> bool:
    """A service manager (systemd) runs here, its libvirtd answers us, and QEMU runs as root there: then no private one is
    needed. As another user it could not make its sockets in the directories of instances, which are root's alone.

    A libvirtd that has just begun asks its emulators first what they can, which takes a while."""
    if not await asyncio.to_thread(Path("/run/systemd/system").is_dir):
        return False
    return await _within(timeout_s, _runs_qemu_as_root, SYSTEM_URI)


class PrivateDaemon:
    """The private libvirtd of one state directory. Every method may be called again, by any process."""

    def __init__(self, state_dir: Path, *, runtime_root: Path = Path("/run"), host_uuid: str | None = None) -> None:
        """`host_uuid` None: the machine's own, which is right where it has one libvirtd that others migrate to."""
        paths = HostPaths(state_dir, runtime_root=runtime_root)
        self._state_dir = paths.state_dir
        self._base = paths.state_dir / "libvirt"
        self._runtime = paths.runtime
        self._host_uuid = host_uuid

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self._runtime}/run/libvirt-sock"

    async def ensure_running(self) -> str:
        """The URI of the daemon, which answers. Adopts one that runs already. Raises StartupError with the reason."""
        await asyncio.to_thread(self._check_host)
        await asyncio.to_thread(self._prepare)
        with await asyncio.to_thread(self._locked):
            self._held.unlink(missing_ok=True)
            adopted = await asyncio.to_thread(self._reaper_pid) is not None
            if not adopted:
                await asyncio.to_thread(self._clear_stale_runtime)
                await self._start()
            await self._wait_until_it_answers()
        log.info("libvirtd.ready", adopted=adopted)
        return self.uri

    async def ensure_stopped(self) -> None:
        """Guests, libvirtd and reaper are gone, and the runtime directory. Guests are destroyed: nobody would reap
        them. Definitions and disks stay in the state directory."""
        if not await asyncio.to_thread(self._base.is_dir):
            return
        with await asyncio.to_thread(self._locked):
            reaper = await asyncio.to_thread(self._reaper_pid)
            if reaper is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_TIMEOUT_S):
                        await asyncio.to_thread(_destroy_all_guests, self.uri)
                await asyncio.to_thread(self._end, reaper)
            await asyncio.to_thread(shutil.rmtree, self._runtime, ignore_errors=True)
        log.info("libvirtd.stopped")

    async def hold(self) -> None:
        """libvirtd ends and is not started again before `ensure_running`; guests go on. For maintenance and tests."""
        await asyncio.to_thread(self._held.touch)
        await asyncio.to_thread(self.kill_libvirtd)

    def kill_libvirtd(self, signal_number: int = signal.SIGKILL) -> None:
        """libvirtd dies, and is started again unless held. Blocking. Waits until it is gone."""
        pid = self.libvirtd_pid()
        if pid is not None:
            _signal_and_wait(pid, signal_number, STOP_TIMEOUT_S)

    def libvirtd_pid(self) -> int | None:
        """The process of libvirtd, None when it does not run. Blocking."""
        return _live_pid(self._runtime / "run" / "libvirtd.pid", "libvirtd", str(self._runtime))

    @property
    def _held(self) -> Path:
        return self._runtime / "held"

    def _check_host(self) -> None:
        if os.geteuid() != 0:
            raise StartupError("A private libvirtd needs root: start as root, or run the system's libvirtd.")
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise StartupError(
                f"The host lacks {', '.join(missing)}: install libvirt-daemon, qemu-system-x86 and tini."
            )
        if any(self._state_dir.is_relative_to(directory) for directory in LIBVIRT_DIRECTORIES):
            raise StartupError("The state directory lies in libvirt's own directory: choose another place.")

    def _prepare(self) -> None:
        for directory in ("lib", "cache", "log", "etc/qemu/networks", "etc/nwfilter"):
            (self._base / directory).mkdir(mode=0o711, parents=True, exist_ok=True)
        (self._runtime / "run").mkdir(mode=0o711, parents=True, exist_ok=True)
        _ensure_says(self._base / "etc" / "qemu.conf", QEMU_CONF)
        host_uuid = f'host_uuid = "{self._host_uuid}"\n' if self._host_uuid else ""
        _ensure_says(self._base / "etc" / "libvirtd.conf", LIBVIRTD_CONF + host_uuid)

    @contextlib.contextmanager
    def _hold_lock(self) -> Iterator[None]:
        """Two starters of the same directory take turns. Blocking, bounded."""
        with (self._base / "lock").open("w") as lock:
            lock_within(lock, LOCK_TIMEOUT_S, "Another process is starting or stopping the private libvirtd.")
            yield

    def _locked(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(self._hold_lock())
        return stack

    def _reaper_pid(self) -> int | None:
        """Where the reaper was killed: what it started, which keeps libvirtd running and holds the reaper's lock."""
        reaper = _live_pid(self._runtime / "reaper.pid", "tini", str(self._runtime))
        return reaper or _live_pid(self._runtime / "serve.pid", "sh", str(self._runtime))

    def _clear_stale_runtime(self) -> None:
        """What a daemon left that died with its machine. Guests' state files stay: libvirtd sorts them out itself."""
        for name in ("reaper.pid", "serve.pid", "run/libvirtd.pid", "run/libvirt-sock", "run/libvirt-sock-ro"):
            (self._runtime / name).unlink(missing_ok=True)
        log_file = self._base / "daemon.log"
        if log_file.exists() and log_file.stat().st_size > LOG_MAX_BYTES:
            os.truncate(log_file, 0)

    async def _start(self) -> None:
        """`setsid --fork` ends at once, so the daemon is nobody's child: it lives on whatever happens to us."""
        script = str(resources.files("instar.hypervisor.libvirt") / "supervise.sh")
        with await asyncio.to_thread((self._base / "daemon.log").open, "ab") as output:
            process = await asyncio.create_subprocess_exec(
                *("setsid", "--fork", "unshare", "--mount", "--propagation", "slave"),
                *("/bin/sh", script, "mount", str(self._base), str(self._runtime)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
            )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await process.wait()
        except TimeoutError as error:
            raise StartupError(f"setsid did not return within {START_TIMEOUT_S:g} seconds.") from error

    async def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if (self._runtime / "run" / "libvirt-sock").exists() and await _within(START_TIMEOUT_S, _connects, self.uri):
                return
            await asyncio.sleep(POLL_S)
        raise StartupError(f"The private libvirtd did not answer within {START_TIMEOUT_S:g} seconds.")

    def _end(self, reaper: int) -> None:
        """Blocking. What is left in the mount namespace when libvirtd has ended is its own, too: guests that it could not
        end, and a QEMU that it was asking for its abilities when it was killed."""
        self._held.touch()
        self.kill_libvirtd(signal.SIGTERM)
        for _ in range(END_ROUNDS_MAX):  # one that was just becoming a daemon is another process afterwards
            left = _emulators_beside(reaper)
            for pid in left:
                _signal_and_wait(pid, signal.SIGKILL, STOP_TIMEOUT_S)
            if not left:
                break
        _signal_and_wait(reaper, signal.SIGTERM, STOP_TIMEOUT_S)


def _ensure_says(file: Path, text: str) -> None:
    """Blocking. A daemon that starts at this very moment, or after a disk was found full, reads all of it: with half of it
    libvirtd would run guests as another user."""
    with contextlib.suppress(FileNotFoundError):
        if file.read_text() == text:
            return
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}")  # of our own: there may be two starters
    try:
        part.write_text(text)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


async def _within(timeout_s: float, question: Callable[[str], bool], uri: str) -> bool:
    """The answer to a question that connects to `uri`; no where it does not come in time: its thread is left behind."""
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.to_thread(question, uri)
    except TimeoutError:
        return False


def _connects(uri: str) -> bool:
    with _connected(uri) as connection:
        return connection is not None


def _runs_qemu_as_root(uri: str) -> bool:
    """Debian's libvirtd runs it as libvirt-qemu, unless /etc/libvirt/qemu.conf says otherwise."""
    with _connected(uri) as connection:
        if connection is None:
            return False
        found = ET.fromstring(connection.getCapabilities())  # noqa: S314 - libvirt's own
    return (found.findtext("host/secmodel[model='dac']/baselabel") or "").startswith("+0:")


@contextlib.contextmanager
def _connected(uri: str) -> Iterator[libvirt.virConnect | None]:
    """None where nobody answers."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # a refusal is an answer, not an incident
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError:
        yield None
        return
    try:
        yield connection
    finally:
        connection.close()


def _destroy_all_guests(uri: str) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        connection = libvirt.open(uri)
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            with contextlib.suppress(libvirt.libvirtError):  # ended meanwhile
                domain.destroy()
        connection.close()


def _live_pid(pid_file: Path, program: str, argument: str) -> int | None:
    """The process that a pid file names, if it lives and is that program with `argument` in its command line: pids are
    used again."""
    try:
        pid = int(pid_file.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, ValueError):
        return None
    if program not in Path(words[0]).name or not any(argument in word for word in words):
        return None
    return pid


def _emulators_beside(reaper: int) -> list[int]:
    """QEMU processes in the mount namespace of the reaper, which is its daemon's alone."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        namespace = Path(f"/proc/{reaper}/ns/mnt").readlink()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ends just now
                words = (path / "cmdline").read_bytes().split(b"\0")
                if b"qemu" in words[0] and (path / "ns/mnt").readlink() == namespace:
                    found.append(int(path.name))
    return found


def _signal_and_wait(pid: int, signal_number: int, timeout_s: float) -> None:
    """Signal a process that is not our child, and wait for its end; SIGKILL when it takes too long. Blocking."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal_number)
        if not _ends_within(descriptor, timeout_s):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            _ends_within(descriptor, timeout_s)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def _ends_within(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
