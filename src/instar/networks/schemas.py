"""Bodies of the Network API. Called by the handlers: a body that does not fit is a 400 that names the path and the rule.

Clients send many fields with null; for a new record null means the default. What this cloud does not serve (routers,
IPv6, QoS …) has a field only where clients send it unasked, and only with the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType, field

from instar.errors import BadRequest
from instar.http.body import convert
from instar.http.request import Request

T = TypeVar("T")

BULK_MAX = 100
FIXED_IPS_MAX = 5
PAIRS_MAX = 10
GROUPS_MAX = 20
NAMESERVERS_MAX = 5
ROUTES_MAX = 20
POOLS_MAX = 20
TAGS_MAX = 50

Text = Annotated[str, Meta(max_length=255, pattern=r"^[^\x00]*$")]
Id = Annotated[str, Meta(min_length=1, max_length=64)]
Address = Annotated[str, Meta(max_length=64)]
Tag = Annotated[str, Meta(min_length=1, max_length=60, pattern=r"^[^\x00,/]*$")]
Mtu = Annotated[int, Meta(ge=1280, le=9216)]
Nothing = Annotated[list[Any], Meta(max_length=0)]
Names = Annotated[list[Text], Meta(max_length=GROUPS_MAX)]


class Wanted(Struct, frozen=True, forbid_unknown_fields=True):
    """What every new record can be given."""

    name: Text | None = None
    description: Text | None = None
    project_id: Id | None = None
    tenant_id: Id | None = None


class Change(Struct, frozen=True, forbid_unknown_fields=True):
    """What can be changed of every record."""

    name: Text | UnsetType = UNSET
    description: Text | UnsetType | None = UNSET


# --- networks ---------------------------------------------------------------------------------------------------------


class NewNetwork(Wanted, frozen=True):
    admin_state_up: bool | None = None
    shared: bool | None = None
    mtu: Mtu | None = None
    port_security_enabled: bool | None = None
    router_external: bool | None = field(name="router:external", default=None)
    is_default: bool | None = None
    vlan_transparent: bool | None = None
    availability_zone_hints: Nothing | None = None
    qos_policy_id: None = None


class ChangedNetwork(Change, frozen=True):
    admin_state_up: bool | UnsetType = UNSET
    shared: bool | UnsetType = UNSET
    mtu: Mtu | UnsetType = UNSET
    port_security_enabled: bool | UnsetType = UNSET
    router_external: bool | None = field(name="router:external", default=None)
    is_default: bool | None = None
    qos_policy_id: None = None


# --- subnets ----------------------------------------------------------------------------------------------------------


class Pool(Struct, frozen=True, forbid_unknown_fields=True):
    start: Address
    end: Address


class HostRoute(Struct, frozen=True, forbid_unknown_fields=True):
    destination: Address
    nexthop: Address


Pools = Annotated[list[Pool], Meta(max_length=POOLS_MAX)]
Nameservers = Annotated[list[Address], Meta(max_length=NAMESERVERS_MAX)]
HostRoutes = Annotated[list[HostRoute], Meta(max_length=ROUTES_MAX)]


class NewSubnet(Wanted, frozen=True, kw_only=True):
    network_id: Id
    ip_version: int = 4
    cidr: Address | None = None
    gateway_ip: Address | UnsetType | None = UNSET
    allocation_pools: Pools | None = None
    dns_nameservers: Nameservers | None = None
    host_routes: HostRoutes | None = None
    enable_dhcp: bool | None = None
    prefixlen: int | None = None
    subnetpool_id: None = None
    use_default_subnet_pool: bool | None = None
    segment_id: None = None
    service_types: Nothing | None = None
    ipv6_address_mode: None = None
    ipv6_ra_mode: None = None
    dns_publish_fixed_ip: bool | None = None


class ChangedSubnet(Change, frozen=True):
    gateway_ip: Address | UnsetType | None = UNSET
    allocation_pools: Pools | UnsetType = UNSET
    dns_nameservers: Nameservers | UnsetType | None = UNSET
    host_routes: HostRoutes | UnsetType | None = UNSET
    enable_dhcp: bool | UnsetType = UNSET
    segment_id: None = None
    service_types: Nothing | None = None
    dns_publish_fixed_ip: bool | None = None


# --- ports ------------------------------------------------------------------------------------------------------------


class WantedIp(Struct, frozen=True, forbid_unknown_fields=True):
    """A free address of a subnet, this very address, or both."""

    subnet_id: Id | None = None
    ip_address: Address | None = None


class Pair(Struct, frozen=True, forbid_unknown_fields=True):
    ip_address: Address
    mac_address: Address | None = None


FixedIps = Annotated[list[WantedIp], Meta(max_length=FIXED_IPS_MAX)]
Pairs = Annotated[list[Pair], Meta(max_length=PAIRS_MAX)]


class NewPort(Wanted, frozen=True, kw_only=True):
    network_id: Id
    admin_state_up: bool | None = None
    mac_address: Address | None = None
    fixed_ips: FixedIps | None = None
    security_groups: Names | None = None
    allowed_address_pairs: Pairs | None = None
    port_security_enabled: bool | None = None
    device_id: Text | None = None
    device_owner: Text | None = None
    host_id: Text | None = field(name="binding:host_id", default=None)
    vnic_type: Text | None = field(name="binding:vnic_type", default=None)
    profile: dict[str, Any] | None = field(name="binding:profile", default=None)
    extra_dhcp_opts: Nothing | None = None
    qos_policy_id: None = None


class ChangedPort(Change, frozen=True):
    admin_state_up: bool | UnsetType = UNSET
    mac_address: Address | UnsetType = UNSET
    fixed_ips: FixedIps | UnsetType | None = UNSET
    security_groups: Names | UnsetType | None = UNSET
    allowed_address_pairs: Pairs | UnsetType | None = UNSET
    port_security_enabled: bool | UnsetType = UNSET
    device_id: Text | UnsetType | None = UNSET
    device_owner: Text | UnsetType | None = UNSET
    host_id: Text | UnsetType | None = field(name="binding:host_id", default=UNSET)
    vnic_type: Text | None = field(name="binding:vnic_type", default=None)
    profile: dict[str, Any] | None = field(name="binding:profile", default=None)
    extra_dhcp_opts: Nothing | None = None
    qos_policy_id: None = None


# --- security groups --------------------------------------------------------------------------------------------------


class NewGroup(Wanted, frozen=True):
    stateful: bool | None = None


class ChangedGroup(Change, frozen=True):
    stateful: bool | None = None


class NewRule(Struct, frozen=True, forbid_unknown_fields=True):
    security_group_id: Id
    direction: str
    ethertype: str | None = None
    protocol: str | int | None = None
    port_range_min: int | None = None
    port_range_max: int | None = None
    remote_ip_prefix: Address | None = None
    remote_group_id: Id | None = None
    remote_address_group_id: None = None
    description: Text | None = None
    project_id: Id | None = None
    tenant_id: Id | None = None


# --- the bodies as they are sent --------------------------------------------------------------------------------------


class NewNetworkBody(Struct, frozen=True, forbid_unknown_fields=True):
    network: NewNetwork | UnsetType = UNSET
    networks: Annotated[list[NewNetwork], Meta(min_length=1, max_length=BULK_MAX)] | UnsetType = UNSET


class NewSubnetBody(Struct, frozen=True, forbid_unknown_fields=True):
    subnet: NewSubnet | UnsetType = UNSET
    subnets: Annotated[list[NewSubnet], Meta(min_length=1, max_length=BULK_MAX)] | UnsetType = UNSET


class NewPortBody(Struct, frozen=True, forbid_unknown_fields=True):
    port: NewPort | UnsetType = UNSET
    ports: Annotated[list[NewPort], Meta(min_length=1, max_length=BULK_MAX)] | UnsetType = UNSET


class NewGroupBody(Struct, frozen=True, forbid_unknown_fields=True):
    security_group: NewGroup | UnsetType = UNSET
    security_groups: Annotated[list[NewGroup], Meta(min_length=1, max_length=BULK_MAX)] | UnsetType = UNSET


class NewRuleBody(Struct, frozen=True, forbid_unknown_fields=True):
    security_group_rule: NewRule | UnsetType = UNSET
    security_group_rules: Annotated[list[NewRule], Meta(min_length=1, max_length=BULK_MAX)] | UnsetType = UNSET


class ChangedNetworkBody(Struct, frozen=True, forbid_unknown_fields=True):
    network: ChangedNetwork


class ChangedSubnetBody(Struct, frozen=True, forbid_unknown_fields=True):
    subnet: ChangedSubnet


class ChangedPortBody(Struct, frozen=True, forbid_unknown_fields=True):
    port: ChangedPort


class ChangedGroupBody(Struct, frozen=True, forbid_unknown_fields=True):
    security_group: ChangedGroup


Tags = Annotated[list[Tag], Meta(max_length=TAGS_MAX)]


class TagsBody(Struct, frozen=True, forbid_unknown_fields=True):
    tags: Tags


Limit = Annotated[int, Meta(ge=-1, le=2**31 - 1)]


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    network: Limit | UnsetType = UNSET
    subnet: Limit | UnsetType = UNSET
    port: Limit | UnsetType = UNSET
    security_group: Limit | UnsetType = UNSET
    security_group_rule: Limit | UnsetType = UNSET
    project_id: Id | None = None
    tenant_id: Id | None = None
    force: bool | None = None
    check_limit: bool | None = None


class LimitsBody(Struct, frozen=True, forbid_unknown_fields=True):
    quota: Limits


async def read(request: Request, body_type: type[T]) -> T:
    """The body as a `body_type`. Text is taken for a number or a flag where one belongs: clients of this API send it.

    Raises BadRequest with the JSON path and the rule."""
    return convert(await request.json(object), body_type)


def refuse_unserved(where: str, **asked: object) -> None:
    """Raises BadRequest for the first field that asks for something that this cloud has not. A field's name may have
    `__` where the API's has a colon."""
    for name, value in asked.items():
        if value:
            raise BadRequest(f"Invalid input: this cloud does not serve it - at `$.{where}.{name.replace('__', ':')}`.")
