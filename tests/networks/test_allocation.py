"""Addresses are never given out twice, by however many processes; what a server asks again it gets again."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instar.config import NetworkSettings
from instar.errors import InstarError, NoFreeAddress, PortInUse
from instar.model.network import InstancePort, RequestedNetwork
from instar.networks.local import LocalNetworks
from instar.store.sqlite import SqliteStore
from tests.networks.network_cloud import Cloud

SETTINGS = NetworkSettings(ports=-1)
POOL = 5  # of a /29, the gateway left out


async def _allocate(networks: LocalNetworks, network_id: str, instance_id: str, nics: int = 1) -> tuple[InstancePort, ...]:
    return await networks.allocate(
        instance_id, project_id="p1", hostname="guest", requested=(RequestedNetwork(network_id=network_id),) * nics,
        security_groups=(), availability_zone="",
    )  # fmt: skip


def _addresses(ports: tuple[InstancePort, ...]) -> list[str]:
    return [one.ip_address for port in ports for one in port.definition.fixed_ips]


async def _play(batches: list[list[tuple[bool, int, int]]], directory: Path) -> None:
    """Each batch runs at once: servers that want so many NICs, or let go of theirs, through one of two services."""
    stores = [SqliteStore(directory / "instar.db", durable=False) for _ in range(2)]
    for store in stores:
        await store.open()
    services = [LocalNetworks(store, SETTINGS) for store in stores]
    network_id = await services[0].bootstrap("10.5.5.0/29")
    holds: dict[str, list[str]] = {}
    try:
        for batch in batches:
            coming, going = [], list(holds)
            tasks = []
            for comes, nics, which in batch:
                if comes:
                    instance_id = str(uuid4())
                    coming.append((instance_id, nics))
                    tasks.append(_allocate(services[which], network_id, instance_id, nics))
                elif going:
                    instance_id = going.pop()
                    del holds[instance_id]
                    coming.append((instance_id, 0))
                    tasks.append(services[which].release(instance_id))
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for (instance_id, nics), result in zip(coming, results, strict=True):
                if isinstance(result, BaseException):
                    assert isinstance(result, NoFreeAddress), repr(result)
                    assert await services[0].ports_of(instance_id) == ()
                elif nics:
                    holds[instance_id] = _addresses(result)
                    assert len(holds[instance_id]) == nics
            taken = [address for addresses in holds.values() for address in addresses]
            assert len(set(taken)) == len(taken) <= POOL
            stored = await stores[1].read("SELECT ip_address FROM port_addresses")
            assert sorted(row["ip_address"] for row in stored) == sorted(taken)
        taken = sum(len(addresses) for addresses in holds.values())
        for number in range(POOL - taken):  # nothing leaked: all the others can be had
            await _allocate(services[number % 2], network_id, str(uuid4()))
        for service in services:
            with pytest.raises(NoFreeAddress):
                await _allocate(service, network_id, str(uuid4()))
    finally:
        for service, store in zip(services, stores, strict=True):
            await service.close()
            await store.close()


_batches = st.lists(
    st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(0, 1)), min_size=1, max_size=5), min_size=1, max_size=6
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches=_batches)
def test_no_address_is_given_out_twice(batches: list[list[tuple[bool, int, int]]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(_play(batches, Path(directory)))


async def test_allocate_bind_and_release_may_be_repeated(cloud: Cloud) -> None:
    networks, instance_id = cloud.networks, str(uuid4())
    first = await _allocate(networks, cloud.shared_id, instance_id, 2)
    again = await asyncio.gather(*(_allocate(networks, cloud.shared_id, instance_id, 2) for _ in range(4)))
    assert {tuple(_addresses(ports)) for ports in again} == {tuple(_addresses(first))}
    bound = await networks.bind(instance_id, host="h1")
    assert await networks.bind(instance_id, host="h1") == bound
    assert [port.definition.id for port in bound] == [port.definition.id for port in first]
    assert await networks.port_owners() == {port.definition.id: instance_id for port in first}
    await networks.unbind(instance_id)
    await networks.unbind(instance_id)
    assert _addresses(await networks.ports_of(instance_id)) == _addresses(first)
    await networks.release(instance_id)
    await networks.release(instance_id)
    assert await networks.ports_of(instance_id) == ()
    assert await networks.port_owners() == {}


async def test_one_port_goes_to_one_of_two_servers(cloud: Cloud) -> None:
    port = await cloud.member.make("port", network_id=cloud.shared_id, name="mine")
    results = await asyncio.gather(
        *(cloud.serve(cloud.shared_id, requested=(RequestedNetwork(port_id=port["id"]),)) for _ in range(4)),
        return_exceptions=True,
    )
    won = [result for result in results if isinstance(result, tuple)]
    assert len(won) == 1
    assert all(isinstance(result, PortInUse) for result in results if isinstance(result, InstarError))
    assert len(results) == 4
    shown = await cloud.member.show("port", port["id"])
    assert shown["device_id"] == won[0][0]
    await cloud.networks.release(won[0][0])
    free = await cloud.member.show("port", port["id"])  # the user's own port stays, with its address
    assert (free["device_id"], free["device_owner"], free["fixed_ips"]) == ("", "", port["fixed_ips"])


async def test_servers_and_users_take_addresses_from_the_same_pool(cloud: Cloud) -> None:
    network, _ = await cloud.member.lan("192.168.5.0/28")  # 12 for ports
    calls = [cloud.serve(network["id"]) for _ in range(8)]
    posts = [
        cloud.client.post("/network/v2.0/ports", json={"port": {"network_id": network["id"]}},
                          headers={"x-auth-token": cloud.member.token})
        for _ in range(8)
    ]  # fmt: skip
    results = await asyncio.gather(*calls, *posts, return_exceptions=True)
    assert sum(isinstance(one, tuple) or getattr(one, "status_code", 0) == 201 for one in results) == 12
    ports = await cloud.member.list("port", f"?network_id={network['id']}")
    addresses = [port["fixed_ips"][0]["ip_address"] for port in ports]
    assert len(set(addresses)) == len(addresses) == 12
    assert "192.168.5.2" not in addresses  # the DHCP server's
