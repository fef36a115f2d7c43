"""Extra specs of flavors, and which projects may use the private ones."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from instar.api.body import convert
from instar.api.flavors import change_flavor, visible_flavor
from instar.api.resource import ApiRoute, Compute, read_body
from instar.api.servers.actions import decode_action
from instar.api.servers.bodies import Record
from instar.errors import BadRequest, Conflict, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.policy import Policy
from instar.http.request import Request
from instar.model.instance import Flavor
from instar.store.flavors import flavor_access_add, flavor_access_list, flavor_access_remove, flavor_fetch

VALIDATED_SINCE = 86
SPECS_MAX = 256
SpecKey = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[a-zA-Z0-9\-_:. ]{1,255}\Z")]
SpecValue = Annotated[str, Meta(max_length=255)]
_SPECS = "os_compute_api:os-flavor-extra-specs:"
_ACCESS = "os_compute_api:os-flavor-access"

_BOOLEAN = re.compile(r"(?i)true|false|yes|no|on|off|1|0|t|f|y|n")
_INTEGER, _POSITIVE = re.compile(r"\d{1,10}"), re.compile(r"[1-9]\d{0,9}")
_ANY = re.compile(r".*", re.DOTALL)


def _one_of(*words: str) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(word) for word in words))


# Extra specs whose meaning is defined, with what they may be. A key in one of these namespaces that is not here is
# refused from 2.86 on; keys in namespaces that nobody defined are anybody's.
_DEFINED: dict[str, re.Pattern[str]] = {
    "hw:boot_menu": _BOOLEAN, "hw:cpu_cores": _POSITIVE, "hw:cpu_dedicated_mask": _ANY, "hw:cpu_max_cores": _POSITIVE,
    "hw:cpu_max_sockets": _POSITIVE, "hw:cpu_max_threads": _POSITIVE,
    "hw:cpu_policy": _one_of("dedicated", "shared", "mixed"), "hw:cpu_realtime": _BOOLEAN,
    "hw:cpu_realtime_mask": _ANY, "hw:cpu_sockets": _POSITIVE,
    "hw:cpu_thread_policy": _one_of("prefer", "isolate", "require"), "hw:cpu_threads": _POSITIVE,
    "hw:emulator_threads_policy": _one_of("isolate", "share"), "hw:hide_hypervisor_id": _BOOLEAN,
    "hw:input_bus": _one_of("usb", "virtio"), "hw:locked_memory": _BOOLEAN, "hw:maxphysaddr_bits": _POSITIVE,
    "hw:maxphysaddr_mode": _one_of("passthrough", "emulate"), "hw:mem_encryption": _BOOLEAN,
    "hw:mem_encryption_model": _one_of("amd-sev", "amd-sev-es"),
    "hw:mem_page_size": re.compile(r"large|small|any|\d+([kKMGT](i?[bB]?)?)?"), "hw:numa_nodes": _POSITIVE,
    "hw:pci_numa_affinity_policy": _one_of("required", "preferred", "legacy", "socket"), "hw:pmem": _ANY,
    "hw:sound_model": _ANY, "hw:usb_model": _ANY, "hw:serial_port_count": _INTEGER, "hw:tpm_model": _ANY,
    "hw:tpm_version": _one_of("1.2", "2.0"), "hw:tpm_secret_security": _ANY, "hw:video_ram": _INTEGER,
    "hw:vif_multiqueue_enabled": _BOOLEAN, "hw:viommu_model": _ANY, "hw:virtio_packed_ring": _BOOLEAN,
    "hw:watchdog_action": _one_of("none", "pause", "poweroff", "reset", "disabled"),
    "hw_rng:allowed": _BOOLEAN, "hw_rng:rate_bytes": _INTEGER, "hw_rng:rate_period": _INTEGER,
    "hw_video:ram_max_mb": _INTEGER, "os:secure_boot": _one_of("disabled", "required"),
    "pci_passthrough:alias": _ANY, "accel:device_profile": _ANY,
}  # fmt: skip
_DEFINED_PATTERNS = re.compile(
    r"hw:(numa_(cpus|mem)\.\d+|cpu_dedicated_mask)"
    r"|quota:(cpu|memory|disk_io|vif)_[a-z_]+|quota:disk_[a-z_]+"
    r"|(resources|trait|group_policy|capabilities|aggregate_instance_extra_specs)\d*:?.*"
)
_NAMESPACES = ("hw:", "hw_rng:", "hw_video:", "os:", "pci_passthrough:", "accel:", "quota:")


class SpecsBody(Record, frozen=True):
    extra_specs: dict[SpecKey, SpecValue | int | float]


class AccessBody(Record, frozen=True):
    tenant: Annotated[str, Meta(min_length=1, max_length=255)]


class FlavorExtraSpecs(msgspec.Struct, frozen=True):
    compute: Compute

    def routes(self) -> list[ApiRoute]:
        path = "/flavors/{flavor_id}/os-extra_specs"
        return [
            ApiRoute("GET", path, _SPECS + "index", self.index),
            ApiRoute("POST", path, _SPECS + "create", self.create),
            ApiRoute("GET", path + "/{key}", _SPECS + "show", self.show),
            ApiRoute("PUT", path + "/{key}", _SPECS + "update", self.update),
            ApiRoute("DELETE", path + "/{key}", _SPECS + "delete", self.delete),
        ]

    async def index(self, request: Request) -> Answer:
        flavor = await visible_flavor(self.compute, request.context, request.params["flavor_id"])
        return json_answer({"extra_specs": flavor.extra_specs})

    async def show(self, request: Request) -> Answer:
        flavor = await visible_flavor(self.compute, request.context, request.params["flavor_id"])
        key = request.params["key"]
        if key not in flavor.extra_specs:
            raise _missing(flavor.id, key)
        return json_answer({key: flavor.extra_specs[key]})

    async def create(self, request: Request) -> Answer:
        specs = _checked((await read_body(request, SpecsBody)).extra_specs, request.microversion)

        def merged(flavor: Flavor) -> dict[str, str]:
            found = flavor.extra_specs | specs
            if len(found) > SPECS_MAX:
                raise BadRequest(f"A flavor has at most {SPECS_MAX} extra specs.")
            return found

        await change_flavor(self.compute, request.params["flavor_id"], extra_specs=merged)
        return json_answer({"extra_specs": specs})

    async def update(self, request: Request) -> Answer:
        body = decode_action(await request.body())
        key = request.params["key"]
        if len(body) != 1:
            raise BadRequest("Invalid input: exactly one extra spec is needed.")
        if key not in body:
            raise BadRequest("Request body and URI mismatch")
        given = convert({"extra_specs": body}, SpecsBody, request.microversion)
        specs = _checked(given.extra_specs, request.microversion)
        await change_flavor(
            self.compute, request.params["flavor_id"], extra_specs=lambda flavor: flavor.extra_specs | specs
        )
        return json_answer(specs)

    async def delete(self, request: Request) -> Answer:
        key = request.params["key"]

        def without(flavor: Flavor) -> dict[str, str]:
            if key not in flavor.extra_specs:
                raise _missing(flavor.id, key)
            return {name: value for name, value in flavor.extra_specs.items() if name != key}

        await change_flavor(self.compute, request.params["flavor_id"], extra_specs=without)
        return empty_answer(200)


def _missing(flavor_id: str, key: str) -> NotFound:
    return NotFound(f"Flavor {flavor_id} has no extra specs with key {key[:80]}.")


def _checked(specs: dict[str, Any], version: int) -> dict[str, str]:
    """Extra specs as text. From 2.86 those that have a defined meaning must have a value that means something."""
    found = {key: str(value) for key, value in specs.items()}
    if version >= VALIDATED_SINCE:
        for key, value in found.items():
            pattern = _DEFINED.get(key)
            if pattern is None:
                if key.startswith(_NAMESPACES) and not _DEFINED_PATTERNS.fullmatch(key):
                    raise BadRequest(f"Validation failed; extra spec '{key}' does not appear to be a standard extra spec.")
            elif not pattern.fullmatch(value):
                raise BadRequest(f"Validation failed; '{value}' is not a valid value of extra spec '{key}'.")
    return found


class FlavorAccess:
    """Private flavors: the projects that may use one."""

    def __init__(self, compute: Compute, policy: Policy) -> None:
        self._compute = compute
        self._policy = policy

    def routes(self) -> list[ApiRoute]:
        return [
            ApiRoute("GET", "/flavors/{flavor_id}/os-flavor-access", _ACCESS, self.index),
            ApiRoute("POST", "/flavors/{flavor_id}/action", _ACCESS + ":action", self.act),
        ]

    async def index(self, request: Request) -> Answer:
        flavor = await self._flavor(request)
        if flavor.is_public:
            raise NotFound("Access list not available for public flavors.")
        return await self._answer(flavor.id)

    async def act(self, request: Request) -> Answer:
        body = decode_action(await request.body())
        if len(body) != 1:
            raise BadRequest("Malformed request body: it must name exactly one action.")
        key, value = next(iter(body.items()))
        if key not in ("addTenantAccess", "removeTenantAccess"):
            raise BadRequest(f"There is no such action: {key[:80]}")
        project_id = convert(value, AccessBody, request.microversion).tenant
        flavor = await self._flavor(request)
        if not await self._compute.identity.project_exists(project_id):
            raise BadRequest(f"Project ID {project_id} is not a valid project.")
        if key == "addTenantAccess":
            if flavor.is_public and request.microversion >= 7:
                raise Conflict("Can not add access to a public flavor.")
            await flavor_access_add(self._compute.store, flavor.id, project_id)
        else:
            await flavor_access_remove(self._compute.store, flavor.id, project_id)
        return await self._answer(flavor.id)

    async def _flavor(self, request: Request) -> Flavor:
        return await flavor_fetch(self._compute.store, request.params["flavor_id"], visible_to=None)

    async def _answer(self, flavor_id: str) -> Answer:
        projects = await flavor_access_list(self._compute.store, flavor_id)
        found = [{"flavor_id": flavor_id, "tenant_id": project_id} for project_id in projects]
        return json_answer({"flavor_access": found})
