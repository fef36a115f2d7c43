"""How a server is shown, at each microversion: one table of additions, compiled once for a version and a kind of reader.

Called for one server and for lists of a thousand, so each addition is a small function on the instance.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from instar.api.host_directory import HostSeen
from instar.clock import iso
from instar.lifecycle.definition import boots_from_volume
from instar.lifecycle.volumes import ends_with_instance
from instar.model.instance import Flavor, Instance
from instar.model.states import VmState

Json = dict[str, Any]

_WITH_PROGRESS = frozenset({"ACTIVE", "BUILD", "REBUILD", "RESIZE", "VERIFY_RESIZE", "MIGRATING"})
ROOT_DEVICE = "/dev/vda"


class Scene(NamedTuple):
    """What a view needs besides the instance: the address for links, what hosts are like now (empty for others than
    admins), and in which zone each is."""

    base_url: str
    version: int
    hosts: dict[str, HostSeen]
    zone_of: Callable[[str], str]


class Addition(NamedTuple):
    """A field of the server view that came with microversion 2.`since`. `admin`: shown to admins only (until microversion
    2.`admin_until`, when that is set). `in_update`: also in the answer to an update before 2.75. `in_list`: in lists."""

    since: int
    name: str
    value: Callable[[Instance, Scene], Any]
    admin: bool = False
    admin_until: int | None = None
    in_update: bool = False
    in_list: bool = True


@lru_cache(maxsize=65_536)
def host_id(project_id: str, host: str | None) -> str:
    """A name for a host that tells a project which of its servers share one, and nothing else."""
    return hashlib.sha224(f"{project_id}{host}".encode()).hexdigest() if host else ""


@lru_cache(maxsize=65_536)
def _second(seconds: int) -> str:
    """Formatting a time costs more than all else in a view, and most times were shown before."""
    return iso(seconds * 1_000_000)


def _time(value: int | None) -> str | None:
    if value is None:
        return None
    seconds, micros = divmod(value, 1_000_000)
    return f"{_second(seconds)[:-1]}.{micros:06d}"


def addresses(instance: Instance) -> Json:
    found: Json = {}
    for port in instance.facts.ports:
        definition = port.definition
        entries = found.setdefault(port.network_name, [])
        for fixed in definition.fixed_ips:
            address = fixed.ip_address
            entries.append(
                {
                    "version": 6 if ":" in address else 4,
                    "addr": address,
                    "OS-EXT-IPS:type": "fixed",
                    "OS-EXT-IPS-MAC:mac_addr": definition.mac_address,
                }
            )
    return found


def _image(instance: Instance, scene: Scene) -> Json | str:
    image = instance.spec.image
    if image is None or boots_from_volume(instance):
        return ""
    return {"id": image.id, "links": [{"rel": "bookmark", "href": f"{scene.base_url}/images/{image.id}"}]}


def _flavor(instance: Instance, scene: Scene) -> Json:
    flavor = instance.spec.flavor
    if scene.version >= 47:
        return embedded_flavor(flavor)
    return {"id": flavor.id, "links": [{"rel": "bookmark", "href": f"{scene.base_url}/flavors/{flavor.id}"}]}


def embedded_flavor(flavor: Flavor) -> Json:
    return {
        "original_name": flavor.name, "vcpus": flavor.vcpus, "ram": flavor.memory_mib, "disk": flavor.root_gib,
        "ephemeral": flavor.ephemeral_gib, "swap": flavor.swap_mib, "extra_specs": flavor.extra_specs,
    }  # fmt: skip


def _zone(instance: Instance, scene: Scene) -> str:
    """The zone of its host now; while it has none, the one that was asked for."""
    if instance.host:
        return scene.zone_of(instance.host)
    return instance.availability_zone or ""


def _property(name: str) -> Callable[[Instance, Scene], str]:
    return lambda instance, _: instance.spec.image.properties.get(name, "") if instance.spec.image else ""


def encoded_user_data(instance: Instance) -> str | None:
    data = instance.spec.user_data
    return base64.b64encode(data).decode() if data is not None else None


def _hypervisor(instance: Instance, scene: Scene) -> str | None:
    seen = scene.hosts.get(instance.host) if instance.host else None
    return seen.hypervisor_hostname if seen else instance.host


def _host_status(instance: Instance, scene: Scene) -> str:
    if not instance.host:
        return ""
    seen = scene.hosts.get(instance.host)
    return seen.status if seen else "UNKNOWN"


def _trusted(instance: Instance, _: Scene) -> list[str] | None:
    trusted = instance.spec.trusted_image_certificates
    return list(trusted) if trusted is not None else None


def _volumes(instance: Instance, scene: Scene) -> list[Json]:
    found: list[Json] = []
    for volume in instance.facts.volumes:
        view: Json = {"id": volume.volume_id}
        if scene.version >= 3:
            view["delete_on_termination"] = ends_with_instance(instance, volume)
        found.append(view)
    return found


_ATTRIBUTE = "OS-EXT-SRV-ATTR:"
ADDITIONS: tuple[Addition, ...] = (
    Addition(1, "OS-DCF:diskConfig", lambda i, _: i.spec.disk_config, in_update=True),
    Addition(1, "OS-EXT-AZ:availability_zone", _zone),
    Addition(1, "config_drive", lambda i, _: "True" if i.spec.config_drive else ""),
    Addition(1, "key_name", lambda i, _: i.spec.key_name),
    Addition(1, "OS-SRV-USG:launched_at", lambda i, _: _time(i.launched_at)),
    Addition(1, "OS-SRV-USG:terminated_at", lambda i, _: _time(i.terminated_at)),
    Addition(1, _ATTRIBUTE + "host", lambda i, _: i.host, admin=True),
    Addition(1, _ATTRIBUTE + "instance_name", lambda i, _: i.domain_name, admin=True),
    Addition(1, _ATTRIBUTE + "hypervisor_hostname", _hypervisor, admin=True),
    Addition(1, "OS-EXT-STS:task_state", lambda i, _: i.task_state),
    Addition(1, "OS-EXT-STS:vm_state", lambda i, _: i.vm_state),
    Addition(1, "OS-EXT-STS:power_state", lambda i, _: int(i.power_state)),
    Addition(1, "os-extended-volumes:volumes_attached", _volumes),
    Addition(3, _ATTRIBUTE + "hostname", lambda i, _: i.hostname, admin=True, admin_until=89),
    Addition(3, _ATTRIBUTE + "reservation_id", lambda i, _: i.reservation_id, admin=True),
    Addition(3, _ATTRIBUTE + "launch_index", lambda i, _: i.spec.launch_index, admin=True),
    Addition(3, _ATTRIBUTE + "kernel_id", _property("kernel_id"), admin=True),
    Addition(3, _ATTRIBUTE + "ramdisk_id", _property("ramdisk_id"), admin=True),
    Addition(3, _ATTRIBUTE + "root_device_name", lambda i, _: ROOT_DEVICE, admin=True),
    Addition(3, _ATTRIBUTE + "user_data", lambda i, _: encoded_user_data(i), admin=True),
    Addition(9, "locked", lambda i, _: i.locked_by is not None, in_update=True),
    Addition(16, "host_status", _host_status, admin=True),
    Addition(19, "description", lambda i, _: i.spec.description, in_update=True),
    Addition(26, "tags", lambda i, _: i.spec.tags, in_update=True),
    Addition(63, "trusted_image_certificates", _trusted, in_update=True),
    Addition(71, "server_groups", lambda i, _: [i.spec.group_id] if i.spec.group_id else [], in_update=True, in_list=False),
    Addition(73, "locked_reason", lambda i, _: i.spec.locked_reason, in_update=True),
    Addition(96, "pinned_availability_zone", lambda i, _: i.spec.availability_zone),
)  # fmt: skip

FULL, IN_LIST, UPDATE = "full", "list", "update"
Fields = tuple[tuple[str, Callable[[Instance, Scene], Any]], ...]


@lru_cache(maxsize=1024)
def _fields(version: int, is_admin: bool, kind: str) -> Fields:
    """The additions that are shown at a version; `kind` is FULL, IN_LIST or UPDATE (the answer to a PUT)."""
    shown = []
    for one in ADDITIONS:
        for_admins = one.admin and (one.admin_until is None or version <= one.admin_until)
        if version < one.since or (for_admins and not is_admin):
            continue
        if (kind == IN_LIST and not one.in_list) or (kind == UPDATE and version < 75 and not one.in_update):
            continue
        shown.append((one.name, one.value))
    return tuple(shown)


def server_view(instance: Instance, scene: Scene, *, is_admin: bool, kind: str = FULL) -> Json:
    """One server, as `GET /servers/{id}` shows it."""
    status = instance.status
    spec, facts, base = instance.spec, instance.facts, scene.base_url
    view: Json = {
        "id": instance.id,
        "name": instance.name,
        "status": status,
        "tenant_id": instance.project_id,
        "user_id": instance.user_id,
        "metadata": spec.metadata,
        "hostId": host_id(instance.project_id, instance.host),
        "image": _image(instance, scene),
        "flavor": _flavor(instance, scene),
        "created": _second(instance.created_at // 1_000_000),
        "updated": _second(instance.updated_at // 1_000_000),
        "addresses": addresses(instance),
        "accessIPv4": spec.access_ip_v4,
        "accessIPv6": spec.access_ip_v6,
        "links": [
            {"rel": "self", "href": f"{base}/v2.1/servers/{instance.id}"},
            {"rel": "bookmark", "href": f"{base}/servers/{instance.id}"},
        ],
    }
    if status in _WITH_PROGRESS:
        view["progress"] = instance.progress
    if facts.fault is not None:
        fault = {"code": facts.fault.code, "created": iso(facts.fault.created_at), "message": facts.fault.message}
        if is_admin and facts.fault.details:
            fault["details"] = facts.fault.details
        view["fault"] = fault
    for name, value in _fields(scene.version, is_admin, kind):
        view[name] = value(instance, scene)
    if (kind != UPDATE or scene.version >= 75) and instance.vm_state is not VmState.DELETED:
        view["security_groups"] = [{"name": name} for name in spec.security_group_names or spec.security_groups]
    return view


def server_brief(instance_id: str, name: str, base_url: str) -> Json:
    """One server, as `GET /servers` shows it."""
    return {
        "id": instance_id,
        "name": name,
        "links": [
            {"rel": "self", "href": f"{base_url}/v2.1/servers/{instance_id}"},
            {"rel": "bookmark", "href": f"{base_url}/servers/{instance_id}"},
        ],
    }
