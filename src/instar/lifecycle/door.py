"""The door to the lifecycle: check, then record, then answer. The API changes instances through nothing else.

Each method checks lock and states, and then sets the first task_state and records the operation in ONE transaction, before
it returns: an accepted request is never lost. Policy, existence and the body were checked by the caller.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from instar.clock import now_us
from instar.engine.conductor import tell_accepted, tell_to_cancel
from instar.engine.hosts import tell_leftovers
from instar.errors import BadRequest, Conflict, Locked, QuotaExceeded, WhereaboutsUnknown, WrongState
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.consoles import Consoles
from instar.lifecycle.definition import boots_from_volume, host_of
from instar.lifecycle.devices import Devices
from instar.lifecycle.evacuate import EvacuateArguments
from instar.lifecycle.find_guest import FindArguments
from instar.lifecycle.guest_calls import GuestCalls
from instar.lifecycle.live_migration import LiveArguments
from instar.lifecycle.move import MoveArguments, pending_move, root_is_smaller
from instar.lifecycle.new_records import NewInstance, finished, new_instance, new_operation
from instar.lifecycle.password import PasswordArguments
from instar.lifecycle.prefetch import ImagePrefetch
from instar.lifecycle.reboot import RebootArguments
from instar.lifecycle.rebuild import RebuildArguments
from instar.lifecycle.rescue import RescueArguments
from instar.lifecycle.shelve import UnshelveArguments
from instar.lifecycle.snapshot import SnapshotArguments, draft_of
from instar.model.context import RequestContext
from instar.model.instance import Flavor, Instance
from instar.model.operation import Operation
from instar.model.states import REBOOT_HARD, REBOOT_SOFT, TRANSITIONS, Action, VmState, check
from instar.store.contract import Statement, WriteConflict
from instar.store.instances import (
    UsageFull,
    instance_fetch,
    instance_grow,
    instance_insert,
    instance_is_idle,
    instance_lock,
    instance_mark,
    instance_mark_deleting,
    instance_set_states,
    usage_add,
    usage_ensure,
    usage_fetch,
    usage_take,
)
from instar.store.operations import CameBetween, operation_insert, operations_cancel
from instar.store.server_groups import server_group_room

QuotaLimits = Callable[[str], Awaitable[dict[str, int]]]
LOCK_ATTEMPTS_MAX = 5
TAKE_OVER_ATTEMPTS_MAX = 20
TELLING_MAX = 500  # accepted operations of which the conductors are just being told


class Lifecycle:
    """`quota_limits(project_id)` gives the limits of instances, cores, ram (MiB) and members of a group; -1 is none."""

    def __init__(self, cloud: Cloud, quota_limits: QuotaLimits) -> None:
        self._cloud = cloud
        self._store = cloud.store
        self._quota_limits = quota_limits
        self.consoles = Consoles(cloud.store, cloud.bus, cloud.settings.console)
        self.prefetch = ImagePrefetch(cloud)
        self.guests = GuestCalls(cloud)
        self.devices = Devices(cloud, self._accept)
        self._telling: set[asyncio.Task[None]] = set()

    # --- operations -------------------------------------------------------------------------------------------------

    async def create(
        self, context: RequestContext, new: Sequence[NewInstance], limits: Mapping[str, int] | None = None
    ) -> list[Instance]:
        """Record instances and their builds: all or none. `limits`: the project's, where the caller has just read them.
        Raises QuotaExceeded."""
        limits = limits or await self._quota_limits(context.project_id)
        now, reservation = now_us(), "r-" + uuid.uuid4().hex[:8]
        instances = [new_instance(context, draft, now, reservation) for draft in new]
        wanted: Counter[str] = Counter()
        for draft in new:
            flavor = draft.spec.flavor
            wanted.update(instances=1, cores=flavor.vcpus, ram=flavor.memory_mib)
        groups = Counter(draft.spec.group_id for draft in new if draft.spec.group_id)
        statements = [server_group_room(group, count, limits["server_group_members"]) for group, count in groups.items()]
        operations = []
        for instance in instances:
            operation = new_operation(context, instance, Action.CREATE, Action.CREATE)
            statements += [instance_insert(instance), operation_insert(operation)]
            operations.append(operation)
        try:
            await self.devices.reserve_for(instances)
            await self._write_counted(context.project_id, wanted, limits, statements)
        except BaseException as error:
            await self.devices.unreserve_for(instances)
            if not isinstance(error, QuotaExceeded):
                raise
            used = (await usage_fetch(self._store, context.project_id)).get(error.resource, error.limit)
            raise QuotaExceeded(
                resource=error.resource, requested=error.requested, used=used, limit=error.limit
            ) from None
        for operation in operations:
            await self._tell(operation)
        return instances

    async def _write_counted(
        self, project_id: str, wanted: Mapping[str, int], limits: Mapping[str, int], statements: Sequence[Statement]
    ) -> None:
        """Write what uses so much of the project's limits. All others of the project wait for the row that counts: it comes
        last, and once for all. Raises QuotaExceeded."""
        try:
            await self._store.write(*statements, usage_take(project_id, wanted, limits))
        except UsageFull:  # of what, the same one by one says; or has somebody made room meanwhile
            counted = (usage_add(project_id, name, amount, limits[name]) for name, amount in wanted.items())
            await self._store.write(*statements, usage_ensure(project_id), *counted)

    async def delete(self, context: RequestContext, instance: Instance, *, force: bool = False) -> None:
        """May come at any time; what is in flight is unwound first. A second delete changes nothing.

        Where a reclaim interval is set the instance can be restored until it is over, unless `force`."""
        _check_lock(context, instance)
        soft = self._cloud.settings.lifecycle.reclaim_instance_interval_s > 0 and not force
        action = Action.SOFT_DELETE if soft else Action.DELETE
        check(action, instance.id, instance.vm_state, instance.task_state)
        operation = new_operation(context, instance, action, action)
        task = TRANSITIONS[action].task
        assert task is not None, "a delete marks the instance"
        try:
            await self._take_over(
                operations_cancel(instance.id, operation), instance_mark_deleting(instance.id, task),
                operation_insert(operation, takes_over=True),
            )  # fmt: skip
        except WriteConflict:
            return  # another delete is on its way
        await self._tell(operation)

    async def restore(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.RESTORE, Action.RESTORE)

    async def reboot(self, context: RequestContext, instance: Instance, *, hard: bool) -> None:
        rule = REBOOT_HARD if hard else REBOOT_SOFT
        await self._accept(context, instance, Action.REBOOT, rule, RebootArguments(hard))

    async def start(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.START, Action.START)

    async def stop(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.STOP, Action.STOP)

    async def pause(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.PAUSE, Action.PAUSE)

    async def unpause(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.UNPAUSE, Action.UNPAUSE)

    async def suspend(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.SUSPEND, Action.SUSPEND)

    async def resume(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.RESUME, Action.RESUME)

    async def create_image(self, context: RequestContext, instance: Instance, wanted: SnapshotArguments) -> None:
        """An image under the id that the caller chose. It is there, queued, before this returns."""
        action = Action.CREATE_IMAGE if wanted.rotation is None else Action.CREATE_BACKUP
        _check_lock(context, instance)
        check(action, instance.id, instance.vm_state, instance.task_state)
        await self._cloud.images.queue(wanted.image_id, draft_of(instance, wanted))
        try:
            await self._accept(context, instance, action, action, wanted)
        except BaseException:
            await self._cloud.images.discard(wanted.image_id)
            raise

    async def shelve(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.SHELVE, Action.SHELVE)

    async def shelve_offload(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.SHELVE_OFFLOAD, Action.SHELVE_OFFLOAD)

    async def unshelve(self, context: RequestContext, instance: Instance, wanted: UnshelveArguments) -> None:
        """A zone or a host can be chosen only for one that is on no host."""
        if instance.vm_state is VmState.SHELVED and wanted != UnshelveArguments():
            raise WrongState(
                action=Action.UNSHELVE.value, id=instance.id, attribute="vm_state", state=instance.vm_state.value
            )
        await self._accept(context, instance, Action.UNSHELVE, Action.UNSHELVE, wanted, needs_host=False)

    async def resize(self, context: RequestContext, instance: Instance, flavor: Flavor, *, host: str | None = None) -> None:
        """Raises BadRequest for a smaller root disk or the same flavor, QuotaExceeded."""
        old = instance.spec.flavor
        if flavor.id == old.id:
            raise BadRequest("When resizing, instances must change flavor!")
        if root_is_smaller(old, flavor) and not boots_from_volume(instance):
            sizes = f"{flavor.root_gib} GiB, smaller than {old.root_gib} GiB"
            raise BadRequest(f"Flavor {flavor.id} has a root disk of {sizes}.")
        if flavor.ephemeral_gib < old.ephemeral_gib:
            raise BadRequest(f"Flavor {flavor.id} has a smaller ephemeral disk than {old.ephemeral_gib} GiB.")
        limits = await self._quota_limits(instance.project_id)
        more = {"cores": flavor.vcpus - old.vcpus, "ram": flavor.memory_mib - old.memory_mib}
        # What is added is counted from now on, and given back when the resize fails or is reverted.
        counted = [
            usage_add(instance.project_id, name, amount, limits[name]) for name, amount in more.items() if amount > 0
        ]
        grown = instance_grow(instance.id, max(more["cores"], 0), max(more["ram"], 0))
        await self._accept(
            context, instance, Action.RESIZE, Action.RESIZE, MoveArguments(flavor, host, old), before=tuple(counted),
            also=(grown,),
        )  # fmt: skip

    async def migrate(self, context: RequestContext, instance: Instance, *, host: str | None = None) -> None:
        if host is not None and host == instance.host:
            raise BadRequest(f"Instance {instance.id} is on host {host} already.")
        await self._accept(context, instance, Action.MIGRATE, Action.MIGRATE, MoveArguments(None, host))

    async def confirm_resize(self, context: RequestContext, instance: Instance) -> None:
        _check_lock(context, instance)
        check(Action.CONFIRM_RESIZE, instance.id, instance.vm_state, instance.task_state)
        if pending_move(instance).reverting:
            raise Conflict(f"Instance {instance.id} is half reverted already, it can only be reverted.")
        # It has no task_state that would keep a second one away.
        refusal = WrongState(
            action=Action.CONFIRM_RESIZE.value, id=instance.id, attribute="task_state", state="confirming"
        )
        idle = instance_is_idle(instance.id, refusal=refusal)
        await self._accept(context, instance, Action.CONFIRM_RESIZE, Action.CONFIRM_RESIZE, also=(idle,))

    async def revert_resize(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.REVERT_RESIZE, Action.REVERT_RESIZE)

    async def rebuild(self, context: RequestContext, instance: Instance, wanted: RebuildArguments) -> None:
        """Raises BadRequest where a root disk is to be replaced that the instance does not have."""
        if boots_from_volume(instance) is not (wanted.image is None):
            raise BadRequest(f"Instance {instance.id} does not have its root where the rebuild would replace it.")
        await self._accept(context, instance, Action.REBUILD, Action.REBUILD, wanted)

    async def rescue(self, context: RequestContext, instance: Instance, image_id: str) -> None:
        await self._accept(context, instance, Action.RESCUE, Action.RESCUE, RescueArguments(image_id))

    async def unrescue(self, context: RequestContext, instance: Instance) -> None:
        await self._accept(context, instance, Action.UNRESCUE, Action.UNRESCUE)

    async def change_password(self, context: RequestContext, instance: Instance, password: str) -> None:
        """Raises GuestAgentMissing: who waits for the answer hears at once that this guest cannot."""
        _check_lock(context, instance)
        check(Action.CHANGE_PASSWORD, instance.id, instance.vm_state, instance.task_state)
        await self.guests.require_agent(instance, "set passwords")
        await self._accept(
            context, instance, Action.CHANGE_PASSWORD, Action.CHANGE_PASSWORD, PasswordArguments(password)
        )

    async def migrate_live(self, context: RequestContext, instance: Instance, wanted: LiveArguments) -> None:
        if wanted.host is not None and wanted.host == instance.host:
            raise BadRequest(f"Instance {instance.id} is on host {wanted.host} already.")
        await self._accept(context, instance, Action.LIVE_MIGRATE, Action.LIVE_MIGRATE, wanted)

    async def evacuate(self, context: RequestContext, instance: Instance, wanted: EvacuateArguments) -> None:
        """Raises BadRequest while the instance's host is up: its guest might still run there."""
        host = host_of(instance)
        if self._cloud.scheduler.is_up(host):
            raise BadRequest(f"Compute service of {host} is still in use.")
        if wanted.host == host:
            raise BadRequest(f"Instance {instance.id} cannot be evacuated to host {host}, where it is.")
        await self._accept(context, instance, Action.EVACUATE, Action.EVACUATE, wanted)

    async def find_guest(self, context: RequestContext, instance: Instance, wanted: FindArguments) -> None:
        """A live migration broke off, and its hosts have said by now where the guest is."""
        await self._accept(context, instance, Action.FIND_GUEST, Action.FIND_GUEST, wanted)

    async def _accept(
        self,
        context: RequestContext,
        instance: Instance,
        action: Action,
        rule: str,
        arguments: msgspec.Struct | None = None,
        *,
        needs_host: bool = True,
        before: tuple[Statement, ...] = (),
        also: tuple[Statement, ...] = (),
    ) -> Operation:
        """`before` and `also` join the transaction, before and behind what is written of the instance."""
        _check_lock(context, instance)
        transition = check(rule, instance.id, instance.vm_state, instance.task_state)
        if instance.maybe_on is not None and instance.host is not None and not transition.anywhere:
            await tell_leftovers(self._cloud.bus, instance.host)  # it is looked for again, as somebody wants to use it
            raise WhereaboutsUnknown(id=instance.id)
        if needs_host:
            host_of(instance)
        operation = new_operation(context, instance, action, rule, arguments)
        refusal = WrongState(action=action.value, id=instance.id, attribute="task_state", state="changed meanwhile")
        # A hard reboot may come during a soft one: it takes over. What has no task_state is waited for.
        takes_over = instance.task_state is not None
        cancel = (operations_cancel(instance.id, operation),) if takes_over else ()
        mark = instance_mark(instance, transition.task, refusal=refusal)
        insert = operation_insert(operation, takes_over=takes_over)
        await self._take_over(*cancel, *before, mark, *also, insert)
        await self._tell(operation)
        return operation

    async def _take_over(self, *statements: Statement) -> None:
        """Once more for each operation that was accepted just between: all of them are to be taken over."""
        for _ in range(TAKE_OVER_ATTEMPTS_MAX):
            try:
                await self._store.write(*statements)
                return
            except CameBetween:
                continue
        raise Conflict("The instance is being changed by others.")

    async def _tell(self, operation: Operation) -> None:
        """A conductor takes it now, and not only when its poll finds it. It is in the database, so nobody waits until a
        broker has promised to keep the word, except where so many are on their way that the broker must be slow."""
        telling = asyncio.create_task(tell_accepted(self._cloud.bus, operation), name="tell accepted")
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)
        if len(self._telling) > TELLING_MAX:
            await telling

    # --- without an operation of their own --------------------------------------------------------------------------

    async def lock(self, context: RequestContext, instance: Instance, reason: str | None) -> None:
        """Others than admins get 409 until it is unlocked. A lock by an admin is an admin's to undo."""
        if instance.locked_by == "admin" and not context.is_admin:
            return  # locked already; a lock of the owner's own would be the owner's to undo
        by = "admin" if context.is_admin and context.project_id != instance.project_id else "owner"
        await self._set_lock(context, instance, Action.LOCK, by, reason)

    async def unlock(self, context: RequestContext, instance: Instance) -> None:
        if instance.locked_by == "admin" and not context.is_admin:
            raise Locked(id=instance.id)
        await self._set_lock(context, instance, Action.UNLOCK, None, None)

    async def _set_lock(
        self, context: RequestContext, instance: Instance, action: Action, by: str | None, reason: str | None
    ) -> None:
        for _ in range(LOCK_ATTEMPTS_MAX):
            spec = msgspec.structs.replace(instance.spec, locked_reason=reason)
            changed = instance_lock(instance.id, by, spec, instance.revision)
            try:
                record = finished(new_operation(context, instance, action, action))
                await self._store.write(changed, operation_insert(record))
                return
            except WriteConflict:
                instance = await instance_fetch(self._store, instance.id)
        raise Conflict(f"Instance {instance.id} is being changed by others.")

    async def reset_state(self, context: RequestContext, instance: Instance, vm_state: VmState) -> None:
        """Admins: the state as told, no task. What is in flight ends first, without touching the state again.

        Of a guest that is on one of two hosts: if one of them is down by an admin's word, it is given up there, and what
        the other has is taken."""
        operation = finished(new_operation(context, instance, Action.RESET_STATE, Action.RESET_STATE))
        await self._store.write(
            operations_cancel(instance.id, operation),
            instance_set_states(instance.id, vm_state),
            operation_insert(operation),
        )
        await tell_to_cancel(self._cloud.bus, instance.id, operation.action)
        now = await instance_fetch(self._store, instance.id)
        hosts = (now.host, now.maybe_on) if now.maybe_on else ()
        if given_up := tuple(host for host in hosts if host and self._cloud.scheduler.is_forced_down(host)):
            await self.find_guest(context, now, FindArguments(given_up))


def _check_lock(context: RequestContext, instance: Instance) -> None:
    if instance.locked_by and not context.is_admin:
        raise Locked(id=instance.id)
