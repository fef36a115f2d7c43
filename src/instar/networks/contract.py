"""What the lifecycle needs of networks. Implemented by `local.py`; a real Neutron will be another implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from instar.model.network import InstancePort, RequestedNetwork


class NetworkService(Protocol):
    async def resolve(
        self, requested: tuple[RequestedNetwork, ...] | None, *, project_id: str, is_admin: bool, count: int
    ) -> tuple[RequestedNetwork, ...]:
        """Check before a build is accepted: networks and ports exist, are visible and free (PortInUse), addresses lie in
        a subnet and are free, the port quota has room for `count` instances. None asks for the project's only network:
        BadRequest when there are several. Raises UnknownReference, Conflict, QuotaExceeded."""
        ...

    async def allocate(
        self,
        instance_id: str,
        *,
        project_id: str,
        hostname: str,
        requested: tuple[RequestedNetwork, ...],
        security_groups: tuple[str, ...],
        availability_zone: str,
        host: str = "",
    ) -> tuple[InstancePort, ...]:
        """Ports with addresses for the instance, in the order asked. Again with the same instance: the same ports. With a
        host they belong to it at once, and are returned as by `bind`. Raises NoFreeAddress, PortInUse, UnknownReference;
        then nothing is taken."""
        ...

    async def attach(
        self,
        instance_id: str,
        port_id: str,
        *,
        project_id: str,
        hostname: str,
        requested: RequestedNetwork,
        security_groups: tuple[str, ...],
        availability_zone: str,
    ) -> InstancePort:
        """One more port for an instance that has its ports already, behind the others: a new one under this id, which the
        caller made up, or the one that the user brought (then it is its id). Bound to no host yet. Again: the same port.
        Raises as `allocate`."""
        ...

    async def release_port(self, instance_id: str, port_id: str) -> None:
        """The instance does not have this port: it is deleted, or free again where the user brought it. Again, or one that
        the instance never had: nothing."""
        ...

    async def bind(self, instance_id: str, *, host: str) -> tuple[InstancePort, ...]:
        """The instance's ports belong to this host now; returns them with fresh definitions."""
        ...

    async def unbind(self, instance_id: str) -> None:
        """The instance's ports belong to no host; addresses are kept."""
        ...

    async def bind_ahead(self, instance_id: str, *, host: str) -> tuple[InstancePort, ...]:
        """The instance runs where its ports are bound and will come to `host` by live migration: the other hosts of its
        networks learn that they reach there, too. Returns the definitions for `host`, to be ensured there before the guest
        comes; then `bind` (and ensuring what that returns) ends it, `unbind_ahead` calls it off."""
        ...

    async def unbind_ahead(self, instance_id: str) -> None:
        """The instance's ports stay where they are bound. Stands that nothing was bound ahead."""
        ...

    async def release(self, instance_id: str) -> None:
        """The instance has no ports: those made for it are deleted, those brought by the user are free again."""
        ...

    async def ports_of(self, instance_id: str) -> tuple[InstancePort, ...]: ...

    async def ports_of_instances(self, instance_ids: Sequence[str]) -> dict[str, tuple[InstancePort, ...]]:
        """Fresh definitions of the ports of many instances at once. An instance without a port is left out."""
        ...

    async def security_groups_exist(self, names: tuple[str, ...], *, project_id: str) -> tuple[str, ...]:
        """The groups' names, in the same order. Raises UnknownReference for a security group (name or id) that the
        project has not."""
        ...

    async def set_security_group(self, instance_id: str, name: str, *, project_id: str, member: bool) -> str:
        """All secured ports of the instance are in the group (named by name or id), or none is; their hosts learn of it
        soon. Returns the group's name. Raises NotFound (no such group or port, or it was not in the group),
        UnknownReference for a name that several groups have."""
        ...

    async def port_owners(self) -> dict[str, str]:
        """Every bound or owned compute port: port id → instance id. For the audit."""
        ...
