"""Bodies of requests about servers. Fields say from which microversion they exist (`since`, `until`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from instar.api.body import (
    Count,
    Description,
    HostName,
    Metadata,
    MetadataValue,
    Name,
    Positive,
    Served,
    Tag,
    Text255,
    Uuid,
    since,
    until,
)

TAGS_MAX = 50
CERTIFICATES_MAX = 50
# A host name: one label before 2.94, a whole domain name from there on (checked in `naming.py`).
HostnameText = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9]([a-zA-Z0-9.\-]*[a-zA-Z0-9])?\Z")]
DiskConfig = Literal["AUTO", "MANUAL"]
Certificates = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=CERTIFICATES_MAX)]
Tags = Annotated[list[Tag], Meta(max_length=TAGS_MAX)]
# By a mistake long ago tags of devices were not accepted in a range of versions; clients know it.
NIC_TAG = Served(((32, 36), (42, None)))
DISK_TAG = Served(((32, 32), (42, None)))


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of bodies: immutable, and what is not named is refused."""


class RequestedNic(Record, frozen=True):
    uuid: Uuid | UnsetType = UNSET
    port: Uuid | UnsetType | None = UNSET
    fixed_ip: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    tag: Annotated[Tag | UnsetType, NIC_TAG] = UNSET


class SecurityGroupName(Record, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=255)] | UnsetType = UNSET


class PersonalityFile(Record, frozen=True):
    path: Annotated[str, Meta(min_length=1)]
    contents: str


class BlockDevice(Record, frozen=True):
    boot_index: int | str | None = None
    uuid: str | UnsetType | None = UNSET
    source_type: Literal["volume", "image", "snapshot", "blank"] | UnsetType = UNSET
    destination_type: Literal["local", "volume"] | UnsetType = UNSET
    delete_on_termination: bool | UnsetType = UNSET
    volume_size: int | str | None = None
    device_name: Text255 | None = None
    device_type: Text255 | None = None
    disk_bus: Text255 | None = None
    guest_format: Text255 | None = None
    no_device: Any = UNSET
    tag: Annotated[Tag | UnsetType, DISK_TAG] = UNSET
    volume_type: Annotated[Text255 | UnsetType | None, since(67)] = UNSET


class Hints(msgspec.Struct, frozen=True):
    """Scheduler hints that are known; others are kept as they came, a scheduler may know them.

    Lists only: a union of a checked text and a list of such crashes msgspec 0.22 when the process ends, so one id on its
    own is made a list before."""

    group: Uuid | UnsetType = UNSET
    same_host: list[Uuid] | UnsetType = UNSET
    different_host: list[Uuid] | UnsetType = UNSET


class NewServer(Record, frozen=True):
    name: Name
    flavor_ref: str | int = msgspec.field(name="flavorRef")
    image_ref: str | UnsetType = msgspec.field(name="imageRef", default=UNSET)
    admin_pass: str | UnsetType = msgspec.field(name="adminPass", default=UNSET)
    access_ip_v4: str | UnsetType = msgspec.field(name="accessIPv4", default=UNSET)
    access_ip_v6: str | UnsetType = msgspec.field(name="accessIPv6", default=UNSET)
    metadata: Metadata | UnsetType = UNSET
    networks: list[RequestedNic] | Literal["auto", "none"] | UnsetType = UNSET
    disk_config: DiskConfig | UnsetType = msgspec.field(name="OS-DCF:diskConfig", default=UNSET)
    personality: Annotated[list[PersonalityFile] | UnsetType, until(56)] = UNSET
    security_groups: list[SecurityGroupName] | UnsetType = UNSET
    user_data: str | UnsetType | None = UNSET
    key_name: Text255 | UnsetType | None = UNSET
    config_drive: bool | Literal[""] | UnsetType | None = UNSET
    min_count: Positive | UnsetType = UNSET
    max_count: Positive | UnsetType = UNSET
    return_reservation_id: bool | UnsetType = UNSET
    availability_zone: Annotated[str, Meta(min_length=1, max_length=255)] | UnsetType = UNSET
    block_device_mapping: Any = UNSET
    block_device_mapping_v2: list[BlockDevice] | UnsetType = UNSET
    description: Annotated[Description | UnsetType | None, since(19)] = UNSET
    tags: Annotated[Tags | UnsetType, since(52)] = UNSET
    trusted_image_certificates: Annotated[Certificates | UnsetType | None, since(63)] = UNSET
    host: Annotated[Text255 | UnsetType, since(74)] = UNSET
    hypervisor_hostname: Annotated[Text255 | UnsetType, since(74)] = UNSET
    hostname: Annotated[HostnameText | UnsetType, since(90)] = UNSET


class CreateServer(Record, frozen=True):
    server: NewServer
    hints: dict[str, Any] | UnsetType = msgspec.field(name="os:scheduler_hints", default=UNSET)
    old_hints: dict[str, Any] | UnsetType = msgspec.field(name="OS-SCH-HNT:scheduler_hints", default=UNSET)


class ServerChanges(Record, frozen=True):
    name: Name | UnsetType = UNSET
    access_ip_v4: str | UnsetType | None = msgspec.field(name="accessIPv4", default=UNSET)
    access_ip_v6: str | UnsetType | None = msgspec.field(name="accessIPv6", default=UNSET)
    disk_config: DiskConfig | UnsetType = msgspec.field(name="OS-DCF:diskConfig", default=UNSET)
    description: Annotated[Description | UnsetType | None, since(19)] = UNSET
    hostname: Annotated[HostnameText | UnsetType, since(90)] = UNSET


class UpdateServer(Record, frozen=True):
    server: ServerChanges


class MetadataBody(Record, frozen=True):
    metadata: Metadata


class MetaItemBody(Record, frozen=True):
    meta: dict[str, MetadataValue]


class TagsBody(Record, frozen=True):
    tags: Tags


# --- actions: the body is {"<key>": <value>}; these are the values --------------------------------------------------


class Reboot(Record, frozen=True):
    type: Annotated[str, Meta(pattern=r"^(?i:HARD|SOFT)\Z")]


class Lock(Record, frozen=True):
    locked_reason: Annotated[Text255, Meta(min_length=1)] | UnsetType = UNSET


class ResetState(Record, frozen=True):
    state: Literal["active", "error"]


class ConsoleOutput(Record, frozen=True):
    length: int | UnsetType | None = UNSET


AdminPassword = Annotated[str, Meta(max_length=255)]
ZoneName = Annotated[str, Meta(min_length=1, max_length=255)]
FORCE = Served(((29, 67),))  # of evacuate; of a live migration from 2.30 on


class CreateImage(Record, frozen=True):
    name: Name
    metadata: Metadata | UnsetType = UNSET


class CreateBackup(Record, frozen=True):
    name: Name
    backup_type: Annotated[str, Meta(min_length=1, max_length=255)]
    rotation: Count
    metadata: Metadata | UnsetType = UNSET


class UnshelveToZone(Record, frozen=True):
    """Microversions 2.77 to 2.90."""

    availability_zone: ZoneName


class Unshelve(Record, frozen=True):
    """From 2.91 on; a zone of null unpins the server from the one that it was asked for."""

    availability_zone: ZoneName | UnsetType | None = UNSET
    host: HostName | UnsetType = UNSET


class Resize(Record, frozen=True):
    flavor_ref: Annotated[str, Meta(min_length=1, max_length=255)] | int = msgspec.field(name="flavorRef")
    disk_config: DiskConfig | UnsetType = msgspec.field(name="OS-DCF:diskConfig", default=UNSET)


class Migrate(Record, frozen=True):
    """From 2.56 on."""

    host: HostName | UnsetType = UNSET


class OldMigrateLive(Record, frozen=True):
    """Before 2.25. Nothing is ever overcommitted here: claims are counted beforehand."""

    host: HostName | None
    block_migration: bool
    disk_over_commit: bool


class MigrateLive(Record, frozen=True):
    host: HostName | None
    block_migration: bool | Literal["auto"]
    force: Annotated[bool | UnsetType, Served(((30, 67),))] = UNSET


class OldEvacuate(Record, frozen=True):
    """Before 2.14, when admins had to know whether storage is shared; it is found out now."""

    on_shared_storage: bool = msgspec.field(name="onSharedStorage")
    host: HostName | UnsetType = UNSET
    admin_pass: AdminPassword | UnsetType = msgspec.field(name="adminPass", default=UNSET)


class Evacuate(Record, frozen=True):
    host: HostName | UnsetType = UNSET
    admin_pass: AdminPassword | UnsetType = msgspec.field(name="adminPass", default=UNSET)
    force: Annotated[bool | UnsetType, FORCE] = UNSET


class Rebuild(Record, frozen=True):
    image_ref: Annotated[str, Meta(min_length=1, max_length=2048)] = msgspec.field(name="imageRef")
    name: Name | UnsetType = UNSET
    admin_pass: AdminPassword | UnsetType = msgspec.field(name="adminPass", default=UNSET)
    metadata: Metadata | UnsetType = UNSET
    personality: Annotated[list[PersonalityFile] | UnsetType, until(56)] = UNSET
    preserve_ephemeral: bool | UnsetType = UNSET
    disk_config: DiskConfig | UnsetType = msgspec.field(name="OS-DCF:diskConfig", default=UNSET)
    access_ip_v4: str | UnsetType = msgspec.field(name="accessIPv4", default=UNSET)
    access_ip_v6: str | UnsetType = msgspec.field(name="accessIPv6", default=UNSET)
    description: Annotated[Description | UnsetType | None, since(19)] = UNSET
    key_name: Annotated[Text255 | UnsetType | None, since(54)] = UNSET
    user_data: Annotated[str | UnsetType | None, since(57)] = UNSET
    trusted_image_certificates: Annotated[Certificates | UnsetType | None, since(63)] = UNSET
    hostname: Annotated[HostnameText | UnsetType, since(90)] = UNSET


class Rescue(Record, frozen=True):
    admin_pass: AdminPassword | UnsetType = msgspec.field(name="adminPass", default=UNSET)
    rescue_image_ref: Annotated[str, Meta(min_length=1, max_length=2048)] | UnsetType = UNSET


class ChangePassword(Record, frozen=True):
    admin_pass: AdminPassword = msgspec.field(name="adminPass")

    def __repr__(self) -> str:
        return "ChangePassword(…)"


class GroupOfServer(Record, frozen=True):
    """Value of addSecurityGroup and removeSecurityGroup: a name or an id."""

    name: Annotated[str, Meta(min_length=1, max_length=255, pattern=r"\S")]
