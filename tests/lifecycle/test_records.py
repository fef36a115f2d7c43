"""What is told and what is kept: notifications of each operation, none lost over a restart, and records that grow old."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from instar.bus.contract import Message
from instar.clock import now_us
from instar.errors import HypervisorError
from instar.model.operation import Notification
from instar.model.states import VmState
from instar.store.moves import migrations_of_instance
from instar.store.operations import notification_insert, notifications_fetch, operations_prune
from tests.lifecycle.harness import Plane, prepared
from tests.lifecycle.scenarios import SCENARIOS, victim
from tests.lifecycle.watching import Held, faults, until
from tests.rabbitmq_server import hear_notifications


class Listener:
    """Everything that is told, in order. The first telling counts: one may come twice."""

    def __init__(self) -> None:
        self.told: dict[str, Notification] = {}

    async def __call__(self, message: Message) -> None:
        one = msgspec.msgpack.decode(message.body, type=Notification)
        self.told.setdefault(one.message_id, one)

    def of(self, action: str, instance_id: str | None = None) -> dict[str, Notification]:
        """By phase. What was recorded before we listened may be told late: of one instance where there were others."""
        prefix = f"instance.{action}."
        return {
            one.event_type.removeprefix(prefix): one
            for one in self.told.values()
            if one.event_type.startswith(prefix) and instance_id in (None, one.payload.get("uuid"))
        }


async def listening(one: Plane) -> Listener:
    listener = Listener()
    await hear_notifications(one.control.bus, listener)
    return listener


async def until_told(listener: Listener, action: str, phase: str, instance_id: str | None = None) -> None:
    async def told() -> bool:
        return phase in listener.of(action, instance_id)

    await until(f"{phase} of {action} is told", told)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_operation_tells_of_its_start_and_of_its_end(one: Plane, name: str) -> None:
    scenario = SCENARIOS[name]
    before = await victim(one, scenario)
    listener = await listening(one)
    instance = await scenario.act(one, before)
    await one.settled()
    action, ended = (await one.last_operation(instance.id)).action, await one.fetch(instance.id)
    await until_told(listener, action, "end", instance.id)
    told = listener.of(action, instance.id)
    assert set(told) == {"start", "end"}
    operation = await one.last_operation(instance.id)
    for phase, notification in told.items():
        assert notification.priority == "INFO"
        assert notification.publisher_id == f"conductor:{operation.owner}"
        payload = notification.payload
        assert (payload["uuid"], payload["tenant_id"], payload["fault"]) == (instance.id, "demo", None)
        assert payload["request_id"] == operation.request_id, phase
        assert payload["flavor"]["flavorid"] == (ended if phase == "end" else instance).spec.flavor.id
        assert payload["image_uuid"] == (await one.image()).id
    assert told["start"].payload["state"] == operation.vm_state_before.value
    assert told["end"].payload["state"] == scenario.ends.value
    assert told["start"].timestamp <= told["end"].timestamp


async def test_end_of_a_create_tells_host_addresses_and_launch(one: Plane) -> None:
    """What a notification says of an instance was what the record said when its operation began: the end of a create told
    neither the host that had been found nor the time of the launch."""
    listener = await listening(one)
    instance = await one.created()
    await until_told(listener, "create", "end")
    payload = listener.of("create")["end"].payload
    assert payload["host"] == instance.host
    assert payload["launched_at"] is not None
    (port,) = instance.facts.ports
    addresses = [(ip["address"], ip["mac"]) for ip in payload["ip_addresses"]]
    assert addresses == [(port.definition.fixed_ips[0].ip_address, port.definition.mac_address)]


async def test_failed_operation_tells_its_error_with_the_fault(one: Plane) -> None:
    listener = await listening(one)
    for host in one.hosts:
        faults(one, host).fail_next("ensure_running", HypervisorError(reason="no luck"))
    await one.created()
    await until_told(listener, "create", "error")
    told = listener.of("create")
    assert set(told) == {"start", "error"}
    assert told["error"].priority == "ERROR"
    payload = told["error"].payload
    assert (payload["state"], payload["fault"]["exception"]) == ("error", "NoValidHost")
    assert "no luck" in payload["fault"]["exception_message"]
    assert (payload["host"], payload["ip_addresses"]) == (None, [])


async def test_start_of_a_long_operation_is_told_while_it_runs(one: Plane) -> None:
    """What had been recorded was told when an operation ended, or half a minute later: the start of a reboot that waited
    for its guest was news of the past."""
    listener = await listening(one)
    instance = await one.created()
    held = one.around_step = Held("stop guest")
    await one.control.lifecycle.stop(one.context(), instance)
    await held.wait()
    await until_told(listener, "stop", "start")
    held.go.set()
    await one.settled()


async def test_nothing_recorded_is_lost_over_a_restart(tmp_path: Path, image_file: Path) -> None:
    async with prepared(tmp_path, image_file) as one:
        instance = await one.created()
        for loop in one.control.conductor._loops:
            if loop.get_name() == "conductor outbox":
                loop.cancel()  # dies before it has told
        await one.control.lifecycle.stop(one.context(), instance)
        await one.settled()
        waiting = await notifications_fetch(one.control.store, 100, one.control.conductor.id)
        kinds = [msgspec.msgpack.decode(body, type=Notification).event_type for _, body in waiting]
        assert kinds[-2:] == ["instance.stop.start", "instance.stop.end"]
    told = Listener()
    one = Plane(tmp_path)
    await hear_notifications(one.control.bus, told)
    await one.control.open()
    try:
        await until_told(told, "stop", "end")

        async def empty() -> bool:
            return not await notifications_fetch(one.control.store, 1)

        await until("the outbox is empty", empty)
    finally:
        await one.control.close()
        one.world.close()


async def test_more_than_one_batch_is_told_in_order(one: Plane) -> None:
    listener = await listening(one)
    notifications = [
        Notification(f"{number:016x}", f"instance.test.{number}", now_us(), {}, "test") for number in range(450)
    ]
    await one.control.store.write(*(notification_insert(notification) for notification in notifications))
    one.control.conductor._outbox.nudge()
    await until_told(listener, "test", "449")
    numbers = [int(kind) for kind in listener.of("test")]
    assert numbers == sorted(numbers) == list(range(450))


async def test_records_of_instances_deleted_long_ago_go_and_others_stay(one: Plane) -> None:
    gone, kept = await one.created("gone"), await one.created("kept")
    await one.control.lifecycle.migrate(one.context(), gone)
    await one.settled()
    await one.control.lifecycle.delete(one.context(), await one.fetch(gone.id))
    await one.settled()
    store = one.control.store
    assert await migrations_of_instance(store, gone.id)
    await store.write(*operations_prune(now_us() - 86_400_000_000))
    assert (await one.fetch(gone.id)).vm_state is VmState.DELETED, "not old enough"
    await store.write(*operations_prune(now_us() + 1))
    left = {
        table: len(await store.read(f"SELECT 1 FROM {table} WHERE {column} = :id", {"id": gone.id}))
        for table, column in (("instances", "id"), ("operations", "instance_id"), ("moves", "instance_id"))
    }
    assert left == {"instances": 0, "operations": 0, "moves": 0}
    orphans = await store.read("SELECT 1 FROM steps WHERE operation_id NOT IN (SELECT id FROM operations)")
    assert not orphans
    assert len(await one.journal(kept.id)) > 5
    assert await one.findings() == []
