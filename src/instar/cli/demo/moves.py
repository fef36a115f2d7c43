"""Chapter of the sizes and the hosts: resize, migrate, live migration, shelve."""

from __future__ import annotations

from itertools import pairwise

from instar.cli.demo import disks
from instar.cli.demo.guest import DemoFailed
from instar.cli.demo.stage import Stage

BIGGER, BIGGEST = "demo.bigger", "demo.biggest"
FLAVORS = {BIGGER: (160, 2), BIGGEST: (192, 3)}  # memory in MiB, root disk in GiB
GAP_MAX_S = 1.0


def make_flavors(stage: Stage) -> None:
    """By the admin, beforehand: no operation on the server."""
    for name, (memory_mib, root_gib) in FLAVORS.items():
        stage.admin.compute.create_flavor(name=name, vcpus=1, ram=memory_mib, disk=root_gib)


def resize(stage: Stage) -> str:
    """Up, to a bigger root disk."""
    make_flavors(stage)
    host, before = stage.host, _disk_mib(stage)
    _resize(stage, BIGGER)
    booted = stage.wait_for_boot()
    now = _disk_mib(stage)
    if now <= before:
        raise DemoFailed(f"The guest's root file system has {now} MiB, and had {before} before.")
    stage.check_letter()
    return f"{host} → {stage.host}, root file system {before} → {now} MiB, its file is there, {booted}"


def confirm_resize(stage: Stage) -> str:
    return _confirm(stage, "ACTIVE")


def resize_stopped(stage: Stage) -> str:
    """To be reverted. The guest does not run: its data are looked at when it is started, after the migration."""
    _resize(stage, BIGGEST)
    return "the stopped server has the biggest size"


def revert_resize(stage: Stage) -> str:
    with stage.operation("revertResize"):
        stage.user.compute.revert_server_resize(stage.server_id)
        server = stage.settled("SHUTOFF", "VERIFY_RESIZE")
    if server.flavor.original_name != BIGGER:
        raise DemoFailed(f"The server has the flavor {server.flavor.original_name} after the revert, not {BIGGER}.")
    return f"{BIGGER} again"


def migrate(stage: Stage) -> str:
    before = stage.host
    with stage.operation("migrate"):
        stage.admin.compute.migrate_server(stage.server_id, host=stage.places.other(before))
        stage.settled("VERIFY_RESIZE")
    stage.moved(before, stage.places.other(before))
    return f"{before} → {stage.host}, without ssh between them"


def confirm_migration(stage: Stage) -> str:
    left = stage.places.other(stage.host)
    remark = _confirm(stage, "SHUTOFF")
    if (found := stage.places.instance_dir(left, stage.server_id)).exists():
        raise DemoFailed(f"{found} is still there after the migration was confirmed.")
    return remark + f", nothing of it is left on {left}"


def live_migrate(stage: Stage) -> str:
    stage.start_counting()
    before, life = stage.host, stage.life()
    with stage.places.pinging(before, stage.address) as moments:
        with stage.operation("live-migration"):
            stage.admin.compute.live_migrate_server(
                stage.server_id, host=stage.places.other(before), block_migration="auto"
            )
            stage.settled("ACTIVE")
        stage.wait_for_ping()
    stage.moved(before, stage.places.other(before))
    gap_s = max(later - earlier for earlier, later in pairwise(moments))
    if gap_s > GAP_MAX_S:
        raise DemoFailed(f"No ping was answered for {gap_s:.2f} s, allowed are {GAP_MAX_S:g} s.")
    alive = stage.check_alive(life)
    disks.check_volume(stage, disks.attached_device(stage))
    return f"{before} → {stage.host}; {alive}; longest time without an answer to ping: {gap_s * 1000:.0f} ms"


def shelve(stage: Stage) -> str:
    before = stage.host
    with stage.operation("shelve"):
        stage.user.compute.shelve_server(stage.server_id)
        stage.settled("SHELVED_OFFLOADED", "SHELVED")
    if (found := stage.places.instance_dir(before, stage.server_id)).exists():
        raise DemoFailed(f"{found} is still there after the server was offloaded.")
    stage.left_host = before
    return f"an image, and nothing on {before} any more; the address and the volume stay its own"


def unshelve(stage: Stage) -> str:
    wanted = stage.places.other(stage.left_host)
    address = stage.address
    with stage.operation("unshelve"):
        stage.admin.compute.unshelve_server(stage.server_id, host=wanted)
        server = stage.settled("ACTIVE")
    stage.diagram("unshelve")
    if stage.host != wanted or (now := next(iter(server.addresses.values()))[0]["addr"]) != address:
        raise DemoFailed(f"The server is on {stage.host} with {server.addresses}, and not on {wanted} with {address}.")
    booted = stage.wait_for_boot()
    stage.check_letter()
    disks.check_volume(stage, disks.attached_device(stage))
    return f"on {stage.host} with {now} and its volume, its file is there, {booted}"


def _resize(stage: Stage, flavor: str) -> None:
    found = stage.user.compute.find_flavor(flavor, ignore_missing=False)
    with stage.operation("resize"):
        stage.user.compute.resize_server(stage.server_id, found)
        stage.settled("VERIFY_RESIZE")


def _confirm(stage: Stage, status: str) -> str:
    with stage.operation("confirmResize"):
        stage.user.compute.confirm_server_resize(stage.server_id)
        stage.settled(status, "VERIFY_RESIZE")
    return f"{status} on {stage.host}"


def _disk_mib(stage: Stage) -> int:
    """Of the root file system, as the guest has it."""
    return int(stage.run("df -m / | awk 'NR == 2 { print $2 }'"))
