"""Bodies of the Block Storage API as records, and how one is read: what does not fit names its field and its value."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from instar.errors import BadRequest
from instar.http.request import Request

T = TypeVar("T")

VALUE_SHOWN_MAX = 100
METADATA_MAX = 128
_INTEGER_MAX = 0x7FFFFFFF

Text = Annotated[str, Meta(max_length=255)]
Key = Annotated[str, Meta(min_length=1, max_length=255)]
Metadata = Annotated[dict[Key, Text], Meta(max_length=METADATA_MAX)]
Uuid = Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\Z")]
Size = Annotated[int, Meta(ge=1, le=_INTEGER_MAX)]
Limit = Annotated[int, Meta(ge=-1, le=_INTEGER_MAX)]
Name = Annotated[str, Meta(min_length=1, max_length=255)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


async def read(request: Request, body_type: type[T]) -> T:
    """The body as a `body_type`. Raises BadRequest that names the field, its value and the rule."""
    body = await request.body()
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"Malformed request body: {error}.") from error
    except RecursionError as error:
        raise BadRequest("Malformed request body: nested too deeply.") from error
    return convert(raw, body_type)


def convert(raw: Any, body_type: type[T]) -> T:
    """As `read`, of decoded JSON. Text becomes a number or a boolean where the type asks for one."""
    try:
        return msgspec.convert(raw, body_type, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(_explain(str(error), raw)) from error


def _explain(said: str, raw: Any) -> str:
    rule, _, path = said.partition(" - at `")
    path = path.rstrip("`")
    unknown = re.search(r"unknown field `(.*)`", rule, re.DOTALL)
    if unknown:
        return f"Invalid input: Additional properties are not allowed ({unknown[1][:VALUE_SHOWN_MAX]!r} was unexpected)."
    missing = re.search(r"missing required field `(.*)`", rule)
    if missing:
        return f"Invalid input: {missing[1]!r} is a required property."
    steps = re.findall(r"\.([A-Za-z0-9_:-]+)|\[(\d+|\.\.\.)\]", path)
    value, field = raw, "body"
    for name, index in steps:
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, ValueError, TypeError):
            break  # `[...]`: somewhere in it
        field = name or field
    return f"Invalid input for field/attribute {field}. Value: {str(value)[:VALUE_SHOWN_MAX]}. {rule}."


# --- volumes --------------------------------------------------------------------------------------------------------


class VolumeFields(msgspec.Struct, frozen=True):
    """Unknown fields are let pass here: this API always has, and clients send some that mean nothing."""

    size: Size | None = None
    name: Text | None = None
    description: Text | None = None
    availability_zone: Text | None = None
    volume_type: Text | None = None
    metadata: Metadata | None = None
    snapshot_id: Uuid | None = None
    source_volid: Uuid | None = None
    imageRef: Text | None = None  # noqa: N815 - the API's name
    image_id: Text | None = None
    backup_id: Text | None = None
    multiattach: bool | None = None


class VolumeBody(msgspec.Struct, frozen=True):
    volume: VolumeFields


class UpdateFields(msgspec.Struct, frozen=True):
    name: Text | UnsetType | None = UNSET
    description: Text | UnsetType | None = UNSET
    metadata: Metadata | UnsetType = UNSET

    def columns(self) -> dict[str, str | None]:
        """Name and description, where they are given."""
        given = {"name": self.name, "description": self.description}
        return {name: text for name, text in given.items() if not isinstance(text, UnsetType)}


class VolumeUpdateBody(_Strict, frozen=True):
    volume: UpdateFields


class MetadataBody(_Strict, frozen=True):
    metadata: Metadata


class MetaBody(_Strict, frozen=True):
    meta: Metadata


class Extend(_Strict, frozen=True):
    new_size: Size


class Upload(_Strict, frozen=True):
    image_name: Name
    force: bool = False
    disk_format: str = "raw"
    container_format: str = "bare"
    visibility: str = "private"
    protected: bool = False


class Attach(_Strict, frozen=True):
    instance_uuid: Uuid | None = None
    mountpoint: Text | None = None
    host_name: Text | None = None
    mode: str = "rw"


class Detach(_Strict, frozen=True):
    attachment_id: Uuid | None = None
    connector: dict[str, Any] | None = None


class Connect(_Strict, frozen=True):
    connector: dict[str, Any]


class ResetStatus(msgspec.Struct, frozen=True):
    status: Text | None = None
    attach_status: Text | None = None
    migration_status: Text | None = None


class Readonly(_Strict, frozen=True):
    readonly: bool


class Bootable(_Strict, frozen=True):
    bootable: bool


class SetImageMetadata(_Strict, frozen=True):
    metadata: Metadata


class UnsetImageMetadata(_Strict, frozen=True):
    key: Key


class Retype(_Strict, frozen=True):
    new_type: Name
    migration_policy: str | None = None


class Revert(_Strict, frozen=True):
    snapshot_id: Uuid


# --- snapshots ------------------------------------------------------------------------------------------------------


class SnapshotFields(_Strict, frozen=True):
    volume_id: Uuid
    name: Text | None = None
    description: Text | None = None
    force: bool = False
    metadata: Metadata | None = None


class SnapshotBody(_Strict, frozen=True):
    snapshot: SnapshotFields


class SnapshotUpdateBody(_Strict, frozen=True):
    snapshot: UpdateFields


# --- types ----------------------------------------------------------------------------------------------------------


class TypeFields(_Strict, frozen=True):
    name: Name
    description: Text | None = None
    is_public: bool | UnsetType = msgspec.field(name="os-volume-type-access:is_public", default=UNSET)
    extra_specs: Metadata | None = None


class TypeBody(_Strict, frozen=True):
    volume_type: TypeFields


class TypeUpdateFields(_Strict, frozen=True):
    name: Name | None = None
    description: Text | UnsetType | None = UNSET
    is_public: bool | None = None


class TypeUpdateBody(_Strict, frozen=True):
    volume_type: TypeUpdateFields


class ExtraSpecsBody(_Strict, frozen=True):
    extra_specs: Metadata


class Access(_Strict, frozen=True):
    project: Name


# --- attachments ----------------------------------------------------------------------------------------------------


class Connector(msgspec.Struct, frozen=True):
    """What a host says of itself; the rest of it is for other kinds of volumes."""

    host: Text = ""
    ip: Text = ""
    mountpoint: Text = ""
    mode: str | None = None


class AttachmentFields(_Strict, frozen=True):
    volume_uuid: Uuid
    instance_uuid: Uuid | None = None
    connector: Connector | None = None
    mode: str | None = None


class AttachmentBody(_Strict, frozen=True):
    attachment: AttachmentFields


class AttachmentUpdateFields(_Strict, frozen=True):
    connector: Connector


class AttachmentUpdateBody(_Strict, frozen=True):
    attachment: AttachmentUpdateFields


# --- quotas ---------------------------------------------------------------------------------------------------------


class Limits(msgspec.Struct, frozen=True):
    """What is counted here; limits of other things (backups, groups) are taken and mean nothing."""

    volumes: Limit | UnsetType = UNSET
    snapshots: Limit | UnsetType = UNSET
    gigabytes: Limit | UnsetType = UNSET
    per_volume_gigabytes: Limit | UnsetType = UNSET


class QuotaBody(msgspec.Struct, frozen=True):
    quota_set: Limits


class QuotaClassBody(msgspec.Struct, frozen=True):
    quota_class_set: Limits
