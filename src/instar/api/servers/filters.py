"""Filters, order and page of a list of servers: query parameters in, an `InstanceQuery` and residual filters out.

Which filter exists from which microversion, and for whom, is a table. Rules: Compute API, List Servers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from instar.api import patterns
from instar.api.resource import boolean, integer, time_us
from instar.api.servers.view import ROOT_DEVICE
from instar.errors import BadRequest, Forbidden
from instar.http.request import Request
from instar.model.instance import Instance
from instar.model.states import TaskState, VmState, states_of_status, status_of
from instar.store.contract import Value
from instar.store.instance_queries import COLUMNS, SORTS, InstanceQuery, SoftDeleted, Substring

Residual = Callable[[Instance], bool]
ADMIN_ONLY = 10_000  # a microversion that never comes: the filter is for admins at every version

# Filter → from which microversion others than admins may use it. What they may not use is ignored, as it always was.
FILTERS: dict[str, int] = {
    "name": 1, "display_name": 1, "status": 1, "image": 1, "image_ref": 1, "flavor": 1, "flavor_id": 1, "ip": 1,
    "changes-since": 1, "reservation_id": 1, "all_tenants": 1, "uuid": 1, "ip6": 5, "tags": 26, "tags-any": 26,
    "not-tags": 26, "not-tags-any": 26, "changes-before": 66, "locked": 73, "availability_zone": 83,
    "config_drive": 83, "key_name": 83, "created_at": 83, "launched_at": 83, "terminated_at": 83, "power_state": 83,
    "task_state": 83, "vm_state": 83, "progress": 83, "user_id": 83,
    "description": ADMIN_ONLY, "display_description": ADMIN_ONLY, "host": ADMIN_ONLY, "node": ADMIN_ONLY,
    "hostname": ADMIN_ONLY, "kernel_id": ADMIN_ONLY, "ramdisk_id": ADMIN_ONLY, "root_device_name": ADMIN_ONLY,
    "launch_index": ADMIN_ONLY, "locked_by": ADMIN_ONLY, "deleted": ADMIN_ONLY, "soft_deleted": ADMIN_ONLY,
    "project_id": ADMIN_ONLY, "tenant_id": ADMIN_ONLY, "access_ip_v4": ADMIN_ONLY, "access_ip_v6": ADMIN_ONLY,
    "auto_disk_config": ADMIN_ONLY,
}  # fmt: skip
# Filters that came later than the list itself: before, nobody has them.
_CAME_WITH = {
    "tags": 26, "tags-any": 26, "not-tags": 26, "not-tags-any": 26, "changes-before": 66, "locked": 73,
}  # fmt: skip
_PAGING = frozenset({"limit", "marker", "sort_key", "sort_dir"})
STRICT_SINCE = 75  # from here on an unknown parameter is refused
STATUS_STRICT_SINCE = 38
IP_TEXT = re.compile(r"\^?[0-9A-Fa-f:.\\]{1,64}\$?")
_EQUAL_ALIASES = {
    "image_ref": "image", "flavor_id": "flavor", "tenant_id": "project_id", "node": "host",
}  # fmt: skip
_TIMES = ("created_at", "launched_at", "terminated_at")
_TAG_FILTERS = ("tags", "tags-any", "not-tags", "not-tags-any")
TAGS_MAX = 50


class Wanted(NamedTuple):
    """What a request asks for: the part in SQL, and what is left to look at in each record."""

    query: InstanceQuery
    residual: tuple[Residual, ...]


class _Gathered:
    """The query while its parameters are read."""

    def __init__(self, project_id: str) -> None:
        self.project_id: str | None = project_id
        self.deleted: bool | None = False
        self.soft_deleted = SoftDeleted.HIDDEN
        self.equal: list[tuple[str, tuple[Value, ...]]] = []
        self.states: list[tuple[VmState, tuple[TaskState, ...], tuple[TaskState, ...]]] | None = None
        self.substrings: list[Substring] = []
        self.seconds: list[tuple[str, int]] = []
        self.since: int | None = None
        self.before: int | None = None
        self.residual: list[Residual] = []


def read_query(request: Request) -> Wanted:
    """The list that a request asks for, without its page. Raises BadRequest, Forbidden."""
    given = _allowed(request)
    context = request.context
    gathered = _Gathered(context.project_id)
    _read_scope(given, gathered, context.is_admin)
    _read_states(given, gathered, context.is_admin, request.microversion)
    _read_times(given, gathered)
    _read_soft_deleted(given, gathered, context.is_admin)
    _read_equal(given, gathered)
    _read_texts(given, gathered)
    _read_tags(given, gathered)
    if "locked" in given:
        wanted = boolean("locked", given["locked"][-1])
        gathered.residual.append(lambda i: (i.locked_by is not None) is wanted)
    return Wanted(
        InstanceQuery(
            project_id=gathered.project_id,
            deleted=gathered.deleted,
            soft_deleted=gathered.soft_deleted,
            equal=tuple(gathered.equal),
            states=None if gathered.states is None else tuple(gathered.states),
            substrings=tuple(gathered.substrings),
            seconds=tuple(gathered.seconds),
            changed_since_us=gathered.since,
            changed_before_us=gathered.before,
            order=_order(request),
        ),
        tuple(gathered.residual),
    )


def _allowed(request: Request) -> dict[str, list[str]]:
    """The filters that count: known at this version and allowed to this caller. From 2.75 unknown names are refused."""
    version: int = request.microversion
    is_admin = request.context.is_admin
    given: dict[str, list[str]] = {}
    for name, value in request.query:
        if name in _PAGING:
            continue
        first = FILTERS.get(name)
        if first is None or version < _CAME_WITH.get(name, 0):
            if version >= STRICT_SINCE:
                raise BadRequest(f"Invalid query parameters: additional properties are not allowed ({name[:80]!r}).")
            continue
        if is_admin or version >= first:
            given.setdefault(name, []).append(value)
    return given


def _read_scope(given: dict[str, list[str]], gathered: _Gathered, is_admin: bool) -> None:
    everyone = given.pop("all_tenants", None)
    projects = given.pop("project_id", []) + given.pop("tenant_id", [])
    if everyone and (everyone[-1] == "" or boolean("all_tenants", everyone[-1])):
        if not is_admin:
            raise Forbidden(action="os_compute_api:servers:index:get_all_tenants")
        gathered.project_id = None
        if projects:
            gathered.equal.append(("project_id", tuple(projects)))
    if "deleted" in given:
        gathered.deleted = boolean("deleted", given.pop("deleted")[-1])


def _read_states(given: dict[str, list[str]], gathered: _Gathered, is_admin: bool, version: int) -> None:
    statuses = given.pop("status", None)
    if not statuses:
        return
    gathered.states = []
    for status in statuses:
        found = states_of_status(status.upper())
        if not found and version >= STATUS_STRICT_SINCE and status.lower() != "unknown":
            raise BadRequest(f"Invalid status value {status[:40]!r}.")
        for vm_state in dict.fromkeys(state for state, _ in found):
            tasks = tuple(task for state, task in found if state is vm_state and task is not None)
            others = () if tasks else _tasks_with_status(vm_state)
            gathered.states.append((vm_state, tasks, others))
    if any(state is VmState.DELETED for state, _, _ in gathered.states):
        if not is_admin:
            raise Forbidden("Only administrators may list deleted instances.")
        gathered.deleted = None


def _read_soft_deleted(given: dict[str, list[str]], gathered: _Gathered, is_admin: bool) -> None:
    """What waits to be restored or deleted is hidden, unless an admin asks for it, or whoever follows changes."""
    asked = boolean("soft_deleted", given.pop("soft_deleted")[-1]) if "soft_deleted" in given else None
    by_state = VmState.SOFT_DELETED.value in (text.lower() for text in given.get("vm_state", ()))
    by_status = any(state is VmState.SOFT_DELETED for state, _, _ in gathered.states or ())
    if gathered.deleted is None:
        gathered.soft_deleted = SoftDeleted.AS_ALL
    elif gathered.deleted and asked is not False:
        gathered.soft_deleted = SoftDeleted.WITH_DELETED
    elif is_admin and asked is not False and (asked or by_state or by_status):
        gathered.soft_deleted = SoftDeleted.AS_ALL


def _tasks_with_status(vm_state: VmState) -> tuple[TaskState, ...]:
    """Task states that make an instance in this vm_state show another status than the vm_state's own."""
    own = status_of(vm_state, None)
    return tuple(task for task in TaskState if status_of(vm_state, task) != own)


def _read_times(given: dict[str, list[str]], gathered: _Gathered) -> None:
    if "changes-since" in given:
        gathered.since = time_us("changes-since", given.pop("changes-since")[-1])
        # Whoever follows changes must also learn of deletions.
        gathered.deleted = None if not gathered.deleted else True
    if "changes-before" in given:
        gathered.before = time_us("changes-before", given.pop("changes-before")[-1])
        gathered.deleted = None if not gathered.deleted else True
    if gathered.since is not None and gathered.before is not None and gathered.since > gathered.before:
        raise BadRequest("The value of changes-since must be less than or equal to changes-before.")
    for name in _TIMES:
        if name in given:
            moment = time_us(name, given.pop(name)[-1])
            gathered.seconds.append((name, moment - moment % 1_000_000))


def _read_equal(given: dict[str, list[str]], gathered: _Gathered) -> None:
    for name in list(given):
        key = _EQUAL_ALIASES.get(name, name)
        if key not in COLUMNS:
            continue
        texts = given.pop(name)
        values: tuple[Value, ...] = tuple(texts)
        if key == "power_state":
            values = tuple(integer(name, text) for text in texts)
        elif key in ("vm_state", "task_state"):
            values = tuple(None if text in ("", "None") else text.lower() for text in texts)
        gathered.equal.append((COLUMNS[key], values))


def _read_texts(given: dict[str, list[str]], gathered: _Gathered) -> None:
    for name, column in (("name", "name"), ("display_name", "name"), ("hostname", "hostname")):
        for pattern in given.pop(name, []):
            _add_pattern(gathered, column, pattern)
    for name in ("ip", "ip6"):
        for text in given.pop(name, []):
            _add_address(gathered, name, text)
    for name in ("description", "display_description"):
        for pattern in given.pop(name, []):
            found = patterns.compiled(pattern)
            gathered.residual.append(lambda i, f=found: f(i.spec.description or ""))  # type: ignore[misc]
    for name, read in _PLAIN.items():
        if name in given:
            texts = frozenset(given.pop(name))
            gathered.residual.append(lambda i, r=read, t=texts: str(r(i)) in t)  # type: ignore[misc]
    if "config_drive" in given:
        wanted = boolean("config_drive", given.pop("config_drive")[-1] or "0")
        gathered.residual.append(lambda i: i.spec.config_drive is wanted)


def _image_property(name: str) -> Callable[[Instance], Any]:
    return lambda i: i.spec.image.properties.get(name, "") if i.spec.image else ""


_PLAIN: dict[str, Callable[[Instance], Any]] = {
    "progress": lambda i: i.progress,
    "launch_index": lambda i: i.spec.launch_index,
    "access_ip_v4": lambda i: i.spec.access_ip_v4,
    "access_ip_v6": lambda i: i.spec.access_ip_v6,
    "kernel_id": _image_property("kernel_id"),
    "ramdisk_id": _image_property("ramdisk_id"),
    "root_device_name": lambda _: ROOT_DEVICE,
    "auto_disk_config": lambda i: i.spec.disk_config,
}


def _add_pattern(gathered: _Gathered, column: str, pattern: str) -> None:
    plain = patterns.literal(pattern)
    if plain is not None:
        gathered.substrings.append(Substring(column, plain.text, plain.at_start, plain.at_end))
        return
    found = patterns.compiled(pattern)
    gathered.residual.append(lambda i: found(i.name if column == "name" else i.hostname))


def _add_address(gathered: _Gathered, name: str, text: str) -> None:
    """A piece of an address. It was a pattern once, so anchors and escaped dots are understood."""
    if not IP_TEXT.fullmatch(text):
        raise BadRequest(f"Invalid input for query parameter {name}: {text[:64]!r} is not part of an address.")
    piece = text.strip("^$").replace("\\", "")
    at_start, at_end = text.startswith("^"), text.endswith("$")
    sign = ":" if name == "ip6" else "."
    gathered.substrings.append(Substring("addresses", piece))

    def matches(instance: Instance) -> bool:
        for port in instance.facts.ports:
            for fixed in port.definition.fixed_ips:
                ip = fixed.ip_address
                if (
                    sign in ip
                    and piece in ip
                    and (not at_start or ip.startswith(piece))
                    and (not at_end or ip.endswith(piece))
                ):
                    return True
        return False

    gathered.residual.append(matches)


def _read_tags(given: dict[str, list[str]], gathered: _Gathered) -> None:
    for name in _TAG_FILTERS:
        if name not in given:
            continue
        tags = frozenset(tag for text in given.pop(name) for tag in text.split(",") if tag)
        if len(tags) > TAGS_MAX:
            raise BadRequest(f"Invalid input for query parameter {name}: more than {TAGS_MAX} tags.")
        gathered.residual.append(_TAG_TESTS[name](tags))


_TAG_TESTS: dict[str, Callable[[frozenset[str]], Residual]] = {
    "tags": lambda tags: lambda i: tags.issubset(i.spec.tags),
    "tags-any": lambda tags: lambda i: not tags.isdisjoint(i.spec.tags),
    "not-tags": lambda tags: lambda i: not tags.issubset(i.spec.tags),
    "not-tags-any": lambda tags: lambda i: tags.isdisjoint(i.spec.tags),
}


def _order(request: Request) -> tuple[tuple[str, bool], ...]:
    """Sort keys and directions; the id makes the order total. Raises BadRequest for a key that is not offered."""
    keys, directions = request.query_all("sort_key"), request.query_all("sort_dir")
    if not keys:
        down = not directions or _is_descending(directions[0])
        return (("created_at", down), ("uuid", down))
    order: dict[str, bool] = {}
    for index, key in enumerate(keys):
        if key not in SORTS or (key in ("host", "node") and not request.context.is_admin):
            raise BadRequest(f"Invalid input for query parameter sort_key: {key[:40]!r} is not one of {sorted(SORTS)}.")
        direction = directions[index] if index < len(directions) else (directions[-1] if directions else "desc")
        order.setdefault(key, _is_descending(direction))
    order.setdefault("uuid", next(iter(order.values())))
    return tuple(order.items())


def _is_descending(direction: str) -> bool:
    if direction not in ("asc", "desc"):
        raise BadRequest(f"Invalid input for query parameter sort_dir: {direction[:40]!r} is not one of asc, desc.")
    return direction == "desc"
