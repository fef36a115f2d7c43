"""Who may do what, as a table in each API room: name of an action → Rule. Read by the router and by handlers.

A role stands for itself and all that imply it; tokens carry implied roles already, so a rule is one lookup in a set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from instar.errors import Forbidden, NotFound
from instar.http.context import RequestContext

ROLES = ("reader", "member", "manager", "admin", "service")


class Rule(NamedTuple):
    """`role` that the caller must have; empty: any valid token will do. `needs_project`: the token must be scoped to a
    project. `needs_token` False: anybody, without a token (version documents, logging in)."""

    role: str = ""
    needs_project: bool = True
    needs_token: bool = True

    def allows(self, context: RequestContext) -> bool:
        if self.role and self.role not in context.roles:
            return False
        return bool(context.project_id) or not self.needs_project


OPEN = Rule(needs_project=False, needs_token=False)
ANYONE = Rule(needs_project=False)  # any valid token, whatever its scope
READER, MEMBER, MANAGER, ADMIN, SERVICE = (Rule(role) for role in ROLES)


class Policy:
    """The rules of one API. A name that is not in the table is our mistake: KeyError, and nothing is allowed."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self._rules = dict(rules)

    def __getitem__(self, name: str) -> Rule:
        return self._rules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def allows(self, context: RequestContext, name: str) -> bool:
        return self._rules[name].allows(context)

    def require(self, context: RequestContext, name: str) -> None:
        """Raises Forbidden that names the rule."""
        if not self._rules[name].allows(context):
            raise Forbidden(action=name)


def own_project(context: RequestContext, project_id: str, kind: str, record_id: str) -> None:
    """Raises NotFound unless the record is of the caller's project or the caller is an admin.

    Not Forbidden: that would tell that another project's record exists."""
    if project_id != context.project_id and not context.is_admin:
        raise NotFound(kind=kind, id=record_id)
