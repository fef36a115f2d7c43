"""JSON in and out, on msgspec: a body that does not fit its type is a BadRequest that names the path and the rule."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, TypeVar, cast

import msgspec

from instar.errors import BadRequest

T = TypeVar("T")


@functools.lru_cache(maxsize=512)
def _decoder(body_type: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(body_type)


def decode(body: bytes, body_type: type[T]) -> T:
    """`body` as a `body_type`, strictly (no text for numbers). Raises BadRequest with the JSON path and the rule."""
    try:
        decoded: T = _decoder(cast(Hashable, body_type)).decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest(f"Invalid input: {error}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"Malformed request body: {error}.") from error
    except RecursionError as error:
        raise BadRequest("Malformed request body: nested too deeply.") from error
    return decoded


def convert(value: Any, body_type: type[T]) -> T:
    """Decoded JSON (or query values) as a `body_type`. Text becomes a number where the type asks for one.

    Raises BadRequest with the path and the rule."""
    try:
        return msgspec.convert(value, body_type, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(f"Invalid input: {error}.") from error


_encoder = msgspec.json.Encoder()


def encode(value: Any) -> bytes:
    """`value` (Structs, dicts, lists, datetimes …) as JSON."""
    return _encoder.encode(value)
