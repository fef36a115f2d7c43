"""Trouble on demand, for tests of all that stands on a hypervisor: calls that fail or hang, guests that act by themselves.

Faults belong to one host (`world.host(name).faults`), are set while it runs, and are not kept by its log.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import msgspec

from instar.errors import HypervisorError, HypervisorUnavailable
from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.records import GuestSet, SimulatedContent
from instar.model.states import PowerState

DATA_MAX_CHARACTERS = 65_536  # that guests write onto one disk


class _Planned(NamedTuple):
    error: Exception | None  # None: the call hangs
    after_work: bool


class HostFaults:
    """`down`: the hypervisor is away. `disk_full`: no disk can be made. `ignores_acpi`: guests do not hear the power
    button. `reboots_on_acpi`: they reboot by themselves when it is pressed, instead of shutting down. `keeps_devices`:
    running guests do not let go of a device. `live_never_converges`: live migrations from here end only when they are
    aborted, forced or cancelled."""

    __slots__ = (
        "_machine", "_planned", "_released", "disk_full", "ignores_acpi", "keeps_devices", "live_never_converges",
        "reboots_on_acpi",
    )  # fmt: skip

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._planned: dict[str, list[_Planned]] | None = None  # None: nothing planned, so that calls stay cheap
        self._released: asyncio.Event | None = None
        self.disk_full = False
        self.ignores_acpi = False
        self.reboots_on_acpi = False
        self.keeps_devices = False
        self.live_never_converges = False

    @property
    def down(self) -> bool:
        return self._machine.away

    @down.setter
    def down(self, down: bool) -> None:
        self._machine.set_away(down)

    @property
    def cut_off(self) -> bool:
        """No stream to or from other hosts goes through; commands reach the host all the same."""
        return self._machine.cut_off

    @cut_off.setter
    def cut_off(self, cut_off: bool) -> None:
        self._machine.cut_off = cut_off

    # --- calls ----------------------------------------------------------------------------------------------------

    def fail_next(
        self, method: str, error: Exception | None = None, *, times: int = 1, after_work: bool = False
    ) -> None:
        """The next calls of `method` raise `error` (else a HypervisorError); `after_work`: having done their work."""
        failure = error or HypervisorError(reason=f"simulated failure of {method}")
        self._plan(method, [_Planned(failure, after_work)] * times)

    def hang_next(self, method: str, *, after_work: bool = False) -> None:
        """The next call of `method` hangs until `release`, or for ever."""
        self._plan(method, [_Planned(None, after_work)])

    def release(self) -> None:
        """Calls that hang go on."""
        if self._released is not None:
            self._released.set()
            self._released = None

    def clear(self) -> None:
        """No fault any more; calls that hang go on."""
        self.release()
        self._planned = None
        self.down = self.disk_full = self.ignores_acpi = self.reboots_on_acpi = False
        self.keeps_devices = self.live_never_converges = self.cut_off = False

    async def meet(self, method: str, *, after_work: bool) -> None:
        """Suffer what is planned for this call. Raises the planned error, HypervisorUnavailable when down."""
        if self._machine.away:
            raise HypervisorUnavailable(host=self._machine.name)
        if self._planned is None:
            return
        plan = self._planned.get(method)
        if not plan or plan[0].after_work is not after_work:
            return
        planned = plan.pop(0)
        if planned.error is not None:
            raise planned.error
        if self._released is None:
            self._released = asyncio.Event()
        await self._released.wait()

    def _plan(self, method: str, planned: list[_Planned]) -> None:
        if self._planned is None:
            self._planned = {}
        self._planned.setdefault(method, []).extend(planned)

    # --- what happens by itself -----------------------------------------------------------------------------------

    def guest_powers_off(self, instance_id: str) -> None:
        self._machine.stop(instance_id, "shutdown")

    def guest_dies(self, instance_id: str) -> None:
        self._machine.stop(instance_id, "crashed", PowerState.CRASHED)

    def guest_is_destroyed(self, instance_id: str) -> None:
        """Somebody destroys the guest behind our back."""
        self._machine.stop(instance_id, "stopped")

    def guest_pauses(self, instance_id: str) -> None:
        self._machine.set_paused(instance_id, True)

    def guest_resumes(self, instance_id: str) -> None:
        self._machine.set_paused(instance_id, False)

    def guest_reboots(self, instance_id: str) -> None:
        guest = self._machine.guests.get(instance_id)
        if guest is not None and guest.domain_id is not None:
            self._machine.stop(instance_id, "shutdown")
            self._machine.start(guest)

    def guest_vanishes(self, instance_id: str) -> None:
        """Somebody destroys and undefines the guest behind our back; its disks stay."""
        self._machine.remove(instance_id)

    def guest_loses_nics(self, instance_id: str) -> None:
        """The running guest's network devices are gone, as after a detach behind our back."""
        guest = self._machine.guests.get(instance_id)
        if guest is not None:
            self._machine.change(GuestSet(self._machine.name, msgspec.structs.replace(guest, ports=())))

    def host_restarts(self) -> None:
        """The machine restarts: no guest runs, disks and definitions are kept, and nobody is told."""
        on_event, self._machine.on_event = self._machine.on_event, None
        for instance_id in list(self._machine.guests):
            self._machine.stop(instance_id, "stopped")
        self._machine.on_event = on_event

    # --- what a guest does with its memory and disks ----------------------------------------------------------------

    def memory(self, instance_id: str) -> str:
        """What the guest's memory holds, while it runs, is paused or suspended: where and as which domain it booted.

        The same text means that it has not booted since. Empty: it has no memory."""
        guest = self._machine.guests.get(instance_id)
        return guest.memory if guest else ""

    def boots(self, instance_id: str, disk: str = "root") -> int:
        """How often a guest has booted from this disk, or from the volume of this id that it has."""
        return self._content(instance_id, disk).boots

    def passwords_set(self, instance_id: str, disk: str = "root") -> int:
        return self._content(instance_id, disk).passwords_set

    def write_data(self, instance_id: str, disk: str, key: str, value: str) -> None:
        """The running guest writes onto a disk of its own, or onto the volume of this id that it has.

        Raises HypervisorError when it does not run or has no such disk, or has written too much."""
        guest = self._machine.running(instance_id)
        if guest is None:
            raise HypervisorError(reason="the guest does not run")
        content = self._content(instance_id, disk)
        data = {**dict(content.data), key: value}
        if sum(len(name) + len(text) for name, text in data.items()) > DATA_MAX_CHARACTERS:
            raise HypervisorError(reason=f"the guest has written too much onto disk {disk}")
        changed = msgspec.structs.replace(content, data=tuple(data.items()))
        self._machine.change(self._machine.content_change(guest, disk, changed))

    def read_data(self, instance_id: str, disk: str = "root") -> dict[str, str]:
        """What `write_data` has put onto the disk, on this host or before it came here. Also of a guest that is off.

        Raises HypervisorError when there is no such disk."""
        return dict(self._content(instance_id, disk).data)

    def _content(self, instance_id: str, disk: str) -> SimulatedContent:
        guest = self._machine.guests.get(instance_id)
        if guest is not None:
            content = self._machine.content_of(guest, disk)
        else:
            made = self._machine.disks_of(instance_id).get(disk)
            content = made.content if made else None
        if content is None:
            raise HypervisorError(reason=f"the instance has no disk {disk}")
        return content
