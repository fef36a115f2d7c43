"""The public Identity API v3, as one service of the HTTP room."""

from __future__ import annotations

from instar.http.app import Service
from instar.http.faults import identity_fault
from instar.identity.auth_routes import AuthRoutes
from instar.identity.credential_routes import CredentialRoutes
from instar.identity.grant_routes import GrantRoutes
from instar.identity.local import LocalIdentity
from instar.identity.policy import IDENTITY_POLICY
from instar.identity.project_routes import ProjectRoutes
from instar.identity.user_routes import UserRoutes

PREFIX = "/identity"


def identity_service(identity: LocalIdentity) -> Service:
    """What `build_app` serves below `/identity`."""
    rooms = (AuthRoutes, UserRoutes, ProjectRoutes, GrantRoutes, CredentialRoutes)
    routes = [route for room in rooms for route in room(identity).routes()]
    return Service("identity", "identity", PREFIX, routes, IDENTITY_POLICY, identity_fault)
