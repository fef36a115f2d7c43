"""The field's own clients, unmodified: openstackclient, and the SDK."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openstack
import pytest

from tests.fixtures.openstack_client import Runs, Said, run_apart, run_openstack
from tests.networks.network_cloud import Cloud, running_cloud

pytestmark = pytest.mark.slow


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[Cloud]:
    async with running_cloud(tmp_path, with_identity=True) as running:
        yield running


async def run(cloud: Cloud, command: str, runs: Runs = run_openstack) -> Said:
    environ = {
        "PATH": os.environ["PATH"], "HOME": "/nonexistent", "OS_AUTH_URL": f"{cloud.url}/identity",
        "OS_USERNAME": "admin", "OS_PASSWORD": cloud.first.admin_password, "OS_PROJECT_NAME": "admin",
        "OS_USER_DOMAIN_NAME": "Default", "OS_PROJECT_DOMAIN_NAME": "Default", "OS_IDENTITY_API_VERSION": "3",
    }  # fmt: skip
    return await runs(environ, *command.split())


async def ok(cloud: Cloud, command: str, runs: Runs = run_openstack) -> str:
    said = await run(cloud, command, runs)
    assert said.status == 0, f"{command}: {said.err}"
    return said.out


async def shown(cloud: Cloud, command: str, runs: Runs = run_openstack) -> Any:
    return json.loads(await ok(cloud, f"{command} -f json", runs))


async def failed(cloud: Cloud, command: str, words: str) -> None:
    said = await run(cloud, command)
    assert said.status != 0, command
    assert words in said.err


async def test_openstack_network_and_subnet(cloud: Cloud) -> None:
    network = await shown(cloud, "network create --description d --mtu 1400 --share lan", run_apart)
    assert (network["name"], network["mtu"], network["shared"]) == ("lan", 1400, True)
    assert {row["Name"] for row in await shown(cloud, "network list")} == {"private", "lan"}
    assert [row["Name"] for row in await shown(cloud, "network list --name lan --share")] == ["lan"]
    assert await shown(cloud, "network list --external") == []
    await ok(cloud, "network set --name hall --no-share --tag green lan")
    assert [row["Name"] for row in await shown(cloud, "network list --long --tags green")] == ["hall"]
    subnet = await shown(
        cloud, "subnet create --network hall --subnet-range 192.168.7.0/24 --dns-nameserver 9.9.9.9 "
        "--allocation-pool start=192.168.7.10,end=192.168.7.20 --host-route destination=10.9.0.0/16,gateway=192.168.7.9 "
        "--gateway 192.168.7.1 sub",
    )  # fmt: skip
    assert subnet["allocation_pools"] == [{"start": "192.168.7.10", "end": "192.168.7.20"}]
    assert subnet["dns_nameservers"] == ["9.9.9.9"]
    await ok(cloud, "subnet set --name sub2 --no-dhcp --no-dns-nameservers sub")
    changed = await shown(cloud, "subnet show sub2")
    assert (changed["enable_dhcp"], changed["dns_nameservers"]) == (False, [])
    assert [row["Name"] for row in await shown(cloud, "subnet list --network hall --no-dhcp")] == ["sub2"]
    await failed(cloud, "subnet create --network hall --subnet-range fd00::/64 --ip-version 6 six", "ip_version")
    await failed(cloud, "network show nowhere", "No Network found for nowhere")
    await ok(cloud, "subnet delete sub2")
    await ok(cloud, "network delete hall")
    assert {row["Name"] for row in await shown(cloud, "network list")} == {"private"}


async def test_openstack_port(cloud: Cloud) -> None:
    port = await shown(
        cloud, "port create --network private --fixed-ip ip-address=10.77.0.99 --mac-address fa:16:3e:01:02:03 one"
    )
    assert port["fixed_ips"][0]["ip_address"] == "10.77.0.99"
    assert port["port_security_enabled"] is True
    await ok(cloud, "port create --network private --disable-port-security --no-security-group --disable two")
    assert {row["Name"] for row in await shown(cloud, "port list --network private")} == {"one", "two"}
    assert [row["Name"] for row in await shown(cloud, "port list --fixed-ip ip-address=10.77.0.99")] == ["one"]
    await ok(cloud, "port set --name uno --description d --allowed-address ip-address=10.77.0.200 one")
    changed = await shown(cloud, "port show uno")
    assert changed["allowed_address_pairs"] == [{"ip_address": "10.77.0.200", "mac_address": "fa:16:3e:01:02:03"}]
    await ok(cloud, "port set --no-security-group --no-allowed-address --disable-port-security uno")
    await ok(cloud, "port unset --fixed-ip subnet=private-subnet,ip-address=10.77.0.99 uno")
    assert (await shown(cloud, "port show uno"))["fixed_ips"] == []
    await failed(cloud, "network delete private", "in use")
    await ok(cloud, "port delete uno two")
    assert await shown(cloud, "port list") == []


async def test_openstack_security_groups(cloud: Cloud) -> None:
    (default,) = await shown(cloud, "security group list")
    assert default["Name"] == "default"
    assert len(await shown(cloud, "security group rule list default")) == 4
    group = await shown(cloud, "security group create --description d web")
    assert len(group["rules"]) == 2
    await ok(cloud, "security group rule create --protocol tcp --dst-port 80:443 --remote-ip 10.0.0.0/8 web")
    await ok(cloud, "security group rule create --protocol icmp --icmp-type 8 web")
    await ok(cloud, "security group rule create --egress --ethertype IPv6 --protocol udp --dst-port 53 web")
    rule = await shown(cloud, "security group rule create --remote-group default web")
    await failed(cloud, "security group rule create --remote-group default web", "already exists")
    assert (await shown(cloud, f"security group rule show {rule['id']}"))["remote_group_id"] == default["ID"]
    assert len(await shown(cloud, "security group rule list web --ingress")) == 3
    await ok(cloud, "port create --network private --security-group web p")
    await failed(cloud, "security group delete web", "in use")
    await ok(cloud, "port delete p")
    await ok(cloud, f"security group rule delete {rule['id']}")
    await ok(cloud, "security group set --name www web")
    await ok(cloud, "security group delete www")
    await failed(cloud, "security group delete default", "default")


async def test_openstack_lists_what_the_cloud_has(cloud: Cloud) -> None:
    assert {"security-group", "quotas"} <= {row["Alias"] for row in await shown(cloud, "extension list --network")}
    assert await shown(cloud, "network agent list") == []
    assert [row["Zone Name"] for row in await shown(cloud, "availability zone list --network")] == ["nova"]


async def test_sdk_creates_lists_pages_and_deletes(cloud: Cloud) -> None:
    def work() -> None:
        connection = openstack.connect(
            auth_url=f"{cloud.url}/identity", username="admin", password=cloud.first.admin_password,
            project_name="admin", user_domain_id="default", project_domain_id="default", region_name="RegionOne",
            load_yaml_config=False, load_envvars=False,
        )  # fmt: skip
        with connection:
            net = connection.network
            network = net.create_network(name="sdk")
            subnet = net.create_subnet(network_id=network.id, ip_version=4, cidr="192.168.8.0/24", name="s")
            ports = list(net.create_ports([{"network_id": network.id, "name": f"p{n}"} for n in range(5)]))
            assert len({port.fixed_ips[0]["ip_address"] for port in ports}) == 5
            assert [one.name for one in net.ports(network_id=network.id, limit=2, sort_key="name")] == [
                "p0", "p1", "p2", "p3", "p4",
            ]  # fmt: skip
            assert net.find_port("p3").id == next(port.id for port in ports if port.name == "p3")
            assert connection.get_network("sdk").id == network.id
            group = net.create_security_group(name="web")
            net.create_security_group_rule(
                security_group_id=group.id, direction="ingress", protocol="tcp", port_range_min=22, port_range_max=22
            )
            assert len(net.get_security_group(group.id).security_group_rules) == 3
            net.update_port(ports[0], security_groups=[group.id])
            net.set_tags(network, ["a", "b"])
            assert sorted(net.get_network(network.id).tags) == ["a", "b"]
            quota = net.get_quota(connection.current_project_id, details=True)
            assert quota.ports["used"] == 5
            assert net.update_quota(connection.current_project_id, ports=6).ports == 6
            with pytest.raises(openstack.exceptions.ConflictException, match="Quota exceeded"):
                net.create_ports([{"network_id": network.id}] * 2)
            net.delete_quota(connection.current_project_id)
            assert net.get_quota_default(connection.current_project_id).ports == 40
            with pytest.raises(openstack.exceptions.ConflictException):
                net.delete_network(network, ignore_missing=False)
            for port in ports:
                net.delete_port(port, ignore_missing=False)
            net.delete_subnet(subnet, ignore_missing=False)
            net.delete_network(network, ignore_missing=False)
            assert net.find_network("sdk") is None

    await asyncio.to_thread(work)
