"""`POST /servers/{id}/action`: one table of actions. The body is `{"<key>": <value>}`; the key chooses the row.

An operation that Instar gains later is one more row here. A key that has none is an unknown action at every version.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from instar.api.body import convert
from instar.api.resource import ApiRoute, Compute
from instar.api.servers.bodies import ConsoleOutput, Lock, Reboot, ResetState
from instar.api.servers.consoles import (
    CONSOLE_POLICY,
    CONSOLES_SINCE,
    RdpConsole,
    SerialConsole,
    SpiceConsole,
    VncConsole,
    console_url,
)
from instar.api.servers.listing import visible_instance
from instar.errors import BadRequest, Conflict, OperationError, Unavailable, WrongState
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.faults import RouteNotFound
from instar.http.policy import Policy
from instar.http.request import Request
from instar.model.instance import Instance
from instar.model.states import VmState

OldConsole = VncConsole | SpiceConsole | RdpConsole | SerialConsole
Act = Callable[[Request, Instance, Any], Awaitable[Answer]]


class Action(NamedTuple):
    """`bodies`: (first microversion, record) in rising order; a record of None takes any value, usually null.

    `policy` is asked before the server is looked for, like that of a route."""

    key: str
    policy: str
    act: Act
    bodies: tuple[tuple[int, type[msgspec.Struct] | None], ...] = ((1, None),)
    until: int | None = None  # the last microversion that has it

    def body_at(self, version: int) -> type[msgspec.Struct] | None:
        return [record for first, record in self.bodies if version >= first][-1]


CONSOLE_RETRY_S = 5
ACTION_POLICY = "os_compute_api:servers:action"  # any role that may use the API; each action has its own besides


class ServerActions:
    def __init__(self, compute: Compute, policy: Policy) -> None:
        self._lifecycle = compute.lifecycle
        self._compute = compute
        self._policy = policy
        self.actions = {
            action.key: action
            for action in (
                Action("reboot", "os_compute_api:servers:reboot", self._reboot, ((1, Reboot),)),
                Action("os-start", "os_compute_api:servers:start", self._start),
                Action("os-stop", "os_compute_api:servers:stop", self._stop),
                Action("lock", "os_compute_api:os-lock-server:lock", self._lock, ((1, None), (73, Lock))),
                Action("unlock", "os_compute_api:os-lock-server:unlock", self._unlock),
                Action("forceDelete", "os_compute_api:os-deferred-delete:force", self._force_delete),
                Action(
                    "os-resetState", "os_compute_api:os-admin-actions:reset_state", self._reset_state,
                    ((1, ResetState),),
                ),
                Action(
                    "os-getConsoleOutput", "os_compute_api:os-console-output", self._console_output,
                    ((1, ConsoleOutput),),
                ),
                *(
                    Action(key, CONSOLE_POLICY, partial(self._console, protocol), ((1, body),), until=CONSOLES_SINCE - 1)
                    for key, protocol, body in (
                        ("os-getVNCConsole", "vnc", VncConsole), ("os-getSPICEConsole", "spice", SpiceConsole),
                        ("os-getRDPConsole", "rdp", RdpConsole), ("os-getSerialConsole", "serial", SerialConsole),
                    )
                ),
            )
        }  # fmt: skip

    def routes(self) -> list[ApiRoute]:
        return [ApiRoute("POST", "/servers/{server_id}/action", ACTION_POLICY, self.act)]

    async def act(self, request: Request) -> Answer:
        body = decode_action(await request.body())
        if len(body) != 1:
            raise BadRequest("Malformed request body: it must name exactly one action.")
        key, value = next(iter(body.items()))
        action = self.actions.get(key)
        if action is None:
            raise BadRequest(f"There is no such action: {key[:80]}")
        self._policy.require(request.context, action.policy)
        if action.until is not None and request.microversion > action.until:
            raise RouteNotFound()
        record = action.body_at(request.microversion)
        given = None
        if record is not None and (value is not None or record is not Lock):
            given = convert(value, record, request.microversion)
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        return await action.act(request, instance, given)

    async def _reboot(self, request: Request, instance: Instance, body: Reboot) -> Answer:
        await self._lifecycle.reboot(request.context, instance, hard=body.type.upper() == "HARD")
        return empty_answer(202)

    async def _start(self, request: Request, instance: Instance, _: None) -> Answer:
        await self._lifecycle.start(request.context, instance)
        return empty_answer(202)

    async def _stop(self, request: Request, instance: Instance, _: None) -> Answer:
        await self._lifecycle.stop(request.context, instance)
        return empty_answer(202)

    async def _lock(self, request: Request, instance: Instance, body: Lock | None) -> Answer:
        reason = body.locked_reason if body is not None and body.locked_reason is not UNSET else None
        await self._lifecycle.lock(request.context, instance, reason)
        return empty_answer(202)

    async def _unlock(self, request: Request, instance: Instance, _: None) -> Answer:
        await self._lifecycle.unlock(request.context, instance)
        return empty_answer(202)

    async def _force_delete(self, request: Request, instance: Instance, _: None) -> Answer:
        await self._lifecycle.delete(request.context, instance, force=True)
        return empty_answer(202)

    async def _reset_state(self, request: Request, instance: Instance, body: ResetState) -> Answer:
        await self._lifecycle.reset_state(request.context, instance, VmState(body.state))
        return empty_answer(202)

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
            output = await self._lifecycle.console_output(request.context, instance, None)
        except OperationError as error:  # names the host, which is not for users
            raise Unavailable(retry_after_s=CONSOLE_RETRY_S) from error
        if lines is not None:
            output = "\n".join(output.split("\n")[-lines:]) if lines else ""
        return json_answer({"output": output})

    async def _console(self, protocol: str, request: Request, instance: Instance, body: OldConsole) -> Answer:
        url = await console_url(self._compute, request, instance, protocol, body.type)
        return json_answer({"console": {"type": body.type, "url": url}})


def decode_action(data: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("Malformed request body: it is not valid JSON.") from error
    if not isinstance(body, dict):
        raise BadRequest("Malformed request body: it must be an object.")
    return body
