"""The filters: which hosts can take an instance, and why the others cannot. Asked in the order of `scheduling.filters`.

A filter is a function of the request and its circumstances that gives a Rule, or None when it has nothing to say of this
request (then it costs nothing). `passes` is asked of host after host and must be quick; `why` only of some that it refused.
A filter from elsewhere is named in the settings as `package.module:function`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from instar.errors import StartupError
from instar.scheduling.extra_specs import satisfies
from instar.scheduling.host_view import HostView
from instar.scheduling.request import Circumstances, SchedulingRequest, disk_gib_of, hinted_instances

SCOPE = "aggregate_instance_extra_specs:"
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64", "i386": "i686"}


Hosts = list[HostView]


class Rule(NamedTuple):
    """What a filter says of one request. `sift`, where it is given, says the same as `passes` of many hosts at once."""

    passes: Callable[[HostView], bool]
    why: Callable[[HostView], str]
    sift: Callable[[Hosts], Hosts] | None = None


def sifting(sift: Callable[[Hosts], Hosts], why: Callable[[HostView], str]) -> Rule:
    """A rule that every request has, so that of ten thousand hosts not each costs a call."""
    return Rule(lambda host: bool(sift([host])), why, sift)


Filter = Callable[[SchedulingRequest, Circumstances], Rule | None]


def enabled(_request: SchedulingRequest, circumstances: Circumstances) -> Rule:
    """The host reports, its hypervisor works, and no admin has disabled it."""
    oldest = circumstances.now - circumstances.down_after_s

    def sift(hosts: Hosts) -> Hosts:
        return [
            host
            for host in hosts
            if (heard_at := host.heard_at) is not None
            and heard_at >= oldest
            and host.hypervisor_ok
            and not (host.disabled or host.forced_down)
        ]

    def why(host: HostView) -> str:
        if host.disabled:
            return f"disabled: {host.disabled_reason}" if host.disabled_reason else "disabled"
        if host.forced_down:
            return "forced down"
        if host.boot_id and not host.hypervisor_ok:
            return "its hypervisor is not available"
        if host.heard_at is None:
            return "has not reported yet"
        return f"silent for {circumstances.now - host.heard_at:.0f} seconds"

    return sifting(sift, why)


def not_tried(request: SchedulingRequest, _circumstances: Circumstances) -> Rule | None:
    """Hosts on which this was tried already."""
    if not request.exclude_hosts:
        return None
    tried = frozenset(request.exclude_hosts)
    return Rule(lambda host: host.name not in tried, lambda _host: "was tried before")


def hint_host(request: SchedulingRequest, _circumstances: Circumstances) -> Rule | None:
    """The host that an admin asked for, by its name or its hypervisor's."""
    wanted = request.requested_host
    if not wanted:
        return None

    def passes(host: HostView) -> bool:
        return host.name == wanted or (host.inventory is not None and host.inventory.hypervisor_hostname == wanted)

    return Rule(passes, lambda _host: f"host {wanted} was asked for")


def capacity(request: SchedulingRequest, _circumstances: Circumstances) -> Rule:
    """Room left after claims; and no instance gets more of a kind than the host has in all, whatever the ratio."""
    flavor = request.flavor
    vcpus, memory_mib, disk_gib = flavor.vcpus, flavor.memory_mib, disk_gib_of(flavor)

    def sift(hosts: Hosts) -> Hosts:
        return [
            host
            for host in hosts
            if host.memory_free_mib >= memory_mib
            and host.vcpus_free >= vcpus
            and (host.disk_free_gib >= disk_gib or not disk_gib)
            and (inventory := host.inventory) is not None
            and inventory.vcpus >= vcpus
            and inventory.memory_mib >= memory_mib
        ]

    def why(host: HostView) -> str:
        lacking = [
            f"{wanted} {unit} wanted, {max(0, free)} left"
            for wanted, free, unit in (
                (vcpus, host.vcpus_free, "vcpus"),
                (memory_mib, host.memory_free_mib, "MiB of memory"),
                (disk_gib, host.disk_free_gib, "GiB of disk"),
            )
            if wanted > free
        ]
        if not lacking and host.inventory is not None:
            has = f"{host.inventory.vcpus} vcpus and {host.inventory.memory_mib} MiB of memory"
            return f"{vcpus} vcpus and {memory_mib} MiB of memory wanted, it has {has} in all"
        return "; ".join(lacking)

    return sifting(sift, why)


def image_properties(request: SchedulingRequest, _circumstances: Circumstances) -> Rule | None:
    """hw_architecture, img_hv_type and hw_vm_mode of the image, with their older names."""
    properties = request.image_properties
    architecture = _first(properties, "hw_architecture", "architecture")
    hypervisor = _first(properties, "img_hv_type", "hypervisor_type")
    vm_mode = _first(properties, "hw_vm_mode", "vm_mode")
    if not (architecture or hypervisor or vm_mode):
        return None
    architecture = _ARCHITECTURES.get(architecture, architecture)

    def passes(host: HostView) -> bool:
        inventory = host.inventory
        return (
            inventory is not None
            and (not architecture or architecture == inventory.cpu_arch)
            and (not hypervisor or hypervisor in (inventory.hypervisor_type.lower(), inventory.virt_type.lower()))
            and vm_mode in ("", "hvm")
        )

    def why(host: HostView) -> str:
        inventory = host.inventory
        if inventory is None:
            return "its inventory is not known"
        if architecture and architecture != inventory.cpu_arch:
            return f"the image is for {architecture}, the host is {inventory.cpu_arch}"
        if hypervisor and hypervisor not in (inventory.hypervisor_type.lower(), inventory.virt_type.lower()):
            return f"the image is for hypervisor {hypervisor}, the host has {inventory.hypervisor_type}"
        return f"the image is for vm mode {vm_mode}, the host has hvm"

    return Rule(passes, why)


def availability_zone(request: SchedulingRequest, _circumstances: Circumstances) -> Rule | None:
    wanted = request.availability_zone
    if not wanted:
        return None
    return Rule(lambda host: host.zone == wanted, lambda host: f"is in zone {host.zone}, {wanted} was asked for")


def aggregate_extra_specs(request: SchedulingRequest, _circumstances: Circumstances) -> Rule | None:
    """Extra specs `aggregate_instance_extra_specs:KEY` of the flavor against the metadata of the host's aggregates."""
    specs = {
        key.removeprefix(SCOPE): wanted for key, wanted in request.flavor.extra_specs.items() if key.startswith(SCOPE)
    }
    if not specs:
        return None

    def unmet(host: HostView) -> str | None:
        for key, wanted in specs.items():
            if not any(satisfies(value, wanted) for value in host.metadata.get(key, ())):
                return key
        return None

    def why(host: HostView) -> str:
        key = unmet(host) or ""
        has = ", ".join(host.metadata.get(key, ())) or "nothing"
        return f"its aggregates say {has} for {key}, the flavor asks for {specs[key]}"

    return Rule(lambda host: unmet(host) is None, why)


def server_group_affinity(_request: SchedulingRequest, circumstances: Circumstances) -> Rule | None:
    """All members of the group on one host."""
    group = circumstances.group
    if group is None or group.policy != "affinity" or not group.members:
        return None
    places = ", ".join(sorted(group.members))
    return Rule(lambda host: host.name in group.members, lambda _host: f"the group's members are on {places}")


def server_group_anti_affinity(_request: SchedulingRequest, circumstances: Circumstances) -> Rule | None:
    """At most `max_server_per_host` members of the group on a host."""
    group = circumstances.group
    if group is None or group.policy != "anti-affinity":
        return None
    full = {host for host, members in group.members.items() if members >= group.max_per_host}
    return Rule(lambda host: host.name not in full, lambda host: f"has {group.members[host.name]} of the group's members")


def different_host(request: SchedulingRequest, circumstances: Circumstances) -> Rule | None:
    """Hint different_host: not where these instances are."""
    avoided = _hosts_of(request, circumstances, "different_host")
    if not avoided:
        return None
    return Rule(lambda host: host.name not in avoided, lambda _host: "has an instance that different_host names")


def same_host(request: SchedulingRequest, circumstances: Circumstances) -> Rule | None:
    """Hint same_host: where one of these instances is."""
    if not hinted_instances(request, "same_host"):
        return None
    wanted = _hosts_of(request, circumstances, "same_host")
    return Rule(lambda host: host.name in wanted, lambda _host: "has no instance that same_host names")


FILTERS: Mapping[str, Filter] = {
    filter_.__name__: filter_
    for filter_ in (
        enabled, not_tried, hint_host, capacity, image_properties, availability_zone, aggregate_extra_specs,
        server_group_affinity, server_group_anti_affinity, different_host, same_host,
    )
}  # fmt: skip


def filters_by_name(names: Sequence[str]) -> tuple[tuple[str, Filter], ...]:
    """Filters with their names, in this order. Raises StartupError that names an unknown one."""
    return tuple((name, FILTERS[name] if name in FILTERS else _imported(name)) for name in names)


def _imported(name: str) -> Filter:
    module, _, function = name.partition(":")
    known = ", ".join(sorted(FILTERS))
    if not function:
        raise StartupError(f"The scheduler's filter {name} is unknown. There are: {known}; or package.module:function.")
    try:
        found: Filter = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise StartupError(f"The scheduler's filter {name} cannot be loaded: {error}.") from error
    return found


def _first(properties: Mapping[str, str], *names: str) -> str:
    return next((properties[name].lower() for name in names if properties.get(name)), "")


def _hosts_of(request: SchedulingRequest, circumstances: Circumstances, hint: str) -> frozenset[str]:
    hosts = circumstances.hinted_hosts
    return frozenset(hosts[instance] for instance in hinted_instances(request, hint) if instance in hosts)
