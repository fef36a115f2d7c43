"""Patterns that users filter names with: a small regular-expression language, matched in time linear to the text.

Python's own `re` can be made to run for hours by a short pattern; a filter of a list must not. Known: literals, `.`,
`[…]`, `\\d \\w \\s` and their opposites, `* + ? {m,n}`, `|`, groups, `^` and `$`. Patterns without any of it, or with
nothing but anchors, become conditions in SQL (`Literal`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from instar.errors import BadRequest

PATTERN_MAX = 255
REPEAT_MAX = 64
STATES_MAX = 4000

Accepts = Callable[[str], bool]


class Literal(NamedTuple):
    """A pattern that is only text, perhaps anchored."""

    text: str
    at_start: bool
    at_end: bool


class _Node(NamedTuple):
    """A piece of a parsed pattern: kind is empty, char, join, either, repeat, start or end."""

    kind: str
    parts: tuple[_Node, ...] = ()
    accepts: Accepts | None = None
    least: int = 0
    most: int | None = None


def literal(pattern: str) -> Literal | None:
    """The pattern as plain text; None when it needs matching."""
    match = re.fullmatch(r"(\^?)((?:[^\\.*+?{}()\[\]|^$]|\\[^a-zA-Z0-9])*)(\$?)", pattern)
    if not match:
        return None
    return Literal(re.sub(r"\\(.)", r"\1", match[2]), bool(match[1]), bool(match[3]))


@lru_cache(maxsize=256)
def compiled(pattern: str) -> Callable[[str], bool]:
    """A function that says whether the pattern is found anywhere in a text. Raises BadRequest for one we do not know."""
    if len(pattern) > PATTERN_MAX:
        raise BadRequest(f"The pattern is longer than {PATTERN_MAX} characters.")
    program = _Program()
    start = program.add(_Parser(pattern).parse(), program.state())
    return lambda text: program.search(start, text)


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._either()
        if self._at < len(self._text):
            raise self._refusal()
        return node

    def _refusal(self) -> BadRequest:
        return BadRequest(f"The pattern {self._text!r} is not understood at character {self._at + 1}.")

    def _peek(self) -> str:
        return self._text[self._at] if self._at < len(self._text) else ""

    def _take(self) -> str:
        char = self._peek()
        if not char:
            raise self._refusal()
        self._at += 1
        return char

    def _either(self) -> _Node:
        branches = [self._join()]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._join())
        return branches[0] if len(branches) == 1 else _Node("either", tuple(branches))

    def _join(self) -> _Node:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return _Node("join", tuple(parts))

    def _repeated(self, node: _Node) -> _Node:
        bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        counted = re.compile(r"\{(\d{1,3})(?:(,)(\d{0,3}))?\}").match(self._text, self._at)
        if self._peek() in bounds and self._peek():
            least, most = bounds[self._take()]
        elif counted:
            self._at = counted.end()
            least = int(counted[1])
            most = least if not counted[2] else int(counted[3]) if counted[3] else None
            if least > REPEAT_MAX or (most is not None and not least <= most <= REPEAT_MAX):
                raise self._refusal()
        else:
            return node
        if self._peek() == "?":  # lazy or greedy: it is found or not all the same
            self._at += 1
        if node.kind in ("start", "end"):
            raise self._refusal()
        return _Node("repeat", (node,), None, least, most)

    def _atom(self) -> _Node:
        char = self._take()
        if char == "(":
            if self._text.startswith("?:", self._at):
                self._at += 2
            self._depth += 1
            if self._depth > 20:
                raise self._refusal()
            node = self._either()
            if self._take() != ")":
                raise self._refusal()
            self._depth -= 1
            return node
        if char == "[":
            return _Node("char", accepts=self._set())
        if char == "\\":
            return _Node("char", accepts=_escaped(self._take()) or self._fail())
        if char == ".":
            return _Node("char", accepts=lambda c: c != "\n")
        if char in "^$":
            return _Node("start" if char == "^" else "end")
        if char in "*+?":
            self._at -= 1
            raise self._refusal()
        return _Node("char", accepts=char.__eq__)

    def _fail(self) -> Accepts:
        raise self._refusal()

    def _set(self) -> Accepts:
        inverted = self._peek() == "^"
        self._at += inverted
        tests: list[Accepts] = []
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._take()
            if low == "\\":
                escape = self._take()
                tests.append(_escaped(escape) or self._fail())
                continue
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._take()
                if high < low:
                    raise self._refusal()
                tests.append(_between(low, high))
            else:
                tests.append(low.__eq__)
        self._at += 1
        return lambda c: any(test(c) for test in tests) is not inverted


def _between(low: str, high: str) -> Accepts:
    return lambda c: low <= c <= high


def _escaped(char: str) -> Accepts | None:
    classes: dict[str, Accepts] = {
        "d": str.isdigit, "s": str.isspace, "w": lambda c: c.isalnum() or c == "_",
        "D": lambda c: not c.isdigit(), "S": lambda c: not c.isspace(), "W": lambda c: not (c.isalnum() or c == "_"),
    }  # fmt: skip
    if char in classes:
        return classes[char]
    return None if char.isalnum() else char.__eq__


class _State:
    __slots__ = ("accepts", "at", "next")

    def __init__(self) -> None:
        self.accepts: Accepts | None = None  # a character that leads to next[0]; None: go to all of next at once
        self.at = ""  # start, end: go on only there
        self.next: list[_State] = []


class _Program:
    """States and their successors. The state made first is the end: being there means found."""

    def __init__(self) -> None:
        self._count = 0
        self._end: _State | None = None

    def state(self) -> _State:
        self._count += 1
        if self._count > STATES_MAX:
            raise BadRequest("The pattern is too complex.")
        state = _State()
        self._end = self._end or state
        return state

    def add(self, node: _Node, then: _State) -> _State:
        """The state from which `node` is matched and then `then` is reached."""
        if node.kind == "join":
            for part in reversed(node.parts):
                then = self.add(part, then)
            return then
        if node.kind == "repeat":
            return self._add_repeat(node, then)
        state = self.state()
        if node.kind == "either":
            state.next = [self.add(part, then) for part in node.parts]
            return state
        state.accepts, state.next = node.accepts, [then]
        state.at = node.kind if node.kind in ("start", "end") else ""
        return state

    def _add_repeat(self, node: _Node, then: _State) -> _State:
        part = node.parts[0]
        if node.most is None:
            loop = self.state()
            loop.next = [self.add(part, loop), then]
            then = loop
        else:
            last = then
            for _ in range(node.most - node.least):
                state = self.state()
                state.next = [self.add(part, then), last]
                then = state
        for _ in range(node.least):
            then = self.add(part, then)
        return then

    def search(self, start: _State, text: str) -> bool:
        alive: dict[_State, None] = {}
        for index, char in enumerate(text):
            self._enter(start, alive, index, len(text))
            if self._end in alive:
                return True
            following: dict[_State, None] = {}
            for state in alive:
                if state.accepts is not None and state.accepts(char):
                    self._enter(state.next[0], following, index + 1, len(text))
            alive = following
        self._enter(start, alive, len(text), len(text))
        return self._end in alive

    def _enter(self, state: _State, alive: dict[_State, None], index: int, length: int) -> None:
        waiting = [state]
        while waiting:
            one = waiting.pop()
            if one in alive or (one.at == "start" and index) or (one.at == "end" and index < length):
                continue
            alive[one] = None
            if one.accepts is None:
                waiting.extend(one.next)
