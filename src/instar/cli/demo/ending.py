"""Last chapter: what is on record, the end of the server, and whether anything is left of it."""

from __future__ import annotations

from instar.cli.demo.guest import DemoFailed
from instar.cli.demo.stage import OPERATION_DEADLINE_S, POLL_S, Stage, wait_until

CLEAN_DEADLINE_S = 30.0


def events(stage: Stage) -> str:
    with stage.timed():
        actions = [one.action for one in stage.user.compute.server_actions(stage.server_id)]
    if sorted(actions) != sorted(stage.actions):
        raise DemoFailed(f"The server's actions are {actions}, not {stage.actions[::-1]}.")
    return f"{len(actions)} actions, each with its steps: {', '.join(dict.fromkeys(stage.actions))}"


def delete(stage: Stage) -> str:
    host = stage.host
    with stage.operation("delete"):
        stage.user.compute.delete_server(stage.server_id)
        server = stage.user.compute.get_server(stage.server_id) if _is_there(stage) else None
        if server is not None:
            stage.user.compute.wait_for_delete(server, interval=POLL_S, wait=OPERATION_DEADLINE_S)
    if stage.places.domain(host, stage.server_id).running_id() is not None:
        raise DemoFailed("The server is deleted, but its domain runs.")
    if not stage.volume_id:
        return "server and domain are gone"
    wait_until(lambda: not list(stage.user.block_storage.volumes()), CLEAN_DEADLINE_S, "The volume was not deleted")
    return "server, domain and volume are gone"


def _is_there(stage: Stage) -> bool:
    return any(server.id == stage.server_id for server in stage.user.compute.servers(details=False))


def audit(stage: Stage) -> str:
    """Nothing on the hosts or in the records is without an owner."""
    if stage.image_id:
        stage.user.image.delete_image(stage.image_id)
    with stage.timed():
        wait_until(lambda: not stage.audit(), CLEAN_DEADLINE_S, f"The audit did not become clean: {stage.audit()}")
    images = [image.name for image in stage.user.image.images()]
    if images != ["tiny"]:
        raise DemoFailed(f"The images {images} are there, and there was only tiny.")
    return "guests, disks, taps, ports, claims, volumes, quotas: nothing is without an owner"
