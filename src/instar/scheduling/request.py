"""What is asked of the scheduler, and what it answers. Both are journaled by the engine, so both are plain records."""

from __future__ import annotations

from typing import Any

import msgspec

from instar.model.instance import Flavor
from instar.store.server_groups import GroupHosts


class SchedulingRequest(msgspec.Struct, frozen=True):
    """A place wanted for one instance. `exclude_hosts` were tried already; `requested_host` is an admin's choice (the API
    lets nobody else ask for it); `hints` are the scheduler hints as given."""

    instance_id: str
    project_id: str
    flavor: Flavor
    image_properties: dict[str, str] = {}
    availability_zone: str | None = None
    requested_host: str | None = None
    hints: dict[str, Any] = {}
    group_id: str | None = None
    exclude_hosts: tuple[str, ...] = ()


class Selection(msgspec.Struct, frozen=True):
    """`hosts` are the candidates, best first. `refusals` maps a filter to the hosts that it refused before enough were
    found, `details` has a line for each (bounded): `host: filter: reason`."""

    hosts: tuple[str, ...]
    refusals: dict[str, int] = {}
    details: tuple[str, ...] = ()


class Circumstances(msgspec.Struct, frozen=True):
    """What filters need besides the request and the host. `now` is the host table's clock, in seconds; `hinted_hosts`
    maps the instances named in hints to where they are."""

    now: float
    down_after_s: float
    group: GroupHosts | None = None
    hinted_hosts: dict[str, str] = {}


def disk_gib_of(flavor: Flavor) -> int:
    """What an instance of this flavor needs on its host's file system, in GiB: swap is rounded up."""
    return flavor.root_gib + flavor.ephemeral_gib + -(-flavor.swap_mib // 1024)


def amounts_of(flavor: Flavor) -> dict[str, int]:
    """What a claim for this flavor takes, by the names that claims have in the database."""
    return {"vcpus": flavor.vcpus, "memory_mib": flavor.memory_mib, "disk_gib": disk_gib_of(flavor)}


def hinted_instances(request: SchedulingRequest, hint: str) -> tuple[str, ...]:
    """Instance ids in a hint that takes one or a list of them."""
    given = request.hints.get(hint)
    if isinstance(given, str):
        return (given,)
    return tuple(value for value in given if isinstance(value, str)) if isinstance(given, list | tuple) else ()
