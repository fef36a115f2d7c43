"""How one host with libvirt is put together: the same in the embedded process, in an agent's, and for `instar down`."""

from __future__ import annotations

from pathlib import Path

from instar.config import Settings
from instar.hypervisor.libvirt.driver import LibvirtHypervisor
from instar.hypervisor.linux_network import LinuxNetwork


def linux_network(state_dir: Path, cloud_id: str, *, address: str | None = None) -> LinuxNetwork:
    """The networks of the host whose state is in `state_dir`. Without `address` they reach no other host."""
    return LinuxNetwork(state_dir=state_dir / "network", cloud_id=cloud_id, underlay_address=address)


def libvirt_host(
    state_dir: Path,
    cloud_id: str,
    settings: Settings,
    *,
    name: str,
    uri: str,
    address: str | None = None,
    machine_shares: int = 1,
) -> LibvirtHypervisor:
    """The host `name`, whose libvirtd is at `uri`. `address` is by which other hosts reach it, None where there are none;
    `machine_shares` hosts divide this machine."""
    return LibvirtHypervisor(
        uri=uri,
        host=name,
        state_dir=state_dir,
        network=linux_network(state_dir, cloud_id, address=address),
        settings=settings.libvirt,
        host_ip=address or "127.0.0.1",
        machine_shares=machine_shares,
    )
