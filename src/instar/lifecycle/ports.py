"""The ports of an instance and the host that they belong to, as steps of operations."""

from __future__ import annotations

from instar.lifecycle.cloud import Cloud
from instar.model.instance import Instance
from instar.model.network import InstancePort


async def bind_ports_to(cloud: Cloud, instance: Instance, host: str, *_: object) -> tuple[InstancePort, ...]:
    """The ports belong to this host; their definitions as they are now."""
    return await cloud.networks.bind(instance.id, host=host)


async def bind_ports_back(cloud: Cloud, instance: Instance, _host: str, before: str) -> None:
    """Undo: they belong to the host where they were; empty: to none."""
    if before:
        await cloud.networks.bind(instance.id, host=before)
    else:
        await cloud.networks.unbind(instance.id)
