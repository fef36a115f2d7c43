"""Reboot, soft and hard (LIFECYCLE section 4).

Soft: the guest is asked by ACPI to shut down, and started again; what proves the reboot is that the domain id changed. A
guest that does not answer in time, or that does not run, is rebooted hard.
Hard: the operator's repair tool. The domain is made anew from what the database says now, its disks kept. A volume that
cannot be reached any more is detached and reported, the guest boots without it.
"""

from __future__ import annotations

import msgspec
import structlog

from instar.engine.run import Run
from instar.errors import HypervisorError, InstarError, LeaseLost, TaskStateConflict, VolumeFailed
from instar.lifecycle import volumes
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import disks_of, guest_of, host_of, source_if_there
from instar.model.guest import GuestState
from instar.model.states import PowerState, TaskState, VmState

log = structlog.get_logger()


class RebootArguments(msgspec.Struct, frozen=True):
    hard: bool


async def reboot(run: Run, cloud: Cloud) -> None:
    hard = msgspec.msgpack.decode(run.operation.arguments, type=RebootArguments).hard
    try:
        if hard:
            await _reboot_hard(run, cloud)
        else:
            await _reboot_soft(run, cloud)
    except (LeaseLost, TaskStateConflict):
        raise
    except InstarError:
        run.failed_state = await _state_after_failure(run)
        raise


async def _reboot_soft(run: Run, cloud: Cloud) -> None:
    host, wait_s = host_of(run.instance), cloud.settings.lifecycle.wait_soft_reboot_seconds
    before = await run.step("note domain id", run.hosts.observe, host)
    if before.domain_id is None:
        log.warning("reboot.guest_was_not_running", instance=run.instance.id)
        return await _reboot_hard(run, cloud)
    outcome = await run.step(
        "shut down guest", run.hosts.await_soft_reboot, host, before.domain_id, wait_s,
        task=TaskState.REBOOT_PENDING, deadline_s=wait_s + 60,
    )  # fmt: skip
    if outcome.outcome == "timed_out":
        log.warning("reboot.goes_on_hard", instance=run.instance.id, waited_s=wait_s)
        return await _reboot_hard(run, cloud)
    state = outcome.state
    if outcome.outcome == "shut_down":
        ports = await run.step("read ports", cloud.networks.ports_of, run.instance.id)
        guest = guest_of(run.instance, disks_of(run.instance, None), ports)
        state = await run.step("start guest", run.hosts.ensure_running, host, guest, task=TaskState.REBOOT_STARTED)
    return await _settle(run, host, state)


async def _reboot_hard(run: Run, cloud: Cloud) -> None:
    instance, hosts, host = run.instance, run.hosts, host_of(run.instance)
    # Recorded before the act: what has to change is the domain id, so doing the act twice reboots once.
    before = await run.step("note domain id", hosts.observe, host)
    ports = await run.step("read ports", cloud.networks.ports_of, instance.id, task=TaskState.REBOOT_PENDING_HARD)
    source = await run.step("find image", source_if_there, cloud.images, instance, on="image")
    disks = disks_of(instance, source)
    if source is not None:
        await run.step("fetch image", hosts.ensure_image, host, source)
        for disk in disks:
            await run.step(f"check {disk.name} disk", hosts.ensure_disk, host, disk)
    plugged = tuple(port.definition for port in ports)
    if plugged:
        await run.step("set up ports", hosts.ensure_ports, host, plugged)
    connected, lost, reason = await volumes.connected_where_possible(run, cloud, host)
    guest = guest_of(connected, disks, ports)
    state = await run.step(
        "restart guest", hosts.ensure_restarted, host, guest, before.domain_id, task=TaskState.REBOOT_STARTED_HARD
    )
    for volume in lost:
        try:
            await run.step(f"let go of volume {volume.device}", cloud.volumes.detach, volume.attachment_id, on="volume")
        except VolumeFailed as error:  # the audit finds an attachment that no instance knows
            log.warning("reboot.volume_stays", volume=volume.volume_id, reason=error.message)
    run.note(facts={"ports": ports, "volumes": connected.facts.volumes})
    await _settle(run, host, state, reason)


async def _settle(run: Run, host: str, state: GuestState, fault: InstarError | None = None) -> None:
    if state.power_state is not PowerState.RUNNING:
        raise HypervisorError(reason="the guest is not running")
    rescued = run.instance.vm_state is VmState.RESCUED  # it boots from the rescue disk again
    await run.settle(VmState.RESCUED if rescued else VmState.ACTIVE, power_state=state.power_state, fault=fault)


async def _state_after_failure(run: Run) -> VmState:
    """A guest that runs is active, whatever failed; one that does not is in error; unknown: as it was."""
    if run.instance.host is None:
        return run.operation.vm_state_before
    try:
        state = await run.step("look at guest", run.hosts.observe, run.instance.host)
    except InstarError:
        return run.operation.vm_state_before
    if state.power_state is not PowerState.RUNNING:
        return VmState.ERROR
    return VmState.RESCUED if run.instance.vm_state is VmState.RESCUED else VmState.ACTIVE
