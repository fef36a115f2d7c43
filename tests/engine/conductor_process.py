"""A conductor in a process of its own, for tests that stop it, kill it, and let it go on.

`python -m tests.engine.conductor_process DIRECTORY DATABASE LEASE_S`: works on the bus socket in DIRECTORY, or on RabbitMQ
where the test does. Prints its id when it works, and when it has another; ends cleanly with SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import msgspec

from instar.bus.opening import bus_of as opened_bus
from instar.bus.socket import SocketBus
from instar.cli.conductor_part import ConductorPart
from instar.cli.log_format import configure_log
from instar.cli.services import Services
from instar.cli.state_dir import StateDir
from instar.config import EngineSettings, HostSettings, LifecycleSettings, QuotaSettings, Settings, SimulatedSettings
from instar.store.postgresql import PostgresqlStore
from tests.postgresql_server import PATIENT
from tests.rabbitmq_server import bus_of

SETTINGS = Settings(
    hypervisor="simulated",
    host=HostSettings(heartbeat_s=0.5, down_after_s=8),
    lifecycle=LifecycleSettings(shutdown_grace_s=1),
    simulated=SimulatedSettings(hosts=4, spawn_s=0.3, destroy_s=0.1),
    quota=QuotaSettings(instances=-1, cores=-1, ram=-1),
)
NAME_LOOKED_AT_S = 0.1


def settings_of(lease_s: float, directory: Path) -> Settings:
    engine = EngineSettings(lease_s=lease_s, poll_s=min(2.0, lease_s / 3), step_deadline_s=90)
    return msgspec.structs.replace(SETTINGS, engine=engine, bus=bus_of(directory))


async def main(directory: Path, database: str, lease_s: float) -> None:
    configure_log("json", "info")
    settings, state = settings_of(lease_s, directory), StateDir(directory)
    store = PostgresqlStore(database, PATIENT)
    bus = opened_bus(settings, name="conductor") if settings.bus else SocketBus(state.bus_socket)
    await store.open()
    await bus.open()
    services = Services(state, settings, store, bus, storage_patience_s=10)
    await services.open()
    part = ConductorPart(services, alone=False)
    await part.kept.open()
    await part.conductor.open()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    told = ""
    while not stop.is_set():
        if part.conductor.id != told:
            told = part.conductor.id
            print(f"ready {told}", flush=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NAME_LOOKED_AT_S):
                await stop.wait()
    for opened in (part.conductor, part.kept, services, bus, store):
        await opened.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
