"""What is left of a cloud of many processes on this machine, and its end."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from instar.cli.hosts.local_hosts import remove_local_hosts
from instar.cli.servers.postgresql import PrivatePostgresql
from instar.cli.servers.rabbitmq import PrivateRabbitMq
from instar.cli.state_dir import StateDir
from instar.errors import StartupError
from instar.volumes.local import remove_exports


def remove_local_cloud(directory: Path, *, delete: bool) -> None:
    """Nothing of it runs; with `delete` nothing of it is left. Raises StartupError where it runs, or is no such cloud."""
    if not (directory / "cloud-id").exists() or not (directory / "postgresql").is_dir():
        raise StartupError(f"{directory} is not the directory of a cloud of many processes.")
    state = StateDir(directory)
    state.lock()
    try:
        if state.hosts.is_dir():
            asyncio.run(remove_local_hosts(state.cloud_id, state.hosts))
            shutil.rmtree(state.hosts)
        remove_exports(state.path)  # its guests are gone: nobody reads their volumes any more
        for server in (PrivateRabbitMq(directory / "rabbitmq"), PrivatePostgresql(directory / "postgresql")):
            if server.pid is not None:
                server.stop()
        if delete:
            shutil.rmtree(directory)
    finally:
        state.unlock()
