"""Quotas, limits and the small facts of the Block Storage API: what a project may have, and what it has."""

from __future__ import annotations

from typing import Any

import msgspec

from instar.errors import BadRequest, Forbidden
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.store.volume_quotas import (
    DEFAULT_PROJECT,
    volume_limits_reset,
    volume_limits_set,
    volume_usage,
)
from instar.volumes import schemas
from instar.volumes.creation import ZONE
from instar.volumes.listing import flag
from instar.volumes.service import Volumes

# What this API knows limits for and this cloud has none of.
_ABSENT = {"backups": 0, "backup_gigabytes": 0, "groups": 0}


class QuotaRoutes:
    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        self._store = volumes.store

    def routes(self) -> list[Route]:
        one = "/os-quota-sets/{project_id}"
        every = "/os-quota-class-sets/{name}"
        return [
            Route("GET", one, "volume:quotas:show", self.quota_show),
            Route("GET", f"{one}/defaults", "volume:quotas:show", self.quota_defaults),
            Route("GET", f"{one}/detail", "volume:quotas:show", self.quota_detail),
            Route("PUT", one, "volume:quotas:update", self.quota_update),
            Route("DELETE", one, "volume:quotas:update", self.quota_delete),
            Route("GET", every, "volume:quotas:class", self.class_show),
            Route("PUT", every, "volume:quotas:class", self.class_update),
            Route("GET", "/limits", "volume:limits:show", self.limits),
            Route("GET", "/os-availability-zone", "volume:zones:list", self.zones),
            Route("GET", "/extensions", "volume:extensions:list", self.extensions),
        ]

    async def quota_show(self, request: Request) -> Answer:
        usage = request.query_one("usage")
        return await self._shown(request, usage=usage is not None and flag("usage", usage or "true"))

    async def quota_detail(self, request: Request) -> Answer:
        return await self._shown(request, usage=True)

    async def _shown(self, request: Request, *, usage: bool) -> Answer:
        project_id = _project(request)
        limits = {**_ABSENT, **await self._volumes.limits(project_id)}
        shown: dict[str, Any] = dict(limits)
        if usage:
            used = await volume_usage(self._store, project_id)
            shown = {
                name: {"limit": limit, "in_use": used.get(name, 0), "reserved": 0, "allocated": 0}
                for name, limit in limits.items()
            }
        return json_answer({"quota_set": {"id": project_id, **shown}})

    async def quota_defaults(self, request: Request) -> Answer:
        project_id = _project(request)
        return json_answer({"quota_set": {"id": project_id, **_ABSENT, **await self._volumes.limits(DEFAULT_PROJECT)}})

    async def quota_update(self, request: Request) -> Answer:
        project_id = request.params["project_id"]
        await self._set(project_id, (await schemas.read(request, schemas.QuotaBody)).quota_set)
        return json_answer({"quota_set": {**_ABSENT, **await self._volumes.limits(project_id)}})

    async def quota_delete(self, request: Request) -> Answer:
        await volume_limits_reset(self._store, request.params["project_id"])
        return empty_answer(200)

    async def class_show(self, request: Request) -> Answer:
        name = _class(request)
        return json_answer({"quota_class_set": {"id": name, **_ABSENT, **await self._volumes.limits(DEFAULT_PROJECT)}})

    async def class_update(self, request: Request) -> Answer:
        _class(request)
        await self._set(DEFAULT_PROJECT, (await schemas.read(request, schemas.QuotaClassBody)).quota_class_set)
        return json_answer({"quota_class_set": {**_ABSENT, **await self._volumes.limits(DEFAULT_PROJECT)}})

    async def _set(self, project_id: str, limits: schemas.Limits) -> None:
        given = {name: value for name, value in msgspec.structs.asdict(limits).items() if value is not msgspec.UNSET}
        await volume_limits_set(self._store, project_id, given)

    async def limits(self, request: Request) -> Answer:
        project_id = request.context.project_id
        limits, used = await self._volumes.limits(project_id), await volume_usage(self._store, project_id)
        absolute = {
            "maxTotalVolumes": limits["volumes"],
            "maxTotalSnapshots": limits["snapshots"],
            "maxTotalVolumeGigabytes": limits["gigabytes"],
            "maxTotalBackups": 0,
            "maxTotalBackupGigabytes": 0,
            "totalVolumesUsed": used["volumes"],
            "totalSnapshotsUsed": used["snapshots"],
            "totalGigabytesUsed": used["gigabytes"],
            "totalBackupsUsed": 0,
            "totalBackupGigabytesUsed": 0,
        }
        return json_answer({"limits": {"rate": [], "absolute": absolute}})

    async def zones(self, request: Request) -> Answer:
        """One: every host reaches every volume."""
        return json_answer({"availabilityZoneInfo": [{"zoneName": ZONE, "zoneState": {"available": True}}]})

    async def extensions(self, request: Request) -> Answer:
        return json_answer({"extensions": []})


def _project(request: Request) -> str:
    """Raises Forbidden for another project than the caller's, unless that is an admin."""
    project_id = request.params["project_id"]
    if project_id != request.context.project_id and not request.context.is_admin:
        raise Forbidden(action="volume:quotas:show")
    return project_id


def _class(request: Request) -> str:
    name = request.params["name"]
    if name != DEFAULT_PROJECT:
        raise BadRequest(f"Invalid input for field/attribute quota class. Value: {name[:60]}. The only one is default.")
    return name
