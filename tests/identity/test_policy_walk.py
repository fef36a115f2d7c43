"""Every route of the Identity API as each role: who has no right is told 401 or 403, whatever the path names."""

from __future__ import annotations

import re

from instar.http.policy import OPEN
from instar.identity.policy import IDENTITY_POLICY
from tests.identity.identity_cloud import Cloud, by_password

# What any user may ask about himself; of others he learns nothing. (method, path) → status for a project's member.
ABOUT_ONESELF = {
    "/v3/users/{id}": {"GET"},
    "/v3/users/{id}/projects": {"GET"},
    "/v3/users/{id}/groups": {"GET"},
    "/v3/users/{user_id}/application_credentials": {"GET", "POST"},
    "/v3/users/{user_id}/application_credentials/{id}": {"GET", "DELETE"},
    "/v3/users/{id}/password": {"POST"},
    "/v3/projects/{id}": {"GET"},
    "/v3/projects/{id}/tags": {"GET"},
    "/v3/projects/{id}/tags/{tag}": {"GET"},
    "/v3/domains/{id}": {"GET"},
    "/v3/role_assignments": {"GET"},
}
FOR_EVERYBODY = ("/v3/auth/", "/v3/services", "/v3/endpoints", "/v3/regions")


async def tokens_of_each_role(cloud: Cloud) -> dict[str, str]:
    admin = await cloud.admin()
    roles = {role["name"]: role["id"] for role in (await cloud.call("GET", "/roles", admin)).json()["roles"]}
    tokens = {"": ""}
    for name in ("reader", "member", "manager", "service"):
        user = await cloud.made("/users", admin, "user", name=f"a-{name}", password="pw")
        project = cloud.first.demo_project_id
        answer = await cloud.call("PUT", f"/projects/{project}/users/{user['id']}/roles/{roles[name]}", admin)
        assert answer.status_code == 204
        tokens[name] = await cloud.token(by_password(f"a-{name}", "pw", "demo"))
    tokens["unscoped"] = await cloud.token(by_password("a-member", "pw"))
    return tokens


async def test_nobody_but_an_admin_gets_at_others(cloud: Cloud) -> None:
    victim = {
        "id": cloud.first.admin_user_id, "user_id": cloud.first.admin_user_id, "tag": "t", "group_id": "g",
        "project_id": cloud.first.admin_project_id, "domain_id": "default", "role_id": "r",
    }  # fmt: skip
    tokens = await tokens_of_each_role(cloud)
    walked = 0
    for route in cloud.app.services[0].routes:
        if IDENTITY_POLICY[route.policy] == OPEN:
            continue
        path = re.sub(r"\{(\w+)\}", lambda found: victim[found[1]], route.path).removeprefix("/v3")
        for role, token in tokens.items():
            walked += 1
            answer = await cloud.call(route.method, path, token, {})
            where = f"{role or 'nobody'}: {route.method} {route.path}: {answer.status_code} {answer.text[:200]}"
            if not role:
                assert answer.status_code == 401, where
            elif route.method == "GET" and route.path.startswith(FOR_EVERYBODY):
                assert answer.status_code in (200, 403, 404), where
                assert answer.status_code != 403 or role == "unscoped", where
            elif route.path == "/v3/auth/tokens":
                assert answer.status_code == 404, where  # no subject token was given
            else:
                assert answer.status_code == 403, where
    assert walked > 400


async def test_an_admin_is_let_through_everywhere(cloud: Cloud) -> None:
    """On a project or on the system: whatever else is wrong with an empty body or an unknown id, it is not his role."""
    system = by_password("admin", cloud.first.admin_password)
    system["auth"]["scope"] = {"system": {"all": True}}
    for token in (await cloud.admin(), await cloud.token(system)):
        for route in cloud.app.services[0].routes:
            fixed = route.policy == "identity:change_catalog"
            # Both are for the caller himself alone, not even an admin acts for another.
            own = route.policy in ("identity:change_password", "identity:create_application_credential")
            if fixed or own or route.policy == "identity:authenticate":
                continue
            path = re.sub(r"\{\w+\}", "unknown", route.path).removeprefix("/v3")
            if route.path == "":
                continue
            answer = await cloud.call(route.method, path, token, {})
            assert answer.status_code in (200, 400, 404), f"{route.method} {route.path} {answer.text}"


async def test_users_may_see_themselves_their_projects_and_their_domain(cloud: Cloud) -> None:
    tokens = await tokens_of_each_role(cloud)
    demo, me = await cloud.demo(), cloud.first.demo_user_id
    own = {"id": me, "user_id": me, "tag": "none"}
    for path, methods in ABOUT_ONESELF.items():
        if "GET" not in methods:
            continue
        ids = dict(own)
        if path.startswith("/v3/projects"):
            ids["id"] = cloud.first.demo_project_id
        if path.startswith("/v3/domains"):
            ids["id"] = "default"
        expected = 404 if path.endswith(("application_credentials/{id}", "{tag}")) else 200
        asked = re.sub(r"\{(\w+)\}", lambda found, ids=ids: ids[found[1]], path).removeprefix("/v3")
        if path == "/v3/role_assignments":
            asked += f"?user.id={me}"
        assert (await cloud.call("GET", asked, demo)).status_code == expected, path
        # Another member of the same project may not, unless it is about the project itself.
        other = await cloud.call("GET", asked, tokens["manager"])
        about_users = "users" in path or "assignments" in path
        assert other.status_code == (403 if about_users else expected), path
