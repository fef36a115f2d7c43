"""What the Block Storage API shows of each record, by microversion. Called by the routes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from instar.http.request import Request
from instar.model.volume import VolumeConnection
from instar.store.volume_quotas import TypeRecord
from instar.store.volume_records import AttachmentRecord, SnapshotRecord, VolumeRecord
from instar.volumes import microversion as since

HOST = "instar@files#files"  # as administrators see where a volume is: one place has all


def timestamp(time_us: int | None) -> str | None:
    if time_us is None:
        return None
    return datetime.fromtimestamp(time_us / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")


def links(request: Request, kind: str, record_id: str) -> list[dict[str, str]]:
    return [
        {"rel": "self", "href": f"{request.base_url}/v3/{kind}/{record_id}"},
        {"rel": "bookmark", "href": f"{request.base_url}/{kind}/{record_id}"},
    ]


def volume_brief(request: Request, record: VolumeRecord) -> dict[str, Any]:
    return {"id": record.id, "name": record.name, "links": links(request, "volumes", record.id)}


def volume_view(
    request: Request, record: VolumeRecord, type_name: str, attachments: Sequence[AttachmentRecord]
) -> dict[str, Any]:
    version, is_admin = request.microversion, request.context.is_admin
    view: dict[str, Any] = {
        "id": record.id,
        "name": record.name,
        "description": record.description,
        "status": record.status,
        "size": record.size_gib,
        "availability_zone": record.availability_zone,
        "created_at": timestamp(record.created_at),
        "updated_at": timestamp(record.updated_at),
        "attachments": [_attached(one, is_admin) for one in attachments if one.status in ("attached", "detaching")],
        "volume_type": type_name,
        "metadata": record.document.metadata | ({"readonly": "True"} if record.read_only else {}),
        "snapshot_id": record.snapshot_id,
        "source_volid": record.source_volume_id,
        "bootable": "true" if record.bootable else "false",
        "encrypted": False,
        "replication_status": None,
        "consistencygroup_id": None,
        "multiattach": record.multiattach,
        "migration_status": None,
        "user_id": record.user_id,
        "os-vol-tenant-attr:tenant_id": record.project_id,
        "links": links(request, "volumes", record.id),
    }
    if record.document.image_metadata:
        view["volume_image_metadata"] = record.document.image_metadata
    if is_admin:
        view |= {
            "os-vol-host-attr:host": HOST,
            "os-vol-mig-status-attr:migstat": None,
            "os-vol-mig-status-attr:name_id": None,
        }
    if version >= since.GROUP_ID:
        view["group_id"] = None
    if version >= since.PROVIDER_ID and is_admin:
        view["provider_id"] = None
    if version >= since.SHARED_TARGETS:
        view |= {"shared_targets": False, "service_uuid": None}
    return view


def _attached(attachment: AttachmentRecord, is_admin: bool) -> dict[str, Any]:
    return {
        "id": attachment.volume_id,
        "attachment_id": attachment.id,
        "volume_id": attachment.volume_id,
        "server_id": attachment.instance_id or None,
        "host_name": (attachment.host or None) if is_admin else None,
        "device": attachment.device or None,
        "attached_at": timestamp(attachment.attached_at),
    }


def snapshot_view(request: Request, record: SnapshotRecord, *, detail: bool = True) -> dict[str, Any]:
    view: dict[str, Any] = {
        "id": record.id,
        "name": record.name,
        "description": record.description,
        "volume_id": record.volume_id,
        "status": record.status,
        "size": record.size_gib,
        "created_at": timestamp(record.created_at),
        "updated_at": timestamp(record.updated_at),
        "metadata": record.document.metadata,
    }
    if detail:
        view["os-extended-snapshot-attributes:project_id"] = record.project_id
        view["os-extended-snapshot-attributes:progress"] = "100%" if record.status == "available" else "0%"
        if request.microversion >= since.SNAPSHOT_USER:
            view["user_id"] = record.user_id
    return view


def type_view(record: TypeRecord, *, is_admin: bool) -> dict[str, Any]:
    """Of what a type is made is for admins; what users may know of it are the capabilities that they can rely on."""
    view: dict[str, Any] = {
        "id": record.id,
        "name": record.name,
        "description": record.description,
        "is_public": record.public,
        "os-volume-type-access:is_public": record.public,
        "extra_specs": record.extra_specs,
        "qos_specs_id": None,
    }
    if not is_admin:
        del view["qos_specs_id"]
        view["extra_specs"] = {key: value for key, value in record.extra_specs.items() if key == "multiattach"}
    return view


def attachment_brief(record: AttachmentRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "status": record.status,
        "instance": record.instance_id or None,
        "volume_id": record.volume_id,
    }


def attachment_view(
    request: Request, record: AttachmentRecord, connection: VolumeConnection | None = None
) -> dict[str, Any]:
    return {
        **attachment_brief(record),
        "attached_at": timestamp(record.attached_at) or "",
        "detached_at": "",
        "attach_mode": "ro" if record.read_only else "rw",
        "connection_info": connection_info(request, record, connection) if connection else {},
    }


def connection_info(request: Request, record: AttachmentRecord, connection: VolumeConnection) -> dict[str, Any]:
    """How a host finds the data. The export's name is its key: only administrators (and services) are told it."""
    data: dict[str, Any] = {
        "volume_id": record.volume_id,
        "attachment_id": record.id,
        "size_bytes": connection.size_bytes,
        "access_mode": "ro" if connection.read_only else "rw",
        "encrypted": False,
        "qos_specs": None,
    }
    if request.context.is_admin:
        data |= {
            "export": connection.export,
            "socket": connection.socket,
            "address": connection.address,
            "port": connection.port,
        }
    return {"driver_volume_type": connection.driver, **data, "data": data}
