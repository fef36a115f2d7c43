"""Two hosts between which guests and disks move, for tests/hypervisor/test_contract_moves.py.

Each implementation has one class that satisfies `TwoHosts`; the fixture in that file names them.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

from instar.cli.libvirt_host import open_streams
from instar.config import Settings, SimulatedSettings
from instar.hypervisor.simulated import SimulatedWorld
from instar.hypervisor.simulated.neighbours import Neighbours

from .harness import Harness
from .simulated_harness import SimulatedHarness


class TwoHosts(Protocol):
    """Both open, with the same networks, and able to reach each other."""

    source: Harness
    target: Harness

    async def boot_mark(self, host: Harness, instance_id: str) -> str:
        """What the memory of the guest on this host holds since its boot: other memory, another mark."""
        ...

    async def cut(self) -> None:
        """The target cannot reach the source."""
        ...

    async def mend(self) -> None: ...

    async def slow_down(self) -> None:
        """Live migrations from the source take longer than a test, until they are forced or `mend` is called."""
        ...

    async def close(self) -> None:
        """Nothing is left: guests, networks, files, processes."""
        ...


class _OneOfTwo(SimulatedHarness):
    def __init__(self, directory: Path, world: SimulatedWorld, name: str) -> None:
        self.events = []
        self._directory = directory
        self._image = directory / "image.raw"
        self._image.write_bytes(b"a guest that needs no machine")
        self._world = world
        self.hypervisor = world.host(name)


class SimulatedTwoHosts:
    def __init__(self, directory: Path) -> None:
        self._world = SimulatedWorld(directory / "world.log", SimulatedSettings())
        self.source = _OneOfTwo(directory, self._world, "first")
        self.target = _OneOfTwo(directory, self._world, "second")

    @classmethod
    async def opened(cls, directory: Path) -> SimulatedTwoHosts:
        hosts = cls(directory)
        for host in (hosts.source, hosts.target):
            await host.hypervisor.open(host.events.append)
        return hosts

    async def boot_mark(self, host: Harness, instance_id: str) -> str:
        assert isinstance(host, SimulatedHarness)
        return host.hypervisor.faults.memory(instance_id)

    async def cut(self) -> None:
        self.source.hypervisor.faults.cut_off = True

    async def mend(self) -> None:
        self.source.hypervisor.faults.clear()

    async def slow_down(self) -> None:
        self.source.hypervisor.faults.live_never_converges = True

    async def close(self) -> None:
        self._world.close()


class SimulatedApart(SimulatedTwoHosts):
    """Hosts of two worlds, as two processes have them: what goes over goes over streams."""

    def __init__(self, directory: Path) -> None:
        self._stack = AsyncExitStack()
        self._directory = directory

    @classmethod
    async def opened(cls, directory: Path) -> SimulatedApart:
        hosts = cls(directory)
        hosts.source = await hosts._one("first")
        hosts.target = await hosts._one("second")
        return hosts

    async def _one(self, name: str) -> _OneOfTwo:
        folder = self._directory / name
        folder.mkdir()
        streams = await open_streams(self._stack, folder, Settings(), name=name, address="127.0.0.1")
        world = SimulatedWorld(folder / "world.log", SimulatedSettings())
        self._stack.callback(world.close)
        world.neighbours = Neighbours(streams.server, streams.client, world.machine)
        await world.neighbours.open()
        self._stack.push_async_callback(world.neighbours.close)
        host = _OneOfTwo(folder, world, name)
        await host.hypervisor.open(host.events.append)
        return host

    async def close(self) -> None:
        await self._stack.aclose()
