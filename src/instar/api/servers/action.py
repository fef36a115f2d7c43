"""A row of the table of actions: what `actions.py` looks up by the key of a body, and the files beside it list."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from instar.http.answer import Answer, empty_answer
from instar.http.context import RequestContext
from instar.http.request import Request
from instar.model.instance import Instance

Act = Callable[[Request, Instance, Any], Awaitable[Answer]]


class Action(NamedTuple):
    """`bodies`: (first microversion, record) in rising order; a record of None takes any value, usually null.

    `policy` is asked before the server is looked for, like that of a route. `or_null`: null will do as well."""

    key: str
    policy: str
    act: Act
    bodies: tuple[tuple[int, type[msgspec.Struct] | None], ...] = ((1, None),)
    until: int | None = None  # the last microversion that has it
    or_null: bool = False

    def body_at(self, version: int) -> type[msgspec.Struct] | None:
        return [record for first, record in self.bodies if version >= first][-1]


def plain(key: str, policy: str, call: Callable[[RequestContext, Instance], Awaitable[None]], status: int = 202) -> Action:
    """An action without anything to choose: the door is called, and that is all."""

    async def act(request: Request, instance: Instance, _: None) -> Answer:
        await call(request.context, instance)
        return empty_answer(status)

    return Action(key, "os_compute_api:" + policy, act)
