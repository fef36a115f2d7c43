"""Actions that change what a server boots or who may log in: rebuild, rescue, unrescue, changePassword."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from instar.api.resource import Compute, service_url
from instar.api.servers.action import Action, plain
from instar.api.servers.bodies import ChangePassword, Rebuild, Rescue
from instar.api.servers.checks import (
    check_address,
    check_image_fits,
    check_metadata_count,
    given,
    read_certificates,
    read_personality,
    read_user_data,
)
from instar.api.servers.listing import scene_of
from instar.api.servers.naming import check_hostname
from instar.api.servers.references import image_id_of, image_named, new_password, public_key_named, spec_image
from instar.api.servers.view import UPDATE, encoded_user_data, server_view
from instar.errors import BadRequest
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.images.contract import Image
from instar.lifecycle.definition import boots_from_volume
from instar.lifecycle.rebuild import RebuildArguments
from instar.lifecycle.root_volume import root_volume
from instar.model.instance import Instance, InstanceSpec, SpecImage
from instar.model.states import TaskState
from instar.store.quotas import quota_limits

KEY_NAME_SINCE, USER_DATA_SINCE = 54, 57  # in the answer of a rebuild
VOLUME_BACKED_RESCUE_SINCE, REIMAGE_SINCE = 87, 93


class RebuildActions:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def rows(self) -> tuple[Action, ...]:
        name = "os_compute_api:"
        return (
            Action("rebuild", name + "servers:rebuild", self._rebuild, ((1, Rebuild),)),
            Action("rescue", name + "os-rescue", self._rescue, ((1, Rescue),), or_null=True),
            plain("unrescue", "os-unrescue", self._compute.lifecycle.unrescue),
            Action("changePassword", name + "os-admin-password", self._change_password, ((1, ChangePassword),)),
        )

    async def _rebuild(self, request: Request, instance: Instance, body: Rebuild) -> Answer:
        context, compute = request.context, self._compute
        image = await image_named(compute, context, image_id_of(body.image_ref, "imageRef"))
        own: SpecImage | None = None
        volume_image_id: str | None = None
        if boots_from_volume(instance):
            volume_image_id = await self._volume_image(request, instance, image)
        else:
            own = spec_image(image)
            check_image_fits(image, instance.spec.flavor, is_admin=context.is_admin)
        spec = await self._rebuilt(request, instance, body, own)
        hostname = None if body.hostname is UNSET else check_hostname(body.hostname, request.microversion, "rebuild")
        wanted = RebuildArguments(
            image=own, spec=spec, name=given(body.name, instance.name), hostname=hostname,
            preserve_ephemeral=given(body.preserve_ephemeral, False), volume_image_id=volume_image_id,
        )  # fmt: skip
        await compute.lifecycle.rebuild(context, instance, wanted)
        # As it will be: nothing but the image and what the body says changes.
        changed = msgspec.structs.replace(
            instance, spec=spec, name=wanted.name, hostname=hostname or instance.hostname, task_state=TaskState.REBUILDING
        )
        return await self._rebuilt_answer(request, changed, given(body.admin_pass, None) or new_password())

    async def _volume_image(self, request: Request, instance: Instance, image: Image) -> str | None:
        """The image that the root volume gets; None where it stays as it is, as before microversion 2.93.

        Raises BadRequest, ImageUnusable."""
        context, root = request.context, root_volume(instance)
        info = await self._compute.volumes.volume_fetch(root.volume_id, project_id=context.project_id, is_admin=True)
        if request.microversion < REIMAGE_SINCE:
            if info.image_metadata.get("image_id") != image.id:
                raise BadRequest(
                    f"Image {image.id} is unacceptable: "
                    "Unable to rebuild with a different image for a volume-backed server."
                )
            return None
        # The volume is what has to have room for it, not the flavor's root disk.
        check_image_fits(image, replace(instance.spec.flavor, root_gib=info.size_gib), is_admin=context.is_admin)
        return image.id

    async def _rebuilt_answer(self, request: Request, changed: Instance, password: str) -> Answer:
        scene = await scene_of(self._compute, request)
        view: dict[str, Any] = server_view(changed, scene, is_admin=request.context.is_admin, kind=UPDATE)
        if request.microversion >= KEY_NAME_SINCE:
            view["key_name"] = changed.spec.key_name
        if request.microversion >= USER_DATA_SINCE:
            view["user_data"] = encoded_user_data(changed)
        view["adminPass"] = password
        location = f"{service_url(request)}/servers/{changed.id}".encode()
        return json_answer({"server": view}, 202, [(b"location", location)])

    async def _rebuilt(self, request: Request, instance: Instance, body: Rebuild, image: SpecImage | None) -> InstanceSpec:
        """The spec with what the body says. Raises BadRequest, QuotaExceeded."""
        limits = await quota_limits(self._compute.store, self._compute.settings.quota, request.context.project_id)
        personality = read_personality(body, limits, "rebuild")
        changes: dict[str, Any] = {"image": image or instance.spec.image, "personality": personality}
        if body.metadata is not UNSET:
            check_metadata_count(len(body.metadata), limits)
            changes["metadata"] = body.metadata
        if body.description is not UNSET:
            changes["description"] = body.description
        if body.disk_config is not UNSET:
            changes["disk_config"] = body.disk_config
        if body.access_ip_v4 is not UNSET:
            changes["access_ip_v4"] = check_address("accessIPv4", body.access_ip_v4, 4, "rebuild")
        if body.access_ip_v6 is not UNSET:
            changes["access_ip_v6"] = check_address("accessIPv6", body.access_ip_v6, 6, "rebuild")
        if body.user_data is not UNSET:
            changes["user_data"] = read_user_data(body, "rebuild")
        if body.trusted_image_certificates is not UNSET:
            changes["trusted_image_certificates"] = read_certificates(body, "rebuild")
        if body.key_name is not UNSET:
            # A key pair is a user's: of the one that the server belongs to, whoever rebuilds it.
            changes["key_name"] = body.key_name or None
            changes["key_public"] = await public_key_named(self._compute, instance.user_id, body.key_name)
        return msgspec.structs.replace(instance.spec, **changes)

    async def _rescue(self, request: Request, instance: Instance, body: Rescue | None) -> Answer:
        reference = given(body.rescue_image_ref, None) if body is not None else None
        if boots_from_volume(instance) and request.microversion < VOLUME_BACKED_RESCUE_SINCE:
            raise BadRequest(f"Instance {instance.id} cannot be rescued: Cannot rescue a volume-backed instance")
        if reference is not None:
            image_id = image_id_of(reference, "rescue_image_ref")
        elif instance.spec.image is not None:
            image_id = instance.spec.image.id
        else:
            raise BadRequest("Invalid input: rescue.rescue_image_ref: the server has no image of its own, one is needed.")
        image = await image_named(self._compute, request.context, image_id)
        # Its disk is counted nowhere, so it must not be larger than one that is.
        check_image_fits(image, instance.spec.flavor, is_admin=True)
        await self._compute.lifecycle.rescue(request.context, instance, image.id)
        password = given(body.admin_pass, None) if body is not None else None
        return json_answer({"adminPass": password or new_password()})

    async def _change_password(self, request: Request, instance: Instance, body: ChangePassword) -> Answer:
        await self._compute.lifecycle.change_password(request.context, instance, body.admin_pass)
        return empty_answer(202)
