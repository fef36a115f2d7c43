"""Actions on the security groups of a server: all its ports join one, or leave it."""

from __future__ import annotations

from functools import partial

import msgspec

from instar.api.resource import Compute
from instar.api.servers.action import Action
from instar.api.servers.bodies import GroupOfServer
from instar.api.servers.changes import change_spec
from instar.errors import Locked
from instar.http.answer import Answer, empty_answer
from instar.http.request import Request
from instar.model.instance import Instance, InstanceSpec


class GroupActions:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def rows(self) -> tuple[Action, ...]:
        name, bodies = "os_compute_api:os-security-groups:", ((1, GroupOfServer),)
        return (
            Action("addSecurityGroup", name + "add", partial(self._change, True), bodies),
            Action("removeSecurityGroup", name + "remove", partial(self._change, False), bodies),
        )

    async def _change(self, member: bool, request: Request, instance: Instance, body: GroupOfServer) -> Answer:
        if instance.locked_by and not request.context.is_admin:
            raise Locked(id=instance.id)
        name = await self._compute.networks.set_security_group(
            instance.id, body.name, project_id=instance.project_id, member=member
        )
        await change_spec(self._compute, request, partial(with_group, body.name, name, member))
        return empty_answer(202)


def with_group(given: str, name: str, member: bool, spec: InstanceSpec) -> InstanceSpec:
    """The groups that the server shows, with or without this one; each is known as it was given, and by its name."""
    names = spec.security_group_names or spec.security_groups
    kept = [
        (was_given, was_named)
        for was_given, was_named in zip(spec.security_groups, names, strict=True)
        if was_given != given and was_named != name
    ]
    kept += [(given, name)] if member else []
    return msgspec.structs.replace(
        spec, security_groups=tuple(one for one, _ in kept), security_group_names=tuple(one for _, one in kept)
    )
