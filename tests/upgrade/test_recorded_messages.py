"""Records of versions before this one: this one reads them, and they would read what this one writes.

A conductor and an agent may be one version apart, and operations that one version began another one ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.upgrade.records import RECORDS, samples_now, shapes_now
from tests.upgrade.shapes import types_of

RECORDED = Path(__file__).parent / "recorded"
VERSIONS = sorted(path.parent.name for path in RECORDED.glob("*/messages.json"))
# Fields that may be more than they were: what is new in them is said only where a wish is new, too, which earlier versions
# do not have.
WIDENED = frozenset({("RebuildArguments", "image")})  # None: the volume that the instance boots from is made anew
GONE: frozenset[str] = frozenset()  # records that nobody sends and no row has any more


@pytest.fixture(params=VERSIONS)
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((RECORDED / request.param / "messages.json").read_text())  # type: ignore[no-any-return]


def test_every_recorded_message_is_read_whole(recorded: dict[str, Any]) -> None:
    assert recorded["samples"], "nothing was recorded"
    for name, samples in recorded["samples"].items():
        if name in GONE:
            continue
        for how, sample in samples.items():
            body = bytes.fromhex(sample)
            read = msgspec.msgpack.decode(body, type=RECORDS[name])
            # Written again it says what it said: no field was dropped, renamed, or taken for something else.
            told, again = msgspec.msgpack.decode(body), msgspec.msgpack.decode(msgspec.msgpack.encode(read))
            assert _is_in(told, again), f"{name} ({how}): {told} became {again}"


def _is_in(told: Any, again: Any) -> bool:
    if isinstance(told, dict) and isinstance(again, dict):
        return all(key in again and _is_in(value, again[key]) for key, value in told.items())
    if isinstance(told, list) and isinstance(again, list):
        return len(told) == len(again) and all(map(_is_in, told, again))
    return bool(told == again)


def test_what_is_written_now_is_read_by_the_version_that_was_recorded(recorded: dict[str, Any]) -> None:
    before = types_of(recorded["shapes"])
    for name, samples in samples_now().items():
        if name not in before:
            continue  # new: who is told of it answers that it does not know it
        for how, sample in samples.items():
            try:
                msgspec.msgpack.decode(bytes.fromhex(sample), type=before[name])
            except msgspec.ValidationError as error:
                raise AssertionError(f"{recorded['version']} cannot read {name} ({how}): {error}") from None


def test_fields_are_never_removed_or_retyped_and_new_ones_have_defaults(recorded: dict[str, Any]) -> None:
    now, broken = shapes_now(), []
    for name, before in recorded["shapes"].items():
        if name in GONE:
            continue
        if name not in now:
            broken.append(f"{name} is gone")
            continue
        fields = now[name]["fields"]
        broken += [f"the tag of {name} changed"] if now[name]["tag"] != before["tag"] else []
        for field, was in before["fields"].items():
            if field not in fields:
                broken.append(f"{name}.{field} is gone")
            elif not _same(was["type"], fields[field]["type"]) and (name, field) not in WIDENED:
                broken.append(f"{name}.{field} was {was['type']}, is {fields[field]['type']}")
            elif fields[field]["required"] and not was["required"]:
                broken.append(f"{name}.{field} has no default any more")
        broken += [
            f"{name}.{field} is new and has no default"
            for field, told in fields.items()
            if told["required"] and field not in before["fields"]
        ]
    assert not broken, "\n".join(broken)


def _same(was: Any, now: Any) -> bool:
    """The same type; an enumeration may have more values than before."""
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
        ((what, inside),) = was.items()
        if what == "enum":
            return set(inside) <= set(now["enum"])
        if isinstance(inside, list):
            return len(inside) == len(now[what]) and all(map(_same, inside, now[what]))
        return _same(inside, now[what])
    return bool(was == now)


def test_a_field_that_is_removed_retyped_or_required_is_noticed() -> None:
    """The rules above can fail: held against records that break them."""
    shape = {"tag": None, "array_like": False, "fields": {"a": {"type": "int", "required": True}}}
    old = types_of({"Thing": shape})["Thing"]
    for written in ({}, {"a": "text"}, {"b": 1}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(written), type=old)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode({"a": 1, "new": 2}), type=old).a == 1  # type: ignore[attr-defined]
    assert _same({"enum": [1, 2]}, {"enum": [1, 2, 3]})
    assert not _same({"enum": [1, 2]}, {"enum": [1]})
    assert not _same({"list": "int"}, {"list": "str"})
