"""The private libvirtd: adopted, restarted, side by side with another one, and gone without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import libvirt
import pytest

from instar.errors import HypervisorUnavailable, StartupError
from instar.hypervisor.libvirt import private_daemon
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.states import PowerState
from tests.patience import PATIENCE_S, patience

from .libvirt_harness import LibvirtHarness
from .test_contract import definition, running

STARTER = """
import asyncio, sys, time
from pathlib import Path
from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
asyncio.run(PrivateDaemon(Path(sys.argv[1])).ensure_running())
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[PrivateDaemon]:
    made = PrivateDaemon(tmp_path / "state")
    (tmp_path / "state").mkdir()
    try:
        yield made
    finally:
        await made.ensure_stopped()


def processes_of(directory: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(HostPaths(directory).runtime) in words or str(directory) in words:
            found.append(words.replace("\0", " "))
    return found


@pytest.mark.host
async def test_a_daemon_is_adopted_with_its_guests_when_its_starter_was_killed(
    daemon: PrivateDaemon, tmp_path: Path
) -> None:
    state_dir = tmp_path / "state"
    starter = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        STARTER,
        str(state_dir),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert starter.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            while b"ready" not in await starter.stdout.readline():
                continue
        pid = daemon.libvirtd_pid()
        assert pid is not None
        host = await LibvirtHarness.opened(daemon, tmp_path)
        guest = definition(host)
        state = await running(host, guest)
    finally:
        starter.kill()
        await starter.wait()
    await daemon.ensure_running()
    assert daemon.libvirtd_pid() == pid
    await host.reopen()
    assert await host.hypervisor.observe(guest.instance_id) == state
    await host.close()


@pytest.mark.host
async def test_libvirtd_that_was_killed_comes_back_by_itself_and_guests_do_not_notice(
    daemon: PrivateDaemon, tmp_path: Path
) -> None:
    await daemon.ensure_running()
    host = await LibvirtHarness.opened(daemon, tmp_path)
    guest = definition(host)
    state = await running(host, guest)
    await host.wait_until_booted(guest.instance_id, boots=1)
    for _ in range(2):
        await asyncio.to_thread(daemon.kill_libvirtd, signal.SIGKILL)
        await host.daemon_back()
        assert await host.hypervisor.observe(guest.instance_id) == state
    # Events work on the new connection, and the guest kept its memory: it has booted once.
    await host.hypervisor.ensure_stopped(guest.instance_id, grace_s=20)
    assert b"boots=2" not in await host.hypervisor.console_output(guest.instance_id, length_bytes=10_000)
    await host.close()


@pytest.mark.host
@pytest.mark.parametrize("emulator_lives", [True, False])
async def test_guest_in_whose_start_libvirtd_was_killed_is_off_and_holds_nothing_up(
    daemon: PrivateDaemon, tmp_path: Path, emulator_lives: bool
) -> None:
    """Its state names no process yet, and the job of its start: the next libvirtd held that job for ever."""
    await daemon.ensure_running()
    host = await LibvirtHarness.opened(daemon, tmp_path)
    guest = definition(host)
    await running(host, guest)
    await daemon.hold()
    (state,) = (HostPaths(tmp_path / "state").runtime / "run" / "qemu").glob("*.xml")
    emulator = int(state.with_suffix(".pid").read_text())
    if not emulator_lives:
        os.kill(emulator, signal.SIGKILL)
    unborn = "<domstatus state='paused' reason='starting up' pid='0'><job type='none' async='start'/>"
    state.write_text(re.sub(r"<domstatus [^>]*>", unborn, state.read_text(), count=1))
    await daemon.ensure_running()
    await host.daemon_back()
    assert (await host.hypervisor.observe(guest.instance_id)).power_state is PowerState.SHUTDOWN
    with pytest.raises(ProcessLookupError):
        os.kill(emulator, 0)
    assert (await host.hypervisor.ensure_running(guest)).power_state is PowerState.RUNNING
    await host.close()


def test_a_daemon_that_starts_meanwhile_reads_its_configuration_whole(tmp_path: Path) -> None:
    daemon = PrivateDaemon(tmp_path / "state", runtime_root=tmp_path)
    daemon._prepare()
    file = tmp_path / "state" / "libvirt" / "etc" / "qemu.conf"
    before = file.stat().st_ino
    daemon._prepare()
    assert file.stat().st_ino == before
    file.write_text("of an earlier version")
    with file.open() as reading:
        daemon._prepare()
        assert reading.read() == "of an earlier version"
    assert file.read_text() == private_daemon.QEMU_CONF
    assert {path.name for path in file.parent.iterdir() if path.is_file()} == {"libvirtd.conf", "qemu.conf"}


@pytest.mark.host
async def test_a_daemon_whose_reaper_was_killed_is_adopted_and_can_be_stopped(
    daemon: PrivateDaemon, tmp_path: Path
) -> None:
    await daemon.ensure_running()
    before = daemon.libvirtd_pid()
    runtime = HostPaths(tmp_path / "state").runtime
    reaper = int((runtime / "reaper.pid").read_text())
    async with asyncio.timeout(PATIENCE_S):
        while not (runtime / "serve.pid").exists():
            await asyncio.sleep(0.02)
    assert daemon._reaper_pid() == reaper
    os.kill(reaper, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while daemon._reaper_pid() == reaper:
            await asyncio.sleep(0.02)
    await PrivateDaemon(tmp_path / "state").ensure_running()
    assert daemon.libvirtd_pid() == before is not None
    await daemon.ensure_stopped()
    async with asyncio.timeout(PATIENCE_S):
        while processes_of(tmp_path / "state"):
            await asyncio.sleep(0.02)


@pytest.mark.host
async def test_two_daemons_do_not_know_each_other(daemon: PrivateDaemon, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = PrivateDaemon(tmp_path / "other")
    try:
        await asyncio.gather(daemon.ensure_running(), other.ensure_running())
        first, second = libvirt.open(daemon.uri), libvirt.open(other.uri)
        xml = "<domain type='qemu'><name>x</name><memory>65536</memory><os><type>hvm</type></os></domain>"
        first.defineXML(xml)
        assert [domain.name() for domain in first.listAllDomains()] == ["x"]
        assert second.listAllDomains() == []
        first.close()
        second.close()
        await other.ensure_stopped()
        assert daemon.libvirtd_pid() is not None
    finally:
        await other.ensure_stopped()


@pytest.mark.host
async def test_two_starters_at_once_get_one_daemon(daemon: PrivateDaemon, tmp_path: Path) -> None:
    uris = await asyncio.gather(daemon.ensure_running(), PrivateDaemon(tmp_path / "state").ensure_running())
    assert uris == [daemon.uri, daemon.uri]
    # Only a machine's own libvirtd that does likewise is used in its place.
    assert await asyncio.to_thread(private_daemon._runs_qemu_as_root, daemon.uri)
    assert not await asyncio.to_thread(private_daemon._runs_qemu_as_root, f"{daemon.uri}-of-nobody")
    assert len([line for line in processes_of(tmp_path / "state") if line.startswith("libvirtd")]) == 1


@pytest.mark.host
async def test_stopping_ends_guests_and_processes_and_keeps_definitions(
    daemon: PrivateDaemon, tmp_path: Path
) -> None:
    await daemon.ensure_running()
    host = await LibvirtHarness.opened(daemon, tmp_path)
    guest = definition(host)
    await running(host, guest)
    await host.hypervisor.close()
    for _ in range(2):
        await daemon.ensure_stopped()
        assert processes_of(tmp_path / "state") == []
        assert not HostPaths(tmp_path / "state").runtime.exists()
    await daemon.ensure_running()
    connection = libvirt.open(daemon.uri)
    assert [domain.UUIDString() for domain in connection.listAllDomains()] == [guest.instance_id]
    connection.close()


def asked_in(namespace: Path) -> list[int]:
    """Processes of QEMU that libvirtd in this mount namespace has started to learn what QEMU is able to do."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if b"qemu-system" in words and b"/qmp-" in words and (entry / "ns/mnt").readlink() == namespace:
                found.append(int(entry.name))
    return found


@pytest.mark.host
@pytest.mark.parametrize("then", ["goes on", "is stopped"])
async def test_what_a_killed_libvirtd_was_asking_ends_with_it(daemon: PrivateDaemon, then: str) -> None:
    """It would stay for ever: nobody but that libvirtd knows of it."""
    await daemon.ensure_running()
    namespace = await asyncio.to_thread(Path(f"/proc/{daemon.libvirtd_pid()}/ns/mnt").readlink)
    connection = libvirt.open(daemon.uri)
    question = asyncio.create_task(asyncio.to_thread(connection.getDomainCapabilities, None, "x86_64", None, "qemu"))
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(asked_in, namespace):
            assert not question.done(), "it was quicker than we could see"
    await (daemon.hold() if then == "is stopped" else asyncio.to_thread(daemon.kill_libvirtd))
    await (daemon.ensure_stopped() if then == "is stopped" else daemon.ensure_running())
    with contextlib.suppress(libvirt.libvirtError):
        await question
    assert then == "goes on" or asked_in(namespace) == []
    async with asyncio.timeout(PATIENCE_S):
        while await asyncio.to_thread(asked_in, namespace):
            await asyncio.sleep(0.05)


@pytest.mark.host
async def test_a_daemon_that_hangs_is_given_up_and_found_again(daemon: PrivateDaemon, tmp_path: Path) -> None:
    await daemon.ensure_running()
    settings = LibvirtSettings(call_timeout_s=0.5, keepalive_interval_s=1, keepalive_count=1)
    host = await LibvirtHarness.opened(daemon, tmp_path, settings)
    pid = daemon.libvirtd_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(12):  # more than there are threads
            started = time.monotonic()
            with pytest.raises(HypervisorUnavailable):
                await host.hypervisor.observe(str(uuid4()))
            assert time.monotonic() - started < 2 * patience()
    finally:
        os.kill(pid, signal.SIGCONT)
    host.settings = LibvirtSettings()  # half a second may be too short for what is asked from here on
    await host.reopen()
    await host.close()


async def test_a_driver_opens_without_a_daemon_and_says_so(tmp_path: Path) -> None:
    host = LibvirtHarness(PrivateDaemon(tmp_path / "state"), tmp_path, LibvirtSettings())
    await host.hypervisor.open(host.events.append)
    with pytest.raises(HypervisorUnavailable):
        await host.hypervisor.inventory()
    await host.hypervisor.close()


@pytest.mark.host
async def test_a_state_directory_inside_libvirts_own_is_refused() -> None:
    with pytest.raises(StartupError):
        await PrivateDaemon(Path("/var/lib/libvirt/instar")).ensure_running()
