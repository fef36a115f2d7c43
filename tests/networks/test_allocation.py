"""Addresses and ports of instances: never twice, all or nothing, the same again after a crash."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network_world import PROJECT, World, address

from instar.config import NetworkSettings
from instar.errors import NoFreeAddress, PortInUse, QuotaExceeded, UnknownReference
from instar.model.network import FixedIp, RequestedNetwork
from instar.networks.addressing import usable
from instar.networks.failures import IpAddressInUse
from instar.store.network_records import PORTS, PortRecord, record_list
from instar.store.networks import address_take, port_insert


async def rows(world: World, table: str) -> int:
    return (await world.store.read(f"SELECT COUNT(*) AS n FROM {table}"))[0]["n"]


async def user_port(world: World, network_id: str, ip: str) -> str:
    """A port as a user makes it beforehand."""
    topology = (await world.networks.topologies.get({network_id: 0}))[network_id]
    fixed = FixedIp(topology.subnets[0].id, ip, 24)
    port = PortRecord(
        id=str(uuid4()), network_id=network_id, project_id=PROJECT, mac_address="fa:16:3e:00:00:01", created_at=1,
        updated_at=1, fixed_ips=(fixed,),
    )
    await world.store.write(
        port_insert(port, network_revision=None, limit=-1, changed=PortInUse(port_id=""), duplicate=PortInUse(port_id="")),
        address_take(fixed.subnet_id, ip, port.id, taken=PortInUse(port_id="")),
    )
    return port.id


async def test_bound_ports_have_all_that_a_host_needs(world):
    network = await world.networks.bootstrap("10.9.8.0/24")
    [port] = await world.allocate(network, "i1", tag="first")
    assert port.network_name == "private" and port.made_by_us and port.tag == "first"
    [bound] = await world.networks.bind("i1", host="h1")
    definition = bound.definition
    assert definition.id == port.definition.id and definition.mac_address.startswith("fa:16:3e:")
    assert definition.network.nat and definition.network.subnets[0].gateway_ip == "10.9.8.1"
    [fixed] = definition.fixed_ips
    assert ip_address(fixed.ip_address) in ip_network("10.9.8.0/24") and fixed.prefix_length == 24
    ingress = [rule for rule in definition.rules if rule.direction == "ingress"]
    assert [(r.ethertype, r.remote_cidrs, r.remote_nobody) for r in ingress] == [
        ("IPv4", (f"{fixed.ip_address}/32",), False), ("IPv6", (), True),
    ]
    assert [(r.ethertype, r.remote_cidrs) for r in definition.rules if r.direction == "egress"] == [
        ("IPv4", ()), ("IPv6", ()),
    ]
    assert await world.networks.port_owners() == {definition.id: "i1"}
    await world.networks.unbind("i1")
    assert (await world.networks.ports_of("i1"))[0].definition.fixed_ips == (fixed,)


async def test_bootstrap_again_makes_nothing(world):
    first = await world.networks.bootstrap("10.9.8.0/24")
    assert await world.networks.bootstrap("10.1.1.0/24") == first
    assert (await rows(world, "networks"), await rows(world, "subnets")) == (1, 1)


async def test_allocate_again_gives_the_same_ports(world):
    network = await world.network("10.9.8.0/24")
    first = await world.allocate(network, "i1")
    assert [p.definition.id for p in await world.allocate(network, "i1")] == [p.definition.id for p in first]
    at_once = await asyncio.gather(*(world.allocate(network, "i2") for _ in range(8)))
    assert len({ports[0].definition.id for ports in at_once}) == 1
    assert await rows(world, "ports") == 2


async def test_failed_allocate_takes_nothing(world):
    full, roomy = await world.network("10.9.8.0/30"), await world.network("10.9.9.0/24")
    await world.allocate(full)
    before = await rows(world, "ports"), await rows(world, "port_addresses"), await rows(world, "port_security_groups")
    for bad, error in (
        (RequestedNetwork(network_id=full), NoFreeAddress),
        (RequestedNetwork(network_id=str(uuid4())), UnknownReference),
        (RequestedNetwork(port_id=str(uuid4())), UnknownReference),
        (RequestedNetwork(network_id=roomy, fixed_ip="10.9.9.9"), IpAddressInUse),
    ):
        with pytest.raises(error):
            await world.networks.allocate(
                "i1", project_id=PROJECT, hostname="h",
                requested=(RequestedNetwork(network_id=roomy, fixed_ip="10.9.9.9"), bad),
                security_groups=("default",), availability_zone="",
            )
    after = await rows(world, "ports"), await rows(world, "port_addresses"), await rows(world, "port_security_groups")
    assert after == before
    assert await world.networks.ports_of("i1") == ()


async def test_port_asked_for_by_two_servers_goes_to_one(world):
    network = await world.network("10.9.8.0/24")
    port = await user_port(world, network, "10.9.8.40")

    async def ask(instance_id: str):
        return await world.networks.allocate(
            instance_id, project_id=PROJECT, hostname="h", requested=(RequestedNetwork(port_id=port),),
            security_groups=("default",), availability_zone="nova",
        )

    outcomes = await asyncio.gather(*(ask(f"i{n}") for n in range(6)), return_exceptions=True)
    winners = [o for o in outcomes if not isinstance(o, BaseException)]
    assert len(winners) == 1 and winners[0][0].definition.id == port and not winners[0][0].made_by_us
    assert all(isinstance(o, PortInUse) for o in outcomes if isinstance(o, BaseException))
    owner = (await world.networks.port_owners())[port]
    with pytest.raises(PortInUse):
        await world.networks.resolve((RequestedNetwork(port_id=port),), project_id=PROJECT, is_admin=False, count=1)
    for _ in range(2):
        await world.networks.release(owner)
    [kept] = await record_list(world.store, PORTS, viewer=None)
    assert (kept.id, kept.device_id, kept.position, kept.fixed_ips[0].ip_address) == (port, "", None, "10.9.8.40")
    assert (await ask("again"))[0].definition.id == port


async def test_released_addresses_can_be_had_again_and_release_may_be_repeated(world):
    network = await world.network("10.9.8.0/29")
    for _ in range(3):
        taken = [address(await world.allocate(network, f"i{n}")) for n in range(5)]
        assert sorted(taken) == [f"10.9.8.{n}" for n in range(2, 7)]
        with pytest.raises(NoFreeAddress):
            await world.allocate(network)
        for n in range(5):
            await world.networks.release(f"i{n}")
            await world.networks.release(f"i{n}")
        assert await rows(world, "port_addresses") == 0


async def test_two_services_on_one_database_share_a_small_subnet(tmp_path):
    worlds = [World(tmp_path / "one.db") for _ in range(2)]
    for one in worlds:
        await one.open()
    try:
        network = await worlds[0].network("10.9.8.0/26")
        asked = [worlds[n % 2].allocate(network) for n in range(70)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        given_out = [address(o) for o in outcomes if not isinstance(o, BaseException)]
        assert len(given_out) == len(set(given_out)) == 61
        assert all(isinstance(o, NoFreeAddress) for o in outcomes if isinstance(o, BaseException))
    finally:
        for one in worlds:
            await one.close()


async def test_port_quota_holds_when_many_ask_at_once(tmp_path):
    world = World(tmp_path / "quota.db", NetworkSettings(ports=5))
    await world.open()
    try:
        network = await world.network("10.9.8.0/24")
        outcomes = await asyncio.gather(*(world.allocate(network) for _ in range(12)), return_exceptions=True)
        assert Counter(type(o) for o in outcomes) == {tuple: 5, QuotaExceeded: 7}
    finally:
        await world.close()


@settings(max_examples=25, deadline=None)
@given(
    prefix=st.integers(27, 30),
    batches=st.lists(st.tuples(st.integers(1, 14), st.lists(st.integers(0, 40), max_size=12)), min_size=1, max_size=5),
)
def test_no_address_is_ever_given_out_twice(prefix, batches):
    """Concurrent allocations and releases on two services against a model: a set of addresses in use."""
    asyncio.run(_random_life(prefix, batches))


async def _random_life(prefix: int, batches: list[tuple[int, list[int]]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        worlds = [World(Path(directory) / "one.db") for _ in range(2)]
        for one in worlds:
            await one.open()
        try:
            cidr = f"10.77.0.0/{prefix}"
            network = await worlds[0].network(cidr)
            room = (1 << (32 - prefix)) - 3
            live: dict[str, str] = {}
            for asked, released in batches:
                ids = [str(uuid4()) for _ in range(asked)]
                outcomes = await asyncio.gather(
                    *(worlds[n % 2].allocate(network, one) for n, one in enumerate(ids)), return_exceptions=True
                )
                for one, outcome in zip(ids, outcomes, strict=True):
                    if isinstance(outcome, BaseException):
                        assert isinstance(outcome, NoFreeAddress), outcome
                        assert await worlds[0].networks.ports_of(one) == ()
                        continue
                    got = address(outcome)
                    assert got not in live.values() and got != "10.77.0.1"
                    assert usable(cidr, int(ip_address(got)))
                    live[one] = got
                if len(live) < room:
                    assert not any(isinstance(o, BaseException) for o in outcomes), "refused while there was room"
                gone = [one for n, one in enumerate(list(live)) if n in released]
                await asyncio.gather(*(worlds[n % 2].networks.release(one) for n, one in enumerate(gone)))
                for one in gone:
                    del live[one]
                assert await rows(worlds[0], "port_addresses") == len(live)
        finally:
            for one in worlds:
                await one.close()
