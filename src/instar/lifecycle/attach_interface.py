"""Attach and detach network interfaces of an instance. Neither has a task_state.

The port that comes was made, or taken, when the request was accepted (`devices.py`): its addresses are in the answer. It is
given back when the operation fails, also where it fails before its first step.
"""

from __future__ import annotations

import msgspec

from instar.engine.run import Run
from instar.errors import InstarError
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import disks_of, guest_of, host_of
from instar.lifecycle.ports import bind_ports_to
from instar.model.guest import GuestDefinition
from instar.model.instance import Instance
from instar.model.network import InstancePort, PortDefinition, RequestedNetwork
from instar.model.operation import Operation


class InterfaceArguments(msgspec.Struct, frozen=True):
    """`port_id` is that of the port, also where it is yet to be made."""

    port_id: str
    requested: RequestedNetwork


def interface_of(operation: Operation) -> InterfaceArguments:
    return msgspec.msgpack.decode(operation.arguments, type=InterfaceArguments)


def took_port(cloud: Cloud, run: Run) -> None:
    """An attach: its port was taken when it was accepted."""
    run.took("take port", cloud.networks.release_port, run.instance.id, interface_of(run.operation).port_id, on="network")


async def attach(run: Run, cloud: Cloud) -> None:
    instance, host, hosts = run.instance, host_of(run.instance), run.hosts
    arguments = interface_of(run.operation)
    before = tuple(port for port in run.facts.ports if port.definition.id != arguments.port_id)
    await run.step("take port", attach_port, cloud, instance, arguments, on="network")
    try:
        ports = await run.step("bind port", bind_ports_to, cloud, instance, host, on="network")
        await run.step("set up ports", hosts.ensure_ports, host, definitions(ports),
                       undo=lambda on, _: hosts.ensure_ports(on, definitions(before)))  # fmt: skip
        guest = _guest_with(instance, ports)
        await run.step("plug interface", hosts.ensure_port_plugged, host, guest, arguments.port_id,
                       undo=hosts.ensure_port_not_plugged)  # fmt: skip
        run.note(facts={"ports": ports})
    except InstarError:
        run.note(facts={"ports": before})
        raise
    await run.settle()


async def detach(run: Run, cloud: Cloud) -> None:
    """Until the guest has let go of it everything can be put back; from then on the port is gone."""
    instance, host, hosts = run.instance, host_of(run.instance), run.hosts
    port_id = interface_of(run.operation).port_id
    ports = await run.step("read ports", cloud.networks.ports_of, instance.id)
    rest = tuple(port for port in ports if port.definition.id != port_id)
    guest = _guest_with(instance, ports)
    await run.step("unplug interface", hosts.ensure_port_unplugged, host, port_id,
                   undo=lambda on, port_id: hosts.ensure_port_plugged(on, guest, port_id))  # fmt: skip
    await run.step("set up ports", hosts.ensure_ports, host, definitions(rest),
                   undo=lambda on, _: hosts.ensure_ports(on, definitions(ports)))  # fmt: skip
    run.keep()
    run.note(facts={"ports": rest})
    # What undoes this is to do it: the guest has let go of it already.
    await run.step("release port", cloud.networks.release_port, instance.id, port_id, undo=cloud.networks.release_port)
    await run.settle()


async def attach_port(cloud: Cloud, instance: Instance, arguments: InterfaceArguments) -> InstancePort:
    """The port is the instance's, with its addresses."""
    return await cloud.networks.attach(
        instance.id,
        arguments.port_id,
        project_id=instance.project_id,
        hostname=instance.hostname,
        requested=arguments.requested,
        security_groups=instance.spec.security_groups,
        availability_zone=instance.availability_zone or "",
    )


def definitions(ports: tuple[InstancePort, ...]) -> tuple[PortDefinition, ...]:
    return tuple(port.definition for port in ports)


def _guest_with(instance: Instance, ports: tuple[InstancePort, ...]) -> GuestDefinition:
    return guest_of(instance, disks_of(instance, None), ports)
