"""Filters, order, pages and fields of lists; quotas, also when many ask at once; bodies that do not fit."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from tests.networks.network_cloud import Cloud


async def test_lists_are_filtered_on_what_they_show(cloud: Cloud) -> None:
    member = cloud.member
    network, subnet = await member.lan()
    ports = [
        await member.make("port", network_id=network["id"], name=name, admin_state_up=up, description="d")
        for name, up in (("a", True), ("b", False), ("a", False))
    ]
    await member.call("PUT", f"/ports/{ports[0]['id']}/tags", 200, {"tags": ["red", "blue"]})
    await member.call("PUT", f"/ports/{ports[1]['id']}/tags", 200, {"tags": ["red"]})

    async def found(query: str) -> list[int]:
        ids = [one["id"] for one in await member.list("port", f"?{query}")]
        return [index for index, port in enumerate(ports) if port["id"] in ids]

    address = ports[1]["fixed_ips"][0]["ip_address"]
    group = ports[0]["security_groups"][0]
    for query, expected in {
        "name=a": [0, 2], "name=a&name=b": [0, 1, 2], "name=a&admin_state_up=False": [2], "admin_state_up=1": [0],
        "mac_address=" + ports[1]["mac_address"]: [1], f"fixed_ips=ip_address={address}": [1],
        f"fixed_ips=subnet_id={subnet['id']}": [0, 1, 2], f"fixed_ips=subnet_id={subnet['id']}&fixed_ips=ip_address=1": [],
        "fixed_ips=ip_address_substr=168.5": [0, 1, 2], f"network_id={network['id']}&project_id=p1": [0, 1, 2],
        "tenant_id=p2": [], "device_id=": [0, 1, 2], "status=ACTIVE": [], f"security_groups={group}": [0, 1, 2],
        "tags=red,blue": [0], "tags-any=red": [0, 1], "not-tags=red,blue": [1, 2], "not-tags-any=red": [2],
        "binding:vnic_type=normal": [0, 1, 2], f"id={ports[0]['id']}&id={ports[2]['id']}": [0, 2],
        "description=d": [0, 1, 2],
    }.items():  # fmt: skip
        assert await found(query) == expected, query
    for query in ("colour=red", "admin_state_up=perhaps", "fixed_ips=nonsense", "binding:host_id=h1", "marker=x",
                  "limit=-1", "sort_key=fixed_ips", "sort_key=colour", "sort_key=name&sort_dir=up",
                  "sort_key=name&sort_key=id&sort_dir=asc"):  # fmt: skip
        await member.refused(400, "GET", f"/ports?{query}")
    assert [one["id"] for one in await cloud.admin.list("port", "?binding:host_id=h1")] == []


async def test_lists_are_sorted_and_paged_both_ways(cloud: Cloud) -> None:
    member = cloud.member
    network = await member.make("network", name="n")
    for name in ("c", "a", "e", "b", "d"):
        await member.make("port", network_id=network["id"], name=name, fixed_ips=[])
    assert [one["name"] for one in await member.list("port", "?sort_key=name&sort_dir=desc")] == list("edcba")
    assert [one["name"] for one in await member.list("port", "?sort_key=status&sort_key=name&sort_dir=asc&sort_dir=desc")] \
        == list("edcba")  # fmt: skip
    names, pages, path = [], [], "/ports?sort_key=name&limit=2"
    while path:
        body = await member.call("GET", path, 200)
        pages.append([one["name"] for one in body["ports"]])
        names += pages[-1]
        links = {link["rel"]: link["href"] for link in body.get("ports_links", [])}
        path = _path(links["next"]) if "next" in links else ""
    assert pages == [["a", "b"], ["c", "d"], ["e"]]
    body = await member.call("GET", _path(links["previous"]), 200)
    assert [one["name"] for one in body["ports"]] == ["c", "d"]
    links = {link["rel"]: link["href"] for link in body["ports_links"]}
    assert [one["name"] for one in (await member.call("GET", _path(links["previous"]), 200))["ports"]] == ["a", "b"]
    assert await member.list("port", "?fields=name&sort_key=name&limit=1") == [{"name": "a"}]
    assert "ports_links" not in await member.call("GET", "/ports", 200)


def _path(href: str) -> str:
    parts = urlsplit(href)
    return f"{parts.path.removeprefix('/network/v2.0')}?{parts.query}"


@pytest.mark.parametrize(
    ("kind", "resource", "limit"), [("network", "network", 3), ("port", "port", 4), ("security_group", "security_group", 4)]
)
async def test_a_quota_holds_when_many_ask_at_once(cloud: Cloud, kind: str, resource: str, limit: int) -> None:
    member = cloud.member
    await member.list("security_group")  # the default group counts
    await cloud.admin.call("PUT", "/quotas/p1", 200, {"quota": {resource: limit}})
    fields = {"network_id": cloud.shared_id} if kind == "port" else {"name": "n"}
    answers = await asyncio.gather(*(
        member.client.post(f"/network/v2.0/{kind.replace('_', '-')}s", json={kind: fields},
                           headers={"x-auth-token": member.token})
        for _ in range(12)
    ))  # fmt: skip
    free = limit - (1 if kind == "security_group" else 0)
    assert sorted(answer.status_code for answer in answers) == [201] * free + [409] * (12 - free)
    error = next(answer.json()["NeutronError"] for answer in answers if answer.status_code == 409)
    assert error["type"] == "OverQuota"
    details = (await member.call("GET", "/quotas/p1/details", 200))["quota"]
    assert details[resource] == {"limit": limit, "used": limit, "reserved": 0}
    await cloud.admin.call("DELETE", "/quotas/p1", 204)
    await member.make(kind, **fields)


async def test_quotas_of_subnets_and_rules_hold(cloud: Cloud) -> None:
    member = cloud.member
    network, _ = await member.lan()
    group = await member.make("security_group", name="g")
    await cloud.admin.call("PUT", "/quotas/p1", 200, {"quota": {"subnet": 1, "security_group_rule": 7}})
    body = {"subnet": {"network_id": network["id"], "cidr": "10.5.0.0/24"}}
    assert (await member.refused(409, "POST", "/subnets", body))[0] == "OverQuota"
    rules = [{"security_group_id": group["id"], "direction": "ingress", "protocol": number} for number in (1, 2)]
    kind, _ = await member.refused(409, "POST", "/security-group-rules", {"security_group_rules": rules})
    assert kind == "OverQuota"
    await member.call("POST", "/security-group-rules", 201, {"security_group_rules": rules[:1]})
    assert [one["project_id"] for one in (await cloud.admin.call("GET", "/quotas", 200))["quotas"]] == ["p1"]
    await cloud.admin.refused(400, "PUT", "/quotas/p1", {"quota": {"floatingip": 3}})
    await cloud.admin.refused(400, "PUT", "/quotas/p1", {"quota": {"port": -2}})
    assert (await cloud.admin.call("PUT", "/quotas/p1", 200, {"quota": {"subnet": -1}}))["quota"]["subnet"] == -1
    await member.call("POST", "/subnets", 201, body)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/networks", {"network": {"name": 5}}, "$.network.name"),
        ("/networks", {"network": {"name": "x" * 256}}, "$.network.name"),
        ("/networks", {"network": {"name": "a\x00b"}}, "$.network.name"),
        ("/networks", {"network": {"mtu": 100}}, "$.network.mtu"),
        ("/networks", {"network": {"mtu": 99999}}, "$.network.mtu"),
        ("/networks", {"network": {"router:external": True}}, "$.network.router:external"),
        ("/networks", {"network": {"provider:network_type": "vxlan"}}, "provider:network_type"),
        ("/networks", {"network": {"admin_state_up": "yes"}}, "$.network.admin_state_up"),
        ("/networks", {"network": {"project_id": "p1", "tenant_id": "p2"}}, "tenant_id"),
        ("/networks", {"networks": [{"name": "a"}, {"name": 1}]}, "$.networks[1].name"),
        ("/networks", {"networks": [{}] * 101}, "$.networks"),
        ("/networks", [], "object"),
        ("/networks", {"network": None}, "$.network"),
        ("/subnets", {"subnet": {"cidr": "10.0.0.0/24"}}, "network_id"),
        ("/ports", {"port": {"network_id": None}}, "$.port.network_id"),
        ("/ports", {"port": {"network_id": "n", "fixed_ips": "10.0.0.1"}}, "$.port.fixed_ips"),
        ("/ports", {"port": {"network_id": "n", "fixed_ips": [{}] * 6}}, "$.port.fixed_ips"),
        ("/ports", {"port": {"network_id": "n", "extra_dhcp_opts": [{"opt_name": "x"}]}}, "extra_dhcp_opts"),
        ("/security-groups", {"security_group": {"name": "g", "stateful": False}}, "stateful"),
    ],
)
async def test_a_body_that_does_not_fit_is_refused(cloud: Cloud, path: str, body: object, words: str) -> None:
    kind, message = await cloud.member.refused(400, "POST", path, body)
    assert words in message
    assert kind in ("HTTPBadRequest", "InvalidInput")


async def test_clients_may_send_everything_with_null(cloud: Cloud) -> None:
    member = cloud.member
    network = await member.make(
        "network", name=None, description=None, admin_state_up=None, shared=None, mtu=None, port_security_enabled=None,
        qos_policy_id=None, availability_zone_hints=[], is_default=False, **{"router:external": False},
    )  # fmt: skip
    assert (network["name"], network["admin_state_up"], network["port_security_enabled"]) == ("", True, True)
    await member.make(
        "subnet", network_id=network["id"], cidr="10.4.0.0/24", ip_version=4, name=None, allocation_pools=None,
        dns_nameservers=None, host_routes=None, enable_dhcp=None, subnetpool_id=None, segment_id=None, service_types=[],
        ipv6_address_mode=None, ipv6_ra_mode=None, prefixlen=None, use_default_subnet_pool=False,
    )  # fmt: skip
    port = await member.make(
        "port", network_id=network["id"], name=None, fixed_ips=None, mac_address=None, security_groups=None,
        allowed_address_pairs=None, device_id=None, device_owner=None, port_security_enabled=None, extra_dhcp_opts=None,
        qos_policy_id=None, **{"binding:vnic_type": "normal", "binding:profile": {}, "binding:host_id": None},
    )  # fmt: skip
    changed = await member.change("port", port["id"], description=None, device_id=None, device_owner=None)
    assert (changed["device_id"], changed["fixed_ips"]) == ("", port["fixed_ips"])
