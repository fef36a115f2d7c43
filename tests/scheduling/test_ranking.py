"""The order of hosts: what each weigher prefers, and that the kept order is the one that sorting anew would give."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from instar.config import SchedulingSettings
from instar.scheduling.host_view import HostView
from instar.scheduling.ranking import Ranking
from instar.store.hosts import Capacity
from instar.store.server_groups import GroupHosts

NO_WEIGHT: dict[str, float] = {"cpu_weight": 0, "memory_weight": 0, "disk_weight": 0, "io_weight": 0}


def ranked(hosts: list[HostView], **weights: Any) -> Ranking:
    ranking = Ranking(SchedulingSettings(**{**NO_WEIGHT, **weights}), operations_max=8)
    for host in hosts:
        ranking.put(host)
    return ranking


USUAL = Capacity(8, 8192, 80)


def view(
    name: str, capacity: Capacity = USUAL, claimed: tuple[int, int, int] = (0, 0, 0), busy: int = 0
) -> HostView:
    host = HostView(name)
    host.set_amounts(capacity, claimed)
    host.busy = busy
    return host


def best(ranking: Ranking, count: int = 3, group: GroupHosts | None = None) -> list[str]:
    return ranking.best(count, lambda hosts: hosts, ranking.bonus(group))


def test_each_weight_pulls_to_the_host_that_has_most_of_its_kind() -> None:
    hosts = [view("cpu", claimed=(0, 4096, 40)), view("disk", claimed=(4, 4096, 0)), view("memory", claimed=(4, 0, 40))]
    assert best(ranked(hosts, cpu_weight=1))[0] == "cpu"
    assert best(ranked(hosts, memory_weight=1))[0] == "memory"
    assert best(ranked(hosts, disk_weight=1))[0] == "disk"


def test_a_negative_weight_packs_instead_of_spreading() -> None:
    hosts = [view("empty"), view("fuller", claimed=(4, 4096, 40))]
    assert best(ranked(hosts, memory_weight=-1.0)) == ["fuller", "empty"]


def test_hosts_with_operations_in_flight_come_later() -> None:
    assert best(ranked([view("a", busy=2), view("b", busy=1), view("c")], io_weight=-1.0)) == ["c", "b", "a"]


def test_equal_hosts_come_by_name() -> None:
    assert best(ranked([view("c"), view("a"), view("b")], cpu_weight=1)) == ["a", "b", "c"]


def test_soft_affinity_moves_hosts_with_members_up_and_soft_anti_affinity_down() -> None:
    ranking = ranked([view("a"), view("b"), view("c")], cpu_weight=1)
    assert best(ranking, group=GroupHosts("soft-affinity", 1, {"c": 2, "b": 1})) == ["c", "b", "a"]
    assert best(ranking, group=GroupHosts("soft-anti-affinity", 1, {"a": 2, "b": 1})) == ["c", "b", "a"]
    assert best(ranking, 1, GroupHosts("soft-anti-affinity", 1, {"a": 2, "gone": 1})) == ["b"]


def test_a_larger_host_changes_the_scale_of_all() -> None:
    ranking = ranked([view("a", claimed=(2, 0, 0)), view("b", claimed=(0, 4096, 0))], cpu_weight=1, memory_weight=1)
    assert best(ranking) == ["a", "b"]
    ranking.put(view("large", Capacity(8, 1_000_000, 80), claimed=(8, 1_000_000, 80)))
    assert best(ranking) == ["b", "a", "large"]


changes = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 64), st.integers(0, 64), st.integers(0, 5), st.booleans()), max_size=60
)


@given(changes)
@settings(max_examples=60, deadline=None)
def test_the_kept_order_is_the_sorted_one_after_any_changes(steps: list[tuple[int, int, int, int, bool]]) -> None:
    ranking = Ranking(SchedulingSettings(), operations_max=8)
    hosts: dict[str, HostView] = {}
    for number, capacity, claimed, busy, remove in steps:
        name = f"h{number}"
        if remove and name in hosts:
            ranking.remove(hosts.pop(name))
            continue
        host = hosts.setdefault(name, HostView(name))
        host.set_amounts(Capacity(capacity, capacity * 100, capacity * 10), (claimed, claimed * 50, claimed))
        host.busy = busy
        ranking.put(host)
    assert [host.name for host in ranking] == sorted(hosts, key=lambda name: (-ranking.worth(hosts[name]), name))
