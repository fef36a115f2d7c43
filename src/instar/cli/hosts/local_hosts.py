"""All hosts that this machine plays for one cloud, each with its agent as a process: started, watched, ended.

`ControlPlane` opens it in the place of hypervisors of its own. Agents that die are started again, and so are hosts that
were not switched off; agents end with this process, however it ends, guests and their libvirtd go on.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import structlog

from instar.bus.contract import Bus
from instar.bus.socket_server import BusServer
from instar.cli.hosts.agent_process import agent_command
from instar.cli.hosts.local_host import LocalHost, check_machine, local_hosts_of
from instar.cli.hosts.underlay import HOSTS_MAX, Underlay
from instar.cli.state_dir import MODE, StateDir
from instar.config import Settings
from instar.engine.hosts import HostClient
from instar.errors import InstarError, StartupError
from instar.scheduling.host_table import HostTable
from instar.settings_reading import environment_of

log = structlog.get_logger()

FIRST_REPORT_MAX_S = 60.0
AGENT_STOP_MAX_S = 15.0
RETRY_FIRST_S, RETRY_MAX_S = 0.2, 10.0
LIVED_WELL_S = 30.0  # an agent that ran so long before it ended is started again at once
OFF_POLL_S = 0.5
CENSUS_DEADLINE_S = 10.0


class LocalHosts:
    """`count` hosts, host-1 and on. `log_format` is that of the agents, who write where this process does."""

    def __init__(
        self, state: StateDir, settings: Settings, bus: Bus, table: HostTable, *, count: int, log_format: str
    ) -> None:
        if not 1 <= count <= HOSTS_MAX:
            raise StartupError(f"This machine plays 1 to {HOSTS_MAX} hosts, not {count}.")
        self._state = state
        self._settings = settings
        self._bus = bus
        self._table = table
        self._log_format = log_format
        self._underlay = Underlay(state.cloud_id, state.hosts / "underlay")
        self._hosts = [LocalHost(state.hosts, f"host-{number}") for number in range(1, count + 1)]
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._plugging = asyncio.Lock()
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        """Every host is up and has reported, or is switched off, or had its time. Raises StartupError; what was started is
        ended again then."""
        check_machine()
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _open(self) -> None:
        self._state.hosts.mkdir(mode=MODE, exist_ok=True)
        await self._underlay.ensure()  # here too, where it may end the start
        server = BusServer(self._bus, self._state.bus_socket)
        await server.open()
        self._stack.push_async_callback(server.close)
        reported = asyncio.Event()
        self._table.watch(lambda _: reported.set())
        for number, host in enumerate(self._hosts, 1):
            keeper = asyncio.create_task(self._keep(host, number), name=f"host {host.name}")
            self._stack.push_async_callback(self._end, host, keeper)
        try:
            async with asyncio.timeout(FIRST_REPORT_MAX_S):
                while missing := await self._silent():
                    reported.clear()
                    await reported.wait()
        except TimeoutError:
            log.warning("host.not_reported", hosts=missing, waited_s=FIRST_REPORT_MAX_S)
        await self._table.persist_new()  # from the first request on they can be named, and chosen

    async def close(self) -> None:
        """Agents end, and hosts that have no guests; the others go on."""
        idle = [host for host in self._hosts if not await self._has_guests(host)]
        await self._stack.aclose()
        for host in idle:
            await asyncio.to_thread(host.rest)
        if not any(await asyncio.to_thread(_are_up, self._hosts)):
            await self._underlay.remove()

    async def _silent(self) -> list[str]:
        off = await asyncio.to_thread(lambda: {host.name for host in self._hosts if host.is_off})
        return [host.name for host in self._hosts if host.name not in off and not self._table.is_up(host.name)]

    async def _has_guests(self, host: LocalHost) -> bool:
        """While its agent can be asked; one that cannot may have some."""
        try:
            census = await HostClient(self._bus, deadline_s=CENSUS_DEADLINE_S).census(host.name)
        except InstarError:
            return True
        return any(state.domain_id is not None for state in census.guests.values())

    # --- one host ---------------------------------------------------------------------------------------------------

    async def _keep(self, host: LocalHost, number: int) -> None:
        """The host is up unless it is switched off, and its agent runs."""
        pause_s = RETRY_FIRST_S
        while True:
            if await asyncio.to_thread(lambda: host.is_off):
                await asyncio.sleep(OFF_POLL_S)
                continue
            began = time.monotonic()
            try:
                process = await asyncio.to_thread(host.ensure_started)
                async with self._plugging:
                    await self._underlay.ensure()
                    await self._underlay.connect(number, process)
                agent = await asyncio.to_thread(self._start_agent, host, number)
                code = await self._ended(agent)
                log.warning("agent.ended", host=host.name, code=code, lived_s=round(time.monotonic() - began, 1))
            except (InstarError, OSError, subprocess.SubprocessError) as error:
                log.warning("host.not_started", host=host.name, reason=str(error))
            pause_s = RETRY_FIRST_S if time.monotonic() - began > LIVED_WELL_S else min(pause_s * 2, RETRY_MAX_S)
            await asyncio.sleep(pause_s)

    def _start_agent(self, host: LocalHost, number: int) -> subprocess.Popen[bytes]:
        """Blocking. It ends when its standard input does: also when we are killed. It is killed when nsenter is."""
        command = agent_command(
            host, self._state.path, address=self._underlay.address(number), shares=len(self._hosts),
            log_format=self._log_format,
        )  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("INSTAR_")}
        without_secrets = msgspec.structs.replace(self._settings, database="", bus="")  # no matter of a host
        agent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/",
            env=inherited | environment_of(without_secrets), start_new_session=True,
        )  # fmt: skip
        self._agents[host.name] = agent
        return agent

    async def _ended(self, agent: subprocess.Popen[bytes]) -> int:
        """How it ended. No thread waits for it meanwhile: there may be many."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        descriptor = os.pidfd_open(agent.pid)
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return agent.wait()

    async def _end(self, host: LocalHost, keeper: asyncio.Task[None]) -> None:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        agent = self._agents.pop(host.name, None)
        if agent is not None:
            await asyncio.to_thread(_end_agent, agent)


def _end_agent(agent: subprocess.Popen[bytes]) -> None:
    """Blocking."""
    assert agent.stdin is not None
    agent.stdin.close()
    try:
        agent.wait(AGENT_STOP_MAX_S)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait()


def _are_up(hosts: list[LocalHost]) -> list[bool]:
    return [host.process is not None for host in hosts]


async def remove_local_hosts(cloud_id: str, hosts_dir: Path) -> None:
    """Nothing of a cloud's hosts is left on the machine, their guests and disks included. The cloud must not run."""
    for host in local_hosts_of(hosts_dir):
        await asyncio.to_thread(host.remove)
    await Underlay(cloud_id, hosts_dir / "underlay").remove()
