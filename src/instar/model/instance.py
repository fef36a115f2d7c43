"""An instance: indexed columns for what is filtered and sorted, two documents for the rest.

`InstanceSpec` is what the user asked for; the API writes it, guarded by `revision`. `InstanceFacts` is what operations
found out; only the engine writes it, and only one operation at a time runs. So neither ever overwrites the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from instar.model.network import InstancePort, RequestedNetwork
from instar.model.states import PowerState, TaskState, VmState, status_of
from instar.model.volume import VolumeConnection

# What operations remember in `system_metadata`, under the names that the field uses.
SHELVED_AT, SHELVED_IMAGE, SHELVED_HOST = "shelved_at", "shelved_image_id", "shelved_host"


class Flavor(msgspec.Struct, frozen=True):
    """A size. It is copied into the instance, so that a flavor that is deleted later changes nothing."""

    id: str
    name: str
    vcpus: int
    memory_mib: int
    root_gib: int
    ephemeral_gib: int = 0
    swap_mib: int = 0
    rxtx_factor: float = 1.0
    is_public: bool = True
    disabled: bool = False
    description: str | None = None
    extra_specs: dict[str, str] = {}


class SpecImage(msgspec.Struct, frozen=True):
    """The image as it was when the build was accepted. Without an id: what a volume that is booted knows of its image."""

    id: str
    name: str
    min_disk_gib: int = 0
    min_ram_mib: int = 0
    virtual_size_bytes: int = 0
    properties: dict[str, str] = {}


class InstanceSpec(msgspec.Struct, frozen=True):
    """What the user asked for. `user_data` is the decoded bytes; `hints` are the scheduler hints as given."""

    flavor: Flavor
    image: SpecImage | None = None
    networks: tuple[RequestedNetwork, ...] = ()
    security_groups: tuple[str, ...] = ("default",)  # as given: names or ids
    security_group_names: tuple[str, ...] = ()  # as shown; empty where they are as given
    metadata: dict[str, str] = {}
    tags: tuple[str, ...] = ()
    description: str | None = None
    key_name: str | None = None
    key_public: str | None = None
    user_data: bytes | None = None
    config_drive: bool = True
    availability_zone: str | None = None
    requested_host: str | None = None
    group_id: str | None = None
    hints: dict[str, Any] = {}
    disk_config: str = "AUTO"
    personality: dict[str, bytes] = {}
    trusted_image_certificates: tuple[str, ...] | None = None
    volumes: tuple[RequestedVolume, ...] = ()
    locked_reason: str | None = None
    access_ip_v4: str = ""
    access_ip_v6: str = ""
    launch_index: int = 0
    # What was said after a volume was attached: volume id → whether it ends with the instance.
    ends_volumes: dict[str, bool] = {}
    ephemeral_gib: int | None = None  # smaller than the flavor's
    swap_mib: int | None = None  # smaller than the flavor's


class Fault(msgspec.Struct, frozen=True):
    """Why the last operation failed. `details` is for admins only; times are microseconds since the epoch."""

    code: int
    message: str
    created_at: int
    details: str = ""


class RequestedVolume(msgspec.Struct, frozen=True):
    """A block device as a user asked for it. One of `volume_id`, `image_id`, `snapshot_id` says what is on it; none: blank.

    `volume_id` of one that is to be made is its future id, so that making it twice makes one (`create` is then set)."""

    volume_id: str
    attachment_id: str
    boot_index: int | None = None
    delete_on_termination: bool = False
    create: bool = False
    size_gib: int = 0
    image_id: str | None = None
    snapshot_id: str | None = None
    source_volume_id: str | None = None
    volume_type: str | None = None
    device: str | None = None
    bus: str | None = None
    tag: str | None = None


class InstanceVolume(msgspec.Struct, frozen=True):
    """A volume that the instance has. `device` is the name without /dev/; `connection` None: on no host now."""

    volume_id: str
    attachment_id: str
    device: str
    boot_index: int | None = None
    delete_on_termination: bool = False
    tag: str | None = None
    bus: str = "virtio"
    multiattach: bool = False
    size_gib: int = 0
    connection: VolumeConnection | None = None


class RescueDisk(msgspec.Struct, frozen=True):
    """What a rescued instance boots from."""

    image_id: str
    virtual_size_bytes: int


class PendingMove(msgspec.Struct, frozen=True):
    """A resize or migration that waits to be confirmed or reverted. `was` is the vm_state before, `claim_id` the claim on
    the new host, `ends_at` when it is confirmed by itself (microseconds; None: never)."""

    migration: str
    source: str
    dest: str
    old_flavor: Flavor
    new_flavor: Flavor
    claim_id: str
    was: VmState
    ends_at: int | None = None
    reverting: bool = False  # a revert has begun: there is nothing left to be confirmed


class InstanceFacts(msgspec.Struct, frozen=True):
    """What operations found out about the instance."""

    ports: tuple[InstancePort, ...] = ()
    fault: Fault | None = None
    system_metadata: dict[str, str] = {}
    volumes: tuple[InstanceVolume, ...] = ()
    rescue: RescueDisk | None = None
    move: PendingMove | None = None
    leaving: str | None = None  # a host that it has left, where something of it may still stand


class Instance(msgspec.Struct, frozen=True):
    """One instance as the database has it. Times are microseconds since the epoch, UTC."""

    id: str
    project_id: str
    user_id: str
    name: str
    hostname: str
    vm_state: VmState
    task_state: TaskState | None
    power_state: PowerState
    host: str | None
    availability_zone: str | None
    created_at: int
    updated_at: int
    launched_at: int | None
    terminated_at: int | None
    locked_by: str | None  # owner | admin
    reservation_id: str
    turn: int
    epoch: int
    revision: int
    spec: InstanceSpec
    facts: InstanceFacts
    progress: int = 0  # percent, while an operation moves data
    maybe_on: str | None = None  # a live migration may have brought its guest to this host instead: see decision 0019

    @property
    def status(self) -> str:
        return status_of(self.vm_state, self.task_state)

    @property
    def domain_name(self) -> str:
        """The name that people meet on a host."""
        return f"instance-{self.id[:8]}"


def instance_from_row(row: Mapping[str, Any]) -> Instance:
    """An Instance from a row of the table `instances`."""
    return Instance(
        id=row["id"],
        project_id=row["project_id"],
        user_id=row["user_id"],
        name=row["name"],
        hostname=row["hostname"],
        vm_state=VmState(row["vm_state"]),
        task_state=TaskState(row["task_state"]) if row["task_state"] else None,
        power_state=PowerState(row["power_state"]),
        host=row["host"],
        availability_zone=row["availability_zone"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        launched_at=row["launched_at"],
        terminated_at=row["terminated_at"],
        locked_by=row["locked_by"],
        reservation_id=row["reservation_id"],
        turn=row["turn"],
        epoch=row["epoch"],
        revision=row["revision"],
        spec=_decode_spec(row["spec"]),
        facts=_decode_facts(row["facts"]),
        progress=row["progress"],
        maybe_on=row["maybe_on"],
    )


_decode_spec = msgspec.msgpack.Decoder(InstanceSpec).decode
_decode_facts = msgspec.msgpack.Decoder(InstanceFacts).decode
