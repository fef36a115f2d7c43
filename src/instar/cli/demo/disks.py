"""Chapter of what is plugged in and copied: a snapshot, a volume, a second network interface."""

from __future__ import annotations

from instar.cli.demo.guest import DemoFailed
from instar.cli.demo.stage import OPERATION_DEADLINE_S, POLL_S, Stage, wait_until

PLUG_DEADLINE_S = 30.0
VOLUME_GIB = 1
WRITTEN = "kept on a volume"


def create_image(stage: Stage) -> str:
    before = stage.life()
    with stage.operation("createImage"):
        stage.image_id = stage.user.compute.create_server_image(stage.server_id, "demo snapshot").id
        stage.settled("ACTIVE")
    image = stage.user.image.get_image(stage.image_id)
    if image.status != "active":
        raise DemoFailed(f"The image is {image.status}.")
    stage.image_boots, stage.image_letter = stage.boots, stage.letter
    return f"{image.size / (1 << 20):.0f} MiB of the running guest; {stage.check_alive(before)}"


def attach_volume(stage: Stage) -> str:
    """A new volume, seen by the running guest, which writes on it."""
    volume = stage.user.block_storage.create_volume(size=VOLUME_GIB, name="demo")
    stage.volume_id = volume.id
    stage.user.block_storage.wait_for_status(volume, "available", interval=POLL_S, wait=OPERATION_DEADLINE_S)
    device = _attach(stage)
    stage.run(f"echo '{WRITTEN}' | dd of={device} conv=notrunc 2> /dev/null; sync")
    return f"{device} in the guest, {_size_mib(stage, device)} MiB; something was written on it"


def attach_volume_again(stage: Stage) -> str:
    """It goes with the server from now on, to its end."""
    device = _attach(stage, delete_on_termination=True)
    check_volume(stage, device)
    return f"{device} in the guest, on {stage.host} now; what was written on it is there"


def _attach(stage: Stage, **wanted: object) -> str:
    """The path of the volume in the guest."""
    with stage.operation("attach_volume"):
        attachment = stage.user.compute.create_volume_attachment(stage.server_id, stage.volume_id, **wanted)
        _wait_for_volume(stage, "in-use")
    device = str(attachment.device)
    wait_until(lambda: _is_there(stage, device), PLUG_DEADLINE_S, f"The guest did not see {device}")
    return device


def detach_volume(stage: Stage) -> str:
    (attachment,) = stage.user.compute.volume_attachments(stage.server_id)
    with stage.operation("detach_volume"):
        stage.user.compute.delete_volume_attachment(stage.server_id, stage.volume_id)
        _wait_for_volume(stage, "available")
    if _is_there(stage, attachment.device):
        raise DemoFailed(f"The volume is detached, but the guest still sees {attachment.device}.")
    return "gone from the guest"


def check_volume(stage: Stage, device: str) -> None:
    read = stage.run(f"head -c {len(WRITTEN)} {device}")
    if read != WRITTEN:
        raise DemoFailed(f"The guest reads {read!r} from its volume, and {WRITTEN!r} was written on it.")


def attached_device(stage: Stage) -> str:
    (attachment,) = stage.user.compute.volume_attachments(stage.server_id)
    return str(attachment.device)


def attach_interface(stage: Stage) -> str:
    network = stage.user.network.find_network("private", ignore_missing=False)
    with stage.operation("attach_interface"):
        port = stage.user.compute.create_server_interface(stage.server_id, net_id=network.id)
    stage.port_id = port.port_id
    address = port.fixed_ips[0]["ip_address"]
    wait_until(lambda: f"{address}/" in stage.run("ip -4 addr"), PLUG_DEADLINE_S, f"The guest did not get {address}")
    return f"the guest has {address} by DHCP on a second interface"


def detach_interface(stage: Stage) -> str:
    with stage.operation("detach_interface"):
        stage.user.compute.delete_server_interface(stage.port_id, stage.server_id)
        wait_until(lambda: len(stage.domain.nics()) == 1, PLUG_DEADLINE_S, "The second interface was not removed")
    if "eth1" in stage.run("ls /sys/class/net"):
        raise DemoFailed("The interface is detached, but the guest still sees it.")
    stage.wait_for_ping()
    return "gone from the guest; its first one answers ping"


def _wait_for_volume(stage: Stage, status: str) -> None:
    volume = stage.user.block_storage.get_volume(stage.volume_id)
    stage.user.block_storage.wait_for_status(volume, status, interval=POLL_S, wait=OPERATION_DEADLINE_S)


def _is_there(stage: Stage, device: str) -> bool:
    return stage.run(f"[ -b {device} ] && echo yes || echo no") == "yes"


def _size_mib(stage: Stage, device: str) -> int:
    sectors = stage.run(f"cat /sys/class/block/{device.removeprefix('/dev/')}/size")
    return int(sectors) // 2048
