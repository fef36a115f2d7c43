"""`os-volume_attachments` of a server: list, show, attach, update or swap, detach."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from instar.api.body import Tag, Uuid, since
from instar.api.resource import ApiRoute, Compute, page_of, read_body
from instar.api.servers.bodies import DISK_TAG, Record
from instar.api.servers.checks import given
from instar.api.servers.listing import visible_instance
from instar.errors import BadRequest, NotFound, WrongState
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.policy import Policy
from instar.http.request import Request
from instar.lifecycle.devices import VolumeWish
from instar.lifecycle.volumes import ends_with_instance
from instar.model.instance import Instance, InstanceVolume
from instar.model.states import Action, VmState

SHELVED_SINCE = 20
TAG_SHOWN_SINCE = 70
ENDS_SHOWN_SINCE = 79
MULTIATTACH_SINCE = 60
UPDATE_SINCE = 85
IDS_SHOWN_SINCE = 89
SWAP_POLICY = "os_compute_api:os-volumes-attachments:swap"
_SHELVED = (VmState.SHELVED, VmState.SHELVED_OFFLOADED)
DeviceName = Annotated[str, Meta(min_length=1, max_length=255)]


class NewAttachment(Record, frozen=True):
    volume_id: Uuid = msgspec.field(name="volumeId")
    device: DeviceName | UnsetType | None = UNSET
    tag: Annotated[Tag | UnsetType, DISK_TAG] = UNSET
    delete_on_termination: Annotated[bool | UnsetType, since(ENDS_SHOWN_SINCE)] = UNSET


class AttachVolume(Record, frozen=True):
    attachment: NewAttachment = msgspec.field(name="volumeAttachment")


class ChangedAttachment(Record, frozen=True):
    """`volume_id` another than that of the path: a swap."""

    volume_id: Uuid = msgspec.field(name="volumeId")
    id: Annotated[Uuid | UnsetType, since(UPDATE_SINCE)] = UNSET
    server_id: Annotated[Uuid | UnsetType, since(UPDATE_SINCE)] = msgspec.field(name="serverId", default=UNSET)
    device: Annotated[DeviceName | UnsetType | None, since(UPDATE_SINCE)] = UNSET
    tag: Annotated[Tag | UnsetType | None, since(UPDATE_SINCE)] = UNSET
    delete_on_termination: Annotated[bool | UnsetType, since(UPDATE_SINCE)] = UNSET


class UpdateAttachment(Record, frozen=True):
    attachment: ChangedAttachment = msgspec.field(name="volumeAttachment")


class VolumeAttachments:
    def __init__(self, compute: Compute, policy: Policy) -> None:
        self._compute = compute
        self._policy = policy
        self._devices = compute.lifecycle.devices

    def routes(self) -> list[ApiRoute]:
        path, name = "/servers/{server_id}/os-volume_attachments", "os_compute_api:os-volumes-attachments:"
        return [
            ApiRoute("GET", path, name + "index", self.index),
            ApiRoute("POST", path, name + "create", self.attach),
            ApiRoute("GET", path + "/{id}", name + "show", self.show),
            ApiRoute("PUT", path + "/{id}", name + "update", self.update),
            ApiRoute("DELETE", path + "/{id}", name + "delete", self.detach),
        ]

    async def _server(self, request: Request) -> Instance:
        return await visible_instance(self._compute, request.context, request.params["server_id"])

    async def index(self, request: Request) -> Answer:
        instance, page = await self._server(request), page_of(request, self._compute)
        volumes = await self._devices.volumes_of(instance)
        start = _integer(request, "offset")
        shown = [_view(instance, volume, request.microversion) for volume in volumes[start : start + page.limit]]
        return json_answer({"volumeAttachments": shown})

    async def show(self, request: Request) -> Answer:
        instance = await self._server(request)
        volume = await self._volume(request, instance)
        return json_answer({"volumeAttachment": _view(instance, volume, request.microversion)})

    async def _volume(self, request: Request, instance: Instance) -> InstanceVolume:
        volume_id = _canonical(request.params["id"])
        for volume in await self._devices.volumes_of(instance):
            if volume.volume_id == volume_id:
                return volume
        raise NotFound(f"Instance {instance.id} is not attached to volume {volume_id[:80]}.")

    async def attach(self, request: Request) -> Answer:
        wanted, version = (await read_body(request, AttachVolume)).attachment, request.microversion
        instance = await self._server(request)
        if instance.vm_state in _SHELVED and version < SHELVED_SINCE:
            raise _wrong_state(instance, Action.ATTACH_VOLUME)
        wish = VolumeWish(
            _canonical(wanted.volume_id), given(wanted.device, None), given(wanted.tag, None),
            given(wanted.delete_on_termination, False), multiattach=version >= MULTIATTACH_SINCE,
        )  # fmt: skip
        volume = await self._devices.attach_volume(request.context, instance, wish)
        # The answer to an attach has kept its `id` at every version.
        view = _view(instance, volume, min(version, IDS_SHOWN_SINCE - 1), ends=volume.delete_on_termination)
        return json_answer({"volumeAttachment": view})

    async def update(self, request: Request) -> Answer:
        wanted = (await read_body(request, UpdateAttachment)).attachment
        instance = await self._server(request)
        old_id, new_id = _canonical(request.params["id"]), _canonical(wanted.volume_id)
        if request.microversion < UPDATE_SINCE or old_id != new_id:
            self._policy.require(request.context, SWAP_POLICY)
            await self._devices.swap_volume(request.context, instance, old_id, new_id)
            return empty_answer(202)
        volume = await self._volume(request, instance)
        for name, value, now in (
            ("device", wanted.device, f"/dev/{volume.device}"), ("tag", wanted.tag, volume.tag),
            ("serverId", wanted.server_id, instance.id), ("id", wanted.id, volume.volume_id),
        ):  # fmt: skip
            if value is not UNSET and value is not None and str(value).lower() != str(now).lower():
                raise BadRequest(f"The {name} of an attachment cannot be changed: it is {now}, not {str(value)[:80]}.")
        if not isinstance(wanted.delete_on_termination, UnsetType):
            await self._devices.end_volume_with(instance, old_id, wanted.delete_on_termination)
        return empty_answer(202)

    async def detach(self, request: Request) -> Answer:
        instance = await self._server(request)
        if instance.vm_state in _SHELVED and request.microversion < SHELVED_SINCE:
            raise _wrong_state(instance, Action.DETACH_VOLUME)
        await self._devices.detach_volume(request.context, instance, _canonical(request.params["id"]))
        return empty_answer(202)


def _view(instance: Instance, volume: InstanceVolume, version: int, *, ends: bool | None = None) -> dict[str, Any]:
    view: dict[str, Any] = {
        "volumeId": volume.volume_id, "serverId": instance.id, "device": f"/dev/{volume.device}",
    }  # fmt: skip
    if version < IDS_SHOWN_SINCE:
        view["id"] = volume.volume_id
    else:
        view |= {"attachment_id": volume.attachment_id, "bdm_uuid": volume.attachment_id}
    if version >= TAG_SHOWN_SINCE:
        view["tag"] = volume.tag
    if version >= ENDS_SHOWN_SINCE:
        view["delete_on_termination"] = ends_with_instance(instance, volume) if ends is None else ends
    return view


def _wrong_state(instance: Instance, action: Action) -> WrongState:
    return WrongState(action=action.value, id=instance.id, attribute="vm_state", state=instance.vm_state.value)


def _canonical(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return text


def _integer(request: Request, name: str) -> int:
    """A number of the query that is not negative; 0 where it is not there. Raises BadRequest."""
    for key, text in request.query:
        if key == name:
            if not (text.isascii() and text.isdigit() and len(text) < 10):
                raise BadRequest(f"Invalid input for query parameter {name}: {text[:40]!r} is not an integer >= 0.")
            return int(text)
    return 0
