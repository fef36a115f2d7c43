"""The image in a real machine: what a guest says and does from its first boot to its second power-off."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from instar.images.guest import GuestImage
from tests.guest_image.qemu_machine import QemuMachine, make_config_drive
from tests.patience import patience

INSTANCE = "6f70656e-7374-4163-8b00-000000000001"
USER_DATA = """\
#!/bin/sh
echo "USER-SAYS $(ip -4 -o addr show eth0 | grep -c 10.0.2.15) on $(hostname)"
exit 7
"""


@pytest.mark.guest
@pytest.mark.slow
def test_guest_lives_through_two_boots(built_image: GuestImage, tmp_path: Path) -> None:
    assert built_image.size_bytes <= 30 * 2**20
    disk = tmp_path / "disk.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(built_image.path), str(disk), "1G"]
    subprocess.run(create, check=True)
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    metadata: dict[str, object] = {
        "uuid": INSTANCE,
        "hostname": "web-1.novalocal",
        "public_keys": {"mine": key.with_suffix(".pub").read_text()},
        "meta": {"console_shell": "0"},
    }
    drive = make_config_drive(tmp_path, metadata, USER_DATA)
    as_disk = ("-drive", f"file={drive},if=none,id=c,format=raw,readonly=on", "-device", "virtio-blk-pci,drive=c")
    as_cdrom = (
        *("-drive", f"file={drive},if=none,id=c,format=raw,readonly=on,media=cdrom"),
        *("-device", "virtio-scsi-pci", "-device", "scsi-cd,drive=c"),
    )
    with QemuMachine(tmp_path, disk, *as_disk) as machine:
        machine.wait_for_line(rf"INSTAR-BOOT count=1 uuid={INSTANCE} hostname=web-1")
        machine.wait_for_line(r"INSTAR-NET eth0 address=10\.0\.2\.15/24 mac=52:54:00:00:00:00")
        machine.wait_for_line(r"INSTAR-READY count=1 uptime_s=\d+\.\d+")
        machine.wait_for_line(r"USER-SAYS 1 on web-1")
        machine.wait_for_line(r"INSTAR-USER-DATA exit=7")
        check_ssh(machine, key)
        check_nic_hot_plug(machine)
        assert machine.power_button() < 10 * patience()
    with QemuMachine(tmp_path, disk, *as_cdrom) as machine:
        machine.wait_for_line(rf"INSTAR-BOOT count=2 uuid={INSTANCE} hostname=web-1")
        machine.wait_for_line(r"INSTAR-READY count=2 uptime_s=\d+\.\d+")
        assert machine.power_button() < 10 * patience()
        assert "USER-SAYS" not in machine.console.read_text(), "user data ran again for the same instance"
    subprocess.run(["qemu-img", "check", "-q", str(disk)], check=True)


def check_ssh(machine: QemuMachine, key: Path) -> None:
    """The key of the metadata opens the door; inside, the disk has grown and a lease's routes are obeyed."""
    if shutil.which("ssh") is None:
        with socket.create_connection(("127.0.0.1", machine.ssh_port), timeout=200) as connection:
            assert connection.recv(20).startswith(b"SSH-2.0-dropbear")
        return
    kilobytes = int(in_guest(machine, key, "df -k / | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2").split()[-1])
    assert kilobytes > 900_000, "the root file system did not grow to the disk's 1 GiB"
    lease = "interface=eth0 ip=10.0.2.15 mask=24 router=10.0.2.9 mtu=1400 dns=10.0.2.3 domain=example.test"
    routes = "'169.254.169.254/32 10.0.2.2 0.0.0.0/0 10.0.2.2 192.0.2.0/24 0.0.0.0'"
    said = in_guest(
        machine,
        key,
        f"{lease} staticroutes={routes} /lib/instar/dhcp renew; ip route; cat /etc/resolv.conf /sys/class/net/eth0/mtu",
    )
    assert "169.254.169.254 via 10.0.2.2 dev eth0" in said
    assert "192.0.2.0/24 dev eth0" in said
    assert "10.0.2.9" not in said, "option 3 counts for nothing beside option 121"
    assert "search example.test\nnameserver 10.0.2.3\n1400" in said


def in_guest(machine: QemuMachine, key: Path, command: str) -> str:
    options = [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        "BatchMode=yes",
    ]
    flags = [part for option in options for part in ("-o", option)]
    target = ["-i", str(key), "-p", str(machine.ssh_port), "root@127.0.0.1"]
    client = ["ssh", *flags, *target, command]
    finished = subprocess.run(client, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def check_nic_hot_plug(machine: QemuMachine) -> None:
    machine.execute("netdev_add", type="user", id="late", net="10.9.0.0/24")
    device = {"driver": "virtio-net-pci", "netdev": "late", "bus": "port0", "mac": "52:54:00:00:00:99"}
    machine.execute("device_add", id="late-nic", **device)
    machine.wait_for_line(r"INSTAR-NET eth1 address=10\.9\.0\.15/24 mac=52:54:00:00:00:99", timeout_s=20)
