"""How guests' QEMU reaches volumes: directly where this host sees the volume's socket, else by a relay on this host.

A relay is a process for each such volume of a guest (`nbd/relay.py`): QEMU has a Unix socket beside it, and between the
machines there is TLS. It outlives the agent, which watches it and starts it again; the machine's restart forgets it, as it
does the guests. The driver asks for it before a guest has the volume, and lets it go when no guest has it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from pathlib import Path

import msgspec
import structlog

from instar.errors import HypervisorError
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.model.guest import GuestDefinition
from instar.model.volume import VolumeConnection, VolumeDisk, VolumeGateway
from instar.nbd.keeper import RelayKeeper
from instar.nbd.monitor import MonitorError
from instar.nbd.place import place_of
from instar.nbd.relay import Key, RelayExport, RelayPlan, TlsSource

log = structlog.get_logger()

NAME_LENGTH = 24  # of a relay: the path of its socket must be short


class VolumeReach:
    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths
        self._keeper = RelayKeeper(paths.runtime / "volumes", paths.runtime / "volumes" / "plans")

    async def open(self) -> None:
        """Relays of an earlier agent go on, or start again."""
        await self._keeper.open()

    async def close(self) -> None:
        """They go on."""
        await self._keeper.close()

    async def from_here(self, guest: GuestDefinition) -> GuestDefinition:
        """The guest with its volumes as they are reached on this host. Raises HypervisorError."""
        if not guest.volumes:
            return guest
        volumes = [await self.volume_from_here(guest.instance_id, volume) for volume in guest.volumes]
        return msgspec.structs.replace(guest, volumes=tuple(volumes))

    async def volume_from_here(self, instance_id: str, volume: VolumeDisk) -> VolumeDisk:
        """The volume as the guest reaches it on this host. Raises HypervisorError."""
        connection = volume.connection
        if not connection.place or await asyncio.to_thread(_is_seen, connection):
            return volume
        if connection.gateway is None:
            raise HypervisorError(reason="the volume is on another machine, which serves none to others (volume.listen)")
        name, plan = _name(instance_id, volume.volume_id), _plan(instance_id, connection, connection.gateway)
        try:
            await self._keeper.ensure(name, plan)
        except MonitorError as error:
            log.warning("volume.not_reached", instance=instance_id, volume=volume.volume_id, reason=error.message)
            raise HypervisorError(reason="the machine that has the volume does not answer, or refuses this host") from None
        local = VolumeConnection(
            export=connection.gateway.export, socket=str(self._keeper.socket(name)), size_bytes=connection.size_bytes,
            read_only=connection.read_only,
        )  # fmt: skip
        return msgspec.structs.replace(volume, connection=local)

    def socket(self, instance_id: str, volume_id: str) -> str:
        """Where QEMU finds the volume if it has a relay."""
        return str(self._keeper.socket(_name(instance_id, volume_id)))

    async def let_go(self, instance_id: str, volume_id: str | None = None) -> None:
        """There is no relay for this volume (None: for any) of the guest, which does not have it any more."""
        plans = self._keeper.plans()
        names = {name for name, plan in plans.items() if plan.about == instance_id}
        if volume_id is not None:
            names &= {_name(instance_id, volume_id)}
        for name in names:
            await self._keeper.end(name)
        if names:
            await asyncio.to_thread(self._tidy)

    def _tidy(self) -> None:
        with contextlib.suppress(OSError):  # not empty: others are in it
            self._paths.runtime.rmdir()


def _is_seen(connection: VolumeConnection) -> bool:
    """Blocking."""
    return connection.socket is not None and place_of(Path(connection.socket).parent) == connection.place


def _name(instance_id: str, volume_id: str) -> str:
    return hashlib.sha256(f"{instance_id} {volume_id}".encode()).hexdigest()[:NAME_LENGTH]


def _plan(instance_id: str, connection: VolumeConnection, gateway: VolumeGateway) -> RelayPlan:
    key = Key(gateway.user, gateway.secret)
    source = TlsSource(gateway.address, gateway.port, gateway.export, key)
    exports = (RelayExport(gateway.export, not connection.read_only),)
    return RelayPlan(source, exports, size_bytes=connection.size_bytes, about=instance_id)
