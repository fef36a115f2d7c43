"""The Compute API as a service of the HTTP room: every resource's routes, microversions, policy, faults.

Called by the program: `compute_service(cloud, lifecycle, hosts, identity)`.
"""

from __future__ import annotations

from functools import lru_cache

from instar.api import microversion
from instar.api.aggregates import Aggregates
from instar.api.flavor_extras import FlavorAccess, FlavorExtraSpecs
from instar.api.flavors import Flavors
from instar.api.host_directory import HostDirectory
from instar.api.hosts import AvailabilityZones, Hypervisors, Services
from instar.api.key_pairs import KeyPairs
from instar.api.migrations import Migrations
from instar.api.outside import Extensions, ExternalEvents
from instar.api.policy import COMPUTE_POLICY, PREFIX
from instar.api.quotas import Limits, QuotaSets
from instar.api.resource import VERSION_PATH, ApiRoute, Compute, http_routes
from instar.api.server_groups import ServerGroups
from instar.api.servers.actions import ServerActions
from instar.api.servers.changes import ServerChanges, ServerMetadata, ServerTags
from instar.api.servers.consoles import RemoteConsoles
from instar.api.servers.create import ServerCreation
from instar.api.servers.diagnostics import Diagnostics
from instar.api.servers.instance_actions import InstanceActions
from instar.api.servers.interfaces import Interfaces
from instar.api.servers.listing import ServerList
from instar.api.servers.parts import ServerParts
from instar.api.servers.volume_attachments import VolumeAttachments
from instar.api.usage import Usage
from instar.http.answer import Answer, Header, json_answer
from instar.http.app import Service
from instar.http.faults import compute_fault
from instar.http.request import Request
from instar.http.routing import Route
from instar.identity.contract import IdentityService
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.door import Lifecycle
from instar.scheduling.host_table import HostTable

MOUNT = "/compute"


def compute_service(cloud: Cloud, lifecycle: Lifecycle, hosts: HostTable, identity: IdentityService) -> Service:
    """The Compute API, below `/compute`. All that it leans on must be open by the first request."""
    compute = Compute(
        store=cloud.store,
        settings=cloud.settings,
        lifecycle=lifecycle,
        images=cloud.images,
        networks=cloud.networks,
        identity=identity,
        hosts=HostDirectory(cloud.store, hosts),
        volumes=cloud.volumes,
    )
    return Service(
        name="nova",
        catalog_type="compute",
        prefix=MOUNT,
        routes=[*_version_routes(), *http_routes(api_routes(compute))],
        policy=COMPUTE_POLICY,
        fault=compute_fault,
        negotiate=negotiate,
        extra_request_id=b"x-compute-request-id",
    )


def api_routes(compute: Compute) -> list[ApiRoute]:
    """Every route below the version, by resource."""
    resources = (
        ServerList(compute), ServerCreation(compute), ServerChanges(compute), ServerMetadata(compute),
        ServerTags(compute), ServerActions(compute, COMPUTE_POLICY), InstanceActions(compute), ServerParts(compute),
        RemoteConsoles(compute), Diagnostics(compute), VolumeAttachments(compute, COMPUTE_POLICY), Interfaces(compute),
        Flavors(compute), FlavorExtraSpecs(compute), FlavorAccess(compute, COMPUTE_POLICY), KeyPairs(compute),
        Limits(compute), QuotaSets(compute), AvailabilityZones(compute), Services(compute), Hypervisors(compute),
        Aggregates(compute, COMPUTE_POLICY), ServerGroups(compute), Usage(compute), ExternalEvents(compute),
        Migrations(compute), Extensions(),
    )  # fmt: skip
    return [route for resource in resources for route in resource.routes()]


def negotiate(request: Request) -> None:
    """The microversion of a request, kept in it, and the headers that tell it. Raises NotAcceptable, BadRequest."""
    modern, legacy = request.header(b"openstack-api-version"), request.header(b"x-openstack-nova-api-version")
    request.microversion = microversion.negotiate(modern, legacy)
    request.answer_headers.extend(_headers(request.microversion))


@lru_cache(maxsize=256)
def _headers(version: int) -> tuple[Header, ...]:
    return tuple((name.lower().encode(), value.encode()) for name, value in microversion.answer_headers(version))


def _version_routes() -> list[Route]:
    name = PREFIX + "versions:show"
    return [Route("GET", "/", name, _versions), Route("GET", VERSION_PATH, name, _version)]


async def _versions(request: Request) -> Answer:
    return json_answer(microversion.documents(request.base_url))


async def _version(request: Request) -> Answer:
    return json_answer(microversion.document(request.base_url))
