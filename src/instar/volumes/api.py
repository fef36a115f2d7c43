"""The Block Storage API v3: its service, policy and faults. Called by the program through `volume_service`.

Who may do what has two halves: the role, which the table below says, and whose record it is, which the handlers ask
(`resource.py`). What another project has is not found.
"""

from __future__ import annotations

from instar.http.answer import Answer, json_answer
from instar.http.app import Service
from instar.http.faults import Fault, compute_fault
from instar.http.policy import ADMIN, MEMBER, OPEN, READER, Policy
from instar.http.request import Request
from instar.http.routing import Route
from instar.volumes import microversion
from instar.volumes.action_routes import VolumeActions
from instar.volumes.attachment_routes import AttachmentRoutes
from instar.volumes.quota_routes import QuotaRoutes
from instar.volumes.resource import both_paths
from instar.volumes.service import Volumes
from instar.volumes.snapshot_routes import SnapshotRoutes
from instar.volumes.type_routes import TypeRoutes
from instar.volumes.volume_routes import VolumeRoutes

PREFIX = "/volume"

POLICY = Policy(
    {
        "volume:versions:list": OPEN,
        "volume:volumes:list": READER,
        "volume:volumes:show": READER,
        "volume:volumes:create": MEMBER,
        "volume:volumes:update": MEMBER,
        "volume:volumes:delete": MEMBER,
        "volume:volumes:action": READER,  # only lets a request in: the action's own rule decides
        "volume:volumes:extend": MEMBER,
        "volume:volumes:upload": MEMBER,
        "volume:volumes:attach": MEMBER,
        "volume:volumes:admin": ADMIN,
        "volume:snapshots:list": READER,
        "volume:snapshots:show": READER,
        "volume:snapshots:create": MEMBER,
        "volume:snapshots:update": MEMBER,
        "volume:snapshots:delete": MEMBER,
        "volume:snapshots:action": ADMIN,
        "volume:snapshots:admin": ADMIN,
        "volume:types:list": READER,
        "volume:types:show": READER,
        "volume:types:create": ADMIN,
        "volume:types:update": ADMIN,
        "volume:types:delete": ADMIN,
        "volume:types:access": ADMIN,
        "volume:attachments:list": READER,
        "volume:attachments:show": READER,
        "volume:attachments:create": MEMBER,
        "volume:attachments:update": MEMBER,
        "volume:attachments:delete": MEMBER,
        "volume:quotas:show": READER,
        "volume:quotas:update": ADMIN,
        "volume:quotas:class": ADMIN,
        "volume:limits:show": READER,
        "volume:zones:list": READER,
        "volume:extensions:list": READER,
    }
)

# This API's own statuses for what other APIs refuse with another one.
_STATUSES = {"VolumeUnusable": (400, "badRequest"), "QuotaExceeded": (413, "overLimit")}


def volume_service(volumes: Volumes, *, list_limit_max: int) -> Service:
    """The service to hand to `build_app`."""
    routes = [
        *VolumeRoutes(volumes, list_limit_max).routes(),
        *VolumeActions(volumes, POLICY).routes(),
        *SnapshotRoutes(volumes, POLICY, list_limit_max).routes(),
        *TypeRoutes(volumes).routes(),
        *AttachmentRoutes(volumes, list_limit_max).routes(),
        *QuotaRoutes(volumes).routes(),
    ]
    versions = [
        Route("GET", "/", "volume:versions:list", _versions),
        Route("GET", "/v3", "volume:versions:list", _version),
    ]
    return Service(
        name="cinder",
        catalog_type="block-storage",
        prefix=PREFIX,
        routes=[*versions, *both_paths(routes)],
        policy=POLICY,
        fault=_fault,
        negotiate=microversion.negotiate,
    )


async def _versions(request: Request) -> Answer:
    return json_answer(microversion.document(request.base_url), 300)


async def _version(request: Request) -> Answer:
    return json_answer(microversion.document(request.base_url))


def _fault(fault: Fault) -> Answer:
    status, key = _STATUSES.get(fault.kind, (fault.status, fault.key))
    message = fault.message
    if fault.kind == "VolumeUnusable":
        message = f"Invalid volume: {message}"
    return compute_fault(fault._replace(status=status, key=key, message=message))
