"""Request bodies: typed records in which each field says from and until which microversion it exists.

One record holds a body's fields of all versions (`Annotated[..., since(19)]`), so handlers stay typed; `decode` refuses
with 400 what the asked version does not know, naming the path and the rule.
"""

from __future__ import annotations

import re
from functools import cache
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import UNSET, Meta

from instar.errors import BadRequest

S = TypeVar("S", bound=msgspec.Struct)
INTEGER_MAX = 0x7FFFFFFF


class Served(msgspec.Struct, frozen=True):
    """Ranges of microversions in which a field exists, both ends included; an end of None is open."""

    ranges: tuple[tuple[int, int | None], ...]

    def has(self, version: int) -> bool:
        return any(first <= version and (last is None or version <= last) for first, last in self.ranges)


def since(first: int) -> Served:
    """A field that came with microversion 2.`first`."""
    return Served(((first, None),))


def until(last: int) -> Served:
    """A field that exists up to and including microversion 2.`last`."""
    return Served(((1, last),))


# --- field types that many bodies share. Rules: Compute API, request parameters of each resource. ------------------

_NOT_PRINTABLE = r"\x00-\x1f\x7f"
Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        pattern=rf"^[^\s{_NOT_PRINTABLE}]([^{_NOT_PRINTABLE}]*[^\s{_NOT_PRINTABLE}])?\Z",
    ),
]
MetadataKey = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9\-_:. ]{1,255}\Z")]
MetadataValue = Annotated[str, Meta(max_length=255)]
Metadata = dict[MetadataKey, MetadataValue]
Text255 = Annotated[str, Meta(max_length=255)]
Description = Annotated[str, Meta(max_length=255)]
Tag = Annotated[str, Meta(min_length=1, max_length=60, pattern=r"^[^,/]*\Z")]
UUID_PATTERN = r"^[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}\Z"
Uuid = Annotated[str, Meta(pattern=UUID_PATTERN)]
Count = Annotated[int, Meta(ge=0, le=INTEGER_MAX)]
Positive = Annotated[int, Meta(ge=1, le=INTEGER_MAX)]
Limit = Annotated[int, Meta(ge=-1, le=INTEGER_MAX)]
HostName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9\-._]*\Z")]


def decode(body: bytes, record: type[S], version: int) -> S:
    """The body as `record`. Raises BadRequest with the path and the rule that it breaks."""
    if not body:
        raise BadRequest("The request needs a JSON body.")
    try:
        value: S = _decoder(record).decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest(f"Invalid input: {explain(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest("Malformed request body: it is not valid JSON.") from error
    except RecursionError as error:
        raise BadRequest("Malformed request body: it is nested too deep.") from error
    _refuse_unserved(value, version, "$")
    return value


def convert(value: object, record: type[S], version: int, *, within: str = "") -> S:
    """As `decode`, for a part of a body that was decoded already; `within` is where in the body it is."""
    try:
        result = msgspec.convert(value, record, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(f"Invalid input: {explain(error, within)}") from error
    _refuse_unserved(result, version, f"$.{within}" if within else "$")
    return result


def explain(error: msgspec.ValidationError, within: str = "") -> str:
    """The rule and the path, as a sentence: `server.name: expected str of length <= 255`."""
    rule, _, path = str(error).partition(" - at `")
    where = re.sub(r"^(key in )?\$\.?", r"\1", path.rstrip("`"))
    if within:
        key, _, inside = where.rpartition("key in ")
        where = f"{'key in ' if key or where.startswith('key in ') else ''}{within}.{inside}".rstrip(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", rule, re.DOTALL)
    if unknown:
        rule = f"Additional properties are not allowed ({unknown[1][:255]!r} was unexpected)"
    missing = re.fullmatch(r"Object missing required field `(.*)`", rule, re.DOTALL)
    if missing:
        rule = f"{missing[1]!r} is a required property"
    return f"{where}: {rule}" if where else rule


@cache
def _decoder(record: type[S]) -> msgspec.json.Decoder[S]:
    # Not strict: the API has always taken "1" for 1 and "true" for true.
    return msgspec.json.Decoder(record, strict=False)


@cache
def _fields(record: type[msgspec.Struct]) -> tuple[tuple[str, str, Served | None], ...]:
    """(attribute, name in JSON, Served) of the fields that need a look: versioned ones and nested records."""
    hints = get_type_hints(record, include_extras=True)
    found = []
    for attribute, name in zip(record.__struct_fields__, record.__struct_encode_fields__, strict=True):
        served = next((extra for extra in get_args(hints[attribute]) if isinstance(extra, Served)), None)
        if served is not None or _holds_record(hints[attribute]):
            found.append((attribute, name, served))
    return tuple(found)


def _holds_record(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return True
    return any(_holds_record(part) for part in get_args(hint) if part is not NoneType)


def _refuse_unserved(value: object, version: int, path: str) -> None:
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_unserved(item, version, f"{path}[{index}]")
    elif isinstance(value, msgspec.Struct):
        for attribute, name, served in _fields(type(value)):
            given = getattr(value, attribute)
            if given is UNSET:
                continue
            if served is not None and not served.has(version):
                where = path.removeprefix("$").removeprefix(".")
                rule = f"Additional properties are not allowed ({name!r} was unexpected)"
                raise BadRequest(f"Invalid input: {where}: {rule}" if where else f"Invalid input: {rule}")
            _refuse_unserved(given, version, f"{path}.{name}")
