"""`POST /servers/{id}/action`: the body is `{"<key>": <value>}`, and the key chooses a row of one table.

The rows are in the files beside this one, by what they do. A key that has none is an unknown action at every version.
"""

from __future__ import annotations

from typing import Any

import msgspec

from instar.api.body import convert
from instar.api.resource import ApiRoute, Compute
from instar.api.servers.action import Action
from instar.api.servers.console_actions import ConsoleActions
from instar.api.servers.group_actions import GroupActions
from instar.api.servers.image_actions import ImageActions
from instar.api.servers.listing import visible_instance
from instar.api.servers.move_actions import MoveActions
from instar.api.servers.power_actions import PowerActions
from instar.api.servers.rebuild_actions import RebuildActions
from instar.errors import BadRequest, Gone
from instar.http.answer import Answer
from instar.http.faults import RouteNotFound
from instar.http.policy import Policy
from instar.http.request import Request

ACTION_POLICY = "os_compute_api:servers:action"  # any role that may use the API; each action has its own besides
# What the API of today has no more, at any version.
REMOVED = frozenset({"injectNetworkInfo", "resetNetwork"})
# What ended with 2.43: addresses are the Network API's matter, and ports are attached whole.
ENDED_WITH_43 = frozenset({"addFixedIp", "removeFixedIp", "addFloatingIp", "removeFloatingIp"})


class ServerActions:
    def __init__(self, compute: Compute, policy: Policy) -> None:
        self._compute = compute
        self._policy = policy
        groups = (
            PowerActions(compute).rows(), ImageActions(compute, policy).rows(), MoveActions(compute).rows(),
            RebuildActions(compute).rows(), GroupActions(compute).rows(), ConsoleActions(compute).rows(),
        )  # fmt: skip
        self.actions: dict[str, Action] = {action.key: action for rows in groups for action in rows}

    def routes(self) -> list[ApiRoute]:
        return [ApiRoute("POST", "/servers/{server_id}/action", ACTION_POLICY, self.act)]

    async def act(self, request: Request) -> Answer:
        body = decode_action(await request.body())
        if len(body) != 1:
            raise BadRequest("Malformed request body: it must name exactly one action.")
        key, value = next(iter(body.items()))
        action = self._row(key, request.microversion)
        self._policy.require(request.context, action.policy)
        if action.until is not None and request.microversion > action.until:
            raise RouteNotFound()
        record = action.body_at(request.microversion)
        given = None
        if record is not None and not (value is None and action.or_null):
            given = convert(value, record, request.microversion, within=key)
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        return await action.act(request, instance, given)

    def _row(self, key: str, version: int) -> Action:
        """Raises BadRequest for an action that there is not, Gone and RouteNotFound for what there was."""
        if key in REMOVED:
            raise Gone(f"The action {key} is gone from the Compute API.")
        if key in ENDED_WITH_43 and version > 43:
            raise RouteNotFound()
        action = self.actions.get(key)
        if action is None:
            raise BadRequest(f"There is no such action: {key[:80]}")
        return action


def decode_action(data: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("Malformed request body: it is not valid JSON.") from error
    if not isinstance(body, dict):
        raise BadRequest("Malformed request body: it must be an object.")
    return body
