"""Several processes on one PostgreSQL keep what is counted: no host overbooked, no quota overrun, no address twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from uuid import uuid4

import pytest

from instar.config import NetworkSettings
from instar.errors import Conflict, InstarError, NoFreeAddress, QuotaExceeded
from instar.model.guest import HostInventory
from instar.model.network import RequestedNetwork
from instar.networks.local import LocalNetworks
from instar.store.audit import audit_host_totals, host_totals_recount
from instar.store.claims import claim_release, claim_take
from instar.store.contract import Statement
from instar.store.hosts import Capacity, host_report
from instar.store.instances import UsageFull, usage_add, usage_ensure, usage_take
from instar.store.postgresql import PostgresqlStore
from instar.store.quotas import quota_take_one
from instar.store.server_groups import ServerGroup, server_group_create, server_group_room
from instar.store.volume_quotas import quota_take
from tests.postgresql_server import PATIENT

PROCESSES = 3


@pytest.fixture
async def stores(postgresql_url: str) -> AsyncIterator[list[PostgresqlStore]]:
    stores = [PostgresqlStore(postgresql_url, PATIENT) for _ in range(PROCESSES)]
    for store in stores:
        await store.open()
    yield stores
    for store in stores:
        await store.close()


async def race(stores: list[PostgresqlStore], writes: Sequence[Sequence[Statement]]) -> tuple[int, list[InstarError]]:
    """All at once, by all processes: how many were done, and why the others were not."""
    asked = [stores[number % PROCESSES].write(*statements) for number, statements in enumerate(writes)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    refused = [one for one in outcomes if isinstance(one, BaseException)]
    assert all(isinstance(one, InstarError) for one in refused), refused
    return len(outcomes) - len(refused), refused  # type: ignore[return-value]


def instance(instance_id: str, group_id: str | None = None) -> Statement:
    return Statement(
        """INSERT INTO instances (id, project_id, user_id, name, hostname, vm_state, power_state, flavor_id, group_id,
             addresses, created_at, updated_at, deleted, reservation_id, vcpus, memory_mib, disk_gib, epoch, turn, revision,
             spec, facts)
           VALUES (:id, 'p', 'u', 'n', 'n', 'building', 0, '1', :group_id, '', 0, 0, 0, 'r', 1, 1, 1, 0, 1, 0,
             :none, :none)""",
        {"id": instance_id, "group_id": group_id, "none": b"\xc0"},
        1,
    )


async def test_two_conductors_never_overbook_a_host(stores: list[PostgresqlStore]) -> None:
    inventory = HostInventory(16, 1600, 100, "simulated", 1, "h")
    await stores[0].write(*(host_report(f"h{n}", inventory, Capacity(16, 1600, 100), 0) for n in range(2)))
    draw = random.Random(5)
    held: list[str] = []
    for _ in range(3):
        takes = []
        for _ in range(24):
            amounts = {"vcpus": draw.randint(1, 4), "memory_mib": draw.randint(50, 400), "disk_gib": 1}
            claim = uuid4().hex
            held.append(claim)
            no = Conflict("no")
            host = f"h{draw.randint(0, 1)}"
            takes.append(claim_take(claim, uuid4().hex, host, amounts, taken=no, full=no, refused=no))
        releases = [claim_release(claim) for claim in draw.sample(held, 8)]  # some of them while they are being taken
        recounts = [host_totals_recount(f"h{number}") for number in range(2)] * 3
        changes = [*takes, *releases, *recounts]
        draw.shuffle(changes)
        await race(stores, changes)
        assert await audit_host_totals(stores[0]) == []
        rows = await stores[0].read("SELECT * FROM hosts")
        assert all(row["vcpus_claimed"] <= 16 and row["memory_claimed_mib"] <= 1600 for row in rows)
        assert sum(row["vcpus_claimed"] for row in rows) > 8


async def test_members_of_a_group_are_never_together_and_never_too_many(stores: list[PostgresqlStore]) -> None:
    inventory = HostInventory(16, 1600, 100, "simulated", 1, "h")
    group = ServerGroup("g", "p", "u", "apart", "anti-affinity", {}, 0)
    reports = [host_report(f"h{n}", inventory, Capacity(99, 9999, 999), 0) for n in range(3)]
    await stores[0].write(server_group_create(group), *reports)
    ids = [uuid4().hex for _ in range(20)]
    done, refused = await race(stores, [(server_group_room("g", 1, 7), instance(one, "g")) for one in ids])
    assert done == 7 and all(isinstance(one, QuotaExceeded) for one in refused)
    members = [row["id"] for row in await stores[0].read("SELECT id FROM instances")]
    no, amounts = Conflict("no"), {"vcpus": 1, "memory_mib": 1, "disk_gib": 0}
    await race(stores, [
        claim_take(uuid4().hex, one, f"h{host}", amounts, taken=no, full=no, refused=no)
        for one in members for host in range(2)
    ])  # fmt: skip
    rows = await stores[0].read("SELECT host, COUNT(*) AS n FROM claims GROUP BY host")
    assert {row["host"]: row["n"] for row in rows} == {"h0": 1, "h1": 1}


def _cores(_: str) -> tuple[Statement, ...]:
    return usage_ensure("p"), usage_add("p", "instances", 1, 100), usage_add("p", "cores", 2, 10)


def _servers(_: str) -> tuple[Statement, ...]:
    return (usage_take("p", {"instances": 1, "cores": 2, "ram": 64}, {"instances": -1, "cores": 10, "ram": 400}),)


def _key_pairs(one: str) -> tuple[Statement, ...]:
    insert = "INSERT INTO key_pairs VALUES ('u', :id, 'ssh', 'f', 'k', 0, :id)"
    return *quota_take_one("key_pairs", "u", 5), Statement(insert, {"id": one}, 1)


def _volumes(one: str) -> tuple[Statement, ...]:
    limits, used = {"volumes": 50, "gigabytes": 50}, {"volumes": 0, "gigabytes": 0}
    take = quota_take("p", {"volumes": 1, "gigabytes": 10}, limits, used)
    insert = """INSERT INTO volumes (id, project_id, user_id, status, status_before, size_gib, type_id, availability_zone,
        bootable, multiattach, read_only, export, document, created_at)
        VALUES (:id, 'p', 'u', 's', 's', 10, 't', 'z', 0, 0, 0, 'e', :none, 0)"""
    return *take, Statement(insert, {"id": one, "none": b"{}"}, 1)


@pytest.mark.parametrize("taking", [_cores, _servers, _key_pairs, _volumes])
async def test_two_apis_never_overrun_a_quota(
    stores: list[PostgresqlStore], taking: Callable[[str], tuple[Statement, ...]]
) -> None:
    kind = "INSERT INTO volume_types VALUES ('t', 'type', NULL, 1, :specs, 0, NULL)"
    await stores[0].write(Statement(kind, {"specs": b"{}"}))
    for attempt in range(2):
        done, refused = await race(stores, [taking(uuid4().hex) for _ in range(20)])
        assert done == (0 if attempt else 5)
        assert all(isinstance(one, QuotaExceeded | UsageFull) for one in refused)


async def test_ports_stay_within_their_quota_and_no_address_is_given_out_twice(stores: list[PostgresqlStore]) -> None:
    services = [LocalNetworks(store, NetworkSettings(ports=9)) for store in stores]
    network_id = await services[0].bootstrap("10.5.5.0/28")

    async def allocate(number: int, project: str) -> int:
        ports = await services[number % PROCESSES].allocate(
            str(uuid4()), project_id=project, hostname="guest", requested=(RequestedNetwork(network_id=network_id),),
            security_groups=(), availability_zone="",
        )  # fmt: skip
        return len(ports)

    projects = ["p1", "p2"]
    outcomes = await asyncio.gather(*(allocate(n, projects[n % 2]) for n in range(30)), return_exceptions=True)
    refused = [one for one in outcomes if isinstance(one, BaseException)]
    assert all(isinstance(one, NoFreeAddress | QuotaExceeded) for one in refused), refused
    rows = await stores[0].read("SELECT ip_address FROM port_addresses")
    assert len({row["ip_address"] for row in rows}) == len(rows) == len(outcomes) - len(refused)
    counts = await stores[0].read("SELECT project_id, COUNT(*) AS n FROM ports GROUP BY project_id")
    assert all(row["n"] <= 9 for row in counts), [dict(row) for row in counts]  # type: ignore[call-overload]
    for service in services:
        await service.close()
