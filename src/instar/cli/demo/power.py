"""First chapter: the server comes into being, and its power: reboot, pause, suspend, stop, start."""

from __future__ import annotations

from openstack.exceptions import ConflictException

from instar.cli.demo.guest import DemoFailed
from instar.cli.demo.stage import Stage

IMAGE, FLAVOR, NETWORK = "tiny", "m1.nano", "private"


def create(stage: Stage) -> str:
    network = stage.user.network.find_network(NETWORK, ignore_missing=False)
    image = stage.user.image.find_image(IMAGE, ignore_missing=False)
    flavor = stage.user.compute.find_flavor(FLAVOR, ignore_missing=False)
    _let_pings_in(stage)
    with stage.operation("create"):
        server = stage.user.compute.create_server(
            name="demo", image_id=image.id, flavor_id=flavor.id, networks=[{"uuid": network.id}], config_drive=True,
            metadata={"console_shell": "1"},
        )  # fmt: skip
        stage.server_id = server.id
        stage.cloud.footprint.instance_ids.add(server.id)
        server = stage.settled("ACTIVE")
    stage.address = next(iter(server.addresses.values()))[0]["addr"]
    stage.cloud.footprint.taps.update(stage.domain.nics())
    stage.diagram("create")
    stage.wait_for_boot()
    return f"{stage.address} on {stage.host} is on the guest's console and answers ping"


def _let_pings_in(stage: Stage) -> None:
    """The default security group lets nothing in from outside."""
    project = stage.user.current_project_id
    group = next(iter(stage.user.network.security_groups(name="default", project_id=project)))
    try:
        stage.user.network.create_security_group_rule(
            security_group_id=group.id, direction="ingress", ethertype="IPv4", protocol="icmp"
        )
    except ConflictException:
        return


def write(stage: Stage) -> str:
    """No operation of the cloud: what the guest keeps on its disk, and is asked for again after what follows."""
    with stage.timed():
        stage.write_letter("dear future self")
    return "a file on its disk, written by its own shell on the serial console"


def soft_reboot(stage: Stage) -> str:
    before = stage.domain.running_id()
    with stage.operation("reboot"):
        stage.user.compute.reboot_server(stage.server_id, "SOFT")
        stage.settled("ACTIVE")
    return check_restarted(stage, before)


def check_restarted(stage: Stage, before: int | None) -> str:
    """The guest itself restarted: another domain id, and the counter on its disk went up by one."""
    after = stage.domain.running_id()
    if after is None or after == before:
        raise DemoFailed(f"The domain id is {after}, and was {before} before the reboot.")
    return f"domain id {before} → {after}, {stage.wait_for_boot()}"


def pause(stage: Stage) -> str:
    stage.start_counting()
    with stage.operation("pause"):
        stage.user.compute.pause_server(stage.server_id)
        stage.settled("PAUSED")
    if stage.places.answers_ping(stage.host, stage.address):
        raise DemoFailed("The guest is paused and answers ping.")
    return "its processors stand still: no ping"


def unpause(stage: Stage) -> str:
    with stage.operation("unpause"):
        stage.user.compute.unpause_server(stage.server_id)
        stage.settled("ACTIVE")
    stage.wait_for_ping()
    return "answers ping again"


def suspend(stage: Stage) -> str:
    stage.before = stage.life()
    with stage.operation("suspend"):
        stage.user.compute.suspend_server(stage.server_id)
        stage.settled("SUSPENDED")
    if (running := stage.domain.running_id()) is not None:
        raise DemoFailed(f"The server is suspended, but its domain runs as {running}.")
    return "its memory is on the disk, its domain does not run"


def resume(stage: Stage) -> str:
    with stage.operation("resume"):
        stage.user.compute.resume_server(stage.server_id)
        stage.settled("ACTIVE")
    stage.wait_for_ping()
    return stage.check_alive(stage.before)


def change_password(stage: Stage) -> str:
    shown = "sed -n 's/^root:\\([^:]*\\):.*/\\1/p' /etc/shadow"
    before = stage.run(shown)
    with stage.operation("changePassword"):
        stage.user.compute.change_server_password(stage.server_id, "new for the demo")
        stage.settled("ACTIVE")
    if stage.run(shown) == before:
        raise DemoFailed("The guest's root has the password of before.")
    return "root has another hash in the guest's /etc/shadow"


def stop(stage: Stage) -> str:
    with stage.operation("stop"):
        stage.user.compute.stop_server(stage.server_id)
        stage.settled("SHUTOFF")
    if (running := stage.domain.running_id()) is not None:
        raise DemoFailed(f"The server is SHUTOFF, but its domain runs as {running}.")
    return "the guest shut down, its domain does not run"


def start(stage: Stage) -> str:
    with stage.operation("start"):
        stage.user.compute.start_server(stage.server_id)
        stage.settled("ACTIVE")
    return f"{stage.wait_for_boot()}, answers ping"


def start_with_data(stage: Stage) -> str:
    """The first boot after what was done to the stopped server."""
    remark = start(stage)
    stage.check_letter()
    return f"its file is there, {remark}"


def console_log(stage: Stage) -> str:
    with stage.timed():
        log = stage.console()
    last = [line.strip() for line in log.splitlines() if line.startswith("INSTAR-")][-1]
    return f"{len(log.splitlines())} lines, the last of the guest's own: {last}"


def lock(stage: Stage) -> str:
    with stage.operation("lock", "unlock"):
        stage.user.compute.lock_server(stage.server_id)
        try:
            stage.user.compute.stop_server(stage.server_id)
        except ConflictException:
            stage.user.compute.unlock_server(stage.server_id)
        else:
            raise DemoFailed("A locked server could be stopped.")
    return "stop is refused with 409 while it is locked"
