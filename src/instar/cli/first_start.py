"""What a cloud is given at its first start: a network, flavors, an image, users with generated passwords.

Called at each start of an embedded cloud, and by `instar cloud init`; what was made before stays as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from instar.cli.clouds_yaml import Passwords, read_passwords, write_clouds
from instar.cli.guest_image import ensure_tiny
from instar.cli.services import Services
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.errors import StartupError
from instar.hypervisor.linux_network.links import host_routes
from instar.identity.bootstrap import bootstrap, is_bootstrapped, new_password
from instar.identity.local import LocalIdentity
from instar.networks.addresses import pick_free_cidr
from instar.store.cloud_facts import cloud_fact, cloud_fact_set
from instar.store.contract import Store

INITIALISED = "initialised"


async def ensure_first_resources(services: Services, state: StateDir, progress: Callable[[str], None]) -> None:
    """The network `private` and the image `tiny`, in `services` that are open."""
    await services.networks.bootstrap(await _free_cidr(state, services.settings))
    await ensure_tiny(services.store, services.images, progress)


async def ensure_first_users(
    identity: LocalIdentity, state: StateDir, settings: Settings, progress: Callable[[str], None]
) -> Passwords | None:
    """None: clouds.yaml is gone, and nobody knows the passwords any more.

    Passwords are written down before they are in force: a crash between the two costs nobody the cloud."""
    passwords = await asyncio.to_thread(read_passwords, state.clouds_yaml)
    if passwords is None:
        if await is_bootstrapped(identity):
            progress(f"{state.clouds_yaml} is gone: put it back, nobody else knows its passwords")
            return None
        passwords = Passwords(new_password(), new_password())
        await asyncio.to_thread(write_clouds, state.clouds_yaml, expected_url(settings), settings.region, passwords)
    await bootstrap(identity, admin_password=passwords.admin, demo_password=passwords.demo)
    return passwords


def expected_url(settings: Settings) -> str:
    """Where clients reach the cloud, unless its port is any free one."""
    return settings.api.public_url or f"http://{settings.api.host}:{settings.api.port}"


async def mark_initialised(store: Store) -> None:
    """Processes may start on this database from now on, and no cloud of one process any more."""
    await cloud_fact_set(store, "directory", "of many processes")
    await cloud_fact_set(store, INITIALISED, "yes")


async def check_initialised(store: Store) -> None:
    """Raises StartupError where `instar cloud init` was not run to its end."""
    if await cloud_fact(store, INITIALISED) is None:
        raise StartupError("The database was not prepared for this cloud: run `instar cloud init` with the same --config.")


async def _free_cidr(state: StateDir, settings: Settings) -> str:
    """A /24 for the first network; where it is real, one that no route of this machine has."""
    routes = await host_routes() if settings.hypervisor == "libvirt" else []
    return pick_free_cidr([str(route.destination) for route in routes], seed=state.cloud_id)
