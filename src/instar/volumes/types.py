"""Volume types: which there are, which a project sees, and the one that a volume has when nobody says."""

from __future__ import annotations

import uuid

from instar.clock import now_us
from instar.errors import NotFound
from instar.store.contract import Store
from instar.store.volume_quotas import TypeRecord, type_access, type_insert, type_list

DEFAULT_TYPE = "__DEFAULT__"
MULTIATTACH_TYPE = "multiattach"


async def types_bootstrap(store: Store) -> None:
    """The default type is there, and at the first start one for volumes that several servers share."""
    if any(record.name == DEFAULT_TYPE for record in await type_list(store)):
        return
    default = TypeRecord(str(uuid.uuid4()), DEFAULT_TYPE, "Files of this machine, served to hosts", True, {}, now_us())
    shared = TypeRecord(
        str(uuid.uuid4()), MULTIATTACH_TYPE, "Volumes that several servers may have at once", True,
        {"multiattach": "<is> True"}, now_us(),
    )  # fmt: skip
    await type_insert(store, shared, once=True)
    await type_insert(store, default, once=True)


async def types_visible(store: Store, project_id: str, *, is_admin: bool) -> list[TypeRecord]:
    """Those that are public, or that the project was given access to; all of them to admins."""
    records = await type_list(store)
    if is_admin:
        return records
    access = await type_access(store)
    return [record for record in records if record.public or (record.id, project_id) in access]


async def type_find(store: Store, wanted: str, project_id: str, *, is_admin: bool) -> TypeRecord:
    """The type of that id or name. Raises NotFound, also for one that the project does not see."""
    records = await types_visible(store, project_id, is_admin=is_admin)
    for record in [one for one in records if one.id == wanted] + [one for one in records if one.name == wanted]:
        return record
    raise NotFound(kind="Volume type", id=wanted)
