"""Images and members as the Image API shows them. Called by `api.py`. Where the data lies is never shown."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from instar.store.images import ImageRecord, MemberRecord


def _time(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def image_view(image: ImageRecord) -> dict[str, Any]:
    """One image: custom properties stand beside the fields."""
    path = f"/v2/images/{image.id}"
    return {
        **image.properties,
        "id": image.id,
        "name": image.name,
        "status": image.status,
        "visibility": image.visibility,
        "protected": image.protected,
        "os_hidden": image.hidden,
        "owner": image.owner,
        "container_format": image.container_format,
        "disk_format": image.disk_format,
        "min_disk": image.min_disk_gib,
        "min_ram": image.min_ram_mib,
        "size": image.size_bytes,
        "virtual_size": image.virtual_size_bytes,
        "checksum": image.md5,
        "os_hash_algo": "sha512" if image.sha512 else None,
        "os_hash_value": image.sha512,
        "tags": image.tags,
        "created_at": _time(image.created_at),
        "updated_at": _time(image.updated_at),
        "self": path,
        "file": f"{path}/file",
        "schema": "/v2/schemas/image",
    }


def member_view(member: MemberRecord) -> dict[str, Any]:
    return {
        "image_id": member.image_id,
        "member_id": member.project_id,
        "status": member.status,
        "created_at": _time(member.created_at),
        "updated_at": _time(member.updated_at),
        "schema": "/v2/schemas/member",
    }
