"""Two hosts between which guests and disks move, for tests/hypervisor/test_contract_moves.py.

Each implementation has one class that satisfies `TwoHosts`; the fixture in that file names them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from instar.config import SimulatedSettings
from instar.hypervisor.simulated import SimulatedWorld

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
