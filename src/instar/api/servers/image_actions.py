"""Actions that make images of servers or take servers off their hosts: createImage, createBackup, shelve and its kin."""

from __future__ import annotations

import uuid

from msgspec import UNSET

from instar.api.resource import Compute
from instar.api.servers.action import Action, plain
from instar.api.servers.bodies import CreateBackup, CreateImage, Unshelve, UnshelveToZone
from instar.api.servers.checks import given, read_metadata
from instar.api.servers.references import check_zone, known_host
from instar.errors import BadRequest, Conflict
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.policy import Policy
from instar.http.request import Request
from instar.lifecycle.definition import boots_from_volume
from instar.lifecycle.shelve import UnshelveArguments
from instar.lifecycle.snapshot import SnapshotArguments
from instar.model.instance import Instance
from instar.store.quotas import quota_limits

IMAGES_PATH = "/image/v2/images/"  # of the Image API, behind the same port
IMAGE_ID_SINCE = 45
_SHELVE = "os_compute_api:os-shelve:"


class ImageActions:
    def __init__(self, compute: Compute, policy: Policy) -> None:
        self._compute = compute
        self._policy = policy

    def rows(self) -> tuple[Action, ...]:
        door, name = self._compute.lifecycle, "os_compute_api:"
        return (
            Action("createImage", name + "servers:create_image", self._create_image, ((1, CreateImage),)),
            Action("createBackup", name + "os-create-backup", self._create_backup, ((1, CreateBackup),)),
            plain("shelve", "os-shelve:shelve", door.shelve),
            plain("shelveOffload", "os-shelve:shelve_offload", door.shelve_offload),
            Action(
                "unshelve", _SHELVE + "unshelve", self._unshelve,
                ((1, None), (77, UnshelveToZone), (91, Unshelve)), or_null=True,
            ),
        )  # fmt: skip

    async def _create_image(self, request: Request, instance: Instance, body: CreateImage) -> Answer:
        return await self._make_image(request, instance, body, None, None)

    async def _create_backup(self, request: Request, instance: Instance, body: CreateBackup) -> Answer:
        return await self._make_image(request, instance, body, body.backup_type, body.rotation)

    async def _make_image(
        self, request: Request, instance: Instance, body: CreateImage | CreateBackup, kind: str | None, rotation: int | None
    ) -> Answer:
        """An image of rotation 0 is gone as soon as it is made: nobody is told its id."""
        settings = self._compute.settings.quota
        limits = await quota_limits(self._compute.store, settings, request.context.project_id)
        properties = read_metadata(body, limits)
        if rotation is not None and boots_from_volume(instance):
            raise BadRequest("Backup is not supported for volume-backed instances.")
        image_id = str(uuid.uuid4())
        wanted = SnapshotArguments(image_id, body.name, properties, kind, rotation)
        await self._compute.lifecycle.create_image(request.context, instance, wanted)
        if rotation == 0:
            return empty_answer(202)
        location = [(b"location", f"{request.origin}{IMAGES_PATH}{image_id}".encode())]
        if request.microversion < IMAGE_ID_SINCE:
            return empty_answer(202, location)
        return json_answer({"image_id": image_id}, 202, location)

    async def _unshelve(self, request: Request, instance: Instance, body: UnshelveToZone | Unshelve | None) -> Answer:
        wanted = UnshelveArguments()
        if isinstance(body, UnshelveToZone):
            wanted = UnshelveArguments(availability_zone=body.availability_zone)
        elif isinstance(body, Unshelve):
            # Absent leaves the zone as it is, null unpins it, which the lifecycle calls "".
            zone = None if body.availability_zone is UNSET else body.availability_zone or ""
            wanted = UnshelveArguments(availability_zone=zone, host=given(body.host, None))
        if wanted.host is not None:
            self._policy.require(request.context, _SHELVE + "unshelve_to_host")
        if wanted.availability_zone:
            await check_zone(self._compute, wanted.availability_zone)
        if wanted.host is not None:
            wanted = UnshelveArguments(wanted.availability_zone, await known_host(self._compute, wanted.host))
            await self._check_host_in_zone(instance, wanted)
        await self._compute.lifecycle.unshelve(request.context, instance, wanted)
        return empty_answer(202)

    async def _check_host_in_zone(self, instance: Instance, wanted: UnshelveArguments) -> None:
        """Raises Conflict where the host is not in the zone that the server is, or is to be, pinned to."""
        pinned = instance.spec.availability_zone if wanted.availability_zone is None else wanted.availability_zone
        if wanted.host and pinned and self._compute.hosts.zone_of(wanted.host) != pinned:
            raise Conflict(f'Host "{wanted.host}" is not in the availability zone "{pinned}".')
