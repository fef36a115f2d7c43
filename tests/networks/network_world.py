"""A store with the network service on it, as tests of this folder begin; used by `conftest.py`."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from instar.config import NetworkSettings
from instar.model.network import InstancePort, RequestedNetwork
from instar.networks.bootstrap import bootstrap_statements
from instar.networks.local import LocalNetworks
from instar.store.sqlite import SqliteStore

PROJECT = "a" * 32


class World:
    """`networks` is the service; `told` collects what `ports_changed` was called with."""

    def __init__(self, path: Path, settings: NetworkSettings | None = None) -> None:
        self.store = SqliteStore(path, durable=False)
        self.told: list[set[str]] = []
        self.networks = LocalNetworks(self.store, settings or NetworkSettings(), self._tell)

    async def _tell(self, instances: set[str]) -> None:
        self.told.append(instances)

    async def open(self) -> None:
        await self.store.open()

    async def close(self) -> None:
        await self.networks.close()
        await self.store.close()

    async def network(self, cidr: str) -> str:
        """One more network like that of the bootstrap."""
        network, statements = bootstrap_statements(cidr, 1450, "", ())
        await self.store.write(*(one._replace(sql=one.sql.partition(" WHERE ")[0]) for one in statements))
        return network.id

    async def allocate(
        self, network_id: str, instance_id: str | None = None, *, project_id: str = PROJECT, **asked: str
    ) -> tuple[InstancePort, ...]:
        return await self.networks.allocate(
            instance_id or str(uuid4()),
            project_id=project_id,
            hostname="one",
            requested=(RequestedNetwork(network_id=network_id, **asked),),
            security_groups=("default",),
            availability_zone="nova",
        )


def address(ports: tuple[InstancePort, ...]) -> str:
    return ports[0].definition.fixed_ips[0].ip_address
