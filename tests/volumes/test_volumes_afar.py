"""Volumes for hosts of other machines: real TLS, real processes, and clients that have, do not have, or had a key."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from instar.config import VolumeSettings
from instar.model.volume import VolumeConnection, VolumeGateway
from instar.nbd.relay import Relay
from instar.volumes.local import volumes_runtime
from tests.patience import PATIENCE_S
from tests.volumes.export_client import qemu_io
from tests.volumes.volume_client import Client
from tests.volumes.volume_cloud import VolumeCloud

ELSEWHERE = "192.0.2.1"  # an address of documentation: no machine has it
FIRST = 20_000 + os.getpid() % 10_000


@pytest.fixture
def settings() -> VolumeSettings:
    return VolumeSettings(listen="127.0.0.1", port_first=FIRST, ports=50)


def afar(gateway: VolumeGateway, keys: Path, *, secret: str | None = None) -> list[str]:
    """The words for qemu-io on a host with this key."""
    keys.mkdir(exist_ok=True)
    (keys / "keys.psk").write_text(f"{gateway.user}:{secret or gateway.secret}\n")
    opened = (
        f"driver=nbd,server.type=inet,server.host={gateway.address},server.port={gateway.port},tls-creds=t,"
        f"export={gateway.export},reconnect-delay=30"
    )
    return ["--object", f"tls-creds-psk,id=t,endpoint=client,dir={keys},username={gateway.user}", "--image-opts", opened]


async def run(words: list[str], *commands: str) -> str:
    options = [word for command in commands for word in ("-c", command)]
    ended = await asyncio.to_thread(
        subprocess.run, ["qemu-io", *words, *options], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    return ended.stdout + ended.stderr


async def attached(cloud: VolumeCloud, volume_id: str, host: str, attachment: str = "") -> tuple[str, VolumeConnection]:
    attachment = attachment or str(uuid.uuid4())
    await cloud.volumes.reserve(attachment, volume_id, instance_id=str(uuid.uuid4()))
    connection = await cloud.volumes.connect(attachment, host=host, host_ip=ELSEWHERE, device="/dev/vdb")
    await cloud.volumes.complete(attachment)
    return attachment, connection


async def test_a_volume_is_read_and_written_from_afar_by_who_has_the_key(
    cloud: VolumeCloud, member: Client, admin: Client, tmp_path: Path
) -> None:
    volume_id = (await member.create(volume_type="multiattach"))["id"]
    first, connection = await attached(cloud, volume_id, "far-1")
    gateway = connection.gateway
    assert gateway is not None
    words = afar(gateway, tmp_path / "k1")
    assert "wrote 1048576" in await run(words, "write -P 5 0 1M", "flush")
    await qemu_io(connection, "read -P 5 0 1M")  # where the socket is seen
    wrong = await run(afar(gateway, tmp_path / "k2", secret="0" * 64), "read 0 4k")
    plain = f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={gateway.port},export={gateway.export}"
    assert "TLS handshake failed" in wrong and "before TLS" in await run(["--image-opts", plain], "read 0 4k")
    relay = Relay(volumes_runtime(cloud.directory) / "gateways", volume_id)
    line = await asyncio.to_thread(Path(f"/proc/{relay.pid()}/cmdline").read_text)
    assert gateway.secret not in line and gateway.export not in line
    told = await admin.call("GET", f"/attachments/{first}")
    assert gateway.secret not in str(told)

    # Another host's end is not the first one's: its connection goes on, the other's is cut and its key is no key any more.
    second, other = await attached(cloud, volume_id, "far-2")
    assert other.gateway is not None and other.gateway.port == gateway.port
    client = await asyncio.to_thread(
        subprocess.Popen, ["qemu-io", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert client.stdin is not None
        client.stdin.write(b"read -P 5 0 64k\n")
        client.stdin.flush()
        assert "read 65536" in await run(afar(other.gateway, tmp_path / "k3"), "read -P 5 0 64k")
        await cloud.volumes.detach(second, keep_reservation=True)
        assert "handshake failed" in await run(afar(other.gateway, tmp_path / "k3"), "read 0 4k")
        # Killed, and the cloud restarted: whoever is connected waits, and finds it at the same port.
        await cloud.stop()
        os.kill(relay.pid() or 0, signal.SIGKILL)
        client.stdin.write(b"write -P 6 64k 64k\n")
        client.stdin.flush()
        again = VolumeCloud(cloud.directory, cloud.volumes.settings)
        await again.start()
        client.stdin.write(b"read -P 6 64k 64k\nquit\n")
        client.stdin.flush()
        said, _ = await asyncio.to_thread(client.communicate, timeout=PATIENCE_S)
    finally:
        client.kill()
        client.wait()
    try:
        assert said.count(b"read 65536/65536") == 2 and b"wrote 65536" in said, said
        same = await again.volumes.connect(first, host="far-1", host_ip=ELSEWHERE, device="/dev/vdb")
        assert same.gateway == gateway
        moved = await again.volumes.connect(second, host="far-3", host_ip=ELSEWHERE, device="/dev/vdb")
        assert moved.gateway is not None and moved.gateway.secret != other.gateway.secret
        await again.volumes.owner.exports.resize(volume_id, 2 << 30)
        assert "read 4096" in await run(afar(gateway, tmp_path / "k1"), f"read {(2 << 30) - 4096} 4k")
        near = await again.volumes.connect(second, host="near", host_ip="127.0.0.1", device="/dev/vdb")
        assert near.gateway is None and near.place == connection.place
        for attachment in (first, second):
            await again.volumes.detach(attachment)
        assert relay.pid() is None and not volumes_runtime(cloud.directory).exists()
        assert again.files() == [f"{volume_id}.qcow2"]
    finally:
        await again.stop()
