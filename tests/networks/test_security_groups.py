"""Security groups over HTTP, and what hosts hear of them."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address, ip_network

import pytest

from instar.hypervisor.linux_network.names import protocol_number
from instar.networks.group_routes import PROTOCOLS
from tests.networks.network_cloud import Caller, Cloud


async def _default(caller: Caller) -> dict:
    (group,) = await caller.list("security_group", "?name=default")
    return group


async def test_the_default_group_is_there_at_the_first_look(cloud: Cloud) -> None:
    groups = await asyncio.gather(*(_default(cloud.member) for _ in range(8)))
    assert len({group["id"] for group in groups}) == 1
    rules = {(rule["direction"], rule["ethertype"], rule["remote_group_id"]) for rule in groups[0]["security_group_rules"]}
    own = groups[0]["id"]
    assert rules == {
        ("egress", "IPv4", None), ("egress", "IPv6", None), ("ingress", "IPv4", own), ("ingress", "IPv6", own),
    }  # fmt: skip
    assert (await _default(cloud.other))["id"] != own


async def test_the_default_group_stays(cloud: Cloud) -> None:
    group = await _default(cloud.member)
    for caller in (cloud.member, cloud.admin):
        kind, _ = await caller.refused(409, "DELETE", f"/security-groups/{group['id']}")
        assert kind == "SecurityGroupCannotRemoveDefault"
    renamed = {"security_group": {"name": "x"}}
    kind, _ = await cloud.member.refused(409, "PUT", f"/security-groups/{group['id']}", renamed)
    assert kind == "SecurityGroupCannotUpdateDefault"
    changed = await cloud.member.change("security_group", group["id"], name="default", description="ours")
    assert changed["description"] == "ours"
    kind, _ = await cloud.member.refused(409, "POST", "/security-groups", {"security_group": {"name": "default"}})
    assert kind == "SecurityGroupDefaultAlreadyExists"


async def test_a_group_in_use_stays(cloud: Cloud) -> None:
    group = await cloud.member.make("security_group", name="web")
    port = await cloud.member.make("port", network_id=cloud.shared_id, security_groups=[group["id"]])
    assert (await cloud.member.refused(409, "DELETE", f"/security-groups/{group['id']}"))[0] == "SecurityGroupInUse"
    await cloud.member.change("port", port["id"], security_groups=None)
    await cloud.member.delete("security_group", group["id"])
    assert (await cloud.member.refused(404, "GET", f"/security-groups/{group['id']}"))[0] == "SecurityGroupNotFound"


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol": "tcp", "port_range_min": 22, "port_range_max": 22},
        {"protocol": "TCP", "port_range_min": 1, "port_range_max": 65535, "remote_ip_prefix": "10.1.2.3/8"},
        {"protocol": "icmp", "port_range_min": 8, "port_range_max": 0},
        {"protocol": "icmpv6", "ethertype": "IPv6", "port_range_min": 128},
        {"protocol": 47},
        {"protocol": "132", "port_range_min": 5, "port_range_max": 6},
        {"protocol": None, "ethertype": None, "remote_ip_prefix": None, "description": None},
        {"ethertype": "ipv6", "remote_ip_prefix": "fd00::/8"},
        {"direction": "egress", "protocol": "any", "remote_ip_prefix": "0.0.0.0/0"},
    ],
)
async def test_a_rule_that_can_be(cloud: Cloud, fields: dict) -> None:
    group = await cloud.member.make("security_group", name="g")
    fields = {"direction": "ingress", **fields}
    rule = await cloud.member.make("security_group_rule", security_group_id=group["id"], **fields)
    assert rule == await cloud.member.show("security_group_rule", rule["id"])
    body = {"security_group_rule": {"security_group_id": group["id"], **fields}}
    assert (await cloud.member.refused(409, "POST", "/security-group-rules", body))[0] == "SecurityGroupRuleExists"
    await cloud.member.delete("security_group_rule", rule["id"])
    kind, _ = await cloud.member.refused(404, "DELETE", f"/security-group-rules/{rule['id']}")
    assert kind == "SecurityGroupRuleNotFound"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"direction": "sideways"}, "direction"),
        ({"ethertype": "IPX"}, "ethertype"),
        ({"protocol": "carrier-pigeon"}, "protocol"),
        ({"protocol": 256}, "protocol"),
        ({"protocol": -1}, "protocol"),
        ({"port_range_min": 22, "port_range_max": 22}, "protocol"),
        ({"protocol": "tcp", "port_range_min": 23, "port_range_max": 22}, "port_range_min"),
        ({"protocol": "tcp", "port_range_min": 22}, "port_range_min"),
        ({"protocol": "tcp", "port_range_min": 0, "port_range_max": 65536}, "port_range_min"),
        ({"protocol": "icmp", "port_range_min": 256}, "port_range_min"),
        ({"protocol": "icmp", "port_range_max": 1}, "port_range_min"),
        ({"remote_ip_prefix": "10.0.0.0/33"}, "remote_ip_prefix"),
        ({"remote_ip_prefix": "fd00::/8"}, "remote_ip_prefix"),
        ({"remote_ip_prefix": "10.0.0.0/8", "remote_group_id": "{own}"}, "remote_group_id"),
        ({"remote_address_group_id": "x"}, "remote_address_group_id"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_a_rule_that_cannot_be(cloud: Cloud, fields: dict, path: str) -> None:
    group = await cloud.member.make("security_group", name="g")
    fields = {key: group["id"] if value == "{own}" else value for key, value in fields.items()}
    body = {"security_group_rule": {"security_group_id": group["id"], "direction": "ingress", **fields}}
    assert path in (await cloud.member.refused(400, "POST", "/security-group-rules", body))[1]


async def test_rules_name_groups_that_one_can_see(cloud: Cloud) -> None:
    group, foreign = await cloud.member.make("security_group", name="g"), await _default(cloud.other)
    for group_id, remote_id in ((foreign["id"], None), (group["id"], foreign["id"])):
        rule = {"direction": "ingress", "security_group_id": group_id, "remote_group_id": remote_id}
        body = {"security_group_rule": rule}
        assert (await cloud.member.refused(404, "POST", "/security-group-rules", body))[0] == "SecurityGroupNotFound"
    body = {"port": {"network_id": cloud.shared_id, "security_groups": [foreign["id"]]}}
    await cloud.member.refused(404, "POST", "/ports", body)


def test_hosts_know_every_protocol() -> None:
    assert all(protocol_number(name) is not None for name in PROTOCOLS)


async def test_hosts_are_told_of_rules_and_members(cloud: Cloud) -> None:
    member, refresh = cloud.member, cloud.networks.refresh
    instance_id, _ = await cloud.serve(cloud.shared_id)
    default = await _default(member)

    async def told() -> set[str]:
        await refresh.settled()
        heard = set().union(*cloud.told)
        cloud.told.clear()
        return heard

    await told()
    rule = await member.make("security_group_rule", security_group_id=default["id"], direction="ingress", protocol="tcp")
    assert await told() == {instance_id}
    (port,) = await cloud.networks.ports_of(instance_id)
    assert any(one.protocol == "tcp" for one in port.definition.rules)
    await member.delete("security_group_rule", rule["id"])
    assert await told() == {instance_id}
    other = await member.make("port", network_id=cloud.shared_id)  # a member of the default group: its peers let it in
    assert await told() == {instance_id}
    (port,) = await cloud.networks.ports_of(instance_id)
    address = ip_address(other["fixed_ips"][0]["ip_address"])
    assert any(address in ip_network(cidr) for rule in port.definition.rules for cidr in rule.remote_cidrs)
    await member.delete("port", other["id"])
    assert await told() == {instance_id}
    group = await member.make("security_group", name="peers")
    await member.make(
        "security_group_rule", security_group_id=default["id"], direction="ingress", remote_group_id=group["id"]
    )
    await told()
    await member.delete("security_group", group["id"])  # and the rule that names it
    assert await told() == {instance_id}
    assert all(one["remote_group_id"] != group["id"] for one in (await _default(member))["security_group_rules"])
