"""JSON patch on an image: `[{"op": "replace", "path": "/name", "value": …}]`. Called by `local.py` and `api.py`.

Clients make patches by comparing documents, so `move` between properties and changes inside the list of tags happen.
"""

from __future__ import annotations

from typing import Any

import msgspec

from instar.errors import BadRequest, Conflict, Forbidden
from instar.images.fields import Caller, check_writable, is_field, with_field
from instar.store.images import ImageRecord

MEDIA_TYPES = {
    "application/openstack-images-v2.1-json-patch": 1,
    "application/openstack-images-v2.0-json-patch": 0,
}
CHANGES_MAX = 512
_OPERATIONS = ("add", "replace", "remove")


class Change(msgspec.Struct, frozen=True):
    """One operation: add, replace, remove or move (`source` is where from). Paths are split and unescaped."""

    operation: str
    path: tuple[str, ...]
    value: Any = None
    source: tuple[str, ...] = ()


def changes_from(body: Any, media_type: str) -> tuple[Change, ...]:
    """The operations of a request's body. Raises BadRequest; the media type is one of MEDIA_TYPES."""
    if not isinstance(body, list) or len(body) > CHANGES_MAX:
        raise BadRequest(f"The body must be a list of at most {CHANGES_MAX} operations.")
    parse = _change_v1 if MEDIA_TYPES[media_type] else _change_v0
    return tuple(parse(item) for item in body)


def _change_v1(item: Any) -> Change:
    if not isinstance(item, dict):
        raise BadRequest("An operation must be an object.")
    operation = item.get("op")
    if operation == "move":
        return Change("move", _pointer(item.get("path")), source=_pointer(item.get("from")))
    if operation not in _OPERATIONS:
        raise BadRequest(f"Operations must be one of {', '.join(_OPERATIONS)}, move.")
    return _change(operation, item.get("path"), item)


def _change_v0(item: Any) -> Change:
    named = [operation for operation in _OPERATIONS if isinstance(item, dict) and operation in item]
    if len(named) != 1:
        raise BadRequest(f"Operations must be exactly one of {', '.join(_OPERATIONS)}.")
    return _change(named[0], item[named[0]], item)


def _change(operation: str, path: Any, item: dict[str, Any]) -> Change:
    if operation != "remove" and "value" not in item:
        raise BadRequest(f"Operation {operation} requires a value.")
    return Change(operation, _pointer(path), item.get("value"))


def _pointer(text: Any) -> tuple[str, ...]:
    """The parts of a JSON pointer (RFC 6901)."""
    if not isinstance(text, str) or not text.startswith("/") or text.endswith("/"):
        raise BadRequest("The path of an operation must be a JSON pointer such as /name.")
    parts = tuple(part.replace("~1", "/").replace("~0", "~") for part in text[1:].split("/"))
    nested = len(parts) == 2 and parts[0] in ("tags", "locations")
    if (len(parts) != 1 and not nested) or "" in parts:
        raise BadRequest(f"The path {text} names nothing in an image.")
    return parts


def apply_changes(record: ImageRecord, changes: tuple[Change, ...], caller: Caller) -> ImageRecord:
    """The record after all operations, in order. Raises BadRequest, Forbidden (read-only), Conflict (not there)."""
    for change in changes:
        record = _apply(record, change, caller)
    return record


def _apply(record: ImageRecord, change: Change, caller: Caller) -> ImageRecord:
    name = change.path[0]
    check_writable(name)
    if change.operation == "move":
        source = change.source[0]
        without = _remove(record, source)
        return with_field(without, name, record.properties[source], caller)
    if len(change.path) == 2:
        return _change_tag(record, change, caller)
    if change.operation == "remove":
        return _remove(record, name)
    if change.operation == "replace" and not is_field(name) and name not in record.properties:
        raise Conflict(f"Property {name} does not exist.")
    return with_field(record, name, change.value, caller)


def _remove(record: ImageRecord, name: str) -> ImageRecord:
    check_writable(name)
    if is_field(name):
        raise Forbidden(f"Property {name} may not be removed.")
    if name not in record.properties:
        raise Conflict(f"Property {name} does not exist.")
    rest = {key: value for key, value in record.properties.items() if key != name}
    return msgspec.structs.replace(record, properties=rest)


def _change_tag(record: ImageRecord, change: Change, caller: Caller) -> ImageRecord:
    tags = list(record.tags)
    place = change.path[1]
    adding = change.operation == "add"
    if place == "-" and adding:
        index = len(tags)
    elif place.isdecimal() and len(place) <= 4 and int(place) < len(tags) + adding:
        index = int(place)
    else:
        raise BadRequest(f"The image has no tag at place {place}.")
    if adding:
        tags.insert(index, change.value)
    elif change.operation == "replace":
        tags[index] = change.value
    else:
        del tags[index]
    return with_field(record, "tags", tags, caller)
