"""How our SQL reaches PostgreSQL: `:name` parameters as `$n`, and whole transactions as one call.

A transaction is data, so its shape (the statements' texts and the rows that each must touch) is known before its values.
A shape that comes often becomes a function of the session, in its temporary schema: then a transaction is one round trip,
with cached plans, and the commit comes with it. Every parameter has the type that its Python value says (PostgreSQL would
guess `integer` for `:limit < 0`); for NULL it is asked once. Called by `postgresql.py` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from instar.store.contract import Result, Statement, Value

HOLD = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"
MARKER = "UPDATE store_sessions SET seq = {seq}, result = {result} WHERE id = {session} AND seq < {seq}"
REFUSED = "IS001"  # our SQLSTATE: a statement did not touch the rows that it had to; DETAIL is its number
FENCED = "IS002"  # our SQLSTATE: another connection has asked for this session's end and was told that nothing more comes
PARAMETERS_MAX = 64  # of one statement in a function; more means a text that changes with their number
ARGUMENTS_MAX = 98  # values that a function takes one by one, besides session and number: PostgreSQL allows 100 arguments

_TOKEN = re.compile(r"'(?:[^']|'')*'|(?<![:\w]):([A-Za-z_]\w*)")
_SPACE = re.compile(r"\s*\n\s*")
_LINE = re.compile(r"line (\d+) at")
_RETURNING = re.compile(r"\bRETURNING\b")

# Python type → PostgreSQL type; and the place of its array where a function takes arrays.
TYPES: Mapping[type, str] = {str: "text", int: "bigint", bool: "bigint", bytes: "bytea", float: "double precision"}
_ARRAYS = {"bigint": 0, "text": 1, "bytea": 2, "double precision": 3}
# What PostgreSQL says of a parameter that stands for NULL only → as which we send it.
INFERRED: Mapping[str, str] = {
    "int2": "bigint", "int4": "bigint", "int8": "bigint", "text": "text", "varchar": "text", "bytea": "bytea",
    "float8": "double precision",
}  # fmt: skip


class Query(NamedTuple):
    """A statement as PostgreSQL takes it: `text` with `$n`, for which `names` gives the parameters in order."""

    text: str
    names: tuple[str, ...]


def kind_of(value: Value) -> str | None:
    """As which type PostgreSQL gets a value: a state of an enumeration is a text like any other. None for NULL."""
    kind = TYPES.get(type(value))
    if kind is None and value is not None:
        kind = next((kind for known, kind in TYPES.items() if isinstance(value, known)), None)
    return kind


@lru_cache(maxsize=2048)
def parameter_names(sql: str) -> tuple[str, ...]:
    """Names of the parameters, each once, as they come."""
    return tuple(dict.fromkeys(match[1] for match in _TOKEN.finditer(sql) if match[1]))


@lru_cache(maxsize=4096)
def _translate(sql: str, types: tuple[str | None, ...]) -> str:
    names = parameter_names(sql)
    places = {
        name: f"${number}" + (f"::{kind}" if kind else "")
        for number, (name, kind) in enumerate(zip(names, types, strict=True), 1)
    }
    return _TOKEN.sub(lambda match: places[match[1]] if match[1] else match[0], sql)


def translate(sql: str, params: Mapping[str, Value]) -> tuple[str, list[Value]]:
    """The text with `$n` and the values in their order. The type of a NULL is left to PostgreSQL."""
    values = [params[name] for name in parameter_names(sql)]
    return _translate(sql, tuple(kind_of(value) for value in values)), values


class ReturnedColumn(NamedTuple):
    name: str
    is_bytes: bool


class Shape:
    """The statements of a transaction without their values, as one function."""

    def __init__(self, statements: Sequence[Statement], types: Sequence[tuple[str, ...]], returned: Sequence[Any]) -> None:
        """`types`: of each statement's parameters, in the order of their names; `returned`: each one's columns or None."""
        self.returned: list[tuple[ReturnedColumn, ...] | None] = list(returned)
        self._rows = [statement.rows for statement in statements]
        # Where each value comes from: (statement, name, type); the empty name is that of `alone`.
        self._places: list[tuple[int, str, str]] = []
        self.told = any(s.rows is None or columns is not None for s, columns in zip(statements, self.returned, strict=True))
        named = [zip(parameter_names(one.sql), kinds, strict=True) for one, kinds in zip(statements, types, strict=True)]
        for number, statement in enumerate(statements):
            self._places += [(number, name, kind) for name, kind in named[number]]
            if statement.alone is not None:
                self._places.append((number, "", "text"))
        # Each value is an argument, which costs either side half as much as arrays that are made and taken apart.
        self._in_arrays = len(self._places) > ARGUMENTS_MAX
        values = [f"{kind}[]" for kind in _ARRAYS] if self._in_arrays else [kind for _, _, kind in self._places]
        self.arguments = ", ".join((*values, "text", "bigint"))
        self.call = "({})".format(", ".join(f"${number}" for number in range(1, len(values) + 3)))
        self.body = self._body(statements, session=f"${len(values) + 1}", seq=f"${len(values) + 2}")

    def _argument(self, place: int) -> str:
        if not self._in_arrays:
            return f"${place + 1}"
        kind = self._places[place][2]
        before = sum(1 for _, _, one in self._places[:place] if one == kind)
        return f"(${_ARRAYS[kind] + 1})[{before + 1}]"

    def _body(self, statements: Sequence[Statement], *, session: str, seq: str) -> str:
        """Each statement is one line, so that an error's line says whose it is: number n stands in line 5 + n."""
        arguments: list[dict[str, str]] = [{} for _ in statements]
        for place, (number, name, _) in enumerate(self._places):
            arguments[number][name] = self._argument(place)
        lines = []
        for number, statement in enumerate(statements):
            places = arguments[number]
            sql = _TOKEN.sub(lambda match, places=places: places[match[1]] if match[1] else match[0], statement.sql)  # type: ignore[misc]
            held = ""
            if statement.alone is not None:
                held = f"PERFORM pg_advisory_xact_lock(hashtextextended({places['']}, 0)); "
            lines.append(held + self._line(number, _SPACE.sub(" ", sql.strip())))
        marker = MARKER.format(seq=seq, session=session, result="instar_told" if self.told else "''")
        return "\n".join((
            "",
            "#variable_conflict use_column",
            "DECLARE instar_n bigint; instar_rows text; instar_told text := '';",
            "BEGIN",
            *lines,
            f"{marker}; IF NOT FOUND THEN RAISE EXCEPTION 'fenced' USING ERRCODE = '{FENCED}'; END IF;",
            "RETURN instar_told;", "END",
        ))  # fmt: skip

    def _line(self, number: int, sql: str) -> str:
        tell = ""
        if self.returned[number] is not None:
            sql = (
                f"WITH instar_done AS ({sql}) SELECT COUNT(*), COALESCE(json_agg(row_to_json(instar_done)), '[]')::text "  # noqa: S608
                "INTO instar_n, instar_rows FROM instar_done;"
            )
            tell = "instar_told := instar_told || ',' || instar_rows;"
        else:
            sql = f"{sql}; GET DIAGNOSTICS instar_n = ROW_COUNT;"
            if self.told:
                tell = "instar_told := instar_told || ',' || instar_n;"
        expected = self._rows[number]
        refuse = f"RAISE EXCEPTION 'rows' USING ERRCODE = '{REFUSED}', DETAIL = '{number}'"
        check = "" if expected is None else f" IF instar_n <> {expected} THEN {refuse}; END IF;"
        return f"{sql}{check} {tell}"

    def values(self, statements: Sequence[Statement]) -> list[Any] | None:
        """The values as the function takes them; None where one has another type than the shape was made for."""
        found: list[Any] = []
        for number, name, kind in self._places:
            value = statements[number].params[name] if name else statements[number].alone
            if value is not None and TYPES.get(type(value)) != kind and kind_of(value) != kind:
                return None
            found.append(value)
        if self._in_arrays:
            kinds = [kind for _, _, kind in self._places]
            return [[value for value, of in zip(found, kinds, strict=True) if of == kind] for kind in _ARRAYS]
        return found

    def results(self, told: str) -> list[Result]:
        """What the statements did, from what the function told (or the session's marker, where an answer was lost)."""
        if not self.told:
            return [Result(rows or 0, ()) for rows in self._rows]
        results = []
        for columns, told_one in zip(self.returned, msgspec.json.decode(f"[{told[1:]}]"), strict=True):
            if columns is None:
                results.append(Result(told_one, ()))
                continue
            for row in told_one:
                for column in columns:
                    if column.is_bytes and row[column.name] is not None:
                        row[column.name] = bytes.fromhex(row[column.name][2:])
            results.append(Result(len(told_one), told_one))
        return results


def has_returning(sql: str) -> bool:
    return _RETURNING.search(sql) is not None


def failed_statement(context: str | None) -> int | None:
    """Which statement of a function an error is about, from its context."""
    lines = _LINE.findall(context or "")
    return int(lines[-1]) - 5 if lines else None


def encode_results(results: Sequence[Result]) -> str:
    """What a transaction did that was sent one statement at a time, for its marker. Bytes stand in a list of their own."""

    def plain(value: Any) -> Any:
        return [value.hex()] if isinstance(value, bytes) else value

    told = [
        [{name: plain(value) for name, value in dict(row).items()} for row in one.rows] if one.rows else one.rowcount  # type: ignore[call-overload]
        for one in results
    ]
    return msgspec.json.encode(told).decode()


def decode_results(told: str) -> list[Result]:
    """The same again, where the answer was lost."""
    results = []
    for one in msgspec.json.decode(told):
        if isinstance(one, int):
            results.append(Result(one, ()))
            continue
        rows = [
            {name: bytes.fromhex(value[0]) if isinstance(value, list) else value for name, value in row.items()}
            for row in one
        ]
        results.append(Result(len(rows), rows))
    return results
