"""Networks changed by several processes over one database: hosts hear of it, addresses and limits hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from instar.bus.memory import MemoryBus
from instar.errors import Conflict, InstarError, QuotaExceeded, Unavailable
from instar.model.guest import HostInventory
from instar.model.network import RequestedNetwork
from instar.networks import filter_notes
from instar.networks.filter_notes import FilterKeeper
from instar.networks.local import LocalNetworks
from instar.networks.reach import new_vni
from instar.networks.security_groups import new_rule
from instar.store.contract import Store
from instar.store.filter_changes import FRESH, LATE, filter_changes_fetch
from instar.store.hosts import Capacity, host_report
from instar.store.network_records import (
    NETWORKS,
    SECURITY_GROUPS,
    SUBNETS,
    NetworkRecord,
    SubnetRecord,
    record_list,
)
from instar.store.networks import network_delete
from instar.store.security_groups import rule_delete
from tests.networks.network_cloud import SETTINGS
from tests.patience import PATIENCE_S


class Cloud(NamedTuple):
    stores: list[Store]
    bus: MemoryBus
    one: LocalNetworks
    other: LocalNetworks
    network_id: str

    async def serve(self, at: LocalNetworks, host: str = "h1", project_id: str = "p1") -> str:
        instance_id = str(uuid4())
        await allocate(at, instance_id, self.network_id, project_id)
        await at.bind(instance_id, host=host)
        await at.refresh.settled()
        return instance_id


async def allocate(at: LocalNetworks, instance_id: str, network_id: str, project_id: str = "p1") -> Any:
    return await at.allocate(
        instance_id, project_id=project_id, hostname="guest", requested=(RequestedNetwork(network_id=network_id),),
        security_groups=("default",), availability_zone="nova",
    )  # fmt: skip


@pytest.fixture
async def cloud(new_store: Callable[[], Store]) -> AsyncIterator[Cloud]:
    stores = [new_store() for _ in range(3)]
    for store in stores:
        await store.open()
    bus = MemoryBus()
    one, other = (LocalNetworks(store, SETTINGS.network, keeper_on=bus) for store in stores[:2])
    made = await asyncio.gather(one.bootstrap("10.77.0.0/24"), other.bootstrap("10.78.0.0/24"))
    assert made[0] == made[1]
    yield Cloud(stores, bus, one, other, made[0])
    await one.close()
    await other.close()
    for store in stores:
        await store.close()


class Hosts:
    """What a keeper told. Instances in `busy` cannot be told of."""

    def __init__(self) -> None:
        self.told: list[set[str]] = []
        self.busy: set[str] = set()
        self.went = asyncio.Event()

    async def tell(self, instance_ids: set[str]) -> set[str]:
        self.told.append(set(instance_ids))
        self.went.set()
        return instance_ids & self.busy

    async def next(self) -> set[str]:
        async with asyncio.timeout(PATIENCE_S):
            await self.went.wait()
        self.went.clear()
        return self.told[-1]


async def drained(cloud: Cloud) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await filter_changes_fetch(cloud.stores[2], FRESH)).ids:
            await asyncio.sleep(0.01)


@pytest.fixture
async def hosts(cloud: Cloud) -> AsyncIterator[Hosts]:
    hosts = Hosts()
    keeper = FilterKeeper(cloud.stores[2], cloud.bus, hosts.tell)
    await keeper.open()
    yield hosts
    await keeper.close()


async def test_member_added_by_one_process_is_told_to_hosts_of_instances_that_another_made(cloud, hosts):
    first = await cloud.serve(cloud.one)
    await drained(cloud)
    hosts.told.clear()
    second = await cloud.serve(cloud.other, host="h2")
    await drained(cloud)
    assert first in set().union(*hosts.told), second


async def test_change_noted_while_nobody_keeps_is_told_by_the_next_keeper(cloud):
    instance_id = await cloud.serve(cloud.one)
    [group] = await record_list(cloud.stores[0], SECURITY_GROUPS, viewer=None, equal={"project_id": ["p1"]})
    rule = new_rule(group, "ingress", "IPv4", protocol="tcp")
    # The process dies right after its transaction: it says nothing to anybody.
    await cloud.stores[1].write(rule_delete(rule.id), *cloud.other.refresh.noting(rules=[group.id]))
    hosts = Hosts()
    keeper = FilterKeeper(cloud.stores[2], cloud.bus, hosts.tell)
    await keeper.open()
    try:
        assert instance_id in await hosts.next()
        await drained(cloud)
    finally:
        await keeper.close()


async def test_instance_that_is_busy_comes_again_also_for_the_next_keeper(cloud, hosts, monkeypatch):
    monkeypatch.setattr(filter_notes, "LATE_EVERY_S", 0.05)
    instance_id = await cloud.serve(cloud.one)
    await drained(cloud)
    hosts.busy.add(instance_id)
    cloud.one.refresh.instances_changed([instance_id])
    await cloud.one.refresh.settled()
    await drained(cloud)
    assert (await filter_changes_fetch(cloud.stores[2], [LATE])).subjects == {LATE: {instance_id}}
    hosts.busy.clear()
    successor = FilterKeeper(cloud.stores[1], cloud.bus, hosts.tell)
    await successor.open()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (await filter_changes_fetch(cloud.stores[2], [LATE])).ids:
                await asyncio.sleep(0.01)
    finally:
        await successor.close()
    assert hosts.told[-1] == {instance_id}


async def test_notes_that_cannot_be_written_are_written_when_the_database_is_back(cloud, hosts, monkeypatch):
    monkeypatch.setattr(filter_notes, "AGAIN_S", 0.05)
    instance_id = await cloud.serve(cloud.one)
    await drained(cloud)
    hosts.told.clear()
    write, away = cloud.stores[0].write, True

    async def failing(*statements: Any) -> Any:
        if away:
            raise Unavailable(retry_after_s=1)
        return await write(*statements)

    monkeypatch.setattr(cloud.stores[0], "write", failing)
    cloud.one.refresh.instances_changed([instance_id])
    await asyncio.sleep(0.2)
    assert hosts.told == []
    away = False
    await cloud.one.refresh.settled()
    await drained(cloud)
    assert hosts.told[-1] == {instance_id}


async def test_members_that_leave_are_noted_with_their_leaving(cloud, monkeypatch):
    gone, stays = await cloud.serve(cloud.one), await cloud.serve(cloud.other)
    notes = await filter_changes_fetch(cloud.stores[2], FRESH)
    before = len(notes.ids)

    async def dead(*_given: Any) -> None:
        return

    monkeypatch.setattr(cloud.bus, "publish", dead)
    await cloud.one.release(gone)
    notes = await filter_changes_fetch(cloud.stores[2], FRESH)
    assert len(notes.ids) > before and notes.subjects["members"]
    assert await cloud.other.ports_of(stays)


async def test_no_address_is_given_twice_by_two_processes_at_once(cloud):
    instances = [str(uuid4()) for _ in range(60)]
    made = await asyncio.gather(*(
        allocate((cloud.one, cloud.other)[number % 2], one, cloud.network_id, f"p{number % 3}")
        for number, one in enumerate(instances)
    ))  # fmt: skip
    addresses = [ip.ip_address for ports in made for port in ports for ip in port.definition.fixed_ips]
    assert len(addresses) == len(set(addresses)) == 60
    groups = await record_list(cloud.stores[0], SECURITY_GROUPS, viewer=None)
    assert len(groups) == 3, "one default group for each project"


async def test_limit_of_ports_holds_when_two_processes_want_the_last(cloud):
    limit = SETTINGS.network.ports
    results = await asyncio.gather(
        *(allocate((cloud.one, cloud.other)[number % 2], str(uuid4()), cloud.network_id) for number in range(limit + 6)),
        return_exceptions=True,
    )
    assert sum(isinstance(one, QuotaExceeded) for one in results) == 6, results
    assert sum(isinstance(one, tuple) for one in results) == limit


async def _host(store: Store, name: str, address: str) -> None:
    inventory = HostInventory(1, 1, 1, "simulated", 1, name, host_ip=address)
    await store.write(host_report(name, inventory, Capacity(1, 1, 1), 1))


async def test_host_that_another_process_came_to_know_is_told_to_the_first(cloud):
    """A process that had read of one host believed for ten seconds that there was no other: its networks ended there."""
    await _host(cloud.stores[0], "h1", "192.0.2.1")
    await cloud.serve(cloud.one, "h1")
    await _host(cloud.stores[1], "h2", "192.0.2.2")
    second = await cloud.serve(cloud.other, "h2")
    [port] = await cloud.one.ports_of(second)
    assert port.definition.network.remotes == ("192.0.2.1",)
    assert cloud.network_id in (await filter_changes_fetch(cloud.stores[2], FRESH)).subjects["networks"]


async def test_network_is_not_deleted_under_a_port_that_is_being_made(cloud):
    """Whichever comes first: no port without a network, and no error that nobody foresaw."""
    for _ in range(10):
        network = NetworkRecord(
            id=str(uuid4()), project_id="p1", name="n", description="", shared=False, admin_state_up=True, mtu=1450,
            port_security=True, nat=False, created_at=1, updated_at=1, vni=new_vni(),
        )  # fmt: skip
        subnet = SubnetRecord(
            id=str(uuid4()), network_id=network.id, project_id="p1", name="s", description="", cidr="10.9.0.0/24",
            gateway_ip=None, dhcp_enabled=False, dhcp_ip=None, dns_nameservers=(), host_routes=(),
            allocation_pools=(("10.9.0.1", "10.9.0.254"),), created_at=1, updated_at=1,
        )  # fmt: skip
        await cloud.stores[0].write(NETWORKS.insert(network), SUBNETS.insert(subnet))
        deleted = cloud.stores[1].write(*network_delete(network.id, in_use=Conflict("in use")))
        made, gone = await asyncio.gather(
            allocate(cloud.one, str(uuid4()), network.id), deleted, return_exceptions=True
        )
        if isinstance(gone, Conflict):
            assert isinstance(made, tuple), made
        else:
            assert isinstance(made, InstarError) and not isinstance(gone, BaseException), (made, gone)


async def test_the_last_two_that_leave_a_host_at_once_tell_the_others_of_it(cloud: Cloud) -> None:
    for turn in range(6):
        pair = [f"{turn}-a", f"{turn}-b"]
        for instance_id in pair:
            await allocate(cloud.one, instance_id, cloud.network_id)
            await cloud.one.bind(instance_id, host="h1")
        (before,) = await cloud.stores[0].read("SELECT reach FROM networks WHERE id = :id", {"id": cloud.network_id})
        await asyncio.gather(cloud.one.release(pair[0]), cloud.other.release(pair[1]))
        (after,) = await cloud.stores[0].read("SELECT reach FROM networks WHERE id = :id", {"id": cloud.network_id})
        assert after["reach"] > before["reach"]
