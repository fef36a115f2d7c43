"""What the Network API says of itself: versions, collections, and the extensions that are really there."""

from __future__ import annotations

from typing import Any

from instar.errors import NotFound
from instar.http.answer import Answer, json_answer
from instar.http.request import Request
from instar.http.routing import Route
from instar.networks.views import ZONE

UPDATED = "2026-01-01T00:00:00-00:00"
COLLECTIONS = {
    "network": "networks", "subnet": "subnets", "port": "ports", "security_group": "security-groups",
    "security_group_rule": "security-group-rules", "quota": "quotas", "extension": "extensions", "agent": "agents",
}  # fmt: skip
# alias → name, what it gives
EXTENSIONS = {
    "agent": ("agent", "Agents of the network service; the hosts' own plumbing has none."),
    "allowed-address-pairs": ("Allowed Address Pairs", "Addresses that a port may use besides its own."),
    "availability_zone": ("Availability Zone", "Zones of network resources."),
    "binding": ("Port Binding", "On which host a port is, for admins."),
    "filter-validation": ("Filter parameters validation", "A filter that is no field is refused."),
    "net-mtu": ("Network MTU", "Networks show their MTU."),
    "net-mtu-writable": ("Network MTU (writable)", "The MTU of a network can be set."),
    "network_availability_zone": ("Network Availability Zone", "Networks show their zones."),
    "pagination": ("Pagination support", "Lists have limit and marker."),
    "port-security": ("Port Security", "Packet filters can be switched off for networks and ports."),
    "project-id": ("project_id field enabled", "Resources show project_id beside tenant_id."),
    "quota_details": ("Quota details management support", "Usage beside the limits."),
    "quotas": ("Quota management support", "Limits for each project."),
    "security-group": ("security-group", "Security groups and their rules."),
    "security-groups-normalized-cidr": ("Normalized CIDR of security group rules", "Rules show normalized_cidr."),
    "sorting": ("Sorting support", "Lists have sort_key and sort_dir."),
    "standard-attr-description": ("standard-attr-description", "Resources have a description."),
    "standard-attr-revisions": ("Resource revision numbers", "Resources show how often they were changed."),
    "standard-attr-tag": ("Tag support for resources with standard attribute", "Resources have tags."),
    "standard-attr-timestamp": ("Resource timestamps", "Resources show created_at and updated_at."),
}


def routes() -> list[Route]:
    return [
        Route("GET", "/", "network:versions:list", versions),
        Route("GET", "/v2.0", "network:versions:list", collections),
        Route("GET", "/v2.0/extensions", "network:extensions:list", extension_list),
        Route("GET", "/v2.0/extensions/{alias}", "network:extensions:show", extension_show),
        Route("GET", "/v2.0/availability_zones", "network:availability_zones:list", availability_zones),
        Route("GET", "/v2.0/agents", "network:agents:list", agents),
    ]


async def versions(request: Request) -> Answer:
    links = [{"rel": "self", "href": f"{request.base_url}/v2.0/"}]
    return json_answer({"versions": [{"id": "v2.0", "status": "CURRENT", "links": links}]})


async def collections(request: Request) -> Answer:
    resources = [
        {
            "name": name.replace("_", "-"),
            "collection": collection,
            "links": [{"rel": "self", "href": f"{request.base_url}/v2.0/{collection}"}],
        }
        for name, collection in COLLECTIONS.items()
    ]
    return json_answer({"resources": resources})


async def extension_list(request: Request) -> Answer:
    return json_answer({"extensions": [_view(alias) for alias in EXTENSIONS]})


async def extension_show(request: Request) -> Answer:
    alias = request.params["alias"]
    if alias not in EXTENSIONS:
        raise NotFound(f"Extension with alias {alias[:64]} does not exist", kind="Extension", id=alias[:64])
    return json_answer({"extension": _view(alias)})


def _view(alias: str) -> dict[str, Any]:
    name, description = EXTENSIONS[alias]
    return {"alias": alias, "name": name, "description": description, "updated": UPDATED, "links": []}


async def availability_zones(request: Request) -> Answer:
    return json_answer({"availability_zones": [{"name": ZONE, "resource": "network", "state": "available"}]})


async def agents(request: Request) -> Answer:
    """None: each host plugs its own guests, see the Compute API's services."""
    return json_answer({"agents": []})
