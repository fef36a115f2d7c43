"""A cloud of many processes on this machine: private servers, APIs behind one port, conductors, storage, agents.

`instar distributed up` runs one until Ctrl-C; the demo, tests and benches make their own. Everything of it is below one
directory, which can be started again. Its methods block.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec

from instar.bus.permissions import agent_user, host_permissions, user_of
from instar.cli.client import CloudClient, CloudUnreachable, read_login
from instar.cli.distributed.layout import Layout
from instar.cli.distributed.settings_file import write_settings
from instar.cli.distributed.supervisor import Launch, Supervisor
from instar.cli.distributed.zones import ensure_zone_of_simulated
from instar.cli.host_processes import simulated_names
from instar.cli.hosts.agent_process import agent_command
from instar.cli.hosts.local_host import LocalHost, check_machine
from instar.cli.hosts.underlay import HOSTS_MAX, Underlay
from instar.cli.servers.bus_users import BusUser, ensure_users, password_in
from instar.cli.servers.postgresql import PrivatePostgresql
from instar.cli.servers.rabbitmq import PrivateRabbitMq
from instar.cli.state_dir import MODE, StateDir
from instar.config import Settings
from instar.errors import StartupError
from instar.file_lock import lock_within

HOSTS_UP_MAX_S = 60.0
ALONE_MAX_S = 5.0  # one that was killed a moment ago may still have it
POLL_S = 0.2
INIT_MAX_S = 600.0  # the guest image may have to be built
LOOPBACK = "127.0.0.1"
HOSTS_OF_A_USER_MAX = 300  # the broker matches their names with every message; more of them are the cloud's own user


class _Kept(msgspec.Struct, frozen=True):
    """What stays the same from one start to the next."""

    port: int


class _Agent(NamedTuple):
    """An agent's process: the hosts that it serves, the name of the queue that many have in common, where the broker is."""

    name: str
    hosts: tuple[str, ...]
    shared: str
    broker: str


class LocalCloud:
    """`start` returns its URL. Processes have names: postgresql, rabbitmq, storage, conductor-1…, api-1…, host-1…,
    simulated-1…; `processes` kills, stops and starts them by these."""

    def __init__(self, directory: Path, layout: Layout, *, say: Callable[[str], None]) -> None:
        if layout.libvirt_hosts:
            check_machine()
        if layout.libvirt_hosts > HOSTS_MAX:
            raise StartupError(f"This machine plays at most {HOSTS_MAX} hosts with libvirt.")
        self.state = StateDir(directory)
        self.layout = layout
        self.config = self.state.path / "instar.toml"
        self.url = ""
        self._say = say
        self._stack = ExitStack()
        self._plugging = threading.Lock()
        self._underlay = Underlay(self.state.cloud_id, self.state.hosts / "underlay")
        self._hosts = [LocalHost(self.state.hosts, f"host-{number + 1}") for number in range(layout.libvirt_hosts)]
        self.postgresql = PrivatePostgresql(self.state.path / "postgresql", durable=layout.durable)
        self.rabbitmq = PrivateRabbitMq(self.state.path / "rabbitmq")
        self.processes = Supervisor(self.state.path / "log", restarts=layout.restarts)

    # --- start and end ----------------------------------------------------------------------------------------------

    def start(self) -> str:
        """Everything is up and every host is known: the URL of the APIs. Raises StartupError; nothing runs then."""
        try:
            return self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> str:
        # Before anything can be ended: a second one in this directory would end the servers and hosts of the first.
        alone = self._stack.enter_context((self.state.path / "up.lock").open("wb"))
        lock_within(alone, ALONE_MAX_S, f"Another process keeps the cloud in {self.state.path}.")
        self._stack.callback(self._rest)
        self._stack.callback(self._stop_processes)
        settings = self._start_servers()
        self._say("preparing the database")
        self._initialise()
        if self.layout.is_mixed:
            asyncio.run(ensure_zone_of_simulated(settings, self._simulated_names()))
        self._add_processes()
        self._say(f"starting {len(self.names)} processes")
        self.processes.start_all(self.names)
        self.url = settings.api.public_url
        self._wait_for_hosts()
        return self.url

    def close(self) -> None:
        """Nothing of it runs any more; hosts that have guests go on."""
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Of our own processes, the servers aside, in the order of their start."""
        return [name for name in self.processes.names if name not in ("postgresql", "rabbitmq")]

    def _stop_processes(self) -> None:
        """Those that ask before those that are asked."""
        self.processes.seal()
        names = self.names
        for kinds in (("api-",), ("conductor-",), ("host-", "simulated-", "storage")):
            self.processes.stop_all([name for name in names if name.startswith(kinds)])
        self.processes.stop_all([name for name in self.processes.names if name not in names])

    def _rest(self) -> None:
        """Hosts without guests end, and what joins them when there is none left."""
        for host in self._hosts:
            if not host.has_guests:
                host.rest()
        if self._hosts and not any(host.process is not None for host in self._hosts):
            asyncio.run(self._underlay.remove())

    # --- servers and settings ---------------------------------------------------------------------------------------

    def _start_servers(self) -> Settings:
        """Both at once: the broker takes its time."""
        self._say("starting PostgreSQL and RabbitMQ")
        if self._hosts:
            self.state.hosts.mkdir(mode=MODE, exist_ok=True)
            asyncio.run(self._underlay.ensure())
            self.rabbitmq = PrivateRabbitMq(
                self.rabbitmq.directory, also_on=(self._underlay.machine_address,)
            )
        self.processes.add_server("postgresql", self.postgresql)
        self.processes.add_server("rabbitmq", self.rabbitmq)
        self.processes.start_all(["postgresql", "rabbitmq"])
        port = self._port()
        api = {"host": LOOPBACK, "port": port, "port_shared": True, "public_url": f"http://{LOOPBACK}:{port}"}
        settings = self.layout.settings_with(database=self.postgresql.url, bus=self.rabbitmq.url(), api=api)
        write_settings(self.config, settings)
        self._write_agents_settings(settings)
        return settings

    def _write_agents_settings(self, settings: Settings) -> None:
        """Each agent has what it would have on a machine of its own: the broker's address there, a user that may do no more
        than its host needs, and no database."""
        users = []
        for agent in self._agents():
            password_file = self.state.path / f"agent-{agent.name}.password"
            if len(agent.hosts) > HOSTS_OF_A_USER_MAX:
                write_settings(self._agent_config(agent.name), msgspec.structs.replace(settings, database=""))
                continue
            name = agent_user(agent.shared) if agent.shared else user_of(agent.hosts[0])
            permissions = host_permissions(list(agent.hosts), agent=agent.shared)
            users.append(BusUser(name, password_in(password_file), permissions))
            rabbitmq = msgspec.structs.replace(settings.rabbitmq, password_file=str(password_file))
            bus = f"amqp://{name}@{agent.broker}:{self.rabbitmq.port}/%2F"
            write_settings(
                self._agent_config(agent.name), msgspec.structs.replace(settings, database="", bus=bus, rabbitmq=rabbitmq)
            )
        if users:
            ensure_users(self.rabbitmq.control, "/", users)

    def _agents(self) -> Iterator[_Agent]:
        for host in self._hosts:
            yield _Agent(host.name, (host.name,), "", self._underlay.machine_address)
        for index in range(self.layout.simulated_processes if self.layout.simulated_hosts else 0):
            names = simulated_names(*self._simulated_share(index))
            yield _Agent(f"simulated-{index + 1}", tuple(names), names[0], LOOPBACK)

    def _agent_config(self, name: str) -> Path:
        return self.state.path / f"agent-{name}.toml"

    def _port(self) -> int:
        """The same at each start, and ours while we run: nobody else of this machine gets it between two APIs' lives."""
        record = self.state.path / "port.json"
        held = self._stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept = msgspec.json.decode(record.read_bytes(), type=_Kept) if record.exists() else _Kept(0)
        try:
            held.bind((LOOPBACK, kept.port))  # bound, never listening: no connection comes here
        except OSError:
            held.bind((LOOPBACK, 0))
        port: int = held.getsockname()[1]
        record.write_bytes(msgspec.json.encode(_Kept(port)))
        return port

    def _initialise(self) -> None:
        once = Supervisor(self.state.path / "log", restarts=False)
        once.add("cloud-init", Launch(lambda: self._instar("cloud", "init")))
        try:
            once.start("cloud-init", wait=False)
            once.wait_until_ended("cloud-init", INIT_MAX_S)
        finally:
            once.close()

    # --- processes --------------------------------------------------------------------------------------------------

    def _add_processes(self) -> None:
        layout, add = self.layout, self.processes.add
        add("storage", Launch(lambda: self._instar("storage", "--end-with-input")))
        for number in range(1, layout.conductors + 1):
            add(f"conductor-{number}", Launch(lambda: self._instar("conductor", "--end-with-input")))
        for number, host in enumerate(self._hosts, 1):
            add(host.name, self._agent(host, number))
        for number in range(layout.simulated_processes if layout.simulated_hosts else 0):
            add(f"simulated-{number + 1}", self._simulated(number))
        for number in range(1, layout.apis + 1):
            add(f"api-{number}", Launch(lambda: self._instar("api", "--end-with-input")))

    def _instar(self, *command: str, config: Path | None = None) -> list[str]:
        places = ("--config", str(config or self.config), "--dir", str(self.state.path))
        return [sys.executable, "-m", "instar.cli", *command, *places, "--log-format", self.layout.log_format]

    def _agent(self, host: LocalHost, number: int) -> Launch:
        def command() -> list[str]:
            process = host.ensure_started()
            with self._plugging:
                asyncio.run(self._plug(number, process))
            return agent_command(
                host, self.state.path, address=self._underlay.address(number), shares=len(self._hosts),
                log_format=self.layout.log_format, config=self._agent_config(host.name),
            )  # fmt: skip

        return Launch(command, real_pid=lambda: host.agent, held=lambda: host.is_off)

    async def _plug(self, number: int, process: int) -> None:
        await self._underlay.ensure()
        await self._underlay.connect(number, process)

    def _simulated(self, index: int) -> Launch:
        prefix, count = self._simulated_share(index)
        more = ("--hypervisor", "simulated", "--hosts", str(count), "--prefix", prefix, "--end-with-input")
        config = self._agent_config(f"simulated-{index + 1}")
        return Launch(lambda: self._instar("agent", *more, config=config))

    def _simulated_share(self, index: int) -> tuple[str, int]:
        """What the names of the process's hosts begin with, and how many it has."""
        processes = self.layout.simulated_processes
        count = self.layout.simulated_hosts // processes + (index < self.layout.simulated_hosts % processes)
        return "sim-" if processes == 1 else f"sim-{index + 1}-", count

    def _simulated_names(self) -> list[str]:
        shares = [self._simulated_share(index) for index in range(self.layout.simulated_processes)]
        return [name for prefix, count in shares for name in simulated_names(prefix, count)]

    def _wait_for_hosts(self) -> None:
        """Every API knows a host as soon as it reported; one that answers for all is asked."""
        wanted = self.layout.simulated_hosts + sum(not host.is_off for host in self._hosts)
        client = CloudClient(read_login(self.state.path, self.state.path, None))
        deadline = time.monotonic() + HOSTS_UP_MAX_S
        while True:
            try:
                up = sum(host["state"] == "up" for host in client.get_json("/v1/hosts")["hosts"])
            except CloudUnreachable:
                up = 0
            if up >= wanted:
                return
            if time.monotonic() > deadline:
                raise StartupError(f"Of {wanted} hosts {up} were up after {HOSTS_UP_MAX_S:g} seconds.")
            time.sleep(POLL_S)
