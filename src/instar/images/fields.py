"""What may stand in an image's fields: one check for each, used by create and by update. Called by `local.py`.

Names are those of the Image API. Whatever is no field is a custom property, and a property is always a string.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from instar.errors import BadRequest, Forbidden
from instar.images.inspect import DISK_FORMATS
from instar.store.images import ImageRecord

NAME_MAX_LENGTH = 255
PROPERTY_NAME_MAX_LENGTH = 255
PROPERTY_VALUE_MAX_LENGTH = 65_535
PROPERTIES_MAX = 128
TAG_MAX_LENGTH = 255
TAGS_MAX = 128
NUMBER_MAX = 2**31 - 1

VISIBILITIES = ("private", "shared", "community", "public")
DEFAULT_VISIBILITY = "shared"
CONTAINER_FORMATS = ("bare",)

READ_ONLY = frozenset({
    "created_at", "updated_at", "status", "checksum", "os_hash_algo", "os_hash_value", "size", "virtual_size",
    "direct_url", "self", "file", "schema", "stores",
})
RESERVED = frozenset({"location", "locations", "deleted", "deleted_at"})
RESERVED_PREFIX = "os_glance"


class Caller(NamedTuple):
    """Who asks, as far as images care."""

    project_id: str
    is_admin: bool


def _string(name: str, value: Any, most: int) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"Invalid value for {name}: it must be a string.")
    if len(value) > most:
        raise BadRequest(f"Invalid value for {name}: it has more than {most} characters.")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRequest(f"Invalid value for {name}: it is not text.")
    return value


def _name(value: Any) -> str | None:
    return None if value is None else _string("name", value, NAME_MAX_LENGTH)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise BadRequest(f"Invalid value for {name}: it must be one of {', '.join(allowed)}.")
    return value


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"Invalid value for {name}: it must be true or false.")
    return value


def _number(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= NUMBER_MAX:
        raise BadRequest(f"Invalid value for {name}: it must be a whole number from 0 to {NUMBER_MAX}.")
    return value


def tag_of(value: Any) -> str:
    """A tag that is one. Raises BadRequest."""
    tag = _string("tags", value, TAG_MAX_LENGTH)
    if not tag:
        raise BadRequest("Invalid value for tags: a tag must not be empty.")
    return tag


def _tags(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise BadRequest("Invalid value for tags: it must be a list of strings.")
    tags = tuple(dict.fromkeys(tag_of(tag) for tag in value))
    if len(tags) > TAGS_MAX:
        raise BadRequest(f"An image may have {TAGS_MAX} tags.")
    return tags


# API field → (attribute of the record, check).
_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "name": ("name", _name),
    "visibility": ("visibility", lambda value: _one_of("visibility", value, VISIBILITIES)),
    "protected": ("protected", lambda value: _boolean("protected", value)),
    "os_hidden": ("hidden", lambda value: _boolean("os_hidden", value)),
    "min_disk": ("min_disk_gib", lambda value: _number("min_disk", value)),
    "min_ram": ("min_ram_mib", lambda value: _number("min_ram", value)),
    "tags": ("tags", _tags),
    "owner": ("owner", lambda value: _string("owner", value, 255)),
    "disk_format": (
        "disk_format", lambda value: None if value is None else _one_of("disk_format", value, DISK_FORMATS),
    ),
    "container_format": (
        "container_format", lambda value: None if value is None else _one_of("container_format", value, CONTAINER_FORMATS),
    ),
}
_ONLY_WHILE_QUEUED = ("disk_format", "container_format")


def is_field(name: str) -> bool:
    return name in _FIELDS or name == "id" or name in READ_ONLY or name in RESERVED


def with_field(record: ImageRecord, name: str, value: Any, caller: Caller) -> ImageRecord:
    """The record with one field or custom property set. Raises BadRequest for the value, Forbidden for the field."""
    check_writable(name)
    if name not in _FIELDS:
        return _with_property(record, name, value)
    attribute, check = _FIELDS[name]
    value = check(value)
    if value == getattr(record, attribute):
        return record
    if name in _ONLY_WHILE_QUEUED and record.status != "queued":
        raise Forbidden(f"Attribute {name} can be replaced only for a queued image.")
    if name == "visibility" and value == "public" and not caller.is_admin:
        raise Forbidden(action="publicize_image")
    if name == "owner" and not caller.is_admin:
        raise Forbidden("Only an administrator may give an image to another project.")
    return msgspec.structs.replace(record, **{attribute: value})


def check_writable(name: str) -> None:
    """Raises Forbidden for what only the service itself writes."""
    if name == "id" or name in READ_ONLY:
        raise Forbidden(f"Attribute '{name}' is read-only.")
    if name in RESERVED or name.startswith(RESERVED_PREFIX):
        raise Forbidden(f"Attribute '{name}' is reserved.")


def _with_property(record: ImageRecord, name: str, value: Any) -> ImageRecord:
    if not name or len(name) > PROPERTY_NAME_MAX_LENGTH or not name.isprintable():
        raise BadRequest(f"The name of a property has 1 to {PROPERTY_NAME_MAX_LENGTH} printable characters.")
    if isinstance(value, bool):
        value = "true" if value else "false"
    elif isinstance(value, int | float):
        value = str(value)
    text = _string(name, value, PROPERTY_VALUE_MAX_LENGTH)
    properties = {**record.properties, name: text}
    if len(properties) > PROPERTIES_MAX:
        raise BadRequest(f"An image may have {PROPERTIES_MAX} properties.")
    return msgspec.structs.replace(record, properties=properties)


def new_image(body: dict[str, Any], caller: Caller, now: int) -> ImageRecord:
    """A queued image as asked for. Raises BadRequest, Forbidden."""
    given = dict(body)
    image_id = given.pop("id", None)
    record = ImageRecord(
        id=str(uuid.uuid4()) if image_id is None else uuid_of(image_id),
        name=None,
        status="queued",
        owner=caller.project_id,
        visibility=DEFAULT_VISIBILITY,
        container_format=None,
        disk_format=None,
        created_at=now,
        updated_at=now,
    )
    for name, value in given.items():
        record = with_field(record, name, value, caller)
    return record


def uuid_of(value: Any) -> str:
    """An image id in its one spelling. Raises BadRequest."""
    try:
        return str(uuid.UUID(value))
    except (ValueError, TypeError, AttributeError) as error:
        raise BadRequest("Invalid value for id: it must be a UUID.") from error
