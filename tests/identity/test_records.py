"""Users, projects, domains, groups, roles and application credentials by HTTP: what is refused, and how."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from instar.identity.bootstrap import bootstrap
from tests.identity.identity_cloud import Cloud, by_password


async def test_bootstrap_happens_once(cloud: Cloud) -> None:
    assert await bootstrap(cloud.identity) is None
    admin = await cloud.admin()
    for kind, names in {
        "users": {"admin", "demo"},
        "projects": {"admin", "demo", "service"},
        "domains": {"Default"},
        "roles": {"admin", "manager", "member", "reader", "service"},
    }.items():
        listed = (await cloud.call("GET", f"/{kind}", admin)).json()
        assert {one["name"] for one in listed[kind]} == names
        assert listed["links"]["next"] is None


@pytest.mark.parametrize("key", ["user", "project", "group"])
async def test_names_are_unique_in_their_domain_alone(cloud: Cloud, key: str) -> None:
    admin = await cloud.admin()
    await cloud.made("/domains", admin, "domain", name="other")
    domains = (await cloud.call("GET", "/domains?name=other", admin)).json()["domains"]
    first = await cloud.made(f"/{key}s", admin, key, name="twin")
    again = await cloud.call("POST", f"/{key}s", admin, {key: {"name": "twin"}})
    assert again.status_code == 409 and again.json()["error"]["code"] == 409 and "twin" in again.text
    await cloud.made(f"/{key}s", admin, key, name="twin", domain_id=domains[0]["id"])
    third = await cloud.made(f"/{key}s", admin, key, name="third")
    renamed = await cloud.call("PATCH", f"/{key}s/{third['id']}", admin, {key: {"name": "twin"}})
    assert renamed.status_code == 409
    assert (await cloud.call("GET", f"/{key}s/{first['id']}", admin)).json()[key]["name"] == "twin"


@pytest.mark.parametrize(
    "path, body, told",
    [
        ("/users", {"user": {"name": ""}}, "$.user.name"),
        ("/users", {"user": {"name": "x" * 256}}, "$.user.name"),
        ("/users", {"user": {"name": "   "}}, "$.user.name"),
        ("/users", {"user": {"name": "x", "enabled": "yes"}}, "$.user.enabled"),
        ("/users", {"user": {"name": "x", "shoe_size": 43}}, "shoe_size"),
        ("/users", {"user": {"name": "x", "password": ""}}, "password"),
        ("/users", {"user": {"name": "x", "password": "p" * 5000}}, "password"),
        ("/users", {}, "user"),
        ("/users", [], "array"),
        ("/projects", {"project": {"name": "x", "is_domain": True}}, "$.project.is_domain"),
        ("/projects", {"project": {"name": "x" * 65}}, "$.project.name"),
        ("/projects", {"project": {"name": "x", "tags": ["a/b"]}}, "$.project.tags"),
        ("/roles", {"role": {"name": "x", "domain_id": "default"}}, "$.role.domain_id"),
        ("/auth/tokens", {"auth": {}}, "$.auth"),
        ("/auth/tokens", {"auth": {"identity": {"methods": []}}}, "$.auth.identity.methods"),
        ("/auth/tokens", {"auth": {"identity": {"methods": ["password"]}}}, "$.auth.identity"),
    ],
)
async def test_a_body_that_does_not_fit_is_told_where(cloud: Cloud, path: str, body: Any, told: str) -> None:
    answer = await cloud.call("POST", path, await cloud.admin(), body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["title"] == "Bad Request" and told in answer.json()["error"]["message"]
    assert "p" * 100 not in answer.text


@pytest.mark.parametrize("kind", ["users", "projects", "domains", "groups", "roles"])
async def test_what_is_not_there_is_404(cloud: Cloud, kind: str) -> None:
    admin = await cloud.admin()
    for method, body in (("GET", None), ("PATCH", {kind[:-1]: {}}), ("DELETE", None)):
        answer = await cloud.call(method, f"/{kind}/{'0' * 32}", admin, body)
        assert answer.status_code == 404 and answer.json()["error"]["title"] == "Not Found"


async def test_passwords_and_hashes_are_in_no_answer(cloud: Cloud) -> None:
    admin = await cloud.admin()
    user = await cloud.made("/users", admin, "user", name="anna", password="hunter2")
    for path in (f"/users/{user['id']}", "/users"):
        text = (await cloud.call("GET", path, admin)).text
        assert "hunter2" not in text and "argon2" not in text and "password_hash" not in text
    assert "hunter2" not in str(user)


async def test_lists_come_in_pages(cloud: Cloud) -> None:
    admin = await cloud.admin()
    for number in range(5):
        await cloud.made("/roles", admin, "role", name=f"role-{number}")
    seen: list[str] = []
    path: str | None = "/roles?limit=3"
    while path:
        page = (await cloud.call("GET", path, admin)).json()
        seen += [role["name"] for role in page["roles"]]
        following = page["links"]["next"]
        path = following and following.removeprefix(f"{cloud.url}/identity/v3")
    assert len(seen) == len(set(seen)) == 10
    assert (await cloud.call("GET", "/roles?limit=-1", admin)).status_code == 400


async def test_what_the_cloud_stands_on_cannot_be_deleted(cloud: Cloud) -> None:
    admin = await cloud.admin()
    role = (await cloud.call("GET", "/roles?name=admin", admin)).json()["roles"][0]
    for method, path, body in (
        ("DELETE", "/domains/default", None),
        ("PATCH", "/domains/default", {"domain": {"enabled": False}}),
        ("DELETE", f"/roles/{role['id']}", None),
        ("PATCH", f"/roles/{role['id']}", {"role": {"name": "boss"}}),
        ("POST", "/services", {"service": {"type": "volumev3"}}),
    ):
        assert (await cloud.call(method, path, admin, body)).status_code == 403, path


async def test_a_deleted_domain_takes_everything_in_it_along(cloud: Cloud) -> None:
    admin = await cloud.admin()
    domain = await cloud.made("/domains", admin, "domain", name="gone")
    inside = domain["id"]
    user = await cloud.made("/users", admin, "user", name="u", password="pw", domain_id=inside)
    project = await cloud.made("/projects", admin, "project", name="p", domain_id=inside)
    role = (await cloud.call("GET", "/roles?name=member", admin)).json()["roles"][0]["id"]
    await cloud.call("PUT", f"/projects/{project['id']}/users/{user['id']}/roles/{role}", admin)
    body = by_password("u", "pw")
    body["auth"]["identity"]["password"]["user"] = {"id": user["id"], "password": "pw"}
    body["auth"]["scope"] = {"project": {"id": project["id"]}}
    token = await cloud.token(body)
    assert (await cloud.call("DELETE", f"/domains/{inside}", admin)).status_code == 403
    await cloud.call("PATCH", f"/domains/{inside}", admin, {"domain": {"enabled": False}})
    assert (await cloud.call("GET", "/auth/projects", token)).status_code == 401
    assert (await cloud.call("POST", "/auth/tokens", json=body)).status_code == 401
    assert (await cloud.call("DELETE", f"/domains/{inside}", admin)).status_code == 204
    for path in (f"/users/{user['id']}", f"/projects/{project['id']}", f"/domains/{inside}"):
        assert (await cloud.call("GET", path, admin)).status_code == 404
    left = (await cloud.call("GET", "/role_assignments", admin)).json()["role_assignments"]
    assert user["id"] not in str(left)


async def test_grants_name_things_that_exist_and_are_the_same_twice(cloud: Cloud) -> None:
    admin = await cloud.admin()
    role = (await cloud.call("GET", "/roles?name=reader", admin)).json()["roles"][0]["id"]
    path = f"/projects/{cloud.first.admin_project_id}/users/{cloud.first.demo_user_id}/roles"
    for _ in range(2):
        assert (await cloud.call("PUT", f"{path}/{role}", admin)).status_code == 204
    assert (await cloud.call("HEAD", f"{path}/{role}", admin)).status_code == 204
    assert [one["id"] for one in (await cloud.call("GET", path, admin)).json()["roles"]] == [role]
    assert (await cloud.call("DELETE", f"{path}/{role}", admin)).status_code == 204
    assert (await cloud.call("DELETE", f"{path}/{role}", admin)).status_code == 404
    assert (await cloud.call("HEAD", f"{path}/{role}", admin)).status_code == 404
    unknown = "0" * 32
    for wrong in (
        f"/projects/{unknown}/users/{cloud.first.demo_user_id}/roles/{role}",
        f"/projects/{cloud.first.demo_project_id}/users/{unknown}/roles/{role}",
        f"/projects/{cloud.first.demo_project_id}/users/{cloud.first.demo_user_id}/roles/{unknown}",
        f"/domains/{unknown}/groups/{unknown}/roles/{role}",
    ):
        assert (await cloud.call("PUT", wrong, admin)).status_code == 404, wrong


def by_credential(credential: dict[str, Any], secret: str) -> dict[str, Any]:
    given = {"id": credential["id"], "secret": secret}
    return {"auth": {"identity": {"methods": ["application_credential"], "application_credential": given}}}


async def test_an_application_credential_has_the_roles_given_to_it_and_ends_with_its_time(cloud: Cloud) -> None:
    demo, path = await cloud.demo(), f"/users/{cloud.first.demo_user_id}/application_credentials"
    end = datetime.now(UTC) + timedelta(minutes=5)
    made = await cloud.made(path, demo, "application_credential", name="robot", roles=[{"name": "reader"}],
                            expires_at=end.strftime("%Y-%m-%dT%H:%M:%S.%f"))  # fmt: skip
    assert "secret" not in (await cloud.call("GET", f"{path}/{made['id']}", demo)).text
    answer = await cloud.call("POST", "/auth/tokens", json=by_credential(made, made["secret"]))
    token = answer.json()["token"]
    assert {role["name"] for role in token["roles"]} == {"reader"}
    assert token["application_credential"]["restricted"] is True
    assert datetime.fromisoformat(token["expires_at"]) <= end
    assert (await cloud.call("POST", "/auth/tokens", json=by_credential(made, "wrong"))).status_code == 401
    robot = answer.headers["x-subject-token"]
    trade = {"auth": {"identity": {"methods": ["token"], "token": {"id": robot}},
                      "scope": {"project": {"id": cloud.first.demo_project_id}}}}  # fmt: skip
    assert (await cloud.call("POST", "/auth/tokens", json=trade)).status_code == 403
    assert (await cloud.call("DELETE", f"{path}/{made['id']}", robot)).status_code == 403
    assert (await cloud.call("DELETE", f"{path}/{made['id']}", demo)).status_code == 204
    assert (await cloud.call("GET", "/auth/projects", robot)).status_code == 401
    assert (await cloud.call("POST", "/auth/tokens", json=by_credential(made, made["secret"]))).status_code == 401


async def test_an_application_credential_gives_no_role_that_its_maker_lacks_or_lost(cloud: Cloud) -> None:
    admin, demo = await cloud.admin(), await cloud.demo()
    path = f"/users/{cloud.first.demo_user_id}/application_credentials"
    wanted = {"application_credential": {"name": "boss", "roles": [{"name": "admin"}]}}
    assert (await cloud.call("POST", path, demo, wanted)).status_code == 400
    past = {"application_credential": {"name": "old", "expires_at": "2020-01-01T00:00:00"}}
    assert (await cloud.call("POST", path, demo, past)).status_code == 400
    made = await cloud.made(path, demo, "application_credential", name="robot")
    token = await cloud.token(by_credential(made, made["secret"]))
    role = (await cloud.call("GET", "/roles?name=member", admin)).json()["roles"][0]["id"]
    grant = f"/projects/{cloud.first.demo_project_id}/users/{cloud.first.demo_user_id}/roles/{role}"
    await cloud.call("DELETE", grant, admin)
    assert (await cloud.call("GET", "/auth/projects", token)).status_code == 401
    assert (await cloud.call("POST", "/auth/tokens", json=by_credential(made, made["secret"]))).status_code == 401
