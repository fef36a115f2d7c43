"""Tokens: what is in them, what refuses them, and that a refusal holds from the very next request."""

from __future__ import annotations

import time
from pathlib import Path

import jwt
import pytest

from instar.errors import StartupError, Unauthorized
from instar.identity.local import LocalIdentity
from instar.identity.token_cache import TOKENS_MAX, TokenCache
from instar.identity.tokens import load_key
from tests.identity.identity_cloud import CHEAP, Cloud, by_password


async def works(cloud: Cloud, token: str) -> bool:
    answer = await cloud.call("GET", "/auth/projects", token)
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


async def test_a_password_gives_a_token_with_user_project_roles_and_catalog(cloud: Cloud) -> None:
    body = by_password("demo", cloud.first.demo_password, "demo")
    answer = await cloud.call("POST", "/auth/tokens", json=body)
    token = answer.json()["token"]
    assert token["user"]["name"] == "demo" and token["user"]["domain"] == {"id": "default", "name": "Default"}
    assert token["project"]["id"] == cloud.first.demo_project_id
    assert {role["name"] for role in token["roles"]} == {"member", "reader"}
    urls = {service["type"]: {point["interface"]: point["url"] for point in service["endpoints"]}
            for service in token["catalog"]}  # fmt: skip
    assert urls["compute"] == dict.fromkeys(("public", "internal", "admin"), f"{cloud.url}/compute/v2.1")
    assert set(urls) == {"identity", "compute", "image", "network", "block-storage", "volumev3"}
    assert cloud.first.demo_password not in answer.text


async def test_the_catalog_names_the_host_that_the_client_used(cloud: Cloud) -> None:
    answer = await cloud.call("POST", "/auth/tokens", json=by_password("demo", cloud.first.demo_password, "demo"),
                              host="cloud.example:9000")  # fmt: skip
    urls = {point["url"] for service in answer.json()["token"]["catalog"] for point in service["endpoints"]}
    assert all(url.startswith("http://cloud.example:9000/") for url in urls)


@pytest.mark.parametrize(
    "scope, key",
    [({"system": {"all": True}}, "system"), ({"project": {"name": "admin", "domain": {"id": "default"}}}, "project")],
)
async def test_scopes_by_name_and_system(cloud: Cloud, scope: dict[str, object], key: str) -> None:
    body = by_password("admin", cloud.first.admin_password)
    body["auth"]["scope"] = scope
    token = (await cloud.call("POST", "/auth/tokens", json=body)).json()["token"]
    assert key in token and "admin" in {role["name"] for role in token["roles"]}


async def test_a_domain_scope_needs_a_role_on_the_domain(cloud: Cloud) -> None:
    admin = await cloud.admin()
    body = by_password("demo", cloud.first.demo_password)
    body["auth"]["scope"] = {"domain": {"name": "Default"}}
    assert (await cloud.call("POST", "/auth/tokens", json=body)).status_code == 401
    roles = (await cloud.call("GET", "/roles?name=reader", admin)).json()["roles"]
    grant = f"/domains/default/users/{cloud.first.demo_user_id}/roles/{roles[0]['id']}"
    assert (await cloud.call("PUT", grant, admin)).status_code == 204
    answer = await cloud.call("POST", "/auth/tokens", json=body)
    assert answer.json()["token"]["domain"]["id"] == "default"


async def test_an_unscoped_token_has_no_roles_and_can_be_traded_in_for_a_scoped_one_that_ends_when_it_ends(
    cloud: Cloud,
) -> None:
    body = by_password("demo", cloud.first.demo_password)
    body["auth"]["scope"] = "unscoped"
    answer = await cloud.call("POST", "/auth/tokens", json=body)
    unscoped = answer.json()["token"]
    assert "roles" not in unscoped and "catalog" not in unscoped and "project" not in unscoped
    trade = {
        "auth": {
            "identity": {"methods": ["token"], "token": {"id": answer.headers["x-subject-token"]}},
            "scope": {"project": {"id": cloud.first.demo_project_id}},
        }
    }
    scoped = (await cloud.call("POST", "/auth/tokens", json=trade)).json()["token"]
    assert scoped["expires_at"] == unscoped["expires_at"]
    assert set(scoped["methods"]) == {"token", "password"}


async def test_forged_tokens_are_refused(cloud: Cloud) -> None:
    token = await cloud.admin()
    claims = jwt.decode(token, options={"verify_signature": False})
    header, payload, signature = token.split(".")
    forged = [
        jwt.encode(claims, None, algorithm="none"),
        jwt.encode(claims, "x" * 32, algorithm="HS256"),
        f"{header}.{payload}.",
        f"{header}.{payload}.{signature[:-4]}AAAA",
        "gAAAAABx",
        "a" * 5000,
        ".." ,
    ]  # fmt: skip
    for wrong in forged:
        assert not await works(cloud, wrong), wrong[:40]
    assert await works(cloud, token)


async def test_an_expired_token_is_refused_even_when_it_was_seen_before(tmp_path: Path, cloud: Cloud) -> None:
    token = await cloud.admin()
    now = time.time()
    store = cloud.identity.records._store
    later = LocalIdentity(store, CHEAP, tmp_path, clock=lambda: now)
    await later.start()
    assert (await later.authenticate_token(token)).user_name == "admin"
    now += CHEAP.identity.token_lifetime_s + 1
    with pytest.raises(Unauthorized):
        await later.authenticate_token(token)
    await later.close()


async def test_a_revoked_token_is_refused_at_once_and_others_are_not(cloud: Cloud) -> None:
    token, other = await cloud.demo(), await cloud.demo()
    assert await works(cloud, token) and await works(cloud, other)
    answer = await cloud.call("DELETE", "/auth/tokens", token, x_subject_token=token)
    assert answer.status_code == 204
    assert not await works(cloud, token)
    assert await works(cloud, other)
    admin = await cloud.admin()
    assert (await cloud.call("GET", "/auth/tokens", admin, x_subject_token=token)).status_code == 404


async def test_somebody_elses_token_can_neither_be_seen_nor_revoked_but_by_an_admin(cloud: Cloud) -> None:
    admin, demo = await cloud.admin(), await cloud.demo()
    for method in ("GET", "HEAD", "DELETE"):
        assert (await cloud.call(method, "/auth/tokens", demo, x_subject_token=admin)).status_code == 403
    assert await works(cloud, admin)
    shown = await cloud.call("GET", "/auth/tokens", admin, x_subject_token=demo)
    assert shown.json()["token"]["user"]["name"] == "demo"
    assert (await cloud.call("HEAD", "/auth/tokens", admin, x_subject_token=demo)).status_code == 200
    assert (await cloud.call("DELETE", "/auth/tokens", admin, x_subject_token=demo)).status_code == 204
    assert not await works(cloud, demo)


@pytest.mark.parametrize("change", [{"password": "another-one"}, {"enabled": False}])
async def test_a_changed_password_or_a_disabled_user_refuses_all_tokens_for_good(
    cloud: Cloud, change: dict[str, object]
) -> None:
    admin, demo = await cloud.admin(), await cloud.demo()
    assert await works(cloud, demo)
    path = f"/users/{cloud.first.demo_user_id}"
    assert (await cloud.call("PATCH", path, admin, {"user": change})).status_code == 200
    assert not await works(cloud, demo)
    await cloud.call("PATCH", path, admin, {"user": {"enabled": True}})
    assert not await works(cloud, demo)


async def test_a_disabled_project_refuses_its_tokens_for_good(cloud: Cloud) -> None:
    admin, demo = await cloud.admin(), await cloud.demo()
    assert await works(cloud, demo)
    path = f"/projects/{cloud.first.demo_project_id}"
    assert (await cloud.call("PATCH", path, admin, {"project": {"enabled": False}})).status_code == 200
    assert not await works(cloud, demo)
    await cloud.call("PATCH", path, admin, {"project": {"enabled": True}})
    assert not await works(cloud, demo)
    assert await works(cloud, await cloud.demo())


async def test_a_role_that_is_taken_away_is_gone_with_the_next_request(cloud: Cloud) -> None:
    admin, demo = await cloud.admin(), await cloud.demo()
    roles = {role["name"]: role["id"] for role in (await cloud.call("GET", "/roles", admin)).json()["roles"]}
    grants = f"/projects/{cloud.first.demo_project_id}/users/{cloud.first.demo_user_id}/roles/"
    assert (await cloud.call("GET", "/users", demo)).status_code == 403
    await cloud.call("PUT", grants + roles["admin"], admin)
    assert (await cloud.call("GET", "/users", demo)).status_code == 200
    await cloud.call("DELETE", grants + roles["admin"], admin)
    assert (await cloud.call("GET", "/users", demo)).status_code == 403
    await cloud.call("DELETE", grants + roles["member"], admin)
    assert not await works(cloud, demo)


async def test_a_user_who_changes_his_password_must_know_the_old_one(cloud: Cloud) -> None:
    demo = await cloud.demo()
    path = f"/users/{cloud.first.demo_user_id}/password"
    wrong = {"user": {"original_password": "no", "password": "new-password"}}
    assert (await cloud.call("POST", path, demo, wrong)).status_code == 401
    right = {"user": {"original_password": cloud.first.demo_password, "password": "new-password"}}
    assert (await cloud.call("POST", f"/users/{cloud.first.admin_user_id}/password", demo, right)).status_code == 403
    assert (await cloud.call("POST", path, demo, right)).status_code == 204
    assert not await works(cloud, demo)
    assert await works(cloud, await cloud.token(by_password("demo", "new-password", "demo")))


async def test_every_wrong_login_gets_the_same_answer(cloud: Cloud) -> None:
    right = cloud.first.demo_password
    bodies = [
        by_password("demo", "wrong", "demo"),
        by_password("nobody", right, "demo"),
        by_password("demo", right, "admin"),
        by_password("demo", right, "no-such-project"),
        by_password("demo", "", "demo"),
        by_password("demo", "x" * 100_000, "demo"),
    ]
    answers = [await cloud.call("POST", "/auth/tokens", json=body) for body in bodies]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert "Keystone uri=" in answers[0].headers["www-authenticate"]


async def test_an_unknown_user_costs_a_hash_like_a_known_one(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    passwords = cloud.identity.passwords
    compare = passwords._compare
    monkeypatch.setattr(passwords, "_compare", lambda h, p: compared.append(h) or compare(h, p))
    for name in ("demo", "nobody"):
        await cloud.call("POST", "/auth/tokens", json=by_password(name, "wrong", "demo"))
    assert len(compared) == 2 and len({h.rpartition("$")[0].rpartition("$")[0] for h in compared}) == 1


async def test_guessing_is_slowed_down_for_the_guesser_alone(cloud: Cloud) -> None:
    for _ in range(cloud.identity.guesses.PER_USER_MAX):
        await cloud.call("POST", "/auth/tokens", json=by_password("demo", "wrong", "demo"))
    answer = await cloud.call("POST", "/auth/tokens", json=by_password("demo", cloud.first.demo_password, "demo"))
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
    assert await works(cloud, await cloud.admin())


async def test_the_cache_stores_nothing_that_was_looked_up_before_a_change(cloud: Cloud) -> None:
    now = 1000.0
    cache = TokenCache(5.0, lambda: now)
    who = await cloud.identity.authenticate_token(await cloud.demo())
    before = cache.generation
    cache.forget()
    cache.put("t", who, before)
    assert cache.get("t") is None
    cache.put("t", who, cache.generation)
    assert cache.get("t") == who
    now += 5.0
    assert cache.get("t") is None
    for number in range(TOKENS_MAX + 10):
        cache.put(str(number), who, cache.generation)
    assert cache.get("5") is None and cache.get(str(TOKENS_MAX)) == who


def test_the_token_key_is_made_once_and_must_be_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "token.key"
    key = load_key(path)
    assert load_key(path) == key and path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["token.key"]
    path.chmod(0o640)
    with pytest.raises(StartupError, match="read by others"):
        load_key(path)
    path.chmod(0o600)
    path.write_text("zz")
    with pytest.raises(StartupError):
        load_key(path)
