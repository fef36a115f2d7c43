"""What admins see of hosts: compute services, hypervisors, and for everybody the availability zones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from instar.api.body import HostName
from instar.api.host_directory import HostSeen
from instar.api.resource import (
    ApiRoute,
    Compute,
    add_next,
    boolean,
    page_of,
    read_body,
    refuse_unknown,
)
from instar.api.servers.bodies import Record
from instar.clock import iso_us
from instar.errors import BadRequest, Conflict, NotFound
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.store.aggregates import zone_list
from instar.store.hosts import host_delete, host_set_disabled, host_set_forced_down
from instar.store.instance_queries import instance_names_by_host

BINARY = "nova-compute"  # the name by which clients know the service on a host
UUID_SINCE = 53
FORCED_DOWN_SINCE = 11
Reason = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"\S")]
_SERVICES, _HYPERVISORS = "os_compute_api:os-services:", "os_compute_api:os-hypervisors:"


def number_of(uuid: str) -> int:
    """The number that stood for a record before 2.53: made of its uuid, so it needs no table."""
    return int(uuid.replace("-", "")[:8], 16) & 0x7FFFFFFF


class ServiceByHost(Record, frozen=True):
    host: HostName
    binary: Annotated[str, Meta(min_length=1, max_length=255)]
    disabled_reason: Reason | UnsetType = UNSET
    forced_down: bool | UnsetType = UNSET


class ServiceChanges(Record, frozen=True):
    status: Literal["enabled", "disabled"] | UnsetType = UNSET
    disabled_reason: Reason | UnsetType = UNSET
    forced_down: bool | UnsetType = UNSET


class Services(msgspec.Struct, frozen=True):
    """`/os-services`: a compute service for each host."""

    compute: Compute

    def routes(self) -> list[ApiRoute]:
        update = _SERVICES + "update"
        return [
            ApiRoute("GET", "/os-services", _SERVICES + "list", self.index),
            ApiRoute("PUT", "/os-services/enable", update, self.enable, until=52),
            ApiRoute("PUT", "/os-services/disable", update, self.disable, until=52),
            ApiRoute("PUT", "/os-services/disable-log-reason", update, self.disable_with_reason, until=52),
            ApiRoute("PUT", "/os-services/force-down", update, self.force_down, since=FORCED_DOWN_SINCE, until=52),
            ApiRoute("PUT", "/os-services/{service_id}", update, self.update, since=UUID_SINCE),
            ApiRoute("DELETE", "/os-services/{service_id}", _SERVICES + "delete", self.delete),
        ]

    async def index(self, request: Request) -> Answer:
        if request.microversion >= 75:
            refuse_unknown(request, frozenset({"host", "binary"}))
        host, binary = request.query_one("host"), request.query_one("binary")
        zones = await _zone_of_hosts(self.compute)
        found = [
            _service(seen, zones, request.microversion)
            for seen in (await self.compute.hosts.seen(fresh=True)).values()
            if host in (None, seen.name) and binary in (None, BINARY)
        ]
        return json_answer({"services": found})

    async def _named(self, request: Request) -> tuple[HostSeen, ServiceByHost]:
        body = await read_body(request, ServiceByHost)
        seen = (await self.compute.hosts.seen(fresh=True)).get(body.host)
        if seen is None or body.binary != BINARY:
            raise NotFound(f"Could not find binary {body.binary} on host {body.host}.")
        return seen, body

    async def enable(self, request: Request) -> Answer:
        seen, _ = await self._named(request)
        return await self._set_disabled(seen, False, None)

    async def disable(self, request: Request) -> Answer:
        seen, _ = await self._named(request)
        return await self._set_disabled(seen, True, None)

    async def disable_with_reason(self, request: Request) -> Answer:
        seen, body = await self._named(request)
        if isinstance(body.disabled_reason, UnsetType):
            raise BadRequest("Missing disabled reason field")
        return await self._set_disabled(seen, True, body.disabled_reason)

    async def _set_disabled(self, seen: HostSeen, disabled: bool, reason: str | None) -> Answer:
        await self.compute.store.write(host_set_disabled(seen.name, disabled, reason))
        await self.compute.hosts.changed()
        view = {"host": seen.name, "binary": BINARY, "status": "disabled" if disabled else "enabled"}
        if reason is not None:
            view["disabled_reason"] = reason
        return json_answer({"service": view})

    async def force_down(self, request: Request) -> Answer:
        seen, body = await self._named(request)
        if isinstance(body.forced_down, UnsetType):
            raise BadRequest("Missing forced_down field")
        await self.compute.store.write(host_set_forced_down(seen.name, body.forced_down))
        await self.compute.hosts.changed()
        view = {"host": seen.name, "binary": BINARY, "forced_down": body.forced_down}
        return json_answer({"service": view})

    async def update(self, request: Request) -> Answer:
        seen = await self._by_id(request)
        changes = await read_body(request, ServiceChanges)
        statements = []
        if not isinstance(changes.disabled_reason, UnsetType) and changes.status != "disabled":
            raise BadRequest("Specifying disabled_reason requires that status is set to disabled.")
        if not isinstance(changes.status, UnsetType):
            reason = None if isinstance(changes.disabled_reason, UnsetType) else changes.disabled_reason
            statements.append(host_set_disabled(seen.name, changes.status == "disabled", reason))
        if not isinstance(changes.forced_down, UnsetType):
            statements.append(host_set_forced_down(seen.name, changes.forced_down))
        if not statements:
            raise BadRequest("No updates were requested. Fields 'status' or 'forced_down' should be specified.")
        await self.compute.store.write(*statements)
        changed = (await self.compute.hosts.changed())[seen.name]
        return json_answer({"service": _service(changed, await _zone_of_hosts(self.compute), request.microversion)})

    async def delete(self, request: Request) -> Answer:
        seen = await self._by_id(request)
        if (await instance_names_by_host(self.compute.store)).get(seen.name):
            raise Conflict("Unable to delete compute service that is hosting instances. Migrate or delete them first.")
        await self.compute.store.write(*host_delete(seen.name))
        await self.compute.hosts.deleted(seen.name)
        return empty_answer(204)

    async def _by_id(self, request: Request) -> HostSeen:
        wanted = request.params["service_id"]
        for seen in (await self.compute.hosts.seen(fresh=True)).values():
            known = seen.service_id if request.microversion >= UUID_SINCE else str(number_of(seen.service_id))
            if known == wanted:
                return seen
        raise NotFound(f"Service {wanted[:80]} not found.")


async def _zone_of_hosts(compute: Compute) -> dict[str, str]:
    return {host: zone for zone, hosts in (await zone_list(compute.store)).items() for host in hosts}


def _service(seen: HostSeen, zones: dict[str, str], version: int) -> dict[str, Any]:
    view: dict[str, Any] = {
        "id": seen.service_id if version >= UUID_SINCE else number_of(seen.service_id),
        "binary": BINARY,
        "host": seen.name,
        "zone": zones.get(seen.name, ""),
        "status": "disabled" if seen.disabled else "enabled",
        "state": "up" if seen.is_up else "down",
        "updated_at": iso_us(seen.reported_at),
        "disabled_reason": seen.disabled_reason,
    }
    if version >= FORCED_DOWN_SINCE:
        view["forced_down"] = seen.forced_down
    return view


class AvailabilityZones(msgspec.Struct, frozen=True):
    """`/os-availability-zone`: which zones there are; for admins, which hosts are in them."""

    compute: Compute

    def routes(self) -> list[ApiRoute]:
        name = "os_compute_api:os-availability-zone:"
        return [
            ApiRoute("GET", "/os-availability-zone", name + "list", self.index),
            ApiRoute("GET", "/os-availability-zone/detail", name + "detail", self.detail),
        ]

    async def index(self, request: Request) -> Answer:
        return await self._answer(detailed=False)

    async def detail(self, request: Request) -> Answer:
        return await self._answer(detailed=True)

    async def _answer(self, *, detailed: bool) -> Answer:
        seen = await self.compute.hosts.seen()
        found = []
        for zone, names in (await zone_list(self.compute.store)).items():
            hosts = [seen[name] for name in names if name in seen]
            services = {one.name: {BINARY: _zone_service(one)} for one in hosts} if detailed else None
            available = any(not one.disabled for one in hosts)
            found.append({"zoneName": zone, "zoneState": {"available": available}, "hosts": services})
        return json_answer({"availabilityZoneInfo": found})


def _zone_service(seen: HostSeen) -> dict[str, Any]:
    return {"active": not seen.disabled, "available": seen.is_up, "updated_at": iso_us(seen.reported_at)}


class Hypervisors(msgspec.Struct, frozen=True):
    """`/os-hypervisors`: what hosts have, and until 2.87 how much of it is claimed."""

    compute: Compute

    def routes(self) -> list[ApiRoute]:
        path = "/os-hypervisors"
        return [
            ApiRoute("GET", path, _HYPERVISORS + "list", self.index),
            ApiRoute("GET", path + "/detail", _HYPERVISORS + "list-detail", self.detail),
            ApiRoute("GET", path + "/statistics", _HYPERVISORS + "statistics", self.statistics, until=87),
            ApiRoute("GET", path + "/{id}", _HYPERVISORS + "show", self.show),
            ApiRoute("GET", path + "/{id}/uptime", _HYPERVISORS + "uptime", self.uptime, until=87),
            ApiRoute("GET", path + "/{id}/search", _HYPERVISORS + "search", self.search, until=52),
            ApiRoute("GET", path + "/{id}/servers", _HYPERVISORS + "servers", self.servers, until=52),
        ]

    async def index(self, request: Request) -> Answer:
        return await self._list(request, detailed=False)

    async def detail(self, request: Request) -> Answer:
        return await self._list(request, detailed=True)

    async def _list(self, request: Request, *, detailed: bool) -> Answer:
        version: int = request.microversion
        hosts = list((await self.compute.hosts.seen(fresh=True)).values())
        servers, marker = None, None
        if version >= UUID_SINCE:
            hosts = _matching(hosts, request.query_one("hypervisor_hostname_pattern"))
            servers = await self._servers(request)
        if version >= 33:
            hosts, marker = _page(hosts, request, self.compute)
        found: dict[str, Any] = {
            "hypervisors": [_hypervisor(one, version, detailed=detailed, servers=servers) for one in hosts]
        }
        return json_answer(add_next(found, "hypervisors", request, marker))

    async def _servers(self, request: Request) -> dict[str, list[tuple[str, str]]] | None:
        asked = request.query_one("with_servers")
        if asked is None or not boolean("with_servers", asked):
            return None
        return await instance_names_by_host(self.compute.store)

    async def show(self, request: Request) -> Answer:
        seen = await self._by_id(request)
        servers = await self._servers(request) if request.microversion >= UUID_SINCE else None
        return json_answer({"hypervisor": _hypervisor(seen, request.microversion, detailed=True, servers=servers)})

    async def uptime(self, request: Request) -> Answer:
        seen = await self._by_id(request)
        raise BadRequest(f"Hypervisor {seen.hypervisor_hostname} does not report its uptime.")

    async def search(self, request: Request) -> Answer:
        return await self._found(request, None)

    async def servers(self, request: Request) -> Answer:
        return await self._found(request, await instance_names_by_host(self.compute.store))

    async def _found(self, request: Request, servers: dict[str, list[tuple[str, str]]] | None) -> Answer:
        hosts = _matching((await self.compute.hosts.seen(fresh=True)).values(), request.params["id"])
        views = [_hypervisor(one, request.microversion, detailed=False, servers=servers) for one in hosts]
        return json_answer({"hypervisors": views})

    async def statistics(self, request: Request) -> Answer:
        views = [_resources(one) for one in (await self.compute.hosts.seen(fresh=True)).values()]
        sums: dict[str, int] = {"count": len(views)}
        for name in (
            "vcpus", "memory_mb", "local_gb", "vcpus_used", "memory_mb_used", "local_gb_used", "free_ram_mb",
            "free_disk_gb", "current_workload", "running_vms", "disk_available_least",
        ):  # fmt: skip
            sums[name] = sum(view[name] for view in views)
        return json_answer({"hypervisor_statistics": sums})

    async def _by_id(self, request: Request) -> HostSeen:
        wanted = request.params["id"]
        for seen in (await self.compute.hosts.seen(fresh=True)).values():
            known = seen.hypervisor_id if request.microversion >= UUID_SINCE else str(number_of(seen.hypervisor_id))
            if known == wanted:
                return seen
        raise NotFound(f"Hypervisor with ID '{wanted[:80]}' could not be found.")


def _matching(hosts: Iterable[HostSeen], pattern: str | None) -> list[HostSeen]:
    """Hosts whose hypervisor's name contains the text. Raises BadRequest for one that is no name, NotFound for none."""
    if pattern is None:
        return list(hosts)
    if not re.fullmatch(r"[a-zA-Z0-9.\-_%]{1,255}", pattern):
        raise BadRequest("Invalid input for query parameter hypervisor_hostname_pattern.")
    found = [one for one in hosts if pattern.replace("%", "") in one.hypervisor_hostname]
    if not found:
        raise NotFound(f"No hypervisor matching '{pattern}' could be found.")
    return found


def _page(hosts: list[HostSeen], request: Request, compute: Compute) -> tuple[list[HostSeen], str | None]:
    page = page_of(request, compute)
    old = request.microversion < UUID_SINCE
    ids = [str(number_of(one.hypervisor_id)) if old else one.hypervisor_id for one in hosts]
    start = 0
    if page.marker is not None:
        if page.marker not in ids:
            raise BadRequest(f"marker [{page.marker}] not found")
        start = ids.index(page.marker) + 1
    shown = hosts[start : start + page.limit]
    more = start + page.limit < len(hosts)
    return shown, ids[start + page.limit - 1] if more else None


def _resources(seen: HostSeen) -> dict[str, int]:
    have = seen.inventory
    return {
        "vcpus": have.vcpus,
        "memory_mb": have.memory_mib,
        "local_gb": have.disk_gib,
        "vcpus_used": seen.vcpus_claimed,
        "memory_mb_used": seen.memory_claimed_mib,
        "local_gb_used": seen.disk_claimed_gib,
        "free_ram_mb": have.memory_mib - seen.memory_claimed_mib,
        "free_disk_gb": have.disk_gib - seen.disk_claimed_gib,
        "current_workload": 0,
        "running_vms": have.running_vms,
        "disk_available_least": have.free_disk_gib,
    }


def _hypervisor(
    seen: HostSeen, version: int, *, detailed: bool, servers: dict[str, list[tuple[str, str]]] | None
) -> dict[str, Any]:
    view: dict[str, Any] = {
        "id": seen.hypervisor_id if version >= UUID_SINCE else number_of(seen.hypervisor_id),
        "hypervisor_hostname": seen.hypervisor_hostname,
        "state": "up" if seen.is_up else "down",
        "status": "disabled" if seen.disabled else "enabled",
    }
    here = [{"uuid": one, "name": name} for one, name in (servers or {}).get(seen.name, [])]
    if here or (servers is not None and version >= 75):
        view["servers"] = here
    if not detailed:
        return view
    have = seen.inventory
    view |= {
        "hypervisor_type": have.hypervisor_type,
        "hypervisor_version": have.hypervisor_version,
        "host_ip": have.host_ip,
        "service": {
            "id": seen.service_id if version >= UUID_SINCE else number_of(seen.service_id),
            "host": seen.name,
            "disabled_reason": seen.disabled_reason,
        },
    }
    if version >= 88:
        view["uptime"] = None
        return view
    cpu = {
        "arch": have.cpu_arch, "model": have.cpu_model, "vendor": "", "features": list(have.cpu_features),
        "topology": {"sockets": have.vcpus, "cores": 1, "threads": 1},
    }  # fmt: skip
    view["cpu_info"] = cpu if version >= 28 else msgspec.json.encode(cpu).decode()
    return view | _resources(seen)
