"""`os-interface` of a server: attach and detach. Lists are in `parts.py`."""

from __future__ import annotations

import ipaddress
import uuid
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from instar.api.body import Served, Tag, Uuid
from instar.api.resource import ApiRoute, Compute, read_body
from instar.api.servers.bodies import Record
from instar.api.servers.checks import given
from instar.api.servers.listing import visible_instance
from instar.api.servers.parts import interface_view
from instar.errors import BadRequest, InterfaceAttachFailed, NotFound, UnknownReference
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.model.network import RequestedNetwork

# The guest has the interface when the answer comes, as clients expect; one that takes longer is shown when it is there.
ANSWER_WAIT_S = 20.0


class WantedAddress(Record, frozen=True):
    ip_address: Annotated[str, Meta(max_length=64)]
    subnet_id: Uuid | UnsetType = UNSET


class NewInterface(Record, frozen=True):
    net_id: Uuid | UnsetType = UNSET
    port_id: Uuid | UnsetType = UNSET
    fixed_ips: Annotated[list[WantedAddress], Meta(min_length=1, max_length=1)] | UnsetType = UNSET
    tag: Annotated[Tag | UnsetType, Served(((49, None),))] = UNSET


class AttachInterface(Record, frozen=True):
    attachment: NewInterface = msgspec.field(name="interfaceAttachment")


class Interfaces:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._devices = compute.lifecycle.devices

    def routes(self) -> list[ApiRoute]:
        path, name = "/servers/{server_id}/os-interface", "os_compute_api:os-attach-interfaces:"
        return [
            ApiRoute("POST", path, name + "create", self.attach),
            ApiRoute("DELETE", path + "/{port_id}", name + "delete", self.detach),
        ]

    async def attach(self, request: Request) -> Answer:
        wanted = _requested((await read_body(request, AttachInterface)).attachment)
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        try:
            port, operation = await self._devices.attach_interface(request.context, instance, wanted)
        except UnknownReference as error:
            raise NotFound(error.message) from error
        if await self._devices.wait_for(operation, ANSWER_WAIT_S) is False:
            raise InterfaceAttachFailed(id=instance.id)
        return json_answer({"interfaceAttachment": interface_view(instance, port, request.microversion)})

    async def detach(self, request: Request) -> Answer:
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        await self._devices.detach_interface(request.context, instance, request.params["port_id"])
        return empty_answer(202)


def _requested(wanted: NewInterface) -> RequestedNetwork | None:
    """None where nothing is named. Raises BadRequest."""
    network, port, addresses = given(wanted.net_id, None), given(wanted.port_id, None), given(wanted.fixed_ips, [])
    tag = given(wanted.tag, None)
    if network and port:
        raise BadRequest("Must not input both network_id and port_id")
    if addresses and not network:
        raise BadRequest("Must input network_id when request IP address")
    fixed_ip = None
    if addresses:
        text = addresses[0].ip_address
        try:
            fixed_ip = str(ipaddress.ip_address(text))
        except ValueError as error:
            where = "interfaceAttachment.fixed_ips[0].ip_address"
            raise BadRequest(f"Invalid input: {where}: {text!r} is not an IP address.") from error
    if not network and not port:
        if tag is not None:
            raise BadRequest("Invalid input: interfaceAttachment.tag: a tag needs a net_id or a port_id.")
        return None
    return RequestedNetwork(
        network_id=str(uuid.UUID(network)) if network else None, port_id=str(uuid.UUID(port)) if port else None,
        fixed_ip=fixed_ip, tag=tag,
    )  # fmt: skip
