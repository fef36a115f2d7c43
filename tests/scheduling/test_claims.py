"""Claims: never more than a host has, however many conductors take at once; and what was given back is back."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instar.errors import Conflict, revive
from instar.model.instance import Flavor
from instar.scheduling.scheduler import ClaimStands, GroupRuleBroken, HostFull, Scheduler
from instar.store.audit import audit_host_totals
from instar.store.hosts import host_delete, host_set_disabled
from instar.store.server_groups import ServerGroup, server_group_create

from .clouds import SMALL, SmallCloud, flavor

HOSTS = ("h1", "h2", "h3")


async def test_a_claim_takes_once_and_a_release_gives_back_once(cloud: SmallCloud) -> None:
    await cloud.report("h1")
    instance = await cloud.instance()
    for _ in range(2):
        await cloud.scheduler.claim("c", instance, "h1", flavor(ephemeral_gib=1, swap_mib=100))
        assert await cloud.claimed() == {"h1": (1, 1024, 12, 1)}
    for _ in range(2):
        await cloud.scheduler.release("c", instance, "h1", SMALL)
        assert await cloud.claimed() == {"h1": (0, 0, 0, 0)}


async def test_all_claims_of_an_instance_are_given_back(cloud: SmallCloud) -> None:
    await cloud.report("h1", "h2")
    instance = await cloud.instance()
    await cloud.scheduler.claim("c1", instance, "h1", SMALL)
    await cloud.scheduler.claim("c2", instance, "h2", SMALL)
    await cloud.scheduler.claim("c3", instance, "h1", SMALL)
    await cloud.scheduler.claim("other", await cloud.instance(), "h1", SMALL)
    for _ in range(2):
        await cloud.scheduler.release_instance(instance)
        assert await cloud.claimed() == {"h1": (1, 1024, 10, 1), "h2": (0, 0, 0, 0)}


@pytest.mark.parametrize(
    "wanted", [flavor(vcpus=65), flavor(memory_mib=8193), flavor(root_gib=101)], ids=["vcpus", "memory", "disk"]
)
async def test_what_does_not_fit_changes_nothing(cloud: SmallCloud, wanted: Flavor) -> None:
    await cloud.report("h1")
    with pytest.raises(HostFull) as caught:
        await cloud.scheduler.claim("c", await cloud.instance(), "h1", wanted)
    assert revive("HostFull", caught.value.message, caught.value.facts).message == "Host h1 has no room left."
    assert await cloud.claimed() == {"h1": (0, 0, 0, 0)}
    assert list(await cloud.store.read("SELECT * FROM claims")) == []


async def test_a_disabled_or_unknown_host_takes_no_claim(cloud: SmallCloud) -> None:
    """The scheduler's memory may be seconds old: the claim looks itself."""
    await cloud.report("h1")
    await cloud.store.write(host_set_disabled("h1", True, None))
    for host in ("h1", "nowhere"):
        with pytest.raises(HostFull):
            await cloud.scheduler.claim("c", await cloud.instance(), host, SMALL)


async def test_a_claim_in_another_transaction_shares_its_fate(cloud: SmallCloud) -> None:
    await cloud.report("h1")
    statements = cloud.scheduler.claim_statements("c", await cloud.instance(), "h1", SMALL)
    with pytest.raises(HostFull):
        await cloud.store.write(*statements, *cloud.scheduler.claim_statements("d", "i", "h1", flavor(vcpus=64)))
    assert await cloud.claimed() == {"h1": (0, 0, 0, 0)}
    await cloud.store.write(*statements)
    with pytest.raises(ClaimStands):
        await cloud.store.write(*statements)
    assert await cloud.claimed() == {"h1": (1, 1024, 10, 1)}


async def test_a_host_with_claims_cannot_be_deleted(cloud: SmallCloud) -> None:
    await cloud.report("h1")
    await cloud.scheduler.claim("c", await cloud.instance(), "h1", SMALL)
    with pytest.raises(Conflict, match="still has instances"):
        await cloud.store.write(*host_delete("h1"))


flavors = st.builds(flavor, vcpus=st.integers(1, 16), memory_mib=st.integers(64, 2048), root_gib=st.integers(0, 20))
plans = st.lists(st.tuples(flavors, st.sampled_from(HOSTS), st.booleans()), min_size=200, max_size=200)


@given(plans)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
def test_two_conductors_never_overbook(plan: list[tuple[Flavor, str, bool]]) -> None:
    """200 claims at once on 3 hosts, through two stores on one file; some are made twice, some given back meanwhile."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(overbook(Path(directory) / "instar.db", plan))


async def overbook(path: Path, plan: list[tuple[Flavor, str, bool]]) -> None:
    clouds = [await SmallCloud.opened(path) for _ in range(2)]
    first = clouds[0]
    try:
        await first.report(*HOSTS)
        for cloud in clouds:
            await cloud.table.load()
        outcomes: Counter[str] = Counter()

        async def one(number: int, wanted: Flavor, host: str, comes_back: bool) -> None:
            scheduler = clouds[number % 2].scheduler
            try:
                await scheduler.claim(f"c{number}", f"i{number}", host, wanted)
                if comes_back:
                    other = clouds[(number + 1) % 2].scheduler
                    repeats = (scheduler.claim(f"c{number}", f"i{number}", host, wanted) for _ in range(2))
                    await asyncio.gather(*repeats)
                    await asyncio.gather(other.release(f"c{number}"), scheduler.release(f"c{number}"))
                outcomes["taken"] += 1
            except HostFull:
                outcomes["full"] += 1

        await asyncio.gather(*(one(number, *step) for number, step in enumerate(plan)))
        assert outcomes.total() == len(plan)
        rows = await first.store.read("SELECT * FROM hosts")
        for row in rows:
            assert 0 <= row["vcpus_claimed"] <= row["vcpus_capacity"]
            assert 0 <= row["memory_claimed_mib"] <= row["memory_capacity_mib"]
            assert 0 <= row["disk_claimed_gib"] <= row["disk_capacity_gib"]
        assert await audit_host_totals(first.store) == []
    finally:
        for cloud in clouds:
            await cloud.store.close()


@pytest.mark.parametrize(("rules", "most"), [({}, 1), ({"max_server_per_host": 2}, 2)])
async def test_members_of_an_anti_affinity_group_that_come_at_once_do_not_meet(
    cloud: SmallCloud, rules: dict[str, int], most: int
) -> None:
    await cloud.report("h1", "h2")
    await cloud.store.write(server_group_create(ServerGroup("g", "p", "u", "g", "anti-affinity", rules, 1)))
    members = [await cloud.instance(group_id="g") for _ in range(6)]
    claims = [cloud.scheduler.claim(f"c{member}", member, "h1", SMALL) for member in members]
    outcomes = await asyncio.gather(*claims, return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == most
    assert all(isinstance(outcome, GroupRuleBroken) for outcome in outcomes if outcome is not None)
    assert (await cloud.claimed())["h1"][3] == most


async def test_members_of_an_affinity_group_that_come_at_once_do_not_part(cloud: SmallCloud) -> None:
    await cloud.report("h1", "h2")
    await cloud.store.write(server_group_create(ServerGroup("g", "p", "u", "g", "affinity", {}, 1)))
    members = [await cloud.instance(group_id="g") for _ in range(6)]
    places = [f"h{1 + number % 2}" for number in range(6)]
    claims = [cloud.scheduler.claim(f"c{m}", m, host, SMALL) for m, host in zip(members, places, strict=True)]
    outcomes = await asyncio.gather(*claims, return_exceptions=True)
    assert [outcome is None for outcome in outcomes] == [True, False] * 3
    assert {host: amounts[3] for host, amounts in (await cloud.claimed()).items()} == {"h1": 3, "h2": 0}


async def test_a_release_is_seen_by_a_scheduler_of_another_process_after_a_refresh(
    cloud: SmallCloud, tmp_path: Path
) -> None:
    await cloud.report("h1")
    other = await SmallCloud.opened(tmp_path / "instar.db")
    try:
        await other.table.load()
        assert isinstance(other.scheduler, Scheduler)
        await cloud.scheduler.claim("c", await cloud.instance(), "h1", SMALL)
        view = other.table.get("h1")
        assert view is not None
        assert view.vcpus_free == 64
        await other.table.refresh()
        assert view.vcpus_free == 63
    finally:
        await other.store.close()
