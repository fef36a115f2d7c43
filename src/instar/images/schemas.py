"""The schema documents of the Image API, which clients read to learn the fields. Called by `api.py`."""

from __future__ import annotations

from typing import Any

from instar.images.fields import CONTAINER_FORMATS, VISIBILITIES
from instar.images.inspect import DISK_FORMATS
from instar.images.sharing import MEMBER_STATUSES

_UUID = "^([0-9a-fA-F]){8}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){12}$"
_STATUSES = ["queued", "saving", "active", "killed", "deleted", "uploading", "importing", "pending_delete", "deactivated"]


def _text(description: str, *, null: bool = False, read_only: bool = False, **more: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": ["null", "string"] if null else "string", "description": description, **more}
    return schema | ({"readOnly": True} if read_only else {})


def _number(description: str, *, read_only: bool = False) -> dict[str, Any]:
    if read_only:
        return {"type": ["null", "integer"], "description": description, "readOnly": True}
    return {"type": "integer", "description": description, "minimum": 0}


_IMAGE_PROPERTIES: dict[str, dict[str, Any]] = {
    "id": _text("Identifier of the image", pattern=_UUID),
    "name": _text("Name of the image", null=True, maxLength=255),
    "status": _text("Status of the image", read_only=True, enum=_STATUSES),
    "visibility": _text("Who can use the image", enum=list(VISIBILITIES)),
    "protected": {"type": "boolean", "description": "If true, the image cannot be deleted"},
    "os_hidden": {"type": "boolean", "description": "If true, the image is left out of lists by default"},
    "checksum": _text("MD5 of the data, for integrity only", null=True, read_only=True, maxLength=32),
    "os_hash_algo": _text("Algorithm of os_hash_value", null=True, read_only=True, maxLength=64),
    "os_hash_value": _text("Hexadecimal digest of the data", null=True, read_only=True, maxLength=128),
    "owner": _text("Project that owns the image", null=True, maxLength=255),
    "size": _number("Size of the data in bytes", read_only=True),
    "virtual_size": _number("Size of the disk in bytes", read_only=True),
    "container_format": {
        "type": ["null", "string"], "description": "Format of the container", "enum": [None, *CONTAINER_FORMATS],
    },
    "disk_format": {"type": ["null", "string"], "description": "Format of the disk", "enum": [None, *DISK_FORMATS]},
    "created_at": _text("Time of creation", read_only=True),
    "updated_at": _text("Time of the last change", read_only=True),
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 255}, "description": "Tags of the image"},
    "min_ram": _number("Memory in MiB that a server needs to boot the image"),
    "min_disk": _number("Disk in GiB that a server needs to boot the image"),
    "self": _text("Path of the image", read_only=True),
    "file": _text("Path of the image's data", read_only=True),
    "schema": _text("Path of the schema", read_only=True),
}  # fmt: skip

_MEMBER_PROPERTIES: dict[str, dict[str, Any]] = {
    "created_at": _text("Time of creation"),
    "image_id": _text("Identifier of the image", pattern=_UUID),
    "member_id": _text("Project that the image is shared with"),
    "status": _text("What the project says to it", enum=list(MEMBER_STATUSES)),
    "updated_at": _text("Time of the last change"),
    "schema": _text("Path of the schema", read_only=True),
}


def _collection(name: str, item: dict[str, Any], links: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "properties": {
            name: {"type": "array", "items": item},
            **{key: {"type": "string"} for key in (*links, "schema")},
        },
        "links": [{"rel": key, "href": f"{{{key}}}"} for key in links] + [{"rel": "describedby", "href": "{schema}"}],
    }


_IMAGE: dict[str, Any] = {
    "name": "image",
    "properties": _IMAGE_PROPERTIES,
    "additionalProperties": {"type": "string"},
    "links": [
        {"rel": "self", "href": "{self}"},
        {"rel": "enclosure", "href": "{file}"},
        {"rel": "describedby", "href": "{schema}"},
    ],
}
_MEMBER: dict[str, Any] = {"name": "member", "properties": _MEMBER_PROPERTIES}

SCHEMAS: dict[str, dict[str, Any]] = {
    "image": _IMAGE,
    "images": _collection("images", _IMAGE, ["first", "next"]),
    "member": _MEMBER,
    "members": _collection("members", _MEMBER, []),
}
