"""Volumes for hosts of other machines: a process for each gives it on by TLS. Called by `exports.py`.

A host's key is made of a secret of ours, the attachment and the host: the same whenever it is asked for, of no use for
another attachment or host, and taken back when the attachment leaves its host. Then its connections are cut as well:
a host that was given up for lost cannot write to the volume any more, should it only have been out of reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import secrets
import socket
from collections.abc import Collection
from pathlib import Path

import msgspec
import structlog

from instar.config import VolumeSettings
from instar.errors import VolumeFailed
from instar.model.volume import VolumeGateway
from instar.nbd.keeper import RelayKeeper
from instar.nbd.monitor import MonitorError
from instar.nbd.relay import Key, RelayExport, RelayPlan, UnixSource
from instar.store.volume_records import AttachmentRecord, VolumeRecord

log = structlog.get_logger()

HOSTS_MAX = 3  # of one attachment: where it is, and where it was until a live migration was over
PORT_ATTEMPTS = 20
WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


class Gateways:
    """`runtime` is for processes, `plans` for what must stay as it is over a restart of the machine: ports. `secret` is a
    file, made when it is needed first."""

    def __init__(self, runtime: Path, plans: Path, secret: Path, settings: VolumeSettings) -> None:
        self._secret = secret
        self._settings = settings
        self._keeper = RelayKeeper(runtime, plans)

    async def open(self) -> None:
        """Gateways of an earlier process go on or start again."""
        await self._keeper.open()

    async def close(self) -> None:
        """They go on."""
        await self._keeper.close()

    def volumes(self) -> list[str]:
        """Those that have a gateway."""
        return list(self._keeper.plans())

    def is_planned(self, volume_id: str) -> bool:
        """Whether the volume has a gateway; also before `open`. Blocking."""
        return self._keeper.is_planned(volume_id)

    async def are_needed(self, host_ip: str) -> bool:
        """Whether a host at this address may be on another machine."""
        return bool(self._settings.listen) and not await asyncio.to_thread(_is_ours, host_ip)

    async def offer(
        self, volume: VolumeRecord, attachment: AttachmentRecord, path: str, *, size_bytes: int, host_ip: str
    ) -> VolumeGateway:
        """The attachment's host may reach the volume, which is served at the Unix socket `path`. Raises VolumeFailed."""
        export = _export_for(await asyncio.to_thread(_secret_in, self._secret), volume, attachment)
        before = self._keeper.plans().get(volume.id)
        others = [one for one in before.exports if one.name != export.name] if before is not None else []
        mine = [one for one in others if one.about == attachment.id][-(HOSTS_MAX - 1) :]
        exports = (*(one for one in others if one.about != attachment.id), *mine, export)
        source = UnixSource(path, volume.export)
        plan = RelayPlan(source, exports, self._settings.listen, size_bytes=size_bytes, about=volume.id)
        port = await self._ensure(volume.id, plan, before)
        assert export.key is not None, "made above"
        address = await asyncio.to_thread(self._address_for, host_ip)
        return VolumeGateway(address, port, export.name, export.key.user, export.key.secret)

    async def keep_only(self, volume_id: str, attachments: Collection[str]) -> None:
        """Hosts of other attachments are cut off, and their keys are of no use any more."""
        before = self._keeper.plans().get(volume_id)
        if before is None:
            return
        exports = tuple(one for one in before.exports if one.about in attachments)
        if not exports:
            await self._keeper.end(volume_id)
        elif exports != before.exports:
            try:
                await self._keeper.ensure(volume_id, msgspec.structs.replace(before, exports=exports))
            except MonitorError as error:  # it has ended, and starts again without them
                log.warning("gateway.restarted", volume=volume_id, reason=error.message)

    async def opened_anew(self, volume_id: str, size_bytes: int) -> None:
        """The volume has another size: clients are cut off for a moment, and connect again by themselves."""
        before = self._keeper.plans().get(volume_id)
        if before is not None:
            try:
                await self._keeper.ensure(volume_id, msgspec.structs.replace(before, size_bytes=size_bytes), anew=True)
            except MonitorError as error:
                log.warning("gateway.not_opened", volume=volume_id, reason=error.message)  # it is tried again

    async def _ensure(self, volume_id: str, plan: RelayPlan, before: RelayPlan | None) -> int:
        """Its port: the one that it had, else one that is free. Raises VolumeFailed."""
        taken = {one.port for name, one in self._keeper.plans().items() if name != volume_id}
        ports = [before.port] if before is not None else self._ports(volume_id, taken)
        reason = "no port is left for it"
        for port in ports:
            try:
                await self._keeper.ensure(volume_id, msgspec.structs.replace(plan, port=port))
                return port
            except MonitorError as error:
                reason = error.message
                if "ddress already in use" not in reason:
                    break
        log.error("gateway.failed", volume=volume_id, reason=reason)
        raise VolumeFailed(volume_id=volume_id, reason="its data cannot be served to other machines")

    def _address_for(self, host_ip: str) -> str:
        """Where that host finds us: what was set, else the address by which this machine speaks to it. Blocking."""
        told = self._settings.advertise or self._settings.listen
        if told not in WILDCARDS:
            return told
        family = socket.AF_INET6 if ":" in host_ip else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((host_ip, 9))  # sends nothing
            return str(probe.getsockname()[0])
        return told

    def _ports(self, volume_id: str, taken: set[int]) -> list[int]:
        """Some that no other volume has, beginning somewhere else for each."""
        first, count = self._settings.port_first, self._settings.ports
        begin = int(hashlib.sha256(volume_id.encode()).hexdigest(), 16) % count
        free = (first + (begin + step) % count for step in range(count))
        return [port for port in free if port not in taken and port < 65536][:PORT_ATTEMPTS]


def _export_for(secret: bytes, volume: VolumeRecord, attachment: AttachmentRecord) -> RelayExport:
    def made_of(purpose: str) -> str:
        words = f"{purpose}\n{volume.export}\n{attachment.id}\n{attachment.host}"
        return hmac.new(secret, words.encode(), hashlib.sha256).hexdigest()

    key = Key(user=made_of("user")[:32], secret=made_of("secret"))
    return RelayExport(made_of("export")[:28], not attachment.read_only, key, about=attachment.id)


def _secret_in(file: Path) -> bytes:
    """Blocking."""
    with contextlib.suppress(FileNotFoundError):
        return file.read_bytes()
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(secrets.token_bytes(32))
            opened.flush()
            os.fsync(opened.fileno())
        with contextlib.suppress(FileExistsError):  # somebody was first: that one is the secret
            os.link(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file.read_bytes()


def _is_ours(address: str) -> bool:
    """Whether this machine has the address. Blocking."""
    if not address:
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True
