"""One dnsmasq per network, DHCP only, in the network's namespace, as an unprivileged user.

It outlives this process: its own session, found again by its pid file and its command line. Hosts are in a file that it
reads again on SIGHUP; when one goes or changes it is restarted instead, because it remembers leases and would refuse an
address to its next owner. It keeps no lease file and is authoritative, so a restart is not noticed by guests."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import ipaddress
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import structlog

from instar.errors import HypervisorError
from instar.hypervisor.linux_network.names import RUN_DIR, CloudNames, dhcp_hostname
from instar.hypervisor.linux_network.records import write_whole
from instar.model.network import NetworkDefinition, PortDefinition, SubnetDefinition

log = structlog.get_logger(__name__)

LEASE_S = 86_400
STOP_MAX_S = 2.0
START_MAX_S = 10.0
POLL_S = 0.002
LEASES_MAX = 65_536
DIRECTORY_ATTEMPTS_MAX = 10
INNER_INTERFACE = "int"

_children: dict[int, subprocess.Popen[bytes]] = {}  # those that this process started, to be reaped


def gateway_is_ours(network: NetworkDefinition, subnet: SubnetDefinition) -> bool:
    """Whether the namespace carries the gateway's address: of networks with NAT always, else unless the subnet names
    another address for the DHCP server (then somebody else is the gateway)."""
    return subnet.gateway_ip is not None and (network.nat or subnet.dhcp_ip is None)


def server_address(network: NetworkDefinition, subnet: SubnetDefinition) -> str | None:
    """The address that DHCP answers from; None when there is no DHCP on this subnet."""
    if not subnet.dhcp_enabled or ipaddress.ip_network(subnet.cidr).version != 4:
        return None
    return subnet.gateway_ip if gateway_is_ours(network, subnet) else subnet.dhcp_ip


def dhcp_subnets(network: NetworkDefinition) -> list[SubnetDefinition]:
    return [subnet for subnet in network.subnets if server_address(network, subnet) is not None]


def render_hosts(network: NetworkDefinition, ports: Iterable[PortDefinition]) -> str:
    """The hosts file: MAC, address, name. A port gets its first IPv4 address on a subnet with DHCP."""
    served = {subnet.id for subnet in dhcp_subnets(network)}
    lines = []
    for port in ports:
        for fixed in port.fixed_ips:
            if fixed.subnet_id in served and ipaddress.ip_address(fixed.ip_address).version == 4:
                lines.append(",".join(filter(None, [port.mac_address.lower(), fixed.ip_address, _name(port)])) + "\n")
                break
    return "".join(sorted(lines))


def _name(port: PortDefinition) -> str:
    return dhcp_hostname(port.hostname)


def render_config(network: NetworkDefinition, directory: Path) -> str:
    """The configuration of a network's dnsmasq; what changes here needs a restart."""
    user, group = _unprivileged()
    lines = [
        "port=0", "no-hosts", "no-resolv", "no-ping", "bind-interfaces", f"interface={INNER_INTERFACE}",
        "except-interface=lo", "dhcp-authoritative", "leasefile-ro", "quiet-dhcp", "dhcp-ignore=tag:!known",
        f"dhcp-lease-max={LEASES_MAX}", f"user={user.pw_name}", f"group={group.gr_name}",
        f"pid-file={directory / 'pid'}", f"dhcp-hostsfile={directory / 'hosts'}",
    ]  # fmt: skip
    for number, subnet in enumerate(dhcp_subnets(network)):
        cidr = ipaddress.IPv4Network(subnet.cidr)
        tag = f"tag:s{number}"
        lines.append(f"dhcp-range=set:s{number},{cidr.network_address},static,{cidr.netmask},{LEASE_S}s")
        # An option without a value keeps dnsmasq from offering its own.
        lines.append(f"dhcp-option={tag},option:router{',' + subnet.gateway_ip if subnet.gateway_ip else ''}")
        nameservers = [a for a in subnet.dns_nameservers if ipaddress.ip_address(a).version == 4]
        lines.append(f"dhcp-option={tag},option:dns-server{''.join(',' + address for address in nameservers)}")
        lines.append(f"dhcp-option={tag},option:mtu,{network.mtu}")
        routes = [f"{to},{hop}" for to, hop in subnet.host_routes if ipaddress.ip_network(to).version == 4]
        if routes:
            # A client that gets classless routes ignores the router option, so the default route is said again.
            routes += [f"0.0.0.0/0,{subnet.gateway_ip}"] if subnet.gateway_ip else []
            lines += [f"dhcp-option={tag},{option},{','.join(routes)}" for option in ("121", "249")]
    return "\n".join(lines) + "\n"


def _unprivileged() -> tuple[pwd.struct_passwd, grp.struct_group]:
    """The account that distributions make for dnsmasq, else nobody."""
    for name in ("dnsmasq", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return user, grp.getgrgid(user.pw_gid)
    raise HypervisorError(reason="the host has no account that dnsmasq could run as")


class DhcpServer:
    """The dnsmasq of one network of one cloud. Calls for one network must not overlap."""

    def __init__(self, names: CloudNames, network_id: str) -> None:
        self._directory = names.run_dir / network_id
        self._namespace = names.namespace(network_id)
        self._errors = self._directory / "errors"
        self._config, self._hosts, self._pid_file = (self._directory / file for file in ("dnsmasq.conf", "hosts", "pid"))

    async def ensure(
        self, network: NetworkDefinition, ports: Iterable[PortDefinition], *, restart: bool, later: bool = False
    ) -> bool:
        """It runs with this configuration and these hosts. `restart`: its interface is new. `later`: where hosts only went
        nothing is done, and False returned: it is still to be called without."""
        if not dhcp_subnets(network):
            await self.ensure_stopped()
            return True
        hosts = render_hosts(network, ports)
        if later and not restart and await asyncio.to_thread(self._only_shrinks, network, hosts):
            return False
        config = render_config(network, self._directory)
        pid, differs = await asyncio.to_thread(self._compare, config, hosts)
        kept = None if restart or differs else pid
        if kept is None:
            # Before the files change: whoever comes after a crash in between must not take it for one that knows them.
            await self._stop_running(pid)
        still_runs = await asyncio.to_thread(self._write, config, hosts)
        if kept is None or kept != still_runs:  # the second: it has died meanwhile
            await self._start()
        else:
            # Also when the file is as it was: an earlier process may have been killed between writing and telling.
            with contextlib.suppress(ProcessLookupError):
                os.kill(kept, signal.SIGHUP)
        return True

    def _only_shrinks(self, network: NetworkDefinition, hosts: str) -> bool:
        """It runs as it should, but for hosts that it has beside these."""
        if self._running_pid() is None or _read(self._config) != render_config(network, self._directory):
            return False
        return set(hosts.splitlines()) < set(_read(self._hosts).splitlines())

    async def ensure_stopped(self) -> None:
        """No dnsmasq of this network, and no file of it."""
        for pid in await asyncio.to_thread(pids_with_config, str(self._config)):
            await _stop(pid)
        await asyncio.to_thread(remove_directory, self._directory)

    def _compare(self, config: str, hosts: str) -> tuple[int | None, bool]:
        """(pid if it runs, whether it must be started again to know these: another configuration, a host that went)."""
        grown = set(_read(self._hosts).splitlines()) <= set(hosts.splitlines())
        return self._running_pid(), _read(self._config) != config or not grown

    def _write(self, config: str, hosts: str) -> int | None:
        """pid if it runs, looked for at the very end."""
        group_id = _unprivileged()[1].gr_gid
        _make_directory(self._directory)
        os.chown(self._directory, 0, group_id)
        for file, content in ((self._config, config), (self._hosts, hosts)):
            if _read(file) != content:
                write_whole(file, content.encode(), mode=0o640, group_id=group_id)
        return self._running_pid()

    def _running_pid(self) -> int | None:
        text = _read(self._pid_file).strip()
        return int(text) if text.isdigit() and _is_ours(int(text), str(self._config)) else None

    async def _stop_running(self, running: int | None) -> None:
        others = [running] if running else await asyncio.to_thread(pids_with_config, str(self._config))
        for pid in others:
            await _stop(pid)

    async def _start(self) -> None:
        for pid in list(_children):  # one that died by itself is still to be reaped
            _alive(pid)
        await asyncio.to_thread(self._pid_file.unlink, missing_ok=True)
        await self._wait_for_pid_file(await asyncio.to_thread(self._spawn))
        log.info("network.dhcp_started", namespace=self._namespace)

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Our own child, so that we reap it, but in a session of its own, so that it stays when we go. (An asyncio
        subprocess would be killed with its event loop; one that daemonises leaves zombies to a slow PID 1.)"""
        with self._errors.open("wb") as errors:
            child = subprocess.Popen(
                ["ip", "netns", "exec", self._namespace, "dnsmasq", "--keep-in-foreground", f"--conf-file={self._config}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        _children[child.pid] = child
        return child

    async def _wait_for_pid_file(self, child: subprocess.Popen[bytes]) -> None:
        """It is written once the sockets are open."""
        for _ in range(int(START_MAX_S / POLL_S)):
            if await asyncio.to_thread(self._running_pid) is not None:
                return
            if child.poll() is not None:
                break
            await asyncio.sleep(POLL_S)
        log.error("network.dhcp_failed", namespace=self._namespace, errors=_read(self._errors)[:2000])
        raise HypervisorError(reason="the DHCP server of a network did not start")


def _make_directory(directory: Path) -> None:
    """Again when another network of ours takes the empty parent away between two of the steps."""
    for attempt in range(DIRECTORY_ATTEMPTS_MAX):
        try:
            for each in (directory.parent.parent, directory.parent):
                each.mkdir(exist_ok=True, mode=0o711)
            directory.mkdir(exist_ok=True, mode=0o750)
        except FileNotFoundError:
            if attempt == DIRECTORY_ATTEMPTS_MAX - 1:
                raise
        else:
            return


def remove_directory(directory: Path) -> None:
    """A network's or a cloud's files, and the cloud's directory when it is empty then. RUN_DIR stays, as /run/netns does:
    with a directory the kernel takes away what other mount namespaces, of hosts on this machine, have mounted on it."""
    shutil.rmtree(directory, ignore_errors=True)
    if directory.parent != RUN_DIR:
        with contextlib.suppress(OSError):  # not empty, or gone
            directory.parent.rmdir()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _is_ours(pid: int, config: str) -> bool:
    """Whether the process is a living dnsmasq with this configuration file; a zombie has no command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return words[0].endswith(b"dnsmasq") and f"--conf-file={config}".encode() in words


def pids_with_config(config: str) -> list[int]:
    """All processes with this configuration file, also when the pid file is lost."""
    return [pid for pid in _all_pids() if _is_ours(pid, config)]


def dhcp_processes(run_dir: Path) -> list[int]:
    """All DHCP servers of the cloud whose files are below `run_dir`."""
    prefix = f"--conf-file={run_dir}/".encode()
    found = []
    for pid in _all_pids():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"dnsmasq") and any(word.startswith(prefix) for word in words):
                found.append(pid)
    return found


def _all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


async def stop_processes(run_dir: Path) -> None:
    """End all DHCP servers of the cloud whose files are below `run_dir`."""
    for pid in await asyncio.to_thread(dhcp_processes, run_dir):
        await _stop(pid)


async def _stop(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        for _ in range(int(STOP_MAX_S / POLL_S)):
            if not await asyncio.to_thread(_alive, pid):
                return
            await asyncio.sleep(POLL_S)
    raise HypervisorError(reason="a DHCP server on the host cannot be stopped")


def _alive(pid: int) -> bool:
    """Whether it runs; reaps it when it is a child of ours (we may be the subreaper of its orphaned parent)."""
    child = _children.get(pid)
    if child is not None:
        # Until it is reaped: one that is about to end has no command line any more, and would stay as a zombie.
        if child.poll() is not None:
            del _children[pid]
            return False
        return True
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False
