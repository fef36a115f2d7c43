"""How one host with libvirt is put together: the same in the embedded process, in an agent's, and for `instar down`."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

from instar.cli.state_dir import STREAMS
from instar.config import Settings
from instar.hypervisor.libvirt.driver import LibvirtHypervisor
from instar.hypervisor.linux_network import LinuxNetwork
from instar.streams.client import StreamClient
from instar.streams.identity import StreamIdentity
from instar.streams.server import StreamServer


def linux_network(state_dir: Path, cloud_id: str, *, address: str | None = None) -> LinuxNetwork:
    """The networks of the host whose state is in `state_dir`. Without `address` they reach no other host."""
    return LinuxNetwork(state_dir=state_dir / "network", cloud_id=cloud_id, underlay_address=address)


class HostStreams(NamedTuple):
    """What a host gives out to others, and what it gets from them."""

    server: StreamServer
    client: StreamClient


async def open_streams(
    stack: AsyncExitStack, state_dir: Path, settings: Settings, *, name: str, address: str
) -> HostStreams:
    """What the host gives out is at a free port of `address`, until the stack is closed. Raises StartupError."""
    identity = await asyncio.to_thread(StreamIdentity.open, state_dir / STREAMS)
    bandwidth = settings.host.transfer_max_mib_s << 20
    server = StreamServer(identity, host=name, listen=address, bandwidth_max_bytes_s=bandwidth)
    await server.open()
    stack.push_async_callback(server.close)
    client = StreamClient(identity, host=name)
    stack.push_async_callback(client.close)
    return HostStreams(server, client)


def libvirt_host(
    state_dir: Path,
    cloud_id: str,
    settings: Settings,
    *,
    name: str,
    uri: str,
    address: str | None = None,
    machine_shares: int = 1,
    streams: HostStreams | None = None,
) -> LibvirtHypervisor:
    """The host `name`, whose libvirtd is at `uri`. `address` is by which other hosts reach it, None where there are none;
    `machine_shares` hosts divide this machine; without `streams` its consoles cannot be reached."""
    return LibvirtHypervisor(
        uri=uri,
        host=name,
        state_dir=state_dir,
        network=linux_network(state_dir, cloud_id, address=address),
        settings=settings.libvirt,
        host_ip=address or "127.0.0.1",
        machine_shares=machine_shares,
        streams=streams.server if streams is not None else None,
        fetches=streams.client if streams is not None else None,
    )
