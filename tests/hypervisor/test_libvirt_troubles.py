"""What the libvirt driver gets over: files that cannot be opened for a moment, guests that are gone between two calls, and
guests that are none of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import libvirt
import msgspec
import pytest

from instar.errors import HypervisorError
from instar.hypervisor.libvirt import console
from instar.hypervisor.libvirt.call_threads import CallThreads
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.guest_events import GuestEvents
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.io_errors import IoErrors
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import GuestEvent, GuestState

WAIT_MAX_S = 30.0
HELD = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
RUNNING = [libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_UNPAUSED]


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_MAX_S):
        while not fact():
            await asyncio.sleep(0.01)


def no_domain() -> libvirt.libvirtError:
    error = libvirt.libvirtError("Domain not found")
    error.err = (libvirt.VIR_ERR_NO_DOMAIN, 0, "Domain not found", 0, "", None, None, 0, 0)
    return error


class Domain:
    """One that QEMU holds still, until somebody resumes it. `cloud`: whose it is; None: nobody's that says so."""

    def __init__(self, cloud: str | None, *, vanishes: bool = False) -> None:
        self.cloud, self.vanishes = cloud, vanishes
        self.asked = self.resumed = 0

    def state(self) -> list[int]:
        self.asked += 1
        if self.vanishes:
            raise no_domain()
        return RUNNING if self.resumed else HELD

    def resume(self) -> None:
        self.resumed += 1

    def metadata(self, _kind: int, uri: str) -> str:
        if self.cloud is None:
            error = libvirt.libvirtError("no metadata")
            error.err = (libvirt.VIR_ERR_NO_DOMAIN_METADATA, 0, "no metadata", 0, "", None, None, 0, 0)
            raise error
        return f'<instance xmlns="{uri}" id="x" cloud="{self.cloud}"/>'


class Libvirtd:
    """Stands for the connection and for what its calls get."""

    def __init__(self, domains: dict[str, Domain]) -> None:
        self.domains = domains

    async def run(self, call: Callable[[Any], Any]) -> Any:
        return call(self)

    def lookupByUUIDString(self, instance_id: str) -> Domain:  # noqa: N802 - libvirt's name
        return self.domains[instance_id]


async def test_only_guests_of_the_cloud_are_helped_over_an_io_error(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path)
    mine, unmarked, other_clouds, nobodys = (str(uuid4()) for _ in range(4))
    domains = {
        mine: Domain(paths.cloud_id), unmarked: Domain(None), other_clouds: Domain("another"), nobodys: Domain(None),
    }  # fmt: skip
    paths.instance(unmarked).mkdir(parents=True)  # somebody has removed its metadata
    errors = IoErrors(cast(LibvirtConnection, Libvirtd(domains)), paths)
    for instance_id in domains:
        errors.noticed(instance_id)
    await until(lambda: all(domain.asked for domain in domains.values()) and not errors._waiting)
    assert [domain.resumed for domain in domains.values()] == [1, 1, 0, 0]
    await errors.close()


async def test_a_guest_that_is_gone_meanwhile_does_not_keep_the_others_from_being_found(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path)
    gone, held = str(uuid4()), str(uuid4())
    domains = {gone: Domain(paths.cloud_id, vanishes=True), held: Domain(paths.cloud_id)}
    errors = IoErrors(cast(LibvirtConnection, Libvirtd(domains)), paths)
    await errors.look([gone, held])
    await until(lambda: domains[held].resumed == 1)
    await errors.close()


class _Gone:
    """A connection that is only closed."""

    def unregisterCloseCallback(self) -> None: ...  # noqa: N802 - libvirt's name
    def close(self) -> None: ...


class _Connection(LibvirtConnection):
    async def _connect(self) -> tuple[Any, tuple[int, ...]]:
        return _Gone(), ()


async def test_a_first_look_that_fails_does_not_end_the_connecting_for_good(tmp_path: Path) -> None:
    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise OSError(errno.EMFILE, "Too many open files")

    connection = _Connection(
        uri="test:///default", host="h", state_dir=tmp_path, settings=LibvirtSettings(), on_connected=look,
        on_lifecycle=lambda *_: None, on_device_removed=lambda _: None, on_lost=lambda: None,
    )  # fmt: skip
    await connection.open()
    try:
        assert connection.connected
        connection._lost.set()  # libvirtd is gone, and comes back
        await until(lambda: looks == 2 and connection.connected)
    finally:
        await connection.close()


async def test_console_logs_are_kept_bounded_also_after_a_moment_without_files(tmp_path: Path) -> None:
    instance_id, asked = str(uuid4()), 0

    class Paths(HostPaths):
        def instance_ids(self) -> tuple[str, ...]:
            nonlocal asked
            asked += 1
            if asked == 1:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().instance_ids()

    paths = Paths(tmp_path)
    log = paths.console_log(instance_id)
    log.parent.mkdir(parents=True)
    log.write_bytes(b"a" * 5000)
    limits = msgspec.structs.replace(
        LibvirtSettings(), console_sweep_s=0.01, console_log_max_bytes=1000, console_log_keep_bytes=100
    )
    sweeping = asyncio.create_task(console.sweep(paths, limits))
    try:
        await until(lambda: log.stat().st_size == 0)
    finally:
        sweeping.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await sweeping


async def test_calls_are_done_again_after_a_moment_in_which_no_thread_could_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = CallThreads(2, name="test-calls")

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            with pytest.raises(HypervisorError):
                await threads.run(lambda: 1)
    async with asyncio.timeout(WAIT_MAX_S):
        assert await threads.run(lambda: 2) == 2
        hold, goes_on = threading.Event(), threading.Event()
        first = asyncio.ensure_future(threads.run(lambda: (hold.set(), goes_on.wait(WAIT_MAX_S))))
        await asyncio.to_thread(hold.wait, WAIT_MAX_S)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            second = asyncio.ensure_future(threads.run(lambda: 3))
            await asyncio.sleep(0)
        goes_on.set()
        await first
        assert await second == 3
    threads.close()


async def test_events_are_told_again_after_one_whose_guest_could_not_be_looked_at() -> None:
    reads, told = 0, list[GuestEvent]()

    async def read(_instance_id: str) -> GuestState:
        nonlocal reads
        reads += 1
        if reads == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return GuestState(exists=True)

    async def is_ours(_instance_id: str) -> bool:
        return True

    events = GuestEvents(read=read, is_ours=is_ours, waiting_max=10)
    events.open(told.append)
    for instance_id in ("a", "b"):
        events.received(instance_id, libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN)
    await until(lambda: [event.instance_id for event in told] == ["b"])
    await events.close()


async def test_a_connection_comes_after_a_moment_in_which_no_thread_could_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Connection(LibvirtConnection):
        def _connect_blocking(self) -> tuple[Any, tuple[int, ...]]:
            return _Gone(), ()

    started, refused = threading.Thread.start, list[str]()

    def start(thread: threading.Thread) -> None:
        if thread.name in ("libvirt-connect", "libvirt-close") and refused.count(thread.name) < 1:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        started(thread)

    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1

    connection = Connection(
        uri="test:///default", host="h", state_dir=tmp_path, settings=LibvirtSettings(), on_connected=look,
        on_lifecycle=lambda *_: None, on_device_removed=lambda _: None, on_lost=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(threading.Thread, "start", start)
    await connection.open()
    try:
        await until(lambda: connection.connected and looks == 1)
        connection._lost.set()  # libvirtd is gone, and comes back
        await until(lambda: looks == 2 and connection.connected)
    finally:
        await connection.close()
    assert refused == ["libvirt-connect", "libvirt-close"]
