"""Thousands of simulated hosts in one process, kept in one log file. Made by the program's start-up and by tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from instar.config import SimulatedSettings
from instar.hypervisor.console_offer import SocketGrants
from instar.hypervisor.simulated.change_log import ChangeLog
from instar.hypervisor.simulated.contents import SharedContents
from instar.hypervisor.simulated.driver import SimulatedHypervisor
from instar.hypervisor.simulated.image_check import ImageCheck
from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.neighbours import Neighbours
from instar.hypervisor.simulated.records import Change, VolumeWritten


class SimulatedWorld:
    """Every simulated host. What stands on them survives the process in the log at `path`; None: in memory only.

    Opening reads the whole log (some 100,000 records a second): do it before the event loop has other work. One process
    at a time may have a world open. Raises OSError when the log cannot be read or written."""

    def __init__(self, path: Path | None, settings: SimulatedSettings) -> None:
        self._settings = settings
        self._machines: dict[str, Machine] = {}
        self._hypervisors: dict[str, SimulatedHypervisor] = {}
        self._images = ImageCheck()
        self._contents = SharedContents()
        self.streams: SocketGrants | None = None  # by which consoles of all hosts are reached; set before `host`
        self.neighbours: Neighbours | None = None  # hosts of other processes; set before `host`
        self._log: ChangeLog | None = None
        if path is not None:
            log = ChangeLog(path)
            for change in log.read():
                if isinstance(change, VolumeWritten):
                    self._contents.write_volume(change.volume_id, change.content)
                else:
                    self._machine(change.host).apply(change)
            log.rewrite(self._changes())
            self._log = log

    def host(self, name: str) -> SimulatedHypervisor:
        """The host of this name; made when it was never asked for."""
        hypervisor = self._hypervisors.get(name)
        if hypervisor is None:
            hypervisor = self._hypervisors[name] = SimulatedHypervisor(
                self._machine(name), self._settings, self._images, self._machines.get
            )
            hypervisor.streams = self.streams
            if self.neighbours is not None:
                hypervisor.know(self.neighbours)
        return hypervisor

    def machine(self, name: str) -> Machine | None:
        """The machine of this name, if it is one of this world."""
        return self._machines.get(name)

    def host_names(self) -> tuple[str, ...]:
        """Hosts that were asked for, or have something on them."""
        return tuple(sorted(self._machines))

    def close(self) -> None:
        """Close the log; hosts stay readable, but nothing can change on them any more."""
        if self._log is not None:
            self._log.close()

    def _machine(self, name: str) -> Machine:
        machine = self._machines.get(name)
        if machine is None:
            machine = self._machines[name] = Machine(name, self._record, self._contents)
        return machine

    def _record(self, changes: tuple[Change, ...]) -> None:
        if self._log is None:
            return
        if self._log.wants_rewrite:
            self._log.rewrite(self._changes())
        self._log.append(changes)

    def _changes(self) -> Iterator[Change]:
        for machine in self._machines.values():
            yield from machine.changes()
        for volume_id, content in self._contents.volumes.items():
            yield VolumeWritten("", volume_id, content)
