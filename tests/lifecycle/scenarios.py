"""The operations that the shared tests break: how to get to where each can begin, and where it ends.

A new operation is one more entry: the suite takes its steps from the journal of a clean run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from instar.model.instance import Instance
from instar.model.states import PowerState, VmState
from tests.lifecycle.harness import Plane

Act = Callable[[Plane, Instance | None], Awaitable[Instance]]


class Scenario(NamedTuple):
    """`failed` are the vm_states in which it may be after a failure that nothing made up for."""

    act: Act
    before: VmState | None
    ends: VmState
    failed: frozenset[VmState]
    power: PowerState


async def _create(plane: Plane, _: Instance | None) -> Instance:
    return await plane.create("victim")


async def _delete(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.delete(plane.context(), instance)
    return instance


async def _soft(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.reboot(plane.context(), instance, hard=False)
    return instance


async def _hard(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.reboot(plane.context(), instance, hard=True)
    return instance


async def _stop(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.stop(plane.context(), instance)
    return instance


async def _start(plane: Plane, instance: Instance | None) -> Instance:
    assert instance is not None
    await plane.control.lifecycle.start(plane.context(), instance)
    return instance


_V, _P = VmState, PowerState
SCENARIOS: Mapping[str, Scenario] = {
    "create": Scenario(_create, None, _V.ACTIVE, frozenset({_V.ACTIVE, _V.ERROR}), _P.RUNNING),
    "reboot-soft": Scenario(_soft, _V.ACTIVE, _V.ACTIVE, frozenset({_V.ACTIVE, _V.ERROR}), _P.RUNNING),
    "reboot-hard": Scenario(_hard, _V.ACTIVE, _V.ACTIVE, frozenset({_V.ACTIVE, _V.ERROR}), _P.RUNNING),
    "stop": Scenario(_stop, _V.ACTIVE, _V.STOPPED, frozenset({_V.ACTIVE}), _P.SHUTDOWN),
    "start": Scenario(_start, _V.STOPPED, _V.ACTIVE, frozenset({_V.STOPPED}), _P.RUNNING),
    "delete": Scenario(_delete, _V.ACTIVE, _V.DELETED, frozenset({_V.ERROR, _V.DELETED}), _P.NOSTATE),
}


async def victim(plane: Plane, scenario: Scenario) -> Instance | None:
    """The instance that the operation is done to, in the state in which it may begin."""
    if scenario.before is None:
        return None
    instance = await plane.created("victim")
    assert instance.vm_state is VmState.ACTIVE, instance.facts.fault
    if scenario.before is VmState.STOPPED:
        await plane.control.lifecycle.stop(plane.context(), instance)
        await plane.settled()
        instance = await plane.fetch(instance.id)
    return instance
