"""Chapter of what goes wrong and is put right: damage, rescue, rebuild, and a host that is lost."""

from __future__ import annotations

from instar.cli.demo import disks
from instar.cli.demo.guest import DemoFailed
from instar.cli.demo.power import check_restarted
from instar.cli.demo.stage import Stage, wait_until

DOWN_DEADLINE_S, UP_DEADLINE_S, CLEAN_DEADLINE_S = 60.0, 60.0, 60.0
NIC_DEADLINE_S = 30.0
REPAIRED = "repaired by the rescue system"


def hard_reboot(stage: Stage) -> str:
    before = stage.domain.running_id()
    stage.domain.remove_nics(deadline_s=NIC_DEADLINE_S)
    if stage.places.answers_ping(stage.host, stage.address):
        raise DemoFailed("The guest answers ping without a NIC.")
    stage.say("removed the NIC from the running domain, behind the cloud's back: no ping any more")
    with stage.operation("reboot"):
        stage.user.compute.reboot_server(stage.server_id, "HARD")
        stage.settled("ACTIVE")
    nics = stage.domain.nics()
    if len(nics) != 1:
        raise DemoFailed(f"The domain has {len(nics)} NICs after the hard reboot.")
    return f"the NIC is back, {check_restarted(stage, before)}"


def rescue(stage: Stage) -> str:
    """With the default image, which is the server's own; its disk is mounted and repaired from there."""
    own = stage.boots
    with stage.operation("rescue"):
        stage.user.compute.rescue_server(stage.server_id)
        stage.settled("RESCUE")
    stage.wait_for_boot(1)
    stage.boots = own
    stage.run("mount /dev/vdb1 /mnt")
    stage.check_letter("/mnt/root/letter")
    stage.run(f"echo '{REPAIRED}' > /mnt/root/letter; umount /mnt; sync")
    stage.letter = REPAIRED
    return "a fresh system runs, the server's own disk is its second: its file was read, and repaired"


def unrescue(stage: Stage) -> str:
    with stage.operation("unrescue"):
        stage.user.compute.unrescue_server(stage.server_id)
        stage.settled("ACTIVE")
    booted = stage.wait_for_boot()
    stage.check_letter()
    return f"its own disk again, with what was repaired, {booted}"


def rebuild(stage: Stage) -> str:
    """Of the snapshot: the guest has what it had then."""
    address = stage.address
    with stage.operation("rebuild"):
        stage.user.compute.rebuild_server(stage.server_id, stage.image_id, name="demo")
        server = stage.settled("ACTIVE")
    if (now := next(iter(server.addresses.values()))[0]["addr"]) != address:
        raise DemoFailed(f"The rebuilt server has {now}, and had {address}.")
    booted = stage.wait_for_boot(stage.image_boots + 1)
    stage.letter = stage.image_letter
    stage.check_letter()
    return f"the disk is that of the snapshot, its file is what it was then, {booted}"


def lose_host(stage: Stage) -> str:
    """Not the cloud's doing: its host's plug is pulled."""
    stage.write_letter("written after the snapshot")
    stage.left_host = stage.host
    with stage.timed():
        stage.places.local(stage.left_host).power_off()
        wait_until(lambda: not _is_up(stage, stage.left_host), DOWN_DEADLINE_S, f"{stage.left_host} did not go down")
    return f"{stage.left_host} is down, and its guest with it"


def evacuate(stage: Stage) -> str:
    """As the API of today has it, an evacuated server is stopped, for its user to start."""
    with stage.operation("evacuate"):
        stage.admin.compute.evacuate_server(stage.server_id)
        stage.settled("SHUTOFF")
    if stage.host == stage.left_host:
        raise DemoFailed(f"The server is still on {stage.left_host}.")
    return f"{stage.left_host} → {stage.host}: a new disk of its image"


def start_evacuated(stage: Stage) -> str:
    with stage.operation("start"):
        stage.user.compute.start_server(stage.server_id)
        stage.settled("ACTIVE")
    booted = stage.wait_for_boot(stage.image_boots + 1)
    stage.letter = stage.image_letter
    stage.check_letter()
    disks.check_volume(stage, disks.attached_device(stage))
    return f"same address and volume; what its image and its volume have is there, {booted}"


def host_returns(stage: Stage) -> str:
    """Its leftovers are removed, never the new guest."""
    running = stage.domain.running_id()
    left = stage.places.instance_dir(stage.left_host, stage.server_id)
    if not left.exists():
        raise DemoFailed(f"{left} is not there: there is nothing to remove.")
    with stage.timed():
        stage.places.local(stage.left_host).power_on()
        wait_until(lambda: _is_up(stage, stage.left_host), UP_DEADLINE_S, f"{stage.left_host} did not come back")
        wait_until(lambda: not left.exists(), CLEAN_DEADLINE_S, f"{left} was not removed")
    old = stage.places.domain(stage.left_host, stage.server_id).running_id()
    if stage.domain.running_id() != running or old is not None:
        raise DemoFailed("The guest does not run where it should, and there alone.")
    return f"the old guest's disk on {stage.left_host} is removed, the new guest on {stage.host} goes on"


def _is_up(stage: Stage, host: str) -> bool:
    services = stage.admin.compute.services(host=host, binary="nova-compute")
    return any(service.state == "up" for service in services)
