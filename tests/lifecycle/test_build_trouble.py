"""Builds that cannot succeed, or succeed elsewhere: nothing leaks, and the fault says why."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import msgspec
import pytest

from instar.clock import now_us
from instar.config import SimulatedSettings
from instar.errors import DiskFull, HypervisorError
from instar.images.fields import Caller
from instar.model.instance import Instance
from instar.model.network import FixedIp, RequestedNetwork
from instar.model.states import VmState
from instar.store import networks as network_sql
from instar.store.contract import WriteConflict
from instar.store.flavors import flavor_delete
from instar.store.network_records import PORTS, PortRecord
from tests.lifecycle.harness import SETTINGS, Plane, plane, prepared
from tests.lifecycle.watching import Held, check_no_trace, faults

ADMIN = Caller("admin", True)


async def check_failed(one: Plane, instance_id: str) -> Instance:
    """The build ended in error, its record says nothing of a host or an address, and no trace of it is anywhere."""
    ended = await one.fetch(instance_id)
    assert (ended.vm_state, ended.task_state, ended.host) == (VmState.ERROR, None, None)
    assert ended.facts.ports == ()
    assert ended.facts.fault is not None
    assert (await one.last_operation(instance_id)).result == "Error"
    await check_no_trace(one)
    return ended


async def test_image_deleted_before_it_is_found_fails_the_build_and_the_record_names_no_host(one: Plane) -> None:
    """An image that is gone is no reason to try another host, so the error left the build without clearing the host and
    the addresses that the failed attempt had written to the record: the server showed addresses it did not have."""
    held = one.around_step = Held("find image")
    instance = await one.create()
    await held.wait()
    image = await one.image()
    await one.control.images.delete(image.id, ADMIN)
    held.go.set()
    await one.settled()
    ended = await check_failed(one, instance.id)
    assert ended.facts.fault is not None
    assert ended.facts.fault.message == f"Image {image.id} could not be found."


async def test_image_deleted_before_a_host_fetched_it_fails_the_build(one: Plane) -> None:
    held = one.around_step = Held("fetch image")
    instance = await one.create()
    await held.wait()
    image = await one.image()
    await one.control.images.delete(image.id, ADMIN)
    held.go.set()
    await one.settled()
    ended = await check_failed(one, instance.id)
    assert ended.facts.fault is not None
    assert image.id in ended.facts.fault.message


async def test_image_deleted_after_a_host_fetched_it_does_not_disturb_the_build(one: Plane) -> None:
    held = one.around_step = Held("create root disk")
    instance = await one.create()
    await held.wait()
    await one.control.images.delete((await one.image()).id, ADMIN)
    held.go.set()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert (ended.vm_state, ended.facts.fault) == (VmState.ACTIVE, None)
    # A hard reboot makes the domain anew without the image, from what is on the disk.
    await one.control.lifecycle.reboot(one.context(), ended, hard=True)
    await one.settled()
    assert (await one.fetch(instance.id)).facts.fault is None


async def test_flavor_deleted_during_a_build_changes_nothing(one: Plane) -> None:
    held = one.around_step = Held("claim")
    instance = await one.create()
    await held.wait()
    await flavor_delete(one.control.store, instance.spec.flavor.id)
    held.go.set()
    await one.settled()
    ended = await one.fetch(instance.id)
    assert ended.vm_state is VmState.ACTIVE
    assert ended.spec.flavor == instance.spec.flavor


async def new_port(one: Plane, ip_address: str) -> str:
    (network,) = await one.control.store.read("SELECT network_id AS id, id AS subnet FROM subnets")
    port = PortRecord(
        id=str(uuid.uuid4()), network_id=network["id"], project_id="demo", mac_address="fa:16:3e:00:00:01",
        created_at=now_us(), updated_at=now_us(), fixed_ips=(FixedIp(network["subnet"], ip_address, 24),),
    )  # fmt: skip
    take = network_sql.address_take(network["subnet"], ip_address, port.id, taken=WriteConflict())
    await one.control.store.write(PORTS.insert(port), take)
    return port.id


async def test_the_same_port_for_two_servers_at_once_goes_to_one_and_the_other_says_which_port(one: Plane) -> None:
    port_id = await new_port(one, "10.77.0.200")
    networks = (RequestedNetwork(port_id=port_id),)
    drafts = [await one.new(name, networks=networks) for name in ("one", "two")]
    made = await asyncio.gather(*(one.control.lifecycle.create(one.context(), [draft]) for draft in drafts))
    await one.settled()
    ended = [await one.fetch(instance.id) for (instance,) in made]
    winner, loser = sorted(ended, key=lambda instance: instance.vm_state.value)
    assert (winner.vm_state, loser.vm_state) == (VmState.ACTIVE, VmState.ERROR)
    assert loser.facts.fault is not None
    assert (loser.facts.fault.code, loser.facts.fault.message) == (409, f"Port {port_id} is still in use.")
    assert (loser.host, loser.facts.ports) == (None, ())
    assert await one.control.networks.port_owners() == {port_id: winner.id}
    assert await one.guests() == {winner.id: winner.host}
    assert await one.findings() == []
    # The port is the user's own: it outlives the server that had it.
    await one.control.lifecycle.delete(one.context(), winner)
    await one.settled()
    await check_no_trace(one)
    assert await one.control.store.read("SELECT id FROM ports WHERE id = :id", {"id": port_id})


async def test_no_free_address_fails_the_build_at_once_and_a_deleted_server_makes_room(
    tmp_path: Path, image_file: Path
) -> None:
    async with plane(tmp_path) as one:
        await one.control.images.register("tiny", image_file, disk_format="raw", properties={})
        await one.control.networks.bootstrap("10.78.0.0/30")  # the gateway and one guest
        first = await one.created("first")
        assert first.vm_state is VmState.ACTIVE
        second = await one.created("second")
        assert (second.vm_state, second.host) == (VmState.ERROR, None)
        assert second.facts.fault is not None
        assert "No more addresses are available on network" in second.facts.fault.message
        names = [step.name for step in await one.journal(second.id)]
        assert "claim (2)" not in names, "no other host has more addresses"
        for instance in (first, second):
            await one.control.lifecycle.delete(one.context(), instance)
        await one.settled()
        await check_no_trace(one)
        assert (await one.created("third")).vm_state is VmState.ACTIVE


async def test_all_hosts_full_says_so_for_each_filter_and_each_host(tmp_path: Path, image_file: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, simulated=SimulatedSettings(hosts=3, memory_mib=600))
    async with prepared(tmp_path, image_file, settings) as one:
        big = msgspec.structs.replace((await one.new()).spec.flavor, memory_mib=500)
        instance = await one.created(flavor=big)
        ended = await check_failed(one, instance.id)
        assert ended.facts.fault is not None
        assert ended.facts.fault.message == "No valid host was found. capacity: 3 hosts refused."
        lines = ended.facts.fault.details.splitlines()
        assert [line.split(":")[:2] for line in sorted(lines)] == [[host, " capacity"] for host in one.hosts]


async def test_the_next_candidate_is_used_when_the_first_fails(one: Plane) -> None:
    async def fail_first(name: str, call):  # type: ignore[no-untyped-def]
        if name == "start guest":
            raise HypervisorError(reason="no luck here")
        return await call()

    one.around_step = fail_first
    instance = await one.created()
    assert (instance.vm_state, instance.facts.fault) == (VmState.ACTIVE, None)
    failed_on = [step.host or "" for step in await one.journal(instance.id) if step.name == "start guest"]
    assert instance.host not in failed_on
    assert await one.guests() == {instance.id: instance.host}
    assert await one.findings() == []


async def test_no_more_than_the_set_number_of_hosts_is_tried_and_the_fault_has_a_reason_for_each(
    tmp_path: Path, image_file: Path
) -> None:
    settings = msgspec.structs.replace(SETTINGS, simulated=SimulatedSettings(hosts=5))
    async with prepared(tmp_path, image_file, settings) as one:
        for host in one.hosts:
            faults(one, host).fail_next("ensure_running", HypervisorError(reason=f"{host} cannot"))
        instance = await one.created()
        ended = await check_failed(one, instance.id)
        assert ended.facts.fault is not None
        tried = [step.host for step in await one.journal(instance.id) if step.name.startswith("start guest")]
        assert len(set(tried)) == SETTINGS.lifecycle.build_hosts_max == 3
        assert ended.facts.fault.message.startswith("No valid host was found. Tried 3: The hypervisor failed: ")
        for host in tried:
            assert f"{host}: The hypervisor failed: {host} cannot" in ended.facts.fault.details.splitlines()


async def test_disk_full_while_spawning_is_undone_and_names_the_file_system(one: Plane) -> None:
    for host in one.hosts:
        faults(one, host).disk_full = True
    instance = await one.created()
    ended = await check_failed(one, instance.id)
    assert ended.facts.fault is not None
    assert "No space left on file system / of the host." in ended.facts.fault.message
    assert "No space left on file system / of host sim-" in ended.facts.fault.details
    assert "/" not in ended.facts.fault.message.replace("file system / of", ""), "a path is shown"


async def test_disk_that_fills_up_on_one_host_moves_the_build_to_another(one: Plane) -> None:
    for host in one.hosts[:2]:
        faults(one, host).fail_next("ensure_disk", DiskFull(filesystem="/", host=host), after_work=True)
    instance = await one.created()
    assert (instance.vm_state, instance.facts.fault) == (VmState.ACTIVE, None)
    assert await one.guests() == {instance.id: instance.host}
    assert await one.findings() == []


@pytest.mark.parametrize("method", ["ensure_image", "ensure_disk", "ensure_ports", "ensure_running"])
async def test_a_host_that_hangs_costs_a_deadline_and_the_build_goes_elsewhere(
    tmp_path: Path, image_file: Path, method: str
) -> None:
    engine = msgspec.structs.replace(SETTINGS.engine, step_deadline_s=0.8)
    async with prepared(tmp_path, image_file, msgspec.structs.replace(SETTINGS, engine=engine)) as one:
        first = (await one.created("first")).host
        stuck = [host for host in one.hosts if host != first]
        for host in stuck:
            faults(one, host).hang_next(method, after_work=True)
        instance = await one.created("second")
        assert (instance.vm_state, instance.host) == (VmState.ACTIVE, first), instance.facts.fault
        # What hung goes on when nobody waits for it any more: the host is cleaned up after it.
        for host in stuck:
            faults(one, host).release()
        await asyncio.sleep(0.05)
        for host in one.hosts:
            await one.control.reconciler.reconcile_host(host)
        assert set((await one.guests()).values()) == {first}
        assert await one.findings() == []
