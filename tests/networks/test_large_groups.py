"""Groups with more members than are read for each build: what a host is told is right in the end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from instar.config import NetworkSettings
from instar.model.network import InstancePort, RequestedNetwork
from instar.networks.local import LocalNetworks
from instar.networks.security_groups import LARGE_GROUP
from instar.store.sqlite import SqliteStore

MEMBERS = LARGE_GROUP + 20


class Cloud:
    """Networks of one project; `told` is what hosts were told last of each instance."""

    def __init__(self, store: SqliteStore) -> None:
        self.told: dict[str, tuple[InstancePort, ...]] = {}
        self.networks = LocalNetworks(store, NetworkSettings(ports=-1), ports_changed=self._tell)
        self.network_id = ""

    async def _tell(self, instance_ids: set[str]) -> None:
        self.told |= await self.networks.ports_of_instances(sorted(instance_ids))

    async def build(self) -> tuple[str, tuple[InstancePort, ...]]:
        instance_id = str(uuid4())
        await self.networks.allocate(
            instance_id, project_id="p", hostname="h", requested=(RequestedNetwork(network_id=self.network_id),),
            security_groups=("default",), availability_zone="",
        )  # fmt: skip
        ports = await self.networks.bind(instance_id, host="one")
        self.told[instance_id] = ports
        return instance_id, ports


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[Cloud]:
    store = SqliteStore(tmp_path / "instar.db", durable=False)
    await store.open()
    made = Cloud(store)
    made.network_id = await made.networks.bootstrap("10.78.0.0/16", resolv_conf=tmp_path / "none")
    yield made
    await made.networks.close()
    await store.close()


def lets_in(ports: tuple[InstancePort, ...]) -> set[str]:
    return {cidr for port in ports for rule in port.definition.rules for cidr in rule.remote_cidrs}


async def test_a_small_group_is_read_anew_for_each_build(cloud: Cloud) -> None:
    for _ in range(5):
        _, ports = await cloud.build()
        fresh = await cloud.networks.ports_of_instances(list(cloud.told))
        assert lets_in(ports) == lets_in(next(iter(fresh.values())))


async def test_every_member_of_a_large_group_is_told_of_all_the_others_in_the_end(cloud: Cloud) -> None:
    for _ in range(MEMBERS):
        await cloud.build()
    await cloud.networks.refresh.settled()
    fresh = await cloud.networks.ports_of_instances(list(cloud.told))
    assert len(fresh) == MEMBERS
    everybody = lets_in(next(iter(fresh.values())))
    assert all(lets_in(ports) == everybody for ports in cloud.told.values())


async def test_a_member_that_is_gone_is_let_in_no_more(cloud: Cloud) -> None:
    ids = [(await cloud.build())[0] for _ in range(MEMBERS)]
    await cloud.networks.refresh.settled()
    await cloud.networks.release(ids[0])
    del cloud.told[ids[0]]
    late, _ = await cloud.build()
    await cloud.networks.refresh.settled()
    fresh = await cloud.networks.ports_of_instances([late])
    assert all(lets_in(ports) == lets_in(fresh[late]) for ports in cloud.told.values())
