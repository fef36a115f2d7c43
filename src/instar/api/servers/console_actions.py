"""Actions that show something of a guest's console; before 2.6 also the URLs of screens and serial lines."""

from __future__ import annotations

from functools import partial

from msgspec import UNSET

from instar.api.resource import Compute
from instar.api.servers.action import Action
from instar.api.servers.bodies import ConsoleOutput
from instar.api.servers.consoles import (
    CONSOLE_POLICY,
    CONSOLES_SINCE,
    RdpConsole,
    SerialConsole,
    SpiceConsole,
    VncConsole,
    console_url,
)
from instar.errors import Conflict, OperationError, Unavailable, WrongState
from instar.http.answer import Answer, json_answer
from instar.http.request import Request
from instar.model.instance import Instance
from instar.model.states import VmState

OldConsole = VncConsole | SpiceConsole | RdpConsole | SerialConsole
CONSOLE_RETRY_S = 5


class ConsoleActions:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def rows(self) -> tuple[Action, ...]:
        output = Action(
            "os-getConsoleOutput", "os_compute_api:os-console-output", self._console_output, ((1, ConsoleOutput),)
        )
        old = (
            Action(key, CONSOLE_POLICY, partial(self._console, protocol), ((1, body),), until=CONSOLES_SINCE - 1)
            for key, protocol, body in (
                ("os-getVNCConsole", "vnc", VncConsole), ("os-getSPICEConsole", "spice", SpiceConsole),
                ("os-getRDPConsole", "rdp", RdpConsole), ("os-getSerialConsole", "serial", SerialConsole),
            )
        )  # fmt: skip
        return (output, *old)

    async def _console_output(self, request: Request, instance: Instance, body: ConsoleOutput) -> Answer:
        if instance.host is None:
            raise Conflict(f"Instance {instance.id} is not ready: it is on no host.")
        if instance.vm_state is VmState.BUILDING:
            raise WrongState(
                action="get_console_output", id=instance.id, attribute="vm_state", state=instance.vm_state.value
            )
        # The API counts in lines, the log in bytes: read as much as may be shown, and keep the last lines of it.
        lines = None if body.length is UNSET or body.length is None or body.length < 0 else body.length
        try:
            output = await self._compute.lifecycle.guests.console_output(instance, None)
        except OperationError as error:  # names the host, which is not for users
            raise Unavailable(retry_after_s=CONSOLE_RETRY_S) from error
        if lines is not None:
            output = "\n".join(output.split("\n")[-lines:]) if lines else ""
        return json_answer({"output": output})

    async def _console(self, protocol: str, request: Request, instance: Instance, body: OldConsole) -> Answer:
        url = await console_url(self._compute, request, instance, protocol, body.type)
        return json_answer({"console": {"type": body.type, "url": url}})
