"""`instar cloud init`: what a cloud of many processes has once, made before any of them starts. May be run again."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager

from instar.bus.memory import MemoryBus
from instar.cli.backends import open_patiently, open_store
from instar.cli.clouds_yaml import write_clouds
from instar.cli.first_start import ensure_first_resources, ensure_first_users, expected_url, mark_initialised
from instar.cli.services import Services
from instar.cli.state_dir import StateDir
from instar.config import Settings
from instar.errors import StartupError
from instar.identity.local import LocalIdentity
from instar.store.flavors import bootstrap_flavors


async def init_cloud(state: StateDir, settings: Settings, *, progress: Callable[[str], None]) -> None:
    """Waits for a database that is away. Raises StartupError."""
    with _alone(state):
        async with AsyncExitStack() as stack:
            store = open_store(settings, application="instar cloud init")
            await open_patiently(store.open, "the database")
            stack.push_async_callback(store.close)
            await bootstrap_flavors(store)
            # Nothing here has to do with hosts or volumes: nobody is on this bus.
            services = Services(state, settings, store, MemoryBus(), storage_patience_s=0)
            await services.images.open()
            stack.push_async_callback(services.images.close)
            await ensure_first_resources(services, state, progress)
            identity = LocalIdentity(store, settings, state.path)
            await identity.start()
            stack.push_async_callback(identity.close)
            passwords = await ensure_first_users(identity, state, settings, progress)
            if passwords is not None:
                url = expected_url(settings)
                await asyncio.to_thread(write_clouds, state.clouds_yaml, url, settings.region, passwords)
            await mark_initialised(store)


@contextmanager
def _alone(state: StateDir) -> Iterator[None]:
    """One at a time in a directory. Raises StartupError."""
    with (state.path / "init.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartupError(f"Another `instar cloud init` runs on {state.path}.") from None
        yield
