"""What a host is told of a guest, made from the instance's record alone: pure functions, no waiting.

Build uses it once; a hard reboot makes it anew from what the database says now.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec

from instar.errors import Conflict, ImageGone, NotFound
from instar.images.contract import ImageService
from instar.model.guest import ConfigDrive, DiskDefinition, GuestDefinition, ImageSource
from instar.model.instance import Flavor, Instance, InstanceSpec, InstanceVolume
from instar.model.network import InstancePort
from instar.model.volume import VolumeDisk

GIB = 1 << 30
MIB = 1 << 20
ROOT, EPHEMERAL, SWAP, RESCUE = "root", "ephemeral0", "swap", "rescue"


def disks_of(instance: Instance, source: ImageSource | None) -> tuple[DiskDefinition, ...]:
    """Root (from the image; a flavor without a disk takes the image's size), then ephemeral, then swap. One that is booted
    from a volume has no root disk of its own; one that is rescued boots from the rescue disk, and has the others beside."""
    flavor, rescue = instance.spec.flavor, instance.facts.rescue
    disks = []
    if rescue is not None:
        disks.append(DiskDefinition(RESCUE, rescue.virtual_size_bytes))
    if not boots_from_volume(instance):
        virtual_size = source.virtual_size_bytes if source else instance_image_size(instance)
        disks.append(DiskDefinition(ROOT, max(flavor.root_gib * GIB, virtual_size), source))
    if size_gib := ephemeral_gib(instance.spec):
        disks.append(DiskDefinition(EPHEMERAL, size_gib * GIB))
    if size_mib := swap_mib(instance.spec):
        disks.append(DiskDefinition(SWAP, size_mib * MIB))
    return tuple(disks)


def ephemeral_gib(spec: InstanceSpec) -> int:
    """The flavor's, where no smaller one was asked for."""
    return spec.flavor.ephemeral_gib if spec.ephemeral_gib is None else spec.ephemeral_gib


def swap_mib(spec: InstanceSpec) -> int:
    """The flavor's, where no smaller one was asked for."""
    return spec.flavor.swap_mib if spec.swap_mib is None else spec.swap_mib


def claimed_flavor(instance: Instance, flavor: Flavor | None = None) -> Flavor:
    """What the instance takes of a host with this flavor (None: its own): no root disk, where that is a volume."""
    flavor = flavor or instance.spec.flavor
    return msgspec.structs.replace(flavor, root_gib=0) if boots_from_volume(instance) else flavor


def boots_from_volume(instance: Instance) -> bool:
    """Its root is a volume: it has no root disk on its host."""
    attached = any(volume.boot_index == 0 for volume in instance.facts.volumes)
    return attached or any(volume.boot_index == 0 for volume in instance.spec.volumes)


def instance_image_size(instance: Instance) -> int:
    return instance.spec.image.virtual_size_bytes if instance.spec.image else 0


async def source_if_there(images: ImageService, instance: Instance) -> ImageSource | None:
    """The image's data, for a host that may have to fetch it again. None: the image is gone, what is on disk must do."""
    if instance.spec.image is None or boots_from_volume(instance):
        return None
    try:
        return await images.image_source(instance.spec.image.id)
    except (ImageGone, NotFound):
        return None


def guest_of(
    instance: Instance, disks: tuple[DiskDefinition, ...], ports: tuple[InstancePort, ...]
) -> GuestDefinition:
    """The guest as its host defines it."""
    flavor = instance.spec.flavor
    properties = dict(instance.spec.image.properties) if instance.spec.image else {}
    hardware = {name: value for name, value in properties.items() if name.startswith(("hw_", "os_"))}
    return GuestDefinition(
        instance_id=instance.id,
        name=instance.domain_name,
        vcpus=flavor.vcpus,
        memory_mib=flavor.memory_mib,
        disks=disks,
        ports=tuple(port.definition for port in ports),
        config_drive=config_drive_of(instance, ports) if instance.spec.config_drive else None,
        project_id=instance.project_id,
        display_name=instance.name,
        properties=hardware,
        volumes=tuple(volume_disk(volume, instance) for volume in instance.facts.volumes if volume.connection),
    )


def volume_disk(volume: InstanceVolume, instance: Instance) -> VolumeDisk:
    """A volume as its host plugs it.

    While the instance is rescued nothing is booted from a volume, and the names of devices are shifted by one: its own
    disk is the second, whatever names volumes have otherwise."""
    assert volume.connection is not None, "it was connected to the host before"
    return VolumeDisk(
        volume_id=volume.volume_id,
        connection=volume.connection,
        device="" if instance.facts.rescue else volume.device,
        boot_index=None if instance.facts.rescue else volume.boot_index,
        bus=volume.bus,
        tag=volume.tag,
        shareable=volume.multiattach,
    )


def config_drive_of(instance: Instance, ports: tuple[InstancePort, ...]) -> ConfigDrive:
    """meta_data.json, network_data.json and user_data, as cloud-init reads them (OpenStack metadata format)."""
    spec = instance.spec
    meta: dict[str, Any] = {
        "uuid": instance.id,
        "name": instance.name,
        "hostname": instance.hostname,
        "project_id": instance.project_id,
        "availability_zone": instance.availability_zone or "nova",
        "launch_index": 0,
        "meta": spec.metadata,
        "devices": [
            {"type": "nic", "mac": port.definition.mac_address, "tags": [port.tag]} for port in ports if port.tag
        ],
    }
    if spec.key_name and spec.key_public:
        meta["public_keys"] = {spec.key_name: spec.key_public}
        meta["keys"] = [{"name": spec.key_name, "type": "ssh", "data": spec.key_public}]
    if spec.personality:
        meta["files"] = [
            {"path": path, "content_base64": base64.b64encode(content).decode("ascii")}
            for path, content in spec.personality.items()
        ]
    return ConfigDrive(json.dumps(meta), json.dumps(_network_data(ports)), spec.user_data)


def _network_data(ports: tuple[InstancePort, ...]) -> dict[str, Any]:
    links, networks, services = [], [], []
    for number, port in enumerate(ports):
        definition = port.definition
        link = definition.tap_name
        links.append(
            {
                "id": link, "vif_id": definition.id, "type": "bridge", "mtu": definition.network.mtu,
                "ethernet_mac_address": definition.mac_address,
            }
        )  # fmt: skip
        subnets = {subnet.id: subnet for subnet in definition.network.subnets}
        for address in definition.fixed_ips:
            subnet = subnets[address.subnet_id]
            networks.append(
                {
                    "id": f"network{number}", "link": link, "type": "ipv4_dhcp" if subnet.dhcp_enabled else "ipv4",
                    "network_id": definition.network.id,
                }
            )  # fmt: skip
            services += [{"type": "dns", "address": server} for server in subnet.dns_nameservers]
    return {"links": links, "networks": networks, "services": services}


def host_of(instance: Instance) -> str:
    """The host that the instance is on. Raises Conflict for one that never got to a host."""
    if instance.host is None:
        raise Conflict(f"Instance {instance.id} is on no host.")
    return instance.host
