"""What records look like on the wire and in the database: described as data, filled with samples, made again from data.

Used by the recorder, once for each version, and by the tests that hold today's records against what was recorded."""

from __future__ import annotations

import enum
from typing import Any

import msgspec
from msgspec import inspect as mi

Shape = Any  # JSON: a string for what is plain, else an object with one key that says what it is
PLAIN = {
    mi.StrType: "str", mi.IntType: "int", mi.FloatType: "float", mi.BoolType: "bool", mi.BytesType: "bytes",
    mi.NoneType: "none", mi.AnyType: "any",
}  # fmt: skip
SAMPLES = {"str": "word", "int": 7, "float": 2.5, "bool": True, "bytes": b"\x01\x02", "none": None, "any": {"a": [1, "b"]}}
OF_NAME: dict[str, Any] = {
    "str": str, "int": int, "float": float, "bool": bool, "bytes": bytes, "none": None, "any": Any,
}  # fmt: skip
encode = msgspec.msgpack.Encoder().encode


def shape_of(kind: mi.Type, structs: dict[str, Shape]) -> Shape:
    """`structs` is given every struct that the type has in it, by name."""
    if isinstance(kind, mi.Metadata):
        return shape_of(kind.type, structs)
    if type(kind) in PLAIN:
        return PLAIN[type(kind)]
    match kind:
        case mi.UnionType(types=types):
            return {"union": sorted((shape_of(one, structs) for one in types), key=str)}
        case mi.ListType(item_type=item) | mi.VarTupleType(item_type=item):
            return {"list": shape_of(item, structs)}
        case mi.TupleType(item_types=items):
            return {"tuple": [shape_of(one, structs) for one in items]}
        case mi.DictType(key_type=key, value_type=value):
            return {"dict": [shape_of(key, structs), shape_of(value, structs)]}
        case mi.EnumType(cls=cls):
            return {"enum": sorted((member.value for member in cls), key=str)}
        case mi.StructType(cls=cls):
            name = cls.__name__
            if name not in structs:
                structs[name] = {}  # it may be in itself
                structs[name] = {
                    "tag": kind.tag,
                    "array_like": kind.array_like,
                    "fields": {
                        field.encode_name: {"type": shape_of(field.type, structs), "required": field.required}
                        for field in kind.fields
                    },
                }
            return {"struct": name}
    raise AssertionError(f"{kind} is not described yet")


def sample_of(kind: mi.Type, *, full: bool) -> Any:
    """A value of the type: with every field, or with those alone that have no default."""
    if isinstance(kind, mi.Metadata):
        return sample_of(kind.type, full=full)
    if type(kind) in PLAIN:
        return SAMPLES[PLAIN[type(kind)]]
    match kind:
        case mi.UnionType(types=types):
            told = [one for one in types if not isinstance(one, mi.NoneType)]
            return sample_of(told[0], full=full)
        case mi.ListType(item_type=item) | mi.VarTupleType(item_type=item):
            return [sample_of(item, full=full)]
        case mi.TupleType(item_types=items):
            return [sample_of(one, full=full) for one in items]
        case mi.DictType(key_type=key, value_type=value):
            return {sample_of(key, full=full): sample_of(value, full=full)}
        case mi.EnumType(cls=cls):
            return next(iter(cls)).value
        case mi.StructType(fields=fields, tag=tag, tag_field=tag_field):
            given = {field.encode_name: sample_of(field.type, full=full) for field in fields if full or field.required}
            return ({tag_field: tag} if tag is not None else {}) | given
    raise AssertionError(f"{kind} is not described yet")


def types_of(structs: dict[str, Shape]) -> dict[str, type]:
    """Record types of a version that is not here any more, made from their shapes."""
    made: dict[str, type] = {}

    def make(shape: Shape) -> Any:
        if isinstance(shape, str):
            return OF_NAME[shape]
        ((what, inside),) = shape.items()
        match what:
            case "union":
                union = make(inside[0])
                for one in inside[1:]:
                    union = union | make(one) if union is not None else make(one) | None
                return union
            case "list":
                return tuple[make(inside), ...]  # type: ignore[misc]
            case "tuple":
                return tuple[*(make(one) for one in inside)]  # type: ignore[misc]
            case "dict":
                return dict[make(inside[0]), make(inside[1])]  # type: ignore[misc]
            case "enum":
                return enum.Enum("Old", {f"v{number}": value for number, value in enumerate(inside)})
        return struct(inside)

    def struct(name: str) -> type:
        if name not in made:
            shape = structs[name]
            fields = [
                (field, make(told["type"])) if told["required"] else (field, make(told["type"]), msgspec.UNSET)
                for field, told in shape["fields"].items()
            ]
            made[name] = msgspec.defstruct(name, fields, tag=shape["tag"], kw_only=True)
        return made[name]

    for name in structs:
        struct(name)
    return made
