"""The sending side of a live migration: libvirtd here hands the running guest to the one there, which this sees to.

The driver calls it. A migration lives no longer than the agent: its data goes through the agent, so whatever ends that ends
the migration, and the guest goes on here. What of it is unfinished is written in the guest's directory (`ownership.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import libvirt
import msgspec
import structlog

from instar.errors import HypervisorError, HypervisorUnavailable, MigrationAborted, OperationError
from instar.hypervisor.contract import Report
from instar.hypervisor.libvirt import domains, ownership
from instar.hypervisor.libvirt.connection import LibvirtConnection
from instar.hypervisor.libvirt.failures import safe_reason
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.live_target import DAEMON, DISKS, MEMORY, NAMES, MigrationSockets, socket_name
from instar.hypervisor.libvirt.live_xml import HostNames, copied_disks, xml_for
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.hypervisor.stream_peers import StreamFetches
from instar.model.guest import GuestDefinition, LiveMigrationOptions, LiveTarget, MigrationProgress, WorkProgress
from instar.model.states import PowerState

POLL_S = 0.1
POLL_MAX_S = 1.0
ENDING_MAX_S = 60.0  # libvirtd has so long to end a migration that was aborted
_FLAGS = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    | libvirt.VIR_MIGRATE_AUTO_CONVERGE
)

log = structlog.get_logger()


class _Move:
    """A migration that runs."""

    __slots__ = ("aborted", "forced", "percent", "progress")

    def __init__(self) -> None:
        self.aborted = False
        self.forced = False
        self.percent = 0
        self.progress = MigrationProgress()


class LiveMigrations:
    def __init__(
        self,
        connection: LibvirtConnection,
        paths: HostPaths,
        sockets: MigrationSockets,
        fetches: StreamFetches | None,
        *,
        settings: LibvirtSettings,
        host: str,
    ) -> None:
        self._connection, self._paths, self._sockets, self._fetches = connection, paths, sockets, fetches
        self._settings, self._host = settings, host
        self._running: dict[str, _Move] = {}

    async def migrate(
        self, guest: GuestDefinition, target: LiveTarget, options: LiveMigrationOptions, report: Report
    ) -> None:
        """See the contract."""
        instance_id = guest.instance_id
        state = await self._connection.run(lambda connection: domains.observe(connection, instance_id))
        if not state.exists:
            await self._hand_over(instance_id, target)
            return
        if state.domain_id is None:
            raise HypervisorError(reason="the guest does not run")
        await self._clear(instance_id)
        move = self._running[instance_id] = _Move()
        try:
            async with self._tunnels(instance_id, target):
                await self._set_going_to(instance_id, target)
                report(WorkProgress(instance_id, 0, move.progress))
                await self._carry_out(move, guest, target, options, report)
        finally:
            del self._running[instance_id]
        await self._hand_over(instance_id, target)
        report(WorkProgress(instance_id, 100, move.progress))

    async def abort(self, instance_id: str) -> None:
        move = self._running.get(instance_id)
        if move is not None:
            move.aborted = True
            await self._abort_job(instance_id)

    async def force(self, instance_id: str) -> None:
        """The guest is held still, so that nothing is left to be sent again. Not post-copy: a guest whose memory is on two
        hosts is lost when the connection between them is."""
        move = self._running.get(instance_id)
        if move is not None:
            move.forced = True

    # --- the migration ----------------------------------------------------------------------------------------------------

    async def _carry_out(
        self, move: _Move, guest: GuestDefinition, target: LiveTarget, options: LiveMigrationOptions, report: Report
    ) -> None:
        instance_id = guest.instance_id
        work = asyncio.ensure_future(
            self._connection.run_apart(lambda connection: self._migrate(connection, guest, target, options))
        )
        try:
            async with asyncio.timeout(self._settings.copy_timeout_s):
                await self._watch(work, move, instance_id, options, report)
        except BaseException:  # cancelled, or too late
            move.aborted = True
            await asyncio.shield(self._end(work, instance_id))
            if not await asyncio.shield(self._is_here(instance_id)):
                await self._hand_over(instance_id, target)
            raise
        failure = work.exception()
        if failure is None:
            return
        # libvirtd's answer may be lost where the guest is not: what counts is where it is.
        if not await self._is_here(instance_id):
            log.warning("live_migration.answer_lost", instance=instance_id)
            return
        await self._clear(instance_id)
        if move.aborted:
            raise MigrationAborted(id=instance_id) from failure
        raise failure

    async def _watch(
        self, work: asyncio.Future[None], move: _Move, instance_id: str, options: LiveMigrationOptions, report: Report
    ) -> None:
        """Until it has ended, one way or the other."""
        pause_s, told_downtime = POLL_S, False
        while not (await asyncio.wait({work}, timeout=pause_s))[0]:
            pause_s = min(pause_s * 1.5, POLL_MAX_S)
            if move.aborted:
                await self._abort_job(instance_id)  # again: the first time may have been before libvirt's job began
                continue
            with contextlib.suppress(OperationError):
                stats = await self._connection.run(lambda connection: _job_stats(connection, instance_id))
                if stats and not told_downtime:
                    told_downtime = True
                    await self._connection.run(
                        lambda connection: _set_downtime(connection, instance_id, options.downtime_ms)
                    )
                if stats:
                    move.progress = _progress(stats)
                    if move.forced and move.progress.memory_total + move.progress.disk_total:
                        # Not before there is something: a guest that is paused when libvirt begins stays so over there.
                        await self._connection.run(lambda connection: self._hold_still(connection, instance_id))
                    move.percent = max(move.percent, _percent(move.progress))
                    report(WorkProgress(instance_id, move.percent, move.progress))

    def _migrate(
        self, connection: Any, guest: GuestDefinition, target: LiveTarget, options: LiveMigrationOptions
    ) -> None:
        """Blocking, for as long as it takes."""
        instance_id = guest.instance_id
        names = msgspec.json.decode(target.details[NAMES], type=HostNames)
        domain = connection.lookupByUUIDString(instance_id)
        live = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE)
        kept = domain.XMLDesc(
            libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE
        )
        here = {self._paths.instance(instance_id), self._paths.socket(instance_id, "console.sock").parent}
        seen = self._sockets.seen_by_libvirt
        parameters: dict[str, Any] = {
            libvirt.VIR_MIGRATE_PARAM_URI: f"unix://{seen(instance_id, MEMORY)}",
            libvirt.VIR_MIGRATE_PARAM_DEST_NAME: names.name,
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: xml_for(live, guest, here, names),
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: xml_for(kept, guest, here, names),
        }
        if options.bandwidth_mib_s:
            parameters[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = options.bandwidth_mib_s
        flags, disks = _FLAGS, copied_disks(live, here)
        if target.shared_storage:
            flags |= libvirt.VIR_MIGRATE_UNSAFE  # both see the same files: the streams' marker says so, libvirt cannot
        elif disks:
            flags |= libvirt.VIR_MIGRATE_NON_SHARED_INC
            parameters[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = disks
            parameters[libvirt.VIR_MIGRATE_PARAM_DISKS_URI] = f"unix://{seen(instance_id, DISKS)}"
        try:
            domain.migrateToURI3(f"qemu+unix:///system?socket={seen(instance_id, DAEMON)}", parameters, flags)
        except libvirt.libvirtError as error:
            if not connection.isAlive():
                raise
            log.warning("live_migration.failed", instance=instance_id, code=error.get_error_code(), text=str(error)[:1000])
            raise HypervisorError(reason=safe_reason(str(error.get_error_message() or error))) from None

    @contextlib.asynccontextmanager
    async def _tunnels(self, instance_id: str, target: LiveTarget) -> AsyncIterator[None]:
        """The sockets of the target are here as well."""
        if self._fetches is None:
            raise HypervisorError(reason="this host takes no streams of others")
        async with contextlib.AsyncExitStack() as stack:
            for what in (DAEMON, MEMORY, DISKS):
                path = await asyncio.to_thread(self._sockets.path, instance_id, what)
                tunnel = await self._fetches.tunnel(path, target.address, socket_name(instance_id, what))
                stack.push_async_callback(tunnel.close)
            yield

    # --- its end ----------------------------------------------------------------------------------------------------------

    async def _end(self, work: asyncio.Future[None], instance_id: str) -> None:
        """An aborted migration has ended, one way or the other; or libvirtd does not end it."""
        deadline = asyncio.get_running_loop().time() + ENDING_MAX_S
        while not work.done() and asyncio.get_running_loop().time() < deadline:
            await self._abort_job(instance_id)
            await asyncio.wait({work}, timeout=POLL_S)
        if work.done():
            work.exception()  # looked at: nobody else will
        with contextlib.suppress(OperationError):
            await self._clear(instance_id)

    async def _abort_job(self, instance_id: str) -> None:
        with contextlib.suppress(OperationError):
            await self._connection.run(lambda connection: _abort_job(connection, instance_id))

    async def _is_here(self, instance_id: str) -> bool:
        """The guest is on this host. While that cannot be known it is taken to be."""
        try:
            state = await self._connection.run(lambda connection: domains.observe(connection, instance_id))
        except HypervisorUnavailable:
            return True
        return state.exists

    async def _clear(self, instance_id: str) -> None:
        """The guest is as before a migration that did not come to its end: not held still, its disks this host's."""
        await self._connection.run(lambda connection: self._let_go_on(connection, instance_id))

    def _let_go_on(self, connection: Any, instance_id: str) -> None:
        directory = self._paths.instance(instance_id)
        owner = ownership.owner_of(directory)
        if owner is None or not (owner.held_still or owner.going_to):
            return
        _abort_job(connection, instance_id)
        if owner.held_still:
            domains.resume(connection, instance_id)
        ownership.write_owner(directory, msgspec.structs.replace(owner, held_still=False, going_to=""))

    def _hold_still(self, connection: Any, instance_id: str) -> None:
        directory = self._paths.instance(instance_id)
        domain = domains.find(connection, instance_id)
        if domain is None or domains.state_of(domain).power_state is not PowerState.RUNNING:
            return
        if directory.is_dir():  # written before: whoever finds it held still must know that nobody wanted that
            owner = ownership.owner_of(directory) or ownership.Ownership(self._host)
            ownership.write_owner(directory, msgspec.structs.replace(owner, held_still=True))
        domain.suspend()

    async def _set_going_to(self, instance_id: str, target: LiveTarget) -> None:
        if target.shared_storage:
            await asyncio.to_thread(self._write_going_to, instance_id, target.address.host)

    def _write_going_to(self, instance_id: str, host: str) -> None:
        directory = self._paths.instance(instance_id)
        if directory.is_dir():
            owner = ownership.owner_of(directory) or ownership.Ownership(self._host)
            ownership.write_owner(directory, msgspec.structs.replace(owner, going_to=host))

    async def _hand_over(self, instance_id: str, target: LiveTarget) -> None:
        """On shared storage the disks are the other host's from now on: nothing of this host removes them."""
        if target.shared_storage:
            directory = self._paths.instance(instance_id)
            await asyncio.to_thread(ownership.hand_over, directory, self._host, target.address.host)


def _job_stats(connection: Any, instance_id: str) -> dict[str, int]:
    """Empty while there is no job."""
    domain = domains.find(connection, instance_id)
    if domain is None:
        return {}
    try:
        stats: dict[str, int] = domain.jobStats()
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            return {}
        raise
    return stats if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) != libvirt.VIR_DOMAIN_JOB_NONE else {}


def _progress(stats: dict[str, int]) -> MigrationProgress:
    names = MigrationProgress.__struct_fields__
    return MigrationProgress(**{name: int(stats.get(name, 0)) for name in names})


def _percent(progress: MigrationProgress) -> int:
    total = progress.memory_total + progress.disk_total
    left = progress.memory_remaining + progress.disk_remaining
    return max(0, min(99, 100 * (total - left) // total)) if total else 0


def _set_downtime(connection: Any, instance_id: str, downtime_ms: int) -> None:
    domain = domains.find(connection, instance_id)
    if domain is not None:
        with contextlib.suppress(libvirt.libvirtError):  # it has ended meanwhile
            domain.migrateSetMaxDowntime(downtime_ms)


def _abort_job(connection: Any, instance_id: str) -> None:
    domain = domains.find(connection, instance_id)
    if domain is not None:
        with contextlib.suppress(libvirt.libvirtError):  # there is none, or no longer
            domain.abortJob()
