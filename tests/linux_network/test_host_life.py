"""What stands on the host, through additions, damage, crashes and removal."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import msgspec
import pytest

from instar.errors import HypervisorError
from instar.hypervisor.linux_network import LinuxNetwork, dhcp
from instar.hypervisor.linux_network.dhcp import dhcp_processes
from instar.hypervisor.linux_network.filter_generation import filter_generation
from instar.hypervisor.linux_network.names import CloudNames
from instar.model.network import PortDefinition

from .conftest import (
    ALLOW_OUT,
    ALLOW_PING,
    Guest,
    MakeCloud,
    Plug,
    command,
    host_pings,
    host_state,
    kernel_file,
    new_network,
    new_port,
)

pytestmark = pytest.mark.host

PINGED = (*ALLOW_OUT, ALLOW_PING)
CRASHING_PROCESS = """
import asyncio, os, pathlib, signal, sys
import msgspec
from instar.hypervisor.linux_network import LinuxNetwork
from instar.model.network import PortDefinition

async def main():
    cloud = LinuxNetwork(state_dir=pathlib.Path(sys.argv[1]), cloud_id=sys.argv[2])
    await cloud.open()
    for word in sys.argv[4:]:
        await cloud.ensure_ports(sys.argv[3], tuple(msgspec.json.decode(word, type=tuple[PortDefinition, ...])))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def start(argv: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def dhcp_pids(cloud_id: str) -> list[int]:
    return dhcp_processes(CloudNames(cloud_id).run_dir)


async def test_a_dhcp_client_gets_its_address_and_options_and_is_pinged_by_the_host(
    cloud: LinuxNetwork, plug: Plug, tmp_path: Path
) -> None:
    port = new_port(new_network(), rules=PINGED)
    await cloud.ensure_ports(str(uuid.uuid4()), (port,))
    guest = plug(cloud, port)
    lease = guest.dhcp(tmp_path)
    assert (lease["ip"], lease["router"], lease["dns"]) == ("10.91.7.10", "10.91.7.1", "192.0.2.53")
    assert (lease["mtu"], lease["hostname"]) == ("1450", "guest-10")
    assert lease["staticroutes"].split() == ["10.200.0.0/16", "10.91.7.1", "0.0.0.0/0", "10.91.7.1"]
    assert host_pings(guest.address)


async def test_the_dhcp_server_learns_new_ports_without_a_restart_and_gives_an_address_to_its_next_owner(
    make_cloud: MakeCloud, plug: Plug, tmp_path: Path
) -> None:
    cloud_id = secrets.token_hex(3)
    cloud = await make_cloud(cloud_id)
    network, instance = new_network(), str(uuid.uuid4())
    first, second, heir = (new_port(network, host, rules=PINGED) for host in (10, 11, 10))
    await cloud.ensure_ports(instance, (first,))
    assert plug(cloud, first).dhcp(tmp_path)["ip"] == "10.91.7.10"
    before = dhcp_pids(cloud_id)
    await cloud.ensure_ports(str(uuid.uuid4()), (second,))
    assert plug(cloud, second).dhcp(tmp_path)["ip"] == "10.91.7.11"
    assert dhcp_pids(cloud_id) == before != []
    await cloud.ensure_no_ports(instance)
    assert first.tap_name not in command("ip", "-br", "link")
    await cloud.ensure_ports(str(uuid.uuid4()), (heir,))
    assert plug(cloud, heir).dhcp(tmp_path)["ip"] == "10.91.7.10"


async def test_a_port_that_comes_back_needs_no_other_dhcp_server_and_one_that_stays_away_is_forgotten(
    make_cloud: MakeCloud,
) -> None:
    cloud_id = secrets.token_hex(3)
    cloud = await make_cloud(cloud_id)
    network, instance = new_network(), str(uuid.uuid4())
    port, other = new_port(network, 10), new_port(network, 11)
    await cloud.ensure_ports(instance, (port,))
    await cloud.ensure_ports(str(uuid.uuid4()), (other,))
    before = dhcp_pids(cloud_id)
    await cloud.ensure_no_ports(instance)
    await cloud.ensure_ports(instance, (port,))
    assert dhcp_pids(cloud_id) == before != []
    await cloud.ensure_no_ports(instance)
    hosts = CloudNames(cloud_id).run_dir / network.id / "hosts"
    async with asyncio.timeout(60):
        while port.mac_address in hosts.read_text() or dhcp_pids(cloud_id) in (before, []):
            await asyncio.sleep(0.05)
    assert other.mac_address in hosts.read_text()


async def test_the_dhcp_server_has_no_root_and_unknown_clients_get_nothing(
    make_cloud: MakeCloud, plug: Plug, tmp_path: Path
) -> None:
    cloud_id = secrets.token_hex(3)
    cloud = await make_cloud(cloud_id)
    network = new_network()
    known = new_port(network, 10)
    await cloud.ensure_ports(str(uuid.uuid4()), (known,))
    stranger = new_port(network, 12, fixed_ips=(), port_security=False)
    await cloud.ensure_ports(str(uuid.uuid4()), (stranger,))
    [pid] = dhcp_pids(cloud_id)
    status = dict(line.split(":\t", 1) for line in kernel_file(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    assert "0" not in status["Uid"].split()
    assert os.getsid(pid) == pid, "in a session of its own"
    plugged = plug(cloud, msgspec.structs.replace(stranger, fixed_ips=known.fixed_ips))
    assert plugged.dhcp(tmp_path, tries=3) == {}


DAMAGES = {
    "bridge": ["ip", "link", "del", "{bridge}"],
    "veth": ["ip", "link", "del", "{server}"],
    "uplink": ["ip", "link", "del", "{uplink}"],
    "namespace": ["ip", "netns", "del", "{namespace}"],
    "addresses": ["ip", "-n", "{namespace}", "addr", "flush", "dev", "int"],
    "host route": ["ip", "route", "del", "10.91.7.0/24"],
    "bridge filter": ["nft", "delete", "table", "bridge", "{table}"],
    "stateful filter": ["nft", "delete", "table", "inet", "{table}"],
    "rules of the filter": ["nft", "flush", "chain", "inet", "{table}", "bridged"],
    "namespace's filter": ["ip", "netns", "exec", "{namespace}", "nft", "flush", "ruleset"],
    "bridge down": ["ip", "link", "set", "{bridge}", "down"],
    "tap unplugged": ["ip", "link", "set", "{tap}", "nomaster"],
    "dhcp": [],
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_ensuring_the_same_ports_again_repairs(
    make_cloud: MakeCloud, plug: Plug, tmp_path: Path, damage: str
) -> None:
    cloud_id = secrets.token_hex(3)
    cloud, names = await make_cloud(cloud_id), CloudNames(cloud_id)
    network, instance = new_network(), str(uuid.uuid4())
    port = new_port(network, rules=PINGED)
    await cloud.ensure_ports(instance, (port,))
    guest = plug(cloud, port)
    whole = stands(names, network.id)
    values = {
        "bridge": names.bridge(network.id), "server": names.server(network.id), "uplink": names.uplink(network.id),
        "namespace": names.namespace(network.id), "table": names.table, "tap": port.tap_name,
    }  # fmt: skip
    if damage == "dhcp":
        os.kill(dhcp_pids(cloud_id)[0], signal.SIGKILL)
    else:
        command(*(word.format(**values) for word in DAMAGES[damage]))
        assert stands(names, network.id) != whole or damage in ("bridge down", "tap unplugged")
    await cloud.ensure_ports(instance, (port,))
    assert stands(names, network.id) == whole
    assert guest.dhcp(tmp_path).get("ip") == guest.address
    assert host_pings(guest.address)


def stands(names: CloudNames, network_id: str) -> list[str]:
    """Everything that makes up the network, as text."""
    namespace = names.namespace(network_id)
    argvs = [
        ["nft", "-s", "list", "table", "bridge", names.table],
        ["nft", "-s", "list", "table", "inet", names.table],
        ["ip", "netns", "exec", namespace, "nft", "-s", "list", "ruleset"],
        ["ip", "route", "show", "dev", names.uplink(network_id)],
        ["ip", "-n", namespace, "route"],
    ]
    addresses = command("ip", "-n", namespace, "-br", "-4", "addr", check=False).split()
    links = [
        name for name in (names.bridge(network_id), names.server(network_id)) if Path(f"/sys/class/net/{name}").exists()
    ]
    return [*(command(*argv, check=False) for argv in argvs), *sorted(word for word in addresses if "/" in word), *links]


async def test_a_process_after_kill_9_adopts_networks_filters_and_dhcp_servers(
    make_cloud: MakeCloud, plug: Plug, tmp_path: Path
) -> None:
    cloud_id, instance = secrets.token_hex(3), str(uuid.uuid4())
    port = new_port(new_network(), rules=PINGED)
    state_dir = tmp_path / cloud_id
    ports = msgspec.json.encode((port,)).decode()
    argv = [sys.executable, "-c", CRASHING_PROCESS, str(state_dir), cloud_id, instance, ports]
    assert start(argv).wait(timeout=300) == -signal.SIGKILL
    names, before = CloudNames(cloud_id), dhcp_pids(cloud_id)
    whole = stands(names, port.network.id)
    cloud = await make_cloud(cloud_id)
    assert dhcp_pids(cloud_id) == before != []
    assert stands(names, port.network.id) == whole
    guest = plug(cloud, port)
    assert guest.dhcp(tmp_path)["ip"] == guest.address
    assert host_pings(guest.address)
    assert await cloud.census() == ((port.tap_name,), (port.network.id,))
    await cloud.ensure_no_ports(instance)
    assert await cloud.census() == ((), ())


async def test_a_process_killed_at_any_moment_of_a_build_is_followed_by_one_that_finishes_it(
    make_cloud: MakeCloud, plug: Plug, tmp_path: Path
) -> None:
    port = new_port(new_network(), rules=PINGED)
    ports = msgspec.json.encode((port,)).decode()
    for number in range(6):
        cloud_id, instance = secrets.token_hex(3), str(uuid.uuid4())
        argv = [sys.executable, "-c", CRASHING_PROCESS, str(tmp_path / cloud_id), cloud_id, instance, ports]
        process = start(argv)
        records = tmp_path / cloud_id / "instances" / f"{instance}.json"
        while not records.exists() and process.poll() is None:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.012 * number)
        process.kill()
        process.wait()
        cloud = await make_cloud(cloud_id)
        assert len(dhcp_pids(cloud_id)) == 1
        await cloud.ensure_ports(instance, (port,))
        guest = plug(cloud, port)
        assert guest.dhcp(tmp_path).get("ip") == guest.address
        assert host_pings(guest.address)
        guest.remove()
        await cloud.remove_everything()


async def test_two_clouds_stand_side_by_side_and_each_removes_its_own(make_cloud: MakeCloud, plug: Plug) -> None:
    one, two = await make_cloud(), await make_cloud()
    network = new_network()  # the same network id and addresses in both: nothing may depend on their being different
    ports = [new_port(network, host, rules=PINGED) for host in (10, 10)]
    await one.ensure_ports(str(uuid.uuid4()), (ports[0],))
    alone = host_state()
    await two.ensure_ports(str(uuid.uuid4()), (ports[1],))
    assert one.bridge_name(network.id) != two.bridge_name(network.id)
    guest = plug(one, ports[0]).configure()
    assert host_pings(guest.address)
    await two.remove_everything()
    assert host_pings(guest.address)
    guest.remove()
    assert host_state() == alone


async def test_an_instance_without_ports_and_a_removed_cloud_leave_nothing(make_cloud: MakeCloud, plug: Plug) -> None:
    before = host_state()
    cloud = await make_cloud()
    red, blue = new_network(), new_network("10.91.8.0/24", nat=False)
    instances = [str(uuid.uuid4()) for _ in range(3)]
    ports = [new_port(red, 10), new_port(red, 11), new_port(blue, 10)]
    await asyncio.gather(*(cloud.ensure_ports(i, (p,)) for i, p in zip(instances, ports, strict=True)))
    guest = plug(cloud, ports[2])
    assert (await cloud.census())[1] == tuple(sorted([red.id, blue.id]))
    await asyncio.gather(*(cloud.ensure_no_ports(i) for i in instances))
    assert host_state() == {**before, "namespaces": sorted([*before["namespaces"], guest.namespace])}  # type: ignore[misc]
    guest.remove()
    await cloud.ensure_ports(instances[0], tuple(ports))
    await cloud.remove_everything()
    assert host_state() == before
    await cloud.remove_everything()


async def test_a_stopped_dhcp_server_is_no_zombie(make_cloud: MakeCloud) -> None:
    """A server that had no command line any more, but had not yet ended, was taken for gone and never reaped."""
    cloud, instance = await make_cloud(), str(uuid.uuid4())
    for _ in range(10):
        await cloud.ensure_ports(instance, (new_port(new_network(nat=False)),))
    await cloud.ensure_no_ports(instance)
    assert zombies_of(os.getpid()) == []


def zombies_of(parent: int) -> list[str]:
    """The names of the process's ended children that nobody has reaped."""
    listed = (line.split() for line in command("ps", "-A", "-o", "ppid=,stat=,comm=").splitlines())
    return [words[2] for words in listed if words[0] == str(parent) and words[1].startswith("Z")]


async def test_removing_everything_finds_what_no_record_tells_of(make_cloud: MakeCloud, tmp_path: Path) -> None:
    cloud_id = secrets.token_hex(3)
    await (await make_cloud(cloud_id)).ensure_ports(str(uuid.uuid4()), (new_port(new_network()),))
    assert cloud_id in str(host_state())
    await LinuxNetwork(state_dir=tmp_path / "elsewhere", cloud_id=cloud_id).remove_everything()
    assert cloud_id not in str(host_state())  # others may change theirs meanwhile


async def test_a_subnet_that_overlaps_a_route_of_the_host_gets_no_host_route(cloud: LinuxNetwork, plug: Plug) -> None:
    port = new_port(new_network())
    command("ip", "route", "add", "blackhole", "10.91.0.0/16")
    try:
        await cloud.ensure_ports(str(uuid.uuid4()), (port,))
        assert "10.91.7.0/24" not in command("ip", "route")
        assert plug(cloud, port).configure().pings("10.91.7.1")
    finally:
        command("ip", "route", "del", "blackhole", "10.91.0.0/16")


async def test_changed_subnets_and_mtu_reach_a_network_that_stands(cloud: LinuxNetwork, plug: Plug, tmp_path: Path) -> None:
    network, instance = new_network(), str(uuid.uuid4())
    port = new_port(network, rules=PINGED)
    await cloud.ensure_ports(instance, (port,))
    subnet = msgspec.structs.replace(network.subnets[0], gateway_ip="10.91.7.254", host_routes=())
    changed = msgspec.structs.replace(network, mtu=1400, subnets=(subnet,))
    port = msgspec.structs.replace(port, network=changed)
    await cloud.ensure_ports(instance, (port,))
    guest: Guest = plug(cloud, port)
    lease = guest.dhcp(tmp_path)
    assert (lease["router"], lease["mtu"]) == ("10.91.7.254", "1400")
    assert host_pings(guest.address)
    assert kernel_file(f"/sys/class/net/{cloud.bridge_name(network.id)}/mtu") == "1400"


class Killed(BaseException):
    """In the place of a kill -9 of the process."""


async def test_a_process_killed_before_the_dhcp_server_has_ended_is_followed_by_one_that_starts_it_anew(
    make_cloud: MakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud_id, instance = secrets.token_hex(3), str(uuid.uuid4())
    cloud = await make_cloud(cloud_id)
    network = new_network()
    port = new_port(network)
    await cloud.ensure_ports(instance, (port,))
    before = dhcp_pids(cloud_id)

    async def die(_pid: int) -> None:
        raise Killed

    subnet = msgspec.structs.replace(network.subnets[0], dns_nameservers=("192.0.2.77",))
    changed = msgspec.structs.replace(port, network=msgspec.structs.replace(network, subnets=(subnet,)))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(dhcp, "_stop", die)
        await cloud.ensure_ports(instance, (changed,))
    assert dhcp_pids(cloud_id) == before != []
    await make_cloud(cloud_id)
    after = dhcp_pids(cloud_id)
    assert len(after) == 1
    assert after != before
    assert "192.0.2.77" in (CloudNames(cloud_id).run_dir / network.id / "dnsmasq.conf").read_text()


async def test_many_ports_come_and_go_at_once_and_the_filter_stays_what_memory_says(make_cloud: MakeCloud) -> None:
    """The filter is changed by differences: after a random-looking hour it must equal one that is loaded whole."""
    cloud_id = secrets.token_hex(3)
    cloud, names = await make_cloud(cloud_id), CloudNames(cloud_id)
    network = new_network(nat=False)
    pairs = (("10.91.7.64/28", "00:00:5e:00:01:07"), ("2001:db8::/64", "00:00:5e:00:01:07"))
    keeper, instances = str(uuid.uuid4()), [str(uuid.uuid4()) for _ in range(12)]
    await cloud.ensure_ports(keeper, (new_port(network, 200),))

    def port(number: int) -> PortDefinition:
        rules = (*ALLOW_OUT, msgspec.structs.replace(ALLOW_PING, remote_cidrs=(f"10.91.7.{number // 3}/32",)))
        return new_port(network, 10 + number, rules=rules, allowed_pairs=pairs if number % 2 else ())

    await asyncio.gather(*(cloud.ensure_ports(i, (port(n),)) for n, i in enumerate(instances)))
    await asyncio.gather(*(cloud.ensure_no_ports(i) for i in instances[::2]))
    await asyncio.gather(*(cloud.ensure_ports(i, (port(n + 20),)) for n, i in enumerate(instances[:8])))

    def listed() -> list[str]:
        return [sorted_elements(command("nft", "-s", "list", "table", f, names.table)) for f in ("bridge", "inet")]

    by_differences = listed()
    ports = cloud._instances[keeper]
    await cloud.ensure_ports(keeper, ports)
    assert listed() == by_differences


def sorted_elements(text: str) -> str:
    """Sets and chains are listed in the order of their making."""
    return "\n".join(sorted(" ".join(text.split()).replace("{", "\n").replace("}", "\n").replace(",", "\n").split("\n")))


def test_each_change_of_the_kernels_filter_is_seen_in_its_generation() -> None:
    before, table = filter_generation(), f"instar_{uuid.uuid4().hex[:8]}"
    command("nft", "add", "table", "ip", table)
    try:
        between = filter_generation()
    finally:
        command("nft", "delete", "table", "ip", table)
    after = filter_generation()
    assert before is not None
    assert between is not None
    assert after is not None
    assert before < between < after


async def test_what_is_not_an_id_or_an_address_never_reaches_the_host(make_cloud: MakeCloud) -> None:
    cloud = await make_cloud()
    before, instance, port = host_state(), str(uuid.uuid4()), new_port(new_network())
    bad = [
        msgspec.structs.replace(port, id='x" accept'),
        msgspec.structs.replace(port, mac_address="fa:16:3e:00:00:01\n"),
        msgspec.structs.replace(port, allowed_pairs=(("0.0.0.0/0 }", port.mac_address),)),
        msgspec.structs.replace(port, network=msgspec.structs.replace(port.network, id="../../etc")),
        msgspec.structs.replace(port, network=msgspec.structs.replace(port.network, mtu=1)),
        msgspec.structs.replace(port, rules=(msgspec.structs.replace(ALLOW_PING, protocol="tcp accept"),)),
        msgspec.structs.replace(port, rules=(msgspec.structs.replace(ALLOW_PING, remote_cidrs=("::/0",)),)),
    ]
    for each in bad:
        with pytest.raises(HypervisorError):
            await cloud.ensure_ports(instance, (each,))
    with pytest.raises(HypervisorError):
        await cloud.ensure_ports("../x", (port,))
    assert host_state() == before
