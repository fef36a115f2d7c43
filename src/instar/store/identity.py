"""Users, projects, domains, groups, roles and what binds them, in the database. Called by instar.identity.

The simple kinds (a table, an id, a few columns) share their statements; SQL is put together from the parts that stand
here and every value is a parameter (hence the silenced S608).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from instar.errors import Conflict, NotFound
from instar.store.contract import Row, Statement, Store, Value

R = TypeVar("R", bound=msgspec.Struct)


class Domain(msgspec.Struct, frozen=True):
    id: str
    name: str
    description: str = ""
    enabled: bool = True


class Project(msgspec.Struct, frozen=True):
    """`tags` is a JSON list, as it is stored. Tokens of an older `token_epoch` are refused."""

    id: str
    domain_id: str
    name: str
    description: str = ""
    enabled: bool = True
    tags: str = "[]"
    token_epoch: int = 0


class User(msgspec.Struct, frozen=True):
    """Tokens of an older `token_epoch` are refused. Without `password_hash` there is no login by password."""

    id: str
    domain_id: str
    name: str
    description: str = ""
    email: str | None = None
    enabled: bool = True
    default_project_id: str | None = None
    password_hash: str | None = None
    token_epoch: int = 0


class Group(msgspec.Struct, frozen=True):
    id: str
    domain_id: str
    name: str
    description: str = ""


class Role(msgspec.Struct, frozen=True):
    id: str
    name: str
    description: str = ""


class ApplicationCredential(msgspec.Struct, frozen=True):
    """`role_ids` is a JSON list, as it is stored. `expires_at` in microseconds since the epoch."""

    id: str
    user_id: str
    project_id: str
    name: str
    description: str
    secret_hash: str
    role_ids: str
    expires_at: int | None
    unrestricted: bool


class Assignment(msgspec.Struct, frozen=True):
    """A role that an actor (user or group) has on a target (project, domain, or system with the id `all`)."""

    actor_type: str
    actor_id: str
    target_type: str
    target_id: str
    role_id: str


class Kind(NamedTuple, Generic[R]):
    """A simple kind: `word` is its name in messages."""

    table: str
    record: type[R]
    word: str

    @property
    def columns(self) -> tuple[str, ...]:
        return self.record.__struct_fields__


DOMAINS = Kind("identity_domains", Domain, "domain")
PROJECTS = Kind("identity_projects", Project, "project")
USERS = Kind("identity_users", User, "user")
GROUPS = Kind("identity_groups", Group, "group")
ROLES = Kind("identity_roles", Role, "role")
APPLICATION_CREDENTIALS = Kind("identity_application_credentials", ApplicationCredential, "application credential")

_HELD_BY_USER = (
    "((a.actor_type = 'user' AND a.actor_id = :user_id) OR (a.actor_type = 'group' AND a.actor_id IN "
    "(SELECT group_id FROM identity_group_members WHERE user_id = :user_id)))"
)
_HOLDS = f"a.target_type = :target_type AND a.target_id = :target_id AND {_HELD_BY_USER}"


def _values(record: msgspec.Struct) -> dict[str, Value]:
    return {
        name: int(value) if isinstance(value, bool) else value for name, value in msgspec.structs.asdict(record).items()
    }


async def _tell_nobody() -> None:
    return


class IdentityRecords:
    """Every statement of the identity room. `changed` is awaited after each write, before the writer goes on."""

    def __init__(self, store: Store, changed: Callable[[], Awaitable[None]] = _tell_nobody) -> None:
        self._store = store
        self._changed = changed

    # --- the simple kinds -------------------------------------------------------------------------------------------

    async def fetch(self, kind: Kind[R], record_id: str) -> R:
        """Raises NotFound."""
        found = await self.list(kind, {"id": record_id}, limit=1)
        if not found:
            raise NotFound(f"Could not find {kind.word}: {record_id[:64]}.", kind=kind.word, id=record_id)
        return found[0]

    async def list(
        self, kind: Kind[R], equals: Mapping[str, Value], *, limit: int, marker: str | None = None
    ) -> list[R]:
        """Records that equal `equals` (column → value), by id, after `marker`."""
        conditions = [f"{column} = :{column}" for column in equals]
        params: dict[str, Value] = {**equals, "row_limit": limit}
        if marker is not None:
            conditions.append("id > :row_marker")
            params["row_marker"] = marker
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = await self._store.read(
            f"SELECT {', '.join(kind.columns)} FROM {kind.table}{where} ORDER BY id LIMIT :row_limit",  # noqa: S608
            params,
        )
        return [_record(kind, row) for row in rows]

    async def insert(self, kind: Kind[R], *records: R) -> None:
        """Raises Conflict when the name is taken, NotFound when the domain is gone."""
        await self._write(*(insert_statement(kind, record) for record in records))

    async def update(
        self, kind: Kind[R], record_id: str, changes: Mapping[str, Value], *, refuse_tokens: bool = False
    ) -> None:
        """`refuse_tokens`: every token of this user or project is refused from now on. Raises NotFound, Conflict."""
        parts = [f"{column} = :{column}" for column in changes if column in kind.columns]
        if refuse_tokens:
            parts.append("token_epoch = token_epoch + 1")
        if not parts:
            return
        values = {name: int(value) if isinstance(value, bool) else value for name, value in changes.items()}
        await self._write(
            Statement(
                f"UPDATE {kind.table} SET {', '.join(parts)} WHERE id = :id",  # noqa: S608
                {**values, "id": record_id},
                rows=1,
                error=NotFound(f"Could not find {kind.word}: {record_id[:64]}.", kind=kind.word, id=record_id),
                duplicate=_name_taken(kind, str(changes.get("name"))),
            )
        )

    async def delete(self, kind: Kind[R], record_id: str) -> None:
        """Deletes the record and every assignment that names it. Raises NotFound."""
        word = kind.word
        statements = []
        if word in ("user", "group"):
            statements.append(
                Statement(
                    "DELETE FROM identity_assignments WHERE actor_type = :word AND actor_id = :id",
                    {"word": word, "id": record_id},
                )
            )
        if word in ("project", "domain"):
            statements.append(
                Statement(
                    "DELETE FROM identity_assignments WHERE target_type = :word AND target_id = :id",
                    {"word": word, "id": record_id},
                )
            )
        gone = NotFound(f"Could not find {word}: {record_id[:64]}.", kind=word, id=record_id)
        statements.append(
            Statement(f"DELETE FROM {kind.table} WHERE id = :id", {"id": record_id}, rows=1, error=gone)  # noqa: S608
        )
        await self._write(*statements)

    async def domain_delete(self, domain_id: str) -> None:
        """Deletes a disabled domain with everything in it. Raises NotFound, Conflict when it is enabled."""
        params = {"id": domain_id}
        enabled = Conflict("Cannot delete a domain that is enabled, please disable it first.")
        of_domain = "(SELECT id FROM {} WHERE domain_id = :id)"
        users = of_domain.format("identity_users")
        groups = of_domain.format("identity_groups")
        projects = of_domain.format("identity_projects")
        assignments = (
            f"DELETE FROM identity_assignments WHERE (actor_type = 'user' AND actor_id IN {users}) "  # noqa: S608
            f"OR (actor_type = 'group' AND actor_id IN {groups}) "
            f"OR (target_type = 'project' AND target_id IN {projects}) "
            "OR (target_type = 'domain' AND target_id = :id)"
        )
        await self._write(
            Statement("UPDATE identity_domains SET enabled = 0 WHERE id = :id AND enabled = 0", params, 1, enabled),
            Statement(assignments, params),
            Statement("DELETE FROM identity_users WHERE domain_id = :id", params),
            Statement("DELETE FROM identity_groups WHERE domain_id = :id", params),
            Statement("DELETE FROM identity_projects WHERE domain_id = :id", params),
            Statement("DELETE FROM identity_domains WHERE id = :id", params, 1),
        )

    # --- groups -----------------------------------------------------------------------------------------------------

    async def group_member_add(self, group_id: str, user_id: str) -> None:
        await self._write(
            Statement(
                "INSERT INTO identity_group_members (group_id, user_id) VALUES (:group_id, :user_id) "
                "ON CONFLICT (group_id, user_id) DO NOTHING",
                {"group_id": group_id, "user_id": user_id},
            )
        )

    async def group_member_remove(self, group_id: str, user_id: str) -> None:
        """Raises NotFound when the user is not in the group."""
        await self._write(
            Statement(
                "DELETE FROM identity_group_members WHERE group_id = :group_id AND user_id = :user_id",
                {"group_id": group_id, "user_id": user_id},
                rows=1,
                error=NotFound("The user is not in the group.", kind="user", id=user_id),
            )
        )

    async def group_members(self, group_id: str, *, limit: int) -> Sequence[User]:
        rows = await self._store.read(
            f"SELECT {_qualified(USERS, 'u')} FROM identity_users u JOIN identity_group_members m "  # noqa: S608
            "ON m.user_id = u.id WHERE m.group_id = :group_id ORDER BY u.id LIMIT :row_limit",
            {"group_id": group_id, "row_limit": limit},
        )
        return [_record(USERS, row) for row in rows]

    async def groups_of_user(self, user_id: str, *, limit: int) -> Sequence[Group]:
        rows = await self._store.read(
            f"SELECT {_qualified(GROUPS, 'g')} FROM identity_groups g JOIN identity_group_members m "  # noqa: S608
            "ON m.group_id = g.id WHERE m.user_id = :user_id ORDER BY g.id LIMIT :row_limit",
            {"user_id": user_id, "row_limit": limit},
        )
        return [_record(GROUPS, row) for row in rows]

    # --- assignments ------------------------------------------------------------------------------------------------

    async def assignment_add(self, assignment: Assignment) -> None:
        """Does nothing when the actor has the role already."""
        await self._write(assignment_statement(assignment))

    async def assignment_remove(self, assignment: Assignment) -> None:
        """Raises NotFound when the actor has no such role there."""
        await self._write(
            Statement(
                "DELETE FROM identity_assignments WHERE actor_type = :actor_type AND actor_id = :actor_id "
                "AND target_type = :target_type AND target_id = :target_id AND role_id = :role_id",
                _values(assignment),
                rows=1,
                error=NotFound("Could not find role assignment.", kind="role assignment", id=assignment.role_id),
            )
        )

    async def assignment_list(self, equals: Mapping[str, Value], *, limit: int) -> Sequence[Assignment]:
        """Assignments as they were made. `equals`: columns of Assignment, or `user_id` for a user with his groups."""
        conditions = [_HELD_BY_USER if column == "user_id" else f"a.{column} = :{column}" for column in equals]
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = await self._store.read(
            "SELECT a.actor_type, a.actor_id, a.target_type, a.target_id, a.role_id FROM identity_assignments a"  # noqa: S608
            f"{where} ORDER BY a.actor_type, a.actor_id, a.target_type, a.target_id, a.role_id LIMIT :row_limit",
            {**equals, "row_limit": limit},
        )
        return [msgspec.convert(_mapping(row, Assignment), Assignment) for row in rows]

    async def roles_held(self, user_id: str, target_type: str, target_id: str) -> Sequence[Role]:
        """Roles that a user has on a target, by himself or through a group; implied roles are not added."""
        rows = await self._store.read(
            f"SELECT DISTINCT {_qualified(ROLES, 'r')} FROM identity_roles r "  # noqa: S608
            f"JOIN identity_assignments a ON a.role_id = r.id WHERE {_HOLDS}",
            {"user_id": user_id, "target_type": target_type, "target_id": target_id},
        )
        return [_record(ROLES, row) for row in rows]

    async def projects_of_user(self, user_id: str, *, limit: int) -> Sequence[Project]:
        """Enabled projects on which the user has a role."""
        rows = await self._store.read(
            f"SELECT {_qualified(PROJECTS, 'p')} FROM identity_projects p WHERE p.enabled = 1 AND EXISTS "  # noqa: S608
            "(SELECT 1 FROM identity_assignments a WHERE a.target_type = 'project' AND a.target_id = p.id "
            f"AND {_HELD_BY_USER}) ORDER BY p.id LIMIT :row_limit",
            {"user_id": user_id, "row_limit": limit},
        )
        return [_record(PROJECTS, row) for row in rows]

    async def domains_of_user(self, user_id: str, *, limit: int) -> Sequence[Domain]:
        """Enabled domains on which the user has a role."""
        rows = await self._store.read(
            f"SELECT {_qualified(DOMAINS, 'd')} FROM identity_domains d WHERE d.enabled = 1 AND EXISTS "  # noqa: S608
            "(SELECT 1 FROM identity_assignments a WHERE a.target_type = 'domain' AND a.target_id = d.id "
            f"AND {_HELD_BY_USER}) ORDER BY d.id LIMIT :row_limit",
            {"user_id": user_id, "row_limit": limit},
        )
        return [_record(DOMAINS, row) for row in rows]

    # --- tokens -----------------------------------------------------------------------------------------------------

    async def token_revoke(self, token_id: str, expires_at: int, now: int) -> None:
        """Remembers a revoked token until it expires by itself; forgets those that have. Times in microseconds."""
        await self._write(
            Statement("DELETE FROM identity_revocations WHERE expires_at < :now", {"now": now}),
            Statement(
                "INSERT INTO identity_revocations (token_id, expires_at) VALUES (:token_id, :expires_at) "
                "ON CONFLICT (token_id) DO NOTHING",
                {"token_id": token_id, "expires_at": expires_at},
            ),
        )

    async def token_is_revoked(self, token_id: str) -> bool:
        rows = await self._store.read(
            "SELECT 1 AS found FROM identity_revocations WHERE token_id = :token_id", {"token_id": token_id}
        )
        return bool(rows)

    async def write(self, *statements: Statement) -> None:
        """Several of this module's statements in one transaction."""
        await self._write(*statements)

    async def _write(self, *statements: Statement) -> None:
        try:
            await self._store.write(*statements)
        finally:
            await self._changed()  # also when it failed: forgetting too much does no harm


def insert_statement(kind: Kind[R], record: R) -> Statement:
    names = ", ".join(kind.columns)
    places = ", ".join(f":{column}" for column in kind.columns)
    values = _values(record)
    return Statement(
        f"INSERT INTO {kind.table} ({names}) VALUES ({places})",  # noqa: S608
        values,
        rows=1,
        duplicate=_name_taken(kind, str(values["name"])),
    )


def assignment_statement(assignment: Assignment) -> Statement:
    return Statement(
        "INSERT INTO identity_assignments (actor_type, actor_id, target_type, target_id, role_id) "
        "VALUES (:actor_type, :actor_id, :target_type, :target_id, :role_id) "
        "ON CONFLICT (actor_type, actor_id, target_type, target_id, role_id) DO NOTHING",
        _values(assignment),
    )


def _name_taken(kind: Kind[Any], name: str) -> Conflict:
    return Conflict(f"Conflict occurred attempting to store {kind.word} - Duplicate entry found with name {name}.")


def _qualified(kind: Kind[Any], alias: str) -> str:
    return ", ".join(f"{alias}.{column}" for column in kind.columns)


def _mapping(row: Row, record: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: row[name] for name in record.__struct_fields__}


def _record(kind: Kind[R], row: Row) -> R:
    return msgspec.convert(_mapping(row, kind.record), kind.record, strict=False)
