"""Who may use which route of the Identity API. `…:other` is for what belongs to another user than the caller."""

from __future__ import annotations

from instar.http.context import RequestContext
from instar.http.policy import ANYONE, OPEN, Policy, Rule

# Whoever runs the cloud may have his admin role on a project, on a domain or on the system.
_ADMIN = Rule("admin", needs_project=False)

IDENTITY_POLICY = Policy(
    {
        "identity:versions": OPEN,
        "identity:authenticate": OPEN,  # the methods in the body prove who it is
        "identity:validate_token": ANYONE,
        "identity:validate_token:other": _ADMIN,
        "identity:validate_token:service": Rule("service", needs_project=False),
        "identity:revoke_token": ANYONE,
        "identity:revoke_token:other": _ADMIN,
        "identity:get_auth_projects": ANYONE,
        "identity:get_auth_domains": ANYONE,
        "identity:get_auth_system": ANYONE,
        "identity:get_auth_catalog": ANYONE,
        "identity:list_users": _ADMIN,
        "identity:get_user": ANYONE,
        "identity:get_user:other": _ADMIN,
        "identity:create_user": _ADMIN,
        "identity:update_user": _ADMIN,
        "identity:delete_user": _ADMIN,
        "identity:change_password": ANYONE,  # of the caller alone, who gives the old one
        "identity:list_user_projects": ANYONE,
        "identity:list_user_projects:other": _ADMIN,
        "identity:list_groups_for_user": ANYONE,
        "identity:list_groups_for_user:other": _ADMIN,
        "identity:list_projects": _ADMIN,
        "identity:get_project": ANYONE,
        "identity:get_project:other": _ADMIN,
        "identity:create_project": _ADMIN,
        "identity:update_project": _ADMIN,
        "identity:delete_project": _ADMIN,
        "identity:update_project_tags": _ADMIN,
        "identity:list_domains": _ADMIN,
        "identity:get_domain": ANYONE,
        "identity:get_domain:other": _ADMIN,
        "identity:create_domain": _ADMIN,
        "identity:update_domain": _ADMIN,
        "identity:delete_domain": _ADMIN,
        "identity:list_groups": _ADMIN,
        "identity:get_group": _ADMIN,
        "identity:create_group": _ADMIN,
        "identity:update_group": _ADMIN,
        "identity:delete_group": _ADMIN,
        "identity:list_users_in_group": _ADMIN,
        "identity:add_user_to_group": _ADMIN,
        "identity:check_user_in_group": _ADMIN,
        "identity:remove_user_from_group": _ADMIN,
        "identity:list_roles": _ADMIN,
        "identity:get_role": _ADMIN,
        "identity:create_role": _ADMIN,
        "identity:update_role": _ADMIN,
        "identity:delete_role": _ADMIN,
        "identity:list_role_inferences": _ADMIN,
        "identity:list_role_assignments": ANYONE,
        "identity:list_role_assignments:other": _ADMIN,
        "identity:list_grants": _ADMIN,
        "identity:check_grant": _ADMIN,
        "identity:create_grant": _ADMIN,
        "identity:revoke_grant": _ADMIN,
        "identity:list_application_credentials": ANYONE,
        "identity:list_application_credentials:other": _ADMIN,
        "identity:get_application_credential": ANYONE,
        "identity:get_application_credential:other": _ADMIN,
        "identity:create_application_credential": ANYONE,  # for oneself: not even an admin makes one for another
        "identity:delete_application_credential": ANYONE,
        "identity:delete_application_credential:other": _ADMIN,
        "identity:list_catalog": ANYONE,  # regions, services, endpoints: everybody has them in his token anyway
        "identity:change_catalog": _ADMIN,
    }
)


def require_self_or(context: RequestContext, user_id: str, name: str) -> None:
    """Raises Forbidden unless the caller is this user, or the rule `<name>:other` allows him."""
    if context.user_id != user_id:
        IDENTITY_POLICY.require(context, f"{name}:other")
