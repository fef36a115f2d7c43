"""Actions after which a server may be on another host: resize, migrate, their two ends, live migration, evacuate.

Only admins choose hosts; a host that there is not is refused before anything begins.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from instar.api.resource import Compute
from instar.api.servers.action import Action, plain
from instar.api.servers.bodies import (
    DiskConfig,
    Evacuate,
    Migrate,
    MigrateLive,
    OldEvacuate,
    OldMigrateLive,
    Resize,
)
from instar.api.servers.changes import change_spec
from instar.api.servers.checks import check_image_fits, given
from instar.api.servers.references import flavor_named, known_host, new_password
from instar.errors import BadRequest
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.lifecycle.definition import boots_from_volume
from instar.lifecycle.evacuate import EvacuateArguments
from instar.lifecycle.live_migration import LiveArguments
from instar.model.instance import Flavor, Instance

STAYS_STOPPED_SINCE = 95
PASSWORD_UNTIL = 13  # of evacuate: later versions do not answer with one


class MoveActions:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def rows(self) -> tuple[Action, ...]:
        door, name = self._compute.lifecycle, "os_compute_api:"
        return (
            Action("resize", name + "servers:resize", self._resize, ((1, Resize),)),
            plain("confirmResize", "servers:confirm_resize", door.confirm_resize, 204),
            plain("revertResize", "servers:revert_resize", door.revert_resize),
            Action("migrate", name + "os-migrate-server:migrate", self._migrate, ((1, None), (56, Migrate)), or_null=True),
            Action(
                "os-migrateLive", name + "os-migrate-server:migrate_live", self._migrate_live,
                ((1, OldMigrateLive), (25, MigrateLive)),
            ),
            Action("evacuate", name + "os-evacuate", self._evacuate, ((1, OldEvacuate), (14, Evacuate))),
        )  # fmt: skip

    async def _resize(self, request: Request, instance: Instance, body: Resize) -> Answer:
        flavor = await flavor_named(self._compute, request.context, body.flavor_ref)
        _check_flavor_fits(instance, flavor, is_admin=request.context.is_admin)
        await self._compute.lifecycle.resize(request.context, instance, flavor)
        await self._keep_disk_config(request, instance, body.disk_config)
        return empty_answer(202)

    async def _keep_disk_config(self, request: Request, instance: Instance, wanted: DiskConfig | UnsetType) -> None:
        """Nothing but what is shown of the server depends on it, so it needs no part in the operation."""
        if wanted is UNSET or wanted == instance.spec.disk_config:
            return
        await change_spec(self._compute, request, lambda spec: msgspec.structs.replace(spec, disk_config=wanted))

    async def _host(self, host: str | UnsetType | None) -> str | None:
        return await known_host(self._compute, host) if isinstance(host, str) else None

    async def _migrate(self, request: Request, instance: Instance, body: Migrate | None) -> Answer:
        host = await self._host(body.host) if body is not None else None
        await self._compute.lifecycle.migrate(request.context, instance, host=host)
        return empty_answer(202)

    async def _migrate_live(self, request: Request, instance: Instance, body: OldMigrateLive | MigrateLive) -> Answer:
        if isinstance(body, MigrateLive):
            _check_force(body.force, body.host, "os-migrateLive")
        host = await self._host(body.host)
        block = None if body.block_migration == "auto" else bool(body.block_migration)
        await self._compute.lifecycle.migrate_live(request.context, instance, LiveArguments(host, block))
        return empty_answer(202)

    async def _evacuate(self, request: Request, instance: Instance, body: OldEvacuate | Evacuate) -> Answer:
        if isinstance(body, Evacuate):
            _check_force(body.force, given(body.host, None), "evacuate")
        host = await self._host(body.host)
        stopped = request.microversion >= STAYS_STOPPED_SINCE
        await self._compute.lifecycle.evacuate(request.context, instance, EvacuateArguments(host, stopped))
        if request.microversion > PASSWORD_UNTIL:
            return empty_answer(200)
        return json_answer({"adminPass": given(body.admin_pass, None) or new_password()})


def _check_force(force: bool | UnsetType, host: str | None, where: str) -> None:
    """`force` asks to skip the scheduler. Hosts are never overfilled: the one that is named is looked at all the same."""
    if force is True and host is None:
        raise BadRequest(f"Invalid input: {where}.force: can't force to a non-provided destination.")


def _check_flavor_fits(instance: Instance, flavor: Flavor, *, is_admin: bool) -> None:
    """Raises BadRequest, ImageUnusable, Forbidden for a flavor that the server could not have been built with."""
    if instance.spec.image is None or boots_from_volume(instance):
        return
    if flavor.root_gib == 0 and instance.spec.flavor.root_gib:
        raise BadRequest(f"Invalid input: resize.flavorRef: flavor {flavor.id} has no root disk.")
    check_image_fits(instance.spec.image, flavor, is_admin=is_admin)
