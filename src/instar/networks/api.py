"""The Network API v2.0: its service, policy and error names. Called by the program through `network_service`.

Who may do what has two halves: the role, which the table below says, and whose record it is, which the handlers ask
(`ownership.py`). What another project may not see is not found.
"""

from __future__ import annotations

from instar.config import Settings
from instar.http.answer import Answer
from instar.http.app import Service
from instar.http.faults import Fault, network_fault
from instar.http.policy import ADMIN, MEMBER, OPEN, READER, Policy
from instar.networks import extensions
from instar.networks.group_routes import GroupRoutes
from instar.networks.local import LocalNetworks
from instar.networks.network_routes import NetworkRoutes
from instar.networks.port_routes import PortRoutes
from instar.networks.quota_routes import QuotaRoutes
from instar.networks.subnet_routes import SubnetRoutes
from instar.networks.tag_routes import TagRoutes

PREFIX = "/network"

NETWORK_POLICY = Policy({
    "network:versions:list": OPEN,
    "network:extensions:list": READER,
    "network:extensions:show": READER,
    "network:availability_zones:list": READER,
    "network:agents:list": ADMIN,
    "network:networks:list": READER,
    "network:networks:show": READER,
    "network:networks:create": MEMBER,
    "network:networks:update": MEMBER,
    "network:networks:delete": MEMBER,
    "network:subnets:list": READER,
    "network:subnets:show": READER,
    "network:subnets:create": MEMBER,
    "network:subnets:update": MEMBER,
    "network:subnets:delete": MEMBER,
    "network:ports:list": READER,
    "network:ports:show": READER,
    "network:ports:create": MEMBER,
    "network:ports:update": MEMBER,
    "network:ports:delete": MEMBER,
    "network:security_groups:list": READER,
    "network:security_groups:show": READER,
    "network:security_groups:create": MEMBER,
    "network:security_groups:update": MEMBER,
    "network:security_groups:delete": MEMBER,
    "network:security_group_rules:list": READER,
    "network:security_group_rules:show": READER,
    "network:security_group_rules:create": MEMBER,
    "network:security_group_rules:delete": MEMBER,
    "network:tags:list": READER,
    "network:tags:update": MEMBER,
    "network:quotas:list": ADMIN,
    "network:quotas:show": READER,
    "network:quotas:update": ADMIN,
    "network:quotas:delete": ADMIN,
})

# The names under which clients of this API know what every API can refuse.
_KINDS = {
    "BadRequest": "HTTPBadRequest",
    "Forbidden": "PolicyNotAuthorized",
    "NotFound": "HTTPNotFound",
    "RouteNotFound": "HTTPNotFound",
    "MethodNotAllowed": "HTTPMethodNotAllowed",
    "Unauthorized": "HTTPUnauthorized",
}


def network_service(networks: LocalNetworks, settings: Settings) -> Service:
    """The service to hand to `build_app`."""
    limit_max = settings.api.list_limit_max
    routes = [
        *extensions.routes(),
        *NetworkRoutes(networks, limit_max).routes(),
        *SubnetRoutes(networks, limit_max).routes(),
        *PortRoutes(networks, limit_max).routes(),
        *GroupRoutes(networks, limit_max).routes(),
        *QuotaRoutes(networks).routes(),
        *TagRoutes(networks).routes(),
    ]
    return Service("network", "network", PREFIX, routes, NETWORK_POLICY, _fault)


def _fault(fault: Fault) -> Answer:
    return network_fault(fault._replace(kind=_KINDS.get(fault.kind, fault.kind)))
