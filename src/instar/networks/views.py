"""Records as the Network API shows them. Called by the handlers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from instar.clock import iso
from instar.networks.security_groups import DEFAULT
from instar.store.network_records import (
    NetworkRecord,
    PortRecord,
    SecurityGroupRecord,
    SecurityGroupRuleRecord,
    SubnetRecord,
)

ZONE = "nova"
View = dict[str, Any]


def _standard(
    record: NetworkRecord | SubnetRecord | PortRecord | SecurityGroupRecord | SecurityGroupRuleRecord,
) -> View:
    return {
        "project_id": record.project_id,
        "tenant_id": record.project_id,
        "description": record.description,
        "created_at": iso(record.created_at),
        "updated_at": iso(record.updated_at),
        "revision_number": record.revision,
    }


def network_view(network: NetworkRecord) -> View:
    """Without `subnets`: see `with_subnets`."""
    return {
        "id": network.id,
        "name": network.name,
        "status": "ACTIVE",
        "admin_state_up": network.admin_state_up,
        "shared": network.shared,
        "mtu": network.mtu,
        "port_security_enabled": network.port_security,
        "router:external": False,
        "availability_zone_hints": [],
        "availability_zones": [ZONE],
        "ipv4_address_scope": None,
        "ipv6_address_scope": None,
        "tags": network.tags,
        **_standard(network),
    }


def with_subnets(view: View, subnet_ids: Sequence[str]) -> View:
    return {**view, "subnets": subnet_ids}


def subnet_view(subnet: SubnetRecord) -> View:
    return {
        "id": subnet.id,
        "name": subnet.name,
        "network_id": subnet.network_id,
        "ip_version": 4,
        "cidr": subnet.cidr,
        "gateway_ip": subnet.gateway_ip,
        "enable_dhcp": subnet.dhcp_enabled,
        "allocation_pools": [{"start": first, "end": last} for first, last in subnet.allocation_pools],
        "dns_nameservers": subnet.dns_nameservers,
        "host_routes": [{"destination": to, "nexthop": hop} for to, hop in subnet.host_routes],
        "ipv6_address_mode": None,
        "ipv6_ra_mode": None,
        "service_types": [],
        "subnetpool_id": None,
        "tags": subnet.tags,
        **_standard(subnet),
    }


def port_view(port: PortRecord, *, is_admin: bool) -> View:
    bound = bool(port.host) and port.position is not None
    view = {
        "id": port.id,
        "name": port.name,
        "network_id": port.network_id,
        "mac_address": port.mac_address,
        "status": "ACTIVE" if bound and port.admin_state_up else "DOWN",
        "admin_state_up": port.admin_state_up,
        "fixed_ips": [{"subnet_id": one.subnet_id, "ip_address": one.ip_address} for one in port.fixed_ips],
        "security_groups": port.security_groups,
        "allowed_address_pairs": [{"ip_address": ip, "mac_address": mac} for ip, mac in port.allowed_pairs],
        "port_security_enabled": port.port_security,
        "device_id": port.device_id,
        "device_owner": port.device_owner,
        "extra_dhcp_opts": [],
        "binding:vnic_type": "normal",
        "tags": port.tags,
        **_standard(port),
    }
    if is_admin:
        view |= {
            "binding:host_id": port.host,
            "binding:vif_type": "bridge" if bound else "unbound",
            "binding:vif_details": {"port_filter": True} if bound else {},
            "binding:profile": {},
        }
    return view


def group_view(group: SecurityGroupRecord) -> View:
    """Without its rules: see `with_rules`."""
    return {
        "id": group.id,
        "name": group.name,
        "stateful": True,
        "shared": False,
        "is_default": group.default_of is not None,
        "tags": group.tags,
        **_standard(group),
    }


def with_rules(view: View, rules: Sequence[SecurityGroupRuleRecord]) -> View:
    of_default = view["name"] == DEFAULT and view["is_default"]
    return {**view, "security_group_rules": [rule_view(rule) | {"belongs_to_default_sg": of_default} for rule in rules]}


def rule_view(rule: SecurityGroupRuleRecord) -> View:
    return {
        "id": rule.id,
        "security_group_id": rule.group_id,
        "direction": rule.direction,
        "ethertype": rule.ethertype,
        "protocol": rule.protocol,
        "port_range_min": rule.port_min,
        "port_range_max": rule.port_max,
        "remote_ip_prefix": rule.remote_ip_prefix,
        "normalized_cidr": rule.remote_ip_prefix,
        "remote_group_id": rule.remote_group_id,
        "remote_address_group_id": None,
        **_standard(rule),
    }
