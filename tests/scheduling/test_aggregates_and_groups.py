"""Aggregates, the zones that they make, and server groups, as records."""

from __future__ import annotations

import msgspec
import pytest

from instar.errors import Conflict, NotFound
from instar.store.aggregates import (
    Aggregate,
    aggregate_add_host,
    aggregate_create,
    aggregate_delete,
    aggregate_fetch,
    aggregate_list,
    aggregate_remove_host,
    aggregate_update,
    zone_list,
)
from instar.store.server_groups import (
    ServerGroup,
    server_group_count,
    server_group_create,
    server_group_delete,
    server_group_fetch,
    server_group_list,
)

from .clouds import SmallCloud


async def made(cloud: SmallCloud, name: str, zone: str | None = None) -> Aggregate:
    return await aggregate_create(cloud.store, uuid=f"uuid of {name}", name=name, zone=zone, now_us=1)


async def test_an_aggregate_from_its_making_to_its_end(cloud: SmallCloud) -> None:
    await cloud.report("h1", "h2")
    first, second = await made(cloud, "first"), await made(cloud, "second", "east")
    assert (first.id, second.id, second.availability_zone, second.hosts) == (1, 2, "east", ())
    await cloud.store.write(*aggregate_add_host(2, "h2", 5), *aggregate_add_host(2, "h1", 6))
    changed = msgspec.structs.replace(second, name="third", metadata={"a": "b"})
    await cloud.store.write(*aggregate_update(changed, 7))
    fetched = await aggregate_fetch(cloud.store, 2)
    assert fetched == msgspec.structs.replace(changed, updated_at=7, hosts=("h1", "h2"))
    assert await aggregate_list(cloud.store) == [first, fetched]
    with pytest.raises(Conflict):
        await cloud.store.write(aggregate_delete(2))
    await cloud.store.write(*aggregate_remove_host(2, "h1", 8), *aggregate_remove_host(2, "h2", 8))
    await cloud.store.write(aggregate_delete(2))
    with pytest.raises(NotFound):
        await aggregate_fetch(cloud.store, 2)


async def test_aggregates_refuse_what_cannot_be(cloud: SmallCloud) -> None:
    await cloud.report("h1")
    await made(cloud, "first")
    with pytest.raises(Conflict, match="first already exists"):
        await made(cloud, "first")
    second = await made(cloud, "second")
    with pytest.raises(Conflict, match="first already exists"):
        await cloud.store.write(*aggregate_update(msgspec.structs.replace(second, name="first"), 2))
    for statements, error in (
        (aggregate_add_host(1, "h9", 2), NotFound),
        (aggregate_add_host(9, "h1", 2), NotFound),
        (aggregate_remove_host(1, "h1", 2), NotFound),
    ):
        with pytest.raises(error):
            await cloud.store.write(*statements)
    await cloud.store.write(*aggregate_add_host(1, "h1", 2))
    with pytest.raises(Conflict, match="already in aggregate"):
        await cloud.store.write(*aggregate_add_host(1, "h1", 2))


async def test_a_host_is_in_one_zone_only(cloud: SmallCloud) -> None:
    await cloud.report("h1")
    east, west, plain = await made(cloud, "e", "east"), await made(cloud, "w", "west"), await made(cloud, "p")
    await cloud.store.write(*aggregate_add_host(east.id, "h1", 2), *aggregate_add_host(plain.id, "h1", 2))
    with pytest.raises(Conflict, match="another availability zone"):
        await cloud.store.write(*aggregate_add_host(west.id, "h1", 2))
    with pytest.raises(Conflict, match="another availability zone"):
        await cloud.store.write(*aggregate_update(msgspec.structs.replace(plain, availability_zone="west"), 3))
    await cloud.store.write(*aggregate_update(msgspec.structs.replace(plain, availability_zone="east"), 3))


async def test_zones_are_listed_with_their_hosts(cloud: SmallCloud) -> None:
    assert await zone_list(cloud.store) == {"nova": ()}
    await cloud.report("h1", "h2", "h3")
    east, plain = await made(cloud, "e", "east"), await made(cloud, "p")
    await cloud.store.write(*aggregate_add_host(east.id, "h2", 2), *aggregate_add_host(plain.id, "h2", 2))
    await cloud.store.write(*aggregate_add_host(plain.id, "h1", 2))
    assert await zone_list(cloud.store) == {"east": ("h2",), "nova": ("h1", "h3")}


async def test_a_server_group_from_its_making_to_its_end(cloud: SmallCloud) -> None:
    groups = [
        ServerGroup(f"g{number}", project, "u", "name", "anti-affinity", {"max_server_per_host": 3}, number)
        for number, project in enumerate(("p", "p", "q"))
    ]
    await cloud.store.write(*(server_group_create(group) for group in groups))
    members = tuple(sorted([await cloud.instance(group_id="g1") for _ in range(3)]))
    assert await server_group_fetch(cloud.store, "g0") == groups[0]
    assert await server_group_fetch(cloud.store, "g1") == msgspec.structs.replace(groups[1], members=members)
    listed = await server_group_list(cloud.store, project_id="p", limit=10)
    assert [(group.id, group.members) for group in listed] == [("g0", ()), ("g1", members)]
    everywhere = await server_group_list(cloud.store, project_id=None, limit=2, offset=1)
    assert [group.id for group in everywhere] == ["g1", "g2"]
    assert await server_group_count(cloud.store, "p") == 2
    await cloud.store.write(*server_group_delete("g1"))
    with pytest.raises(NotFound):
        await cloud.store.write(*server_group_delete("g1"))
    with pytest.raises(NotFound):
        await server_group_fetch(cloud.store, "g1")
    row = (await cloud.store.read("SELECT group_id FROM instances WHERE id = :id", {"id": members[0]}))[0]
    assert row["group_id"] is None
