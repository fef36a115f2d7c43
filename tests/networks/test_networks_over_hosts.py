"""Which hosts a network's definition names: they follow where its ports are bound, and the others are told."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

import pytest

from instar.model.guest import HostInventory
from instar.model.network import InstancePort, NetworkDefinition, RequestedNetwork
from instar.store.contract import Statement
from instar.store.hosts import Capacity, host_report
from instar.store.network_reach import instances_to_tell, network_hosts
from tests.networks.network_cloud import Cloud

HOSTS = {"h1": "10.9.0.1", "h2": "10.9.0.2", "h3": "10.9.0.3", "lonely": "127.0.0.1"}


async def report_hosts(cloud: Cloud, **addresses: str) -> None:
    for name, address in (addresses or HOSTS).items():
        inventory = HostInventory(1, 1, 1, "simulated", 1, name, host_ip=address)
        await cloud.store.write(host_report(name, inventory, Capacity(1, 1, 1), 1))


async def new_instance(cloud: Cloud, network_id: str) -> str:
    instance_id = str(uuid4())
    requested = (RequestedNetwork(network_id=network_id),)
    await cloud.networks.allocate(
        instance_id, project_id="p1", hostname="guest", requested=requested, security_groups=("default",),
        availability_zone="nova",
    )  # fmt: skip
    return instance_id


def network_of(ports: Sequence[InstancePort]) -> NetworkDefinition:
    return ports[0].definition.network


async def remotes(cloud: Cloud, instance_id: str) -> tuple[str, ...]:
    return network_of(await cloud.networks.ports_of(instance_id)).remotes


async def insert_instance(cloud: Cloud, instance_id: str, task_state: str | None) -> None:
    texts = ("project_id", "user_id", "name", "hostname", "vm_state", "flavor_id", "addresses", "reservation_id")
    numbers: tuple[str, ...] = ("power_state", "created_at", "updated_at", "deleted", "vcpus", "memory_mib", "disk_gib")
    numbers += ("epoch", "turn", "revision")
    values = {**dict.fromkeys(texts, "-"), **dict.fromkeys(numbers, 0), "spec": b"", "facts": b""}
    row = {**values, "id": instance_id, "task_state": task_state}
    sql = f"INSERT INTO instances ({', '.join(row)}) VALUES ({', '.join(':' + name for name in row)})"
    await cloud.store.write(Statement(sql, row))


async def test_each_network_has_a_number_of_its_own(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the same number is drawn twice."""
    drawn = iter([7, 7, 8, 8, 8, 9])
    monkeypatch.setattr("instar.networks.network_routes.new_vni", lambda: next(drawn))
    for _ in range(3):
        await cloud.member.make("network", name="lan")
    numbers = [row["vni"] for row in await cloud.store.read("SELECT vni FROM networks")]
    assert {7, 8, 9} < set(numbers)
    assert len(set(numbers)) == len(numbers) == 4
    assert all(0 < number < 1 << 24 for number in numbers)


async def test_remotes_follow_the_hosts_that_ports_are_bound_to(cloud: Cloud) -> None:
    await report_hosts(cloud)
    one, two, three = [await new_instance(cloud, cloud.shared_id) for _ in range(3)]
    first = network_of(await cloud.networks.bind(one, host="h1"))
    assert first.vni > 0
    assert first.remotes == ()
    second = network_of(await cloud.networks.bind(two, host="h2"))
    assert second.remotes == ("10.9.0.1",)
    assert second.reach > first.reach
    assert await remotes(cloud, one) == ("10.9.0.2",)
    # One more on a host that has the network, and the same again, change nothing.
    third = network_of(await cloud.networks.bind(three, host="h2"))
    assert (third.remotes, third.reach) == (second.remotes, second.reach)
    assert network_of(await cloud.networks.bind(three, host="h2")).reach == second.reach
    # The host has it as long as one port is there.
    await cloud.networks.unbind(two)
    assert await remotes(cloud, one) == ("10.9.0.2",)
    await cloud.networks.release(three)
    assert await remotes(cloud, one) == ()
    # Moved: gone from there, come to here.
    await cloud.networks.bind(two, host="h3")
    moved = network_of(await cloud.networks.bind(one, host="h2"))
    assert moved.remotes == ("10.9.0.3",)
    assert await remotes(cloud, two) == ("10.9.0.2",)
    assert moved.reach > third.reach


async def test_ports_that_are_made_on_a_host_are_as_if_they_were_bound_to_it(cloud: Cloud) -> None:
    await report_hosts(cloud)
    brought = (await cloud.member.make("port", network_id=cloud.shared_id))["id"]
    new = RequestedNetwork(network_id=cloud.shared_id)

    async def made(instance_id: str, host: str, *requested: RequestedNetwork) -> tuple[InstancePort, ...]:
        return await cloud.networks.allocate(
            instance_id, project_id="p1", hostname="guest", requested=requested,
            security_groups=("default",), availability_zone="nova", host=host,
        )  # fmt: skip

    one, two, three = (str(uuid4()) for _ in range(3))
    first = await made(one, "h1", new)
    assert await cloud.networks.bind(one, host="h1") == first
    assert first[0].definition.rules
    second = await made(two, "h2", RequestedNetwork(port_id=brought), new)
    assert second[0].definition.id == brought
    assert await cloud.networks.bind(two, host="h2") == second
    assert network_of(second).remotes == ("10.9.0.1",)
    assert network_of(second).reach > network_of(first).reach
    assert await remotes(cloud, one) == ("10.9.0.2",)
    # One more on a host that has the network changes nothing; what is asked again is there already, where it is wanted.
    third = await made(three, "h2", new, new)
    assert network_of(third).reach == network_of(second).reach
    assert await made(three, "h2", new, new) == third
    moved = await made(three, "h3", new, new)
    assert network_of(moved).remotes == ("10.9.0.1", "10.9.0.2")
    assert [port.definition.id for port in moved] == [port.definition.id for port in third]


async def test_a_host_that_others_cannot_reach_is_no_remote(cloud: Cloud) -> None:
    await report_hosts(cloud)
    one, two = [await new_instance(cloud, cloud.shared_id) for _ in range(2)]
    await cloud.networks.bind(one, host="h1")
    assert network_of(await cloud.networks.bind(two, host="lonely")).remotes == ()
    assert await remotes(cloud, one) == ()


async def test_a_host_that_reports_late_is_seen_when_the_first_port_comes_to_it(cloud: Cloud) -> None:
    await report_hosts(cloud, h1="10.9.0.1")
    one, two = [await new_instance(cloud, cloud.shared_id) for _ in range(2)]
    await cloud.networks.bind(one, host="h1")
    await report_hosts(cloud, h2="10.9.0.2")
    assert network_of(await cloud.networks.bind(two, host="h2")).remotes == ("10.9.0.1",)
    assert await remotes(cloud, one) == ("10.9.0.2",)


async def test_where_a_guest_goes_by_live_migration_is_reached_before_it_comes(cloud: Cloud) -> None:
    await report_hosts(cloud)
    moving, other = [await new_instance(cloud, cloud.shared_id) for _ in range(2)]
    await cloud.networks.bind(moving, host="h1")
    await cloud.networks.bind(other, host="h3")
    for _ in range(2):
        (port,) = await cloud.networks.bind_ahead(moving, host="h2")
        assert port.definition.arriving
        assert network_of([port]).remotes == ("10.9.0.1", "10.9.0.3")
    (still,) = await cloud.networks.ports_of(moving)
    assert not still.definition.arriving
    assert network_of([still]).remotes == ("10.9.0.2", "10.9.0.3")
    assert await remotes(cloud, other) == ("10.9.0.1", "10.9.0.2")
    # Called off, twice.
    await cloud.networks.unbind_ahead(moving)
    await cloud.networks.unbind_ahead(moving)
    assert await remotes(cloud, other) == ("10.9.0.1",)
    # Done.
    await cloud.networks.bind_ahead(moving, host="h2")
    (arrived,) = await cloud.networks.bind(moving, host="h2")
    assert not arrived.definition.arriving
    assert network_of([arrived]).remotes == ("10.9.0.3",)
    assert await remotes(cloud, other) == ("10.9.0.2",)
    assert await network_hosts(cloud.store, cloud.shared_id) == {"h2", "h3"}


async def test_one_instance_of_each_other_host_is_told_when_a_host_comes_or_goes(cloud: Cloud) -> None:
    await report_hosts(cloud)
    instances = [await new_instance(cloud, cloud.shared_id) for _ in range(4)]
    for instance_id, host, task_state in zip(
        instances, ("h1", "h1", "h2", "h3"), ("rebooting", None, None, None), strict=True
    ):
        await insert_instance(cloud, instance_id, task_state)
        await cloud.networks.bind(instance_id, host=host)
    # The idle one of two on h1: the other would be told only after its operation.
    assert await instances_to_tell(cloud.store, [cloud.shared_id]) == {instances[1], instances[2], instances[3]}
    await cloud.networks.refresh.settled()
    cloud.told.clear()
    await cloud.networks.bind(instances[0], host="h1")
    await cloud.networks.refresh.settled()
    assert cloud.told == []
    await cloud.networks.release(instances[3])
    await cloud.networks.refresh.settled()
    assert cloud.told
    assert set().union(*cloud.told) >= {instances[1], instances[2]}


async def test_nobody_is_told_where_there_is_one_host(cloud: Cloud) -> None:
    await report_hosts(cloud, h1="10.9.0.1", lonely="127.0.0.1")
    one, two = [await new_instance(cloud, cloud.shared_id) for _ in range(2)]
    await cloud.networks.bind(one, host="h1")
    await cloud.networks.bind(two, host="lonely")
    assert cloud.networks.refresh._networks == set()
