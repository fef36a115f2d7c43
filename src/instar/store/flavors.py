"""SQL of flavors, of who may use the private ones, and the flavors of a fresh cloud. Called by the Compute API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from instar.clock import now_us
from instar.errors import Conflict, NotFound
from instar.model.instance import Flavor
from instar.store.contract import Duplicate, Row, Statement, Store, Value

SORTS: Mapping[str, str] = {
    "flavorid": "f.id", "name": "f.name", "vcpus": "f.vcpus", "memory_mb": "f.memory_mib", "root_gb": "f.root_gib",
    "is_public": "f.is_public", "disabled": "f.disabled", "created_at": "f.created_at", "id": "f.id",
}  # fmt: skip

# The sizes of a fresh cloud. `nano` is enough for the guest image that Instar builds; the rest are what people expect.
DEFAULT_FLAVORS = (
    Flavor(id="1", name="m1.nano", vcpus=1, memory_mib=128, root_gib=1),
    Flavor(id="2", name="m1.micro", vcpus=1, memory_mib=256, root_gib=1),
    Flavor(id="3", name="m1.tiny", vcpus=1, memory_mib=512, root_gib=1),
    Flavor(id="4", name="m1.small", vcpus=1, memory_mib=2048, root_gib=20),
    Flavor(id="5", name="m1.medium", vcpus=2, memory_mib=4096, root_gib=40),
)

_decode = msgspec.msgpack.Decoder(Flavor).decode

# Which flavors a project sees: the public ones, and those it was given access to.
_VISIBLE = """(f.is_public = 1 OR EXISTS (
    SELECT 1 FROM flavor_access a WHERE a.flavor_id = f.id AND a.project_id = :project_id))"""


class FlavorQuery(msgspec.Struct, frozen=True, kw_only=True):
    """`visible_to`: only what this project may use; None: all. `public` None does not restrict. Order: (key of SORTS,
    descending); `after` are the values of these keys and the id in the last row before."""

    visible_to: str | None = None
    public: bool | None = None
    disabled: bool | None = None
    min_memory_mib: int = 0
    min_root_gib: int = 0
    order: tuple[str, bool] = ("flavorid", False)
    after: tuple[Value, str] | None = None
    limit: int = 1000


async def bootstrap_flavors(store: Store) -> None:
    """A cloud that has never had a flavor gets the default ones. Those that an admin deleted stay deleted."""
    done = Statement("INSERT INTO cloud_facts VALUES ('default_flavors', 'made')", {}, rows=1, duplicate=AlreadyMade())
    try:
        await store.write(done, *(_insert(flavor) for flavor in DEFAULT_FLAVORS))
    except (AlreadyMade, Duplicate):
        return


class AlreadyMade(Duplicate):
    """The default flavors were made before."""


def _insert(flavor: Flavor) -> Statement:
    return Statement(
        """INSERT INTO flavors (id, name, is_public, disabled, vcpus, memory_mib, root_gib, document, created_at)
           VALUES (:id, :name, :is_public, :disabled, :vcpus, :memory_mib, :root_gib, :document, :now)""",
        {
            "id": flavor.id, "name": flavor.name, "is_public": int(flavor.is_public),
            "disabled": int(flavor.disabled), "vcpus": flavor.vcpus, "memory_mib": flavor.memory_mib,
            "root_gib": flavor.root_gib, "document": msgspec.msgpack.encode(flavor), "now": now_us(),
        },
        rows=1,
    )  # fmt: skip


async def flavor_insert(store: Store, flavor: Flavor) -> None:
    """Raises Conflict where the id or the name is taken."""
    taken = Conflict(f"Flavor with name {flavor.name} or ID {flavor.id} already exists.")
    await store.write(_insert(flavor)._replace(duplicate=taken))


async def flavor_replace(store: Store, flavor: Flavor, was: Flavor) -> bool:
    """Changes the document if it still is `was`; False where somebody else was quicker."""
    done = await store.write(
        Statement(
            "UPDATE flavors SET document = :document WHERE id = :id AND document = :was",
            {"id": flavor.id, "document": msgspec.msgpack.encode(flavor), "was": msgspec.msgpack.encode(was)},
        )
    )
    return done[0].rowcount == 1


async def flavor_delete(store: Store, flavor_id: str) -> None:
    """Instances that have the flavor keep their copy. Raises NotFound."""
    missing = NotFound(kind="Flavor", id=flavor_id)
    await store.write(
        Statement("DELETE FROM flavor_access WHERE flavor_id = :id", {"id": flavor_id}),
        Statement("DELETE FROM flavors WHERE id = :id", {"id": flavor_id}, rows=1, error=missing),
    )


async def flavor_fetch(store: Store, flavor_id: str, *, visible_to: str | None) -> Flavor:
    """The flavor. Raises NotFound, also where the project `visible_to` (None: anybody) may not use it."""
    condition = f" AND {_VISIBLE}" if visible_to is not None else ""
    rows = await store.read(
        f"SELECT f.document FROM flavors f WHERE f.id = :id{condition}",  # noqa: S608 - a constant
        {"id": flavor_id, "project_id": visible_to},
    )
    if not rows:
        raise NotFound(kind="Flavor", id=flavor_id)
    return _decode(rows[0]["document"])


async def flavor_list(store: Store, query: FlavorQuery) -> list[Flavor]:
    key, down = query.order
    column = SORTS[key]
    conditions = ["f.memory_mib >= :min_memory", "f.root_gib >= :min_root"]
    params: dict[str, Value] = {
        "project_id": query.visible_to, "min_memory": query.min_memory_mib, "min_root": query.min_root_gib,
        "limit": query.limit,
    }  # fmt: skip
    if query.visible_to is not None:
        conditions.append(_VISIBLE)
    for name, wanted in (("is_public", query.public), ("disabled", query.disabled)):
        if wanted is not None:
            conditions.append(f"f.{name} = {int(wanted)}")
    if query.after is not None:
        sign = "<" if down else ">"
        conditions.append(f"({column} {sign} :value OR ({column} = :value AND f.id {sign} :after_id))")
        params |= {"value": query.after[0], "after_id": query.after[1]}
    direction = "DESC" if down else "ASC"
    rows = await store.read(
        f"SELECT f.document FROM flavors f WHERE {' AND '.join(conditions)} "  # noqa: S608 - names of SORTS, constants
        f"ORDER BY {column} {direction}, f.id {direction} LIMIT :limit",
        params,
    )
    return [_decode(row["document"]) for row in rows]


async def flavor_sort_value(store: Store, flavor_id: str, key: str) -> tuple[Value, str] | None:
    """Where a marker stands in the order; None when there is no such flavor."""
    rows = await store.read(
        f"SELECT {SORTS[key]} AS value FROM flavors f WHERE f.id = :id",  # noqa: S608 - of SORTS
        {"id": flavor_id},
    )
    return (rows[0]["value"], flavor_id) if rows else None


async def flavor_access_list(store: Store, flavor_id: str) -> list[str]:
    """Projects that were given access to a private flavor."""
    rows: Sequence[Row] = await store.read(
        "SELECT project_id FROM flavor_access WHERE flavor_id = :id ORDER BY project_id", {"id": flavor_id}
    )
    return [row["project_id"] for row in rows]


async def flavor_access_add(store: Store, flavor_id: str, project_id: str) -> None:
    """Raises Conflict where the project has access already."""
    known = Conflict(f"Flavor access already exists for flavor {flavor_id} and project {project_id} combination.")
    await store.write(
        Statement(
            "INSERT INTO flavor_access VALUES (:id, :project_id)", {"id": flavor_id, "project_id": project_id}, 1,
            duplicate=known,
        )
    )  # fmt: skip


async def flavor_access_remove(store: Store, flavor_id: str, project_id: str) -> None:
    """Raises NotFound where the project has no access."""
    missing = NotFound(f"Flavor access not found for {flavor_id} / {project_id} combination.")
    await store.write(
        Statement(
            "DELETE FROM flavor_access WHERE flavor_id = :id AND project_id = :project_id",
            {"id": flavor_id, "project_id": project_id}, 1, missing,
        )
    )  # fmt: skip
