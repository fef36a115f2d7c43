"""What this host must remember of its networks: one small file per instance and per network, written whole.

A process that starts reads them and goes on where the last one was killed. Called in threads by `LinuxNetwork`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from instar.model.network import NetworkDefinition, PortDefinition

log = structlog.get_logger(__name__)

T = TypeVar("T")


class InstanceRecord(msgspec.Struct, frozen=True):
    instance_id: str
    ports: tuple[PortDefinition, ...]


class NetworkRecord(msgspec.Struct, frozen=True):
    """`link_index` is the number of the network's link addresses and conntrack zone on this host."""

    network: NetworkDefinition
    link_index: int


class Records:
    """The files below `state_dir`. A record exists before anything on the host does, and until nothing does."""

    def __init__(self, state_dir: Path) -> None:
        self._instances = state_dir / "instances"
        self._networks = state_dir / "networks"

    def prepare(self) -> None:
        for directory in (self._instances, self._networks):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load(self) -> tuple[dict[str, tuple[PortDefinition, ...]], dict[str, NetworkRecord]]:
        """(ports by instance, record by network). A file that cannot be read is logged and left alone."""
        instances = {record.instance_id: record.ports for record in _read_all(self._instances, InstanceRecord)}
        networks = {record.network.id: record for record in _read_all(self._networks, NetworkRecord)}
        return instances, networks

    def save_instance(self, instance_id: str, ports: tuple[PortDefinition, ...]) -> None:
        write_whole(self._instances / f"{instance_id}.json", msgspec.json.encode(InstanceRecord(instance_id, ports)))

    def save_network(self, record: NetworkRecord) -> None:
        write_whole(self._networks / f"{record.network.id}.json", msgspec.json.encode(record))

    def forget_instance(self, instance_id: str) -> None:
        (self._instances / f"{instance_id}.json").unlink(missing_ok=True)

    def forget_network(self, network_id: str) -> None:
        (self._networks / f"{network_id}.json").unlink(missing_ok=True)

    def forget_everything(self) -> None:
        for directory in (self._instances, self._networks):
            for path in directory.glob("*.json*"):
                path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes, *, mode: int = 0o600, group_id: int = -1) -> None:
    """Replace a file so that readers, and a start after a crash, see the old content or the new, never a part."""
    draft = path.with_name(path.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        if group_id >= 0:
            os.fchown(descriptor, 0, group_id)
    draft.replace(path)


def _read_all(directory: Path, kind: type[T]) -> list[T]:
    found: list[T] = []
    for path in sorted(directory.glob("*.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=kind))
        except (OSError, msgspec.DecodeError) as error:
            log.error("network.record_unreadable", file=path.name, error=str(error))
    return found
