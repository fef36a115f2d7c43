"""The door for volumes and network interfaces of an instance: what is asked is checked and taken, then recorded.

What is taken before the record is written (a volume's reservation, a new port) is given back when the record cannot be
written; a crash in between leaves it to the audit. Called by the Compute API through `Lifecycle.devices`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from instar.errors import BadRequest, Conflict, NotFound, PortInUse, VolumeUnusable
from instar.lifecycle.attach_interface import InterfaceArguments, attach_port, interface_of
from instar.lifecycle.attach_volume import SwapArguments, VolumeArguments
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import boots_from_volume
from instar.lifecycle.device_names import DEVICES_MAX, free_device, local_devices, volume_bus, wanted_device
from instar.model.context import RequestContext
from instar.model.instance import Instance, InstanceSpec, InstanceVolume
from instar.model.network import InstancePort, RequestedNetwork
from instar.model.operation import Operation
from instar.model.states import Action, check
from instar.store.contract import Statement, WriteConflict
from instar.store.instances import instance_change_spec, instance_fetch, instance_turn
from instar.store.operations import operation_fetch, operations_waiting
from instar.volumes.contract import VolumeInfo

Accept = Callable[..., Awaitable[Operation]]
ATTEMPTS_MAX = 20  # each one that fails means that another operation of the instance was accepted


WAIT_FIRST_S, WAIT_GROWTH, WAIT_LONGEST_S = 0.003, 1.1, 0.1  # between two looks at an operation that somebody waits for


class VolumeWish(msgspec.Struct, frozen=True):
    """A volume to be attached. `multiattach`: whether the caller may have one that is shared."""

    volume_id: str
    device: str | None = None
    tag: str | None = None
    delete_on_termination: bool = False
    multiattach: bool = True


class Devices:
    """`accept` records an operation (`Lifecycle._accept`)."""

    def __init__(self, cloud: Cloud, accept: Accept) -> None:
        self._cloud = cloud
        self._store = cloud.store
        self._accept = accept

    async def volumes_of(self, instance: Instance) -> tuple[InstanceVolume, ...]:
        """Those that it has, and those that are on their way."""
        # What is on its way is read first: what arrives in between is found among those that it has.
        coming = await self._coming(instance)
        volumes = (await instance_fetch(self._store, instance.id)).facts.volumes
        had = {volume.attachment_id for volume in volumes}
        return (*volumes, *(volume for volume in coming if volume.attachment_id not in had))

    # --- attach -----------------------------------------------------------------------------------------------------

    async def attach_volume(self, context: RequestContext, instance: Instance, wish: VolumeWish) -> InstanceVolume:
        """The volume is reserved for the instance, and will be attached. Returns it, with the device that it gets.

        Raises NotFound for the volume, BadRequest where it cannot be had, Conflict for a device that is in use."""
        check(Action.ATTACH_VOLUME, instance.id, instance.vm_state, instance.task_state)
        info = await self._cloud.volumes.volume_fetch(
            wish.volume_id, project_id=context.project_id, is_admin=context.is_admin
        )
        self._check_attachable(instance, info, wish)
        attachment_id, reserved = str(uuid.uuid4()), False
        try:
            for _ in range(ATTEMPTS_MAX):
                volume = await self._placed(instance, wish, info, attachment_id)
                if not reserved:
                    await self._reserve(instance, volume)
                    reserved = True
                try:
                    await self._accept(
                        context, instance, Action.ATTACH_VOLUME, Action.ATTACH_VOLUME, VolumeArguments(volume),
                        needs_host=False, also=(instance_turn(instance), *_forget_wish(instance, info.id)),
                    )  # fmt: skip
                except WriteConflict:
                    instance = await instance_fetch(self._store, instance.id)
                    continue
                return volume
            raise Conflict(f"Instance {instance.id} is being changed by others.")
        except BaseException:
            if reserved:
                await self._cloud.volumes.detach(attachment_id)
            raise

    def _check_attachable(self, instance: Instance, info: VolumeInfo, wish: VolumeWish) -> None:
        self._check_host(instance)
        if info.multiattach and not wish.multiattach:
            raise BadRequest(f"Volume {info.id} has multiattach enabled: this needs microversion 2.60.")
        if info.multiattach and instance.host is None:
            raise BadRequest("Attaching multiattach volumes is not supported for shelved-offloaded instances.")

    async def _placed(
        self, instance: Instance, wish: VolumeWish, info: VolumeInfo, attachment_id: str
    ) -> InstanceVolume:
        """The volume as the instance will have it. Raises BadRequest, Conflict."""
        volumes = await self.volumes_of(instance)
        if any(one.volume_id == info.id for one in volumes):
            raise BadRequest(f"Invalid volume: volume {info.id} is already attached to instance {instance.id}")
        if wish.tag is not None and wish.tag in _tags(instance, volumes):
            raise BadRequest(f"Device tag {wish.tag!r} is used already by another device of instance {instance.id}.")
        bus = volume_bus(instance.spec)
        local = local_devices(instance.spec, bus, boots_from_volume=boots_from_volume(instance))
        taken = local | {one.device for one in volumes}
        if len(taken) >= DEVICES_MAX:
            raise BadRequest(f"The maximum allowed number of disk devices ({DEVICES_MAX}) to attach is exceeded.")
        device = wanted_device(wish.device, taken, bus) if wish.device else free_device(taken, bus)
        return InstanceVolume(
            volume_id=info.id, attachment_id=attachment_id, device=device, tag=wish.tag, bus=bus,
            delete_on_termination=wish.delete_on_termination, multiattach=info.multiattach, size_gib=info.size_gib,
        )  # fmt: skip

    async def reserve_for(self, instances: Sequence[Instance]) -> None:
        """The volumes that are there already and that these new instances are to have. Raises BadRequest."""
        for instance in instances:
            for wanted in instance.spec.volumes:
                if not wanted.create:
                    await self._reserve(instance, InstanceVolume(wanted.volume_id, wanted.attachment_id, ""))

    async def unreserve_for(self, instances: Sequence[Instance]) -> None:
        for instance in instances:
            for wanted in instance.spec.volumes:
                await self._cloud.volumes.detach(wanted.attachment_id)

    async def _reserve(self, instance: Instance, volume: InstanceVolume, *, alone: bool = False) -> None:
        try:
            await self._cloud.volumes.reserve(
                volume.attachment_id, volume.volume_id, instance_id=instance.id, alone=alone
            )
        except VolumeUnusable as error:
            raise BadRequest(f"Invalid volume: {error.message}") from error

    # --- detach, swap -------------------------------------------------------------------------------------------------

    async def detach_volume(self, context: RequestContext, instance: Instance, volume_id: str) -> None:
        """Raises NotFound where the instance does not have it, BadRequest for its root or one that is going already."""
        check(Action.DETACH_VOLUME, instance.id, instance.vm_state, instance.task_state)
        volume = await self._settled_volume(instance, volume_id)
        if volume.boot_index == 0:
            raise BadRequest("Cannot detach a root device volume")
        self._check_host(instance)
        bare = msgspec.structs.replace(volume, connection=None)
        await self._accept(
            context, instance, Action.DETACH_VOLUME, Action.DETACH_VOLUME, VolumeArguments(bare), needs_host=False
        )

    async def swap_volume(self, context: RequestContext, instance: Instance, old_id: str, new_id: str) -> None:
        """The data of one volume goes to another, which takes its place. Raises NotFound, BadRequest."""
        check(Action.SWAP_VOLUME, instance.id, instance.vm_state, instance.task_state)
        old = await self._settled_volume(instance, old_id)
        self._check_host(instance)
        try:
            info = await self._cloud.volumes.volume_fetch(
                new_id, project_id=context.project_id, is_admin=context.is_admin
            )
        except NotFound as error:
            raise BadRequest(f"Volume {new_id} could not be found.") from error
        if info.size_gib < old.size_gib:
            raise BadRequest(
                f"Invalid volume: volume {new_id} has {info.size_gib} GiB, less than the {old.size_gib} of {old_id}"
            )
        if any(one.volume_id == new_id for one in await self.volumes_of(instance)):
            raise BadRequest(f"Invalid volume: volume {new_id} is already attached to instance {instance.id}")
        if await self._cloud.volumes.writers(old_id) > 1:
            raise BadRequest(
                f"Invalid volume: volume {old_id} has more than one read/write attachment, such a one is not swapped."
            )
        bare = msgspec.structs.replace(old, connection=None)
        new = msgspec.structs.replace(
            bare, volume_id=new_id, attachment_id=str(uuid.uuid4()), multiattach=info.multiattach, size_gib=info.size_gib
        )
        await self._reserve(instance, new, alone=True)
        try:
            await self._accept(
                context, instance, Action.SWAP_VOLUME, Action.SWAP_VOLUME, SwapArguments(bare, new),
                also=(instance_turn(instance),),
            )  # fmt: skip
        except WriteConflict:
            await self._cloud.volumes.detach(new.attachment_id)
            raise Conflict(f"Instance {instance.id} is being changed by others.") from None
        except BaseException:
            await self._cloud.volumes.detach(new.attachment_id)
            raise

    async def end_volume_with(self, instance: Instance, volume_id: str, ends: bool) -> None:
        """Whether the volume is deleted with the instance. Raises NotFound where the instance does not have it."""
        for _ in range(ATTEMPTS_MAX):
            had = {volume.volume_id for volume in await self.volumes_of(instance)}
            if volume_id not in had:
                raise _not_attached(instance, volume_id)
            wishes = {one: end for one, end in instance.spec.ends_volumes.items() if one in had} | {volume_id: ends}
            spec = msgspec.structs.replace(instance.spec, ends_volumes=wishes)
            try:
                await self._store.write(instance_change_spec(instance, spec))
            except WriteConflict:
                instance = await instance_fetch(self._store, instance.id)
                continue
            return
        raise Conflict(f"Instance {instance.id} is being changed by others.")

    # --- interfaces -----------------------------------------------------------------------------------------------------

    async def attach_interface(
        self, context: RequestContext, instance: Instance, wanted: RequestedNetwork | None
    ) -> tuple[InstancePort, Operation]:
        """The port is the instance's, and will be plugged in by the operation. None: on the project's only network.

        Raises UnknownReference, PortInUse, BadRequest, Conflict, QuotaExceeded."""
        check(Action.ATTACH_INTERFACE, instance.id, instance.vm_state, instance.task_state)
        self._check_host(instance)
        networks = self._cloud.networks
        resolved = await networks.resolve(
            None if wanted is None else (wanted,), project_id=context.project_id, is_admin=context.is_admin, count=1
        )
        if not resolved:
            raise BadRequest("No network to attach the interface to: name one by net_id, or a port by port_id.")
        requested = resolved[0]
        if requested.tag is not None and requested.tag in _tags(instance, await self.volumes_of(instance)):
            raise BadRequest(f"Device tag {requested.tag!r} is used already by another device of instance {instance.id}.")
        arguments = InterfaceArguments(requested.port_id or str(uuid.uuid4()), requested)
        try:
            port = await attach_port(self._cloud, instance, arguments)
            operation = await self._accept(
                context, instance, Action.ATTACH_INTERFACE, Action.ATTACH_INTERFACE, arguments
            )
        except PortInUse:
            raise  # it is another's
        except BaseException:
            await networks.release_port(instance.id, arguments.port_id)
            raise
        return port, operation

    async def detach_interface(self, context: RequestContext, instance: Instance, port_id: str) -> None:
        """Raises NotFound where the instance has no such port, Conflict where it is being detached already."""
        check(Action.DETACH_INTERFACE, instance.id, instance.vm_state, instance.task_state)
        port = next((one for one in instance.facts.ports if one.definition.id == port_id), None)
        if port is None:
            raise NotFound(f"No interface with port {port_id[:80]} is attached to {instance.id}.")
        self._check_host(instance)
        for operation in await operations_waiting(self._store, instance.id):
            if operation.action == Action.DETACH_INTERFACE and interface_of(operation).port_id == port_id:
                raise Conflict(f"Port {port_id} is being detached already.")
        arguments = InterfaceArguments(port_id, RequestedNetwork(port_id=port_id))
        await self._accept(context, instance, Action.DETACH_INTERFACE, Action.DETACH_INTERFACE, arguments)

    async def wait_for(self, operation: Operation, deadline_s: float) -> bool | None:
        """Whether it succeeded; None where it is not at its end by then."""
        pause_s = WAIT_FIRST_S
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    now = await operation_fetch(self._store, operation.id)
                    if now is None or now.finished_at is not None:
                        return now is not None and now.result == "Success"
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * WAIT_GROWTH, WAIT_LONGEST_S)
        except TimeoutError:
            return None

    # --- what is on its way -------------------------------------------------------------------------------------------

    def _check_host(self, instance: Instance) -> None:
        if instance.host is not None and not self._cloud.scheduler.is_up(instance.host):
            raise Conflict(f"The host of instance {instance.id} cannot be reached at this moment.")

    async def _settled_volume(self, instance: Instance, volume_id: str) -> InstanceVolume:
        """One that the instance has, and that nothing is going on with. Raises NotFound, BadRequest."""
        volume = next((one for one in await self.volumes_of(instance) if one.volume_id == volume_id), None)
        if volume is None:
            raise _not_attached(instance, volume_id)
        waiting = await operations_waiting(self._store, instance.id)
        if any(volume_id in _volumes_in(operation) for operation in waiting):
            raise BadRequest(f"Invalid volume: volume {volume_id} is being attached, detached or swapped already")
        return volume

    async def _coming(self, instance: Instance) -> list[InstanceVolume]:
        found = []
        for operation in await operations_waiting(self._store, instance.id):
            if operation.action == Action.ATTACH_VOLUME:
                found.append(msgspec.msgpack.decode(operation.arguments, type=VolumeArguments).volume)
            elif operation.action == Action.SWAP_VOLUME:
                found.append(msgspec.msgpack.decode(operation.arguments, type=SwapArguments).new)
        return found


def _tags(instance: Instance, volumes: tuple[InstanceVolume, ...]) -> set[str | None]:
    return {volume.tag for volume in volumes} | {port.tag for port in instance.facts.ports}


def _volumes_in(operation: Operation) -> set[str]:
    """Ids of the volumes that an operation is about."""
    if operation.action in (Action.ATTACH_VOLUME, Action.DETACH_VOLUME):
        return {msgspec.msgpack.decode(operation.arguments, type=VolumeArguments).volume.volume_id}
    if operation.action == Action.SWAP_VOLUME:
        swap = msgspec.msgpack.decode(operation.arguments, type=SwapArguments)
        return {swap.old.volume_id, swap.new.volume_id}
    return set()


def _forget_wish(instance: Instance, volume_id: str) -> tuple[Statement, ...]:
    """What was once said of the same volume, when it was attached before, does not count any more."""
    wishes: dict[str, Any] = dict(instance.spec.ends_volumes)
    if wishes.pop(volume_id, None) is None:
        return ()
    spec: InstanceSpec = msgspec.structs.replace(instance.spec, ends_volumes=wishes)
    return (instance_change_spec(instance, spec),)


def _not_attached(instance: Instance, volume_id: str) -> NotFound:
    return NotFound(f"volume_id not found: {volume_id} is not attached to instance {instance.id}.")
