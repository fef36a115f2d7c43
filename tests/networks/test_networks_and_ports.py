"""Networks, subnets and ports over HTTP: what is shown, what is refused, and under which name."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest

from tests.networks.network_cloud import Cloud


async def test_version_documents_need_no_token(cloud: Cloud) -> None:
    root = (await cloud.client.get("/network/")).json()
    (version,) = root["versions"]
    assert version["id"] == "v2.0"
    resources = (await cloud.client.get(version["links"][0]["href"])).json()["resources"]
    assert {"networks", "subnets", "ports", "security-groups"} <= {one["collection"] for one in resources}


async def test_extensions_are_those_that_are_there(cloud: Cloud) -> None:
    aliases = {one["alias"] for one in (await cloud.member.call("GET", "/extensions", 200))["extensions"]}
    assert {"security-group", "quotas", "net-mtu", "port-security", "allowed-address-pairs", "sorting"} <= aliases
    assert not aliases & {"router", "external-net", "qos", "trunk", "floating-ip-port-forwarding"}
    for alias in aliases:
        assert (await cloud.member.call("GET", f"/extensions/{alias}", 200))["extension"]["alias"] == alias
    await cloud.member.refused(404, "GET", "/extensions/router")
    for path in ("/routers", "/floatingips", "/trunks"):
        await cloud.member.refused(404, "GET", path)
    zones = (await cloud.member.call("GET", "/availability_zones", 200))["availability_zones"]
    assert zones == [{"name": "nova", "resource": "network", "state": "available"}]
    assert (await cloud.admin.call("GET", "/agents", 200)) == {"agents": []}


async def test_a_network_lives_and_dies(cloud: Cloud) -> None:
    member = cloud.member
    network, subnet = await member.lan()
    shown = await member.show("network", network["id"])
    assert shown["subnets"] == [subnet["id"]]
    assert shown["project_id"] == shown["tenant_id"] == "p1"
    assert (shown["mtu"], shown["shared"], shown["status"]) == (1450, False, "ACTIVE")
    changed = await member.change("network", network["id"], name="renamed", mtu=1400, description=None)
    assert (changed["name"], changed["mtu"]) == ("renamed", 1400)
    assert changed["revision_number"] > network["revision_number"]
    assert changed == await member.show("network", network["id"])
    await member.delete("network", network["id"])
    assert await member.refused(404, "GET", f"/networks/{network['id']}") == (
        "NetworkNotFound", f"Network {network['id']} could not be found.",
    )  # fmt: skip
    assert await member.refused(404, "GET", f"/subnets/{subnet['id']}")
    assert (await member.refused(404, "DELETE", f"/networks/{network['id']}"))[0] == "NetworkNotFound"


async def test_a_subnet_has_sensible_defaults(cloud: Cloud) -> None:
    _, subnet = await cloud.member.lan("192.168.9.0/28", name=None, dns_nameservers=None, host_routes=None)
    assert subnet["gateway_ip"] == "192.168.9.1"
    assert subnet["allocation_pools"] == [{"start": "192.168.9.2", "end": "192.168.9.14"}]
    assert subnet["enable_dhcp"] is True
    assert subnet["ip_version"] == 4


async def test_everything_of_a_subnet_can_be_chosen_and_changed(cloud: Cloud) -> None:
    member = cloud.member
    _, subnet = await member.lan(
        "192.168.9.0/24", name="s", gateway_ip="192.168.9.254", enable_dhcp=False, dns_nameservers=["9.9.9.9"],
        allocation_pools=[{"start": "192.168.9.20", "end": "192.168.9.29"}],
        host_routes=[{"destination": "10.9.0.0/16", "nexthop": "192.168.9.7"}],
    )  # fmt: skip
    shown = await member.show("subnet", subnet["id"])
    assert shown["dns_nameservers"] == ["9.9.9.9"]
    assert shown["host_routes"] == [{"destination": "10.9.0.0/16", "nexthop": "192.168.9.7"}]
    assert shown["enable_dhcp"] is False
    changed = await member.change(
        "subnet", subnet["id"], gateway_ip=None, enable_dhcp=True, dns_nameservers=[], host_routes=[],
        allocation_pools=[{"start": "192.168.9.40", "end": "192.168.9.41"}], name="t",
    )  # fmt: skip
    assert (changed["gateway_ip"], changed["dns_nameservers"], changed["host_routes"]) == (None, [], [])
    assert changed == await member.show("subnet", subnet["id"])


@pytest.mark.parametrize(
    ("fields", "status", "path"),
    [
        ({"ip_version": 6, "cidr": "fd00::/64"}, 400, "ip_version"),
        ({"cidr": "fd00::/64"}, 400, "cidr"),
        ({"cidr": "192.168.1.5/24"}, 400, "cidr"),
        ({"cidr": "nonsense"}, 400, "cidr"),
        ({"cidr": "0.0.0.0/0"}, 400, "cidr"),
        ({"cidr": "224.0.0.0/24"}, 400, "cidr"),
        ({}, 400, "cidr"),
        ({"cidr": "192.168.1.0/24", "gateway_ip": "10.0.0.1"}, 400, "gateway_ip"),
        ({"cidr": "192.168.1.0/24", "gateway_ip": "192.168.1.255"}, 400, "gateway_ip"),
        ({"cidr": "192.168.1.0/24", "allocation_pools": [{"start": "192.168.1.9", "end": "192.168.1.2"}]}, 400, "pools"),
        ({"cidr": "192.168.1.0/24", "allocation_pools": [{"start": "10.0.0.9", "end": "10.0.0.12"}]}, 400, "pools"),
        ({"cidr": "192.168.1.0/24", "allocation_pools": [{"start": "192.168.1.1", "end": "192.168.1.9"}]}, 409, ""),
        ({"cidr": "192.168.1.0/24", "dns_nameservers": ["one.example"]}, 400, "dns_nameservers[0]"),
        ({"cidr": "192.168.1.0/24", "host_routes": [{"destination": "x", "nexthop": "y"}]}, 400, "destination"),
        ({"cidr": "192.168.1.0/24", "colour": "red"}, 400, "colour"),
        ({"cidr": "192.168.1.0/24", "use_default_subnet_pool": True}, 400, "use_default_subnet_pool"),
        ({"cidr": "192.168.1.0/32"}, 400, "enable_dhcp"),
    ],
)
async def test_a_subnet_that_cannot_be_is_refused(cloud: Cloud, fields: dict, status: int, path: str) -> None:
    network = await cloud.member.make("network", name="n")
    body = {"subnet": {"network_id": network["id"], **fields}}
    _, message = await cloud.member.refused(status, "POST", "/subnets", body)
    assert path in message
    assert (await cloud.member.show("network", network["id"]))["subnets"] == []


async def test_subnets_of_a_network_do_not_overlap(cloud: Cloud) -> None:
    member = cloud.member
    network, _ = await member.lan("192.168.0.0/16")
    body = {"subnet": {"network_id": network["id"], "cidr": "192.168.4.0/24"}}
    assert "overlaps" in (await member.refused(400, "POST", "/subnets", body))[1]
    await member.lan("192.168.4.0/24")  # in a network of its own
    both = [{"network_id": network["id"], "cidr": cidr} for cidr in ("10.1.0.0/24", "10.1.0.0/25")]
    await member.refused(400, "POST", "/subnets", {"subnets": both})
    assert len(await member.list("subnet", f"?network_id={network['id']}")) == 1
    answers = await asyncio.gather(*(
        member.client.post(
            "/network/v2.0/subnets", headers={"x-auth-token": member.token},
            json={"subnet": {"network_id": network["id"], "cidr": f"10.2.{index}.0/{22 if index == 0 else 24}"}},
        ) for index in range(4)
    ))  # fmt: skip
    assert {answer.status_code for answer in answers} == {201, 400}
    cidrs = [ipaddress.ip_network(one["cidr"]) for one in await member.list("subnet", f"?network_id={network['id']}")]
    assert not any(one.overlaps(two) for one in cidrs for two in cidrs if one is not two)


async def test_a_port_gets_an_address_a_mac_and_the_default_group(cloud: Cloud) -> None:
    member = cloud.member
    network, subnet = await member.lan("192.168.5.0/29")
    port = await member.make("port", network_id=network["id"], name="p", admin_state_up=True, security_groups=None)
    (address,) = port["fixed_ips"]
    assert address["subnet_id"] == subnet["id"]
    assert ipaddress.ip_address(address["ip_address"]) in ipaddress.ip_network("192.168.5.0/29")
    assert port["mac_address"].startswith("fa:16:3e:")
    (default,) = [group for group in await member.list("security_group") if group["name"] == "default"]
    assert port["security_groups"] == [default["id"]]
    assert port["status"] == "DOWN"
    assert "binding:host_id" not in port
    as_admin = await cloud.admin.show("port", port["id"])
    assert (as_admin["binding:host_id"], as_admin["binding:vif_type"]) == ("", "unbound")
    await member.delete("port", port["id"])
    await member.refused(404, "GET", f"/ports/{port['id']}")


async def test_ports_ask_for_subnets_and_addresses(cloud: Cloud) -> None:
    member = cloud.member
    network, one = await member.lan("192.168.5.0/24")
    two = await member.make("subnet", network_id=network["id"], cidr="192.168.6.0/24")
    port = await member.make(
        "port", network_id=network["id"], mac_address="FA:16:3E:00:00:01",
        fixed_ips=[{"subnet_id": two["id"]}, {"ip_address": "192.168.5.77"}],
    )  # fmt: skip
    assert port["mac_address"] == "fa:16:3e:00:00:01"
    assert [ip["subnet_id"] for ip in port["fixed_ips"]] == [two["id"], one["id"]]
    assert port["fixed_ips"][1]["ip_address"] == "192.168.5.77"
    bare = await member.make("port", network_id=network["id"], fixed_ips=[])
    assert bare["fixed_ips"] == []

    async def refused(status: int, **fields: object) -> tuple[str, str]:
        return await member.refused(status, "POST", "/ports", {"port": {"network_id": network["id"], **fields}})

    assert (await refused(409, fixed_ips=[{"ip_address": "192.168.5.77"}]))[0] == "IpAddressInUse"
    assert (await refused(409, mac_address="fa:16:3e:00:00:01"))[0] == "MacAddressInUse"
    assert "fixed_ips[0].ip_address" in (await refused(400, fixed_ips=[{"ip_address": "10.0.0.1"}]))[1]
    await refused(400, fixed_ips=[{"ip_address": "192.168.5.0"}])
    await refused(400, fixed_ips=[{"ip_address": "192.168.5.9", "subnet_id": two["id"]}])
    await refused(400, fixed_ips=[{"subnet_id": "nowhere"}])
    await refused(400, fixed_ips=[{}])
    await refused(400, mac_address="01:00:5e:00:00:01")
    await refused(400, mac_address="zz")
    assert (await refused(404, security_groups=["nowhere"]))[0] == "SecurityGroupNotFound"
    assert (await member.refused(404, "POST", "/ports", {"port": {"network_id": "x"}}))[0] == "NetworkNotFound"
    # A change keeps the address that it names, and takes a new one beside it.
    changed = await member.change("port", port["id"], fixed_ips=[{"ip_address": "192.168.5.77"}, {"subnet_id": one["id"]}])
    assert changed["fixed_ips"][0]["ip_address"] == "192.168.5.77"
    assert changed["fixed_ips"][1]["ip_address"] != "192.168.5.77"
    again = await member.make("port", network_id=network["id"], fixed_ips=port["fixed_ips"][:1])
    assert again["fixed_ips"] == port["fixed_ips"][:1]  # given back by the change


async def test_a_full_network_says_so(cloud: Cloud) -> None:
    member = cloud.member
    network, _ = await member.lan("192.168.5.0/29")  # a gateway, a DHCP server, four left
    ports = [await member.make("port", network_id=network["id"]) for _ in range(4)]
    addresses = {port["fixed_ips"][0]["ip_address"] for port in ports}
    assert addresses == {f"192.168.5.{last}" for last in (3, 4, 5, 6)}
    body = {"port": {"network_id": network["id"]}}
    assert (await member.refused(409, "POST", "/ports", body))[0] == "IpAddressGenerationFailure"
    await member.refused(409, "POST", "/ports", {"ports": [{"network_id": network["id"]}] * 2})
    await member.delete("port", ports[2]["id"])
    again = await member.make("port", network_id=network["id"])
    assert again["fixed_ips"][0]["ip_address"] == ports[2]["fixed_ips"][0]["ip_address"]


async def test_the_address_of_the_dhcp_server_is_nobodys(cloud: Cloud) -> None:
    member = cloud.member
    network, _ = await member.lan("192.168.5.0/24")
    body = {"port": {"network_id": network["id"], "fixed_ips": [{"ip_address": "192.168.5.2"}]}}
    assert (await member.refused(409, "POST", "/ports", body))[0] == "IpAddressInUse"
    gateway = await member.make("port", network_id=network["id"], fixed_ips=[{"ip_address": "192.168.5.1"}])
    assert gateway["fixed_ips"][0]["ip_address"] == "192.168.5.1"  # a guest of the user's is the router
    body = {"port": {"network_id": cloud.shared_id, "fixed_ips": [{"ip_address": "10.77.0.1"}]}}
    await cloud.admin.refused(409, "POST", "/ports", body)  # there it is the host


async def test_a_user_router_takes_the_gateway_without_dhcp_too(cloud: Cloud) -> None:
    network, _ = await cloud.member.lan("192.168.5.0/24", enable_dhcp=False)
    port = await cloud.member.make("port", network_id=network["id"], fixed_ips=[{"ip_address": "192.168.5.1"}])
    assert port["fixed_ips"][0]["ip_address"] == "192.168.5.1"


async def test_dhcp_switched_on_later_takes_a_free_address(cloud: Cloud) -> None:
    member = cloud.member
    network, subnet = await member.lan("192.168.5.0/29", enable_dhcp=False)
    ports = [await member.make("port", network_id=network["id"]) for _ in range(5)]
    body = {"subnet": {"enable_dhcp": True}}
    assert "enable_dhcp" in (await member.refused(400, "PUT", f"/subnets/{subnet['id']}", body))[1]
    await member.delete("port", ports[3]["id"])
    await member.call("PUT", f"/subnets/{subnet['id']}", 200, body)
    await member.refused(409, "POST", "/ports", {"port": {"network_id": network["id"]}})


async def test_what_is_in_use_is_not_deleted(cloud: Cloud) -> None:
    member = cloud.member
    network, subnet = await member.lan()
    port = await member.make("port", network_id=network["id"])
    assert (await member.refused(409, "DELETE", f"/networks/{network['id']}"))[0] == "NetworkInUse"
    assert (await member.refused(409, "DELETE", f"/subnets/{subnet['id']}"))[0] == "SubnetInUse"
    await member.delete("port", port["id"])
    await member.delete("subnet", subnet["id"])
    await member.delete("network", network["id"])


async def test_bulk_makes_all_or_nothing(cloud: Cloud) -> None:
    member = cloud.member
    made = await member.call("POST", "/networks", 201, {"networks": [{"name": "a"}, {"name": "b"}]})
    assert [one["name"] for one in made["networks"]] == ["a", "b"]
    a, b = made["networks"]
    subnets = [{"network_id": a["id"], "cidr": "10.1.0.0/24"}, {"network_id": b["id"], "cidr": "10.1.0.0/24"}]
    assert len((await member.call("POST", "/subnets", 201, {"subnets": subnets}))["subnets"]) == 2
    ports = [{"network_id": a["id"]}, {"network_id": a["id"]}, {"network_id": "nowhere"}]
    await member.refused(404, "POST", "/ports", {"ports": ports})
    assert await member.list("port") == []
    made = await member.call("POST", "/ports", 201, {"ports": ports[:2]})
    assert len({one["fixed_ips"][0]["ip_address"] for one in made["ports"]}) == 2
    await member.refused(400, "POST", "/networks", {"networks": []})
    await member.refused(400, "POST", "/networks", {})
    await member.refused(400, "POST", "/networks", {"networks": [{"name": "c"}], "network": {"name": "d"}})


async def test_a_servers_port_is_not_pulled_from_under_it(cloud: Cloud) -> None:
    network, _ = await cloud.member.lan()
    instance_id, port_id = await cloud.serve(network["id"])
    kind, message = await cloud.member.refused(409, "DELETE", f"/ports/{port_id}")
    assert kind == "PortBoundToServer"
    assert instance_id in message
    port = await cloud.member.show("port", port_id)
    assert (port["device_id"], port["device_owner"], port["status"]) == (instance_id, "compute:nova", "ACTIVE")
    assert (await cloud.admin.show("port", port_id))["binding:host_id"] == "h1"
    for fields in ({"device_id": ""}, {"mac_address": "fa:16:3e:00:00:09"}, {"fixed_ips": []}):
        await cloud.member.refused(409, "PUT", f"/ports/{port_id}", {"port": fields})
    await cloud.member.change("port", port_id, name="eth0")
    assert await cloud.member.list("port", f"?device_id={instance_id}&fields=id&fields=name") == [
        {"id": port_id, "name": "eth0"}
    ]
    await cloud.networks.release(instance_id)
    await cloud.member.refused(404, "GET", f"/ports/{port_id}")


async def test_pairs_and_port_security(cloud: Cloud) -> None:
    member = cloud.member
    network, _ = await member.lan()
    pairs = [{"ip_address": "192.168.5.200"}, {"ip_address": "10.0.0.0/24", "mac_address": "FA:16:3E:00:00:02"}]
    port = await member.make("port", network_id=network["id"], allowed_address_pairs=pairs)
    assert port["allowed_address_pairs"] == [
        {"ip_address": "192.168.5.200", "mac_address": port["mac_address"]},
        {"ip_address": "10.0.0.0/24", "mac_address": "fa:16:3e:00:00:02"},
    ]
    kind, _ = await member.refused(409, "PUT", f"/ports/{port['id']}", {"port": {"port_security_enabled": False}})
    assert kind == "PortSecurityPortHasSecurityGroup"
    off = {"port_security_enabled": False, "security_groups": []}
    kind, _ = await member.refused(409, "PUT", f"/ports/{port['id']}", {"port": off})
    assert kind == "AddressPairAndPortSecurityRequired"
    changed = await member.change("port", port["id"], allowed_address_pairs=[], **off)
    assert (changed["security_groups"], changed["port_security_enabled"]) == ([], False)
    open_network = await member.make("network", name="open", port_security_enabled=False)
    assert (await member.make("port", network_id=open_network["id"]))["security_groups"] == []


async def test_a_shared_network_is_used_but_not_owned(cloud: Cloud) -> None:
    member, network_id = cloud.member, cloud.shared_id
    assert network_id in [one["id"] for one in await member.list("network")]
    (subnet,) = await member.list("subnet", f"?network_id={network_id}")
    port = await member.make("port", network_id=network_id)
    await cloud.other.refused(404, "GET", f"/ports/{port['id']}")
    for method, path, body in (
        ("PUT", f"/networks/{network_id}", {"network": {"name": "mine"}}),
        ("DELETE", f"/networks/{network_id}", None),
        ("PUT", f"/subnets/{subnet['id']}", {"subnet": {"name": "mine"}}),
        ("DELETE", f"/subnets/{subnet['id']}", None),
        ("POST", "/subnets", {"subnet": {"network_id": network_id, "cidr": "10.3.0.0/24"}}),
        ("POST", "/ports", {"port": {"network_id": network_id, "port_security_enabled": False}}),
        ("POST", "/ports", {"port": {"network_id": network_id, "allowed_address_pairs": [{"ip_address": "0.0.0.0/0"}]}}),
        ("POST", "/ports", {"port": {"network_id": network_id, "device_owner": "network:dhcp"}}),
        ("PUT", f"/ports/{port['id']}", {"port": {"port_security_enabled": False, "security_groups": []}}),
        ("PUT", f"/ports/{port['id']}", {"port": {"binding:host_id": "h1"}}),
        ("POST", "/networks", {"network": {"name": "n", "shared": True}}),
        ("POST", "/networks", {"network": {"name": "n", "project_id": "p2"}}),
        ("PUT", f"/networks/{network_id}/tags/x", None),
    ):
        kind, _ = await member.refused(403, method, path, body)
        assert kind == "PolicyNotAuthorized"


async def test_sharing_ends_only_when_nobody_else_is_there(cloud: Cloud) -> None:
    network, _ = await cloud.member.lan()
    await cloud.other.refused(404, "GET", f"/networks/{network['id']}")
    await cloud.member.refused(403, "PUT", f"/networks/{network['id']}", {"network": {"shared": True}})
    await cloud.admin.change("network", network["id"], shared=True)
    port = await cloud.other.make("port", network_id=network["id"])
    kind, _ = await cloud.admin.refused(409, "PUT", f"/networks/{network['id']}", {"network": {"shared": False}})
    assert kind == "InvalidSharedSetting"
    await cloud.member.delete("port", port["id"])  # the network is the member's
    await cloud.admin.change("network", network["id"], shared=False)
    await cloud.other.refused(404, "GET", f"/networks/{network['id']}")


async def test_hosts_are_told_of_changes(cloud: Cloud) -> None:
    network, subnet = await cloud.member.lan()
    instance_id, port_id = await cloud.serve(network["id"])
    for change in (
        ("network", network["id"], {"mtu": 1400}), ("network", network["id"], {"admin_state_up": False}),
        ("subnet", subnet["id"], {"dns_nameservers": ["9.9.9.9"]}), ("port", port_id, {"security_groups": []}),
        ("port", port_id, {"admin_state_up": False}),
    ):  # fmt: skip
        await cloud.networks.refresh.settled()
        cloud.told.clear()
        kind, record_id, fields = change
        await cloud.member.change(kind, record_id, **fields)
        await cloud.networks.refresh.settled()
        assert set().union(*cloud.told) == {instance_id}, change
    (port,) = await cloud.networks.ports_of(instance_id)
    assert port.definition.network.mtu == 1400
    assert port.definition.network.subnets[0].dns_nameservers == ("9.9.9.9",)
    assert port.definition.rules == ()
    await cloud.networks.refresh.settled()
    cloud.told.clear()
    await cloud.member.change("network", network["id"], name="no host cares")
    await cloud.networks.refresh.settled()
    assert cloud.told == []


async def test_a_port_that_is_down_lets_nothing_through(cloud: Cloud) -> None:
    network, _ = await cloud.member.lan()
    instance_id, port_id = await cloud.serve(network["id"])
    (up,) = await cloud.networks.ports_of(instance_id)
    assert up.definition.rules
    await cloud.member.change("port", port_id, admin_state_up=False, port_security_enabled=False, security_groups=[])
    (down,) = await cloud.networks.ports_of(instance_id)
    assert (down.definition.port_security, down.definition.rules) == (True, ())
    assert (await cloud.member.show("port", port_id))["status"] == "DOWN"
