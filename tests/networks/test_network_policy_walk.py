"""Every route as each role and as another project. A route that is not in the table fails the test."""

from __future__ import annotations

from typing import Any

import pytest

from tests.networks.network_cloud import Cloud

OPEN = (200, 200, 200, 200, 200, 200)
READ = (401, 403, 200, 200, 200, 200)
SHOW = (401, 403, 200, 200, 404, 200)
CREATE = (401, 403, 403, 201, 201, 201)
CREATE_IN = (401, 403, 403, 201, 404, 201)  # in a network or group that another project does not see
CHANGE = (401, 403, 403, 200, 404, 200)
DELETE = (401, 403, 403, 204, 404, 204)
ADMIN = (401, 403, 403, 403, 403, 200)

# (method, path) → (body, status for: no token, nobody, reader, member, another project's member, admin)
WALK: dict[tuple[str, str], tuple[Any, tuple[int, ...]]] = {
    ("GET", "/"): (None, OPEN),
    ("GET", "/v2.0"): (None, OPEN),
    ("GET", "/v2.0/extensions"): (None, READ),
    ("GET", "/v2.0/extensions/{alias}"): (None, READ),
    ("GET", "/v2.0/availability_zones"): (None, READ),
    ("GET", "/v2.0/agents"): (None, ADMIN),
    ("GET", "/v2.0/networks"): (None, READ),
    ("POST", "/v2.0/networks"): ({"network": {"name": "n"}}, CREATE),
    ("GET", "/v2.0/networks/{id}"): (None, SHOW),
    ("PUT", "/v2.0/networks/{id}"): ({"network": {"name": "m"}}, CHANGE),
    ("DELETE", "/v2.0/networks/{id}"): (None, DELETE),
    ("GET", "/v2.0/subnets"): (None, READ),
    ("POST", "/v2.0/subnets"): ({"subnet": {"network_id": "{network}", "cidr": "10.8.0.0/24"}}, CREATE_IN),
    ("GET", "/v2.0/subnets/{id}"): (None, SHOW),
    ("PUT", "/v2.0/subnets/{id}"): ({"subnet": {"name": "m"}}, CHANGE),
    ("DELETE", "/v2.0/subnets/{id}"): (None, DELETE),
    ("GET", "/v2.0/ports"): (None, READ),
    ("POST", "/v2.0/ports"): ({"port": {"network_id": "{network}"}}, CREATE_IN),
    ("GET", "/v2.0/ports/{id}"): (None, SHOW),
    ("PUT", "/v2.0/ports/{id}"): ({"port": {"name": "m"}}, CHANGE),
    ("DELETE", "/v2.0/ports/{id}"): (None, DELETE),
    ("GET", "/v2.0/security-groups"): (None, READ),
    ("POST", "/v2.0/security-groups"): ({"security_group": {"name": "n"}}, CREATE),
    ("GET", "/v2.0/security-groups/{id}"): (None, SHOW),
    ("PUT", "/v2.0/security-groups/{id}"): ({"security_group": {"name": "m"}}, CHANGE),
    ("DELETE", "/v2.0/security-groups/{id}"): (None, DELETE),
    ("GET", "/v2.0/security-group-rules"): (None, READ),
    ("POST", "/v2.0/security-group-rules"): (
        {"security_group_rule": {"security_group_id": "{group}", "direction": "ingress"}}, CREATE_IN,
    ),
    ("GET", "/v2.0/security-group-rules/{id}"): (None, SHOW),
    ("DELETE", "/v2.0/security-group-rules/{id}"): (None, DELETE),
    ("GET", "/v2.0/quotas"): (None, ADMIN),
    ("GET", "/v2.0/quotas/{project_id}"): (None, (401, 403, 200, 200, 403, 200)),
    ("GET", "/v2.0/quotas/{project_id}/default"): (None, (401, 403, 200, 200, 403, 200)),
    ("GET", "/v2.0/quotas/{project_id}/details"): (None, (401, 403, 200, 200, 403, 200)),
    ("PUT", "/v2.0/quotas/{project_id}"): ({"quota": {"port": 30}}, ADMIN),
    ("DELETE", "/v2.0/quotas/{project_id}"): (None, (401, 403, 403, 403, 403, 204)),
}  # fmt: skip
for _collection in ("networks", "subnets", "ports", "security-groups"):
    _tags = f"/v2.0/{_collection}/{{id}}/tags"
    WALK |= {
        ("GET", _tags): (None, SHOW),
        ("PUT", _tags): ({"tags": ["t", "u"]}, CHANGE),
        ("DELETE", _tags): (None, DELETE),
        ("GET", f"{_tags}/{{tag}}"): (None, (401, 403, 204, 204, 404, 204)),
        ("PUT", f"{_tags}/{{tag}}"): (None, (401, 403, 403, 201, 404, 201)),
        ("DELETE", f"{_tags}/{{tag}}"): (None, DELETE),
    }
NO_LIMIT = ("network", "subnet", "port", "security_group", "security_group_rule")
CALLERS = ("", "nobody@p1", "reader@p1", "member@p1", "member@p2", "admin@p0")


def test_every_route_is_walked(cloud: Cloud) -> None:
    service = cloud.app.services[0]
    assert {(route.method, route.path) for route in service.routes} == set(WALK)
    assert {route.policy for route in service.routes} == set(service.policy)


async def _records(cloud: Cloud) -> dict[str, str]:
    """One of each kind, of project p1, each deletable."""
    member = cloud.member
    network = await member.make("network", name="alone")
    other = await member.make("network", name="used")
    subnet = await member.make("subnet", network_id=other["id"], cidr="192.168.5.0/24")
    port = await member.make("port", network_id=other["id"], fixed_ips=[])
    group = await member.make("security_group", name="g")
    rule = group["security_group_rules"][0]
    records = {"network": network, "subnet": subnet, "port": port, "security-group": group, "security-group-rule": rule}
    for kind in ("network", "subnet", "port", "security-group"):
        await member.call("PUT", f"/{kind}s/{records[kind]['id']}/tags/t", 201)
    return {kind: record["id"] for kind, record in records.items()}


def _filled(value: Any, records: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(one, records) for key, one in value.items()}
    return {"{network}": records["network"], "{group}": records["security-group"]}.get(value, value) if isinstance(
        value, str
    ) else value


@pytest.mark.parametrize("token", CALLERS, ids=lambda token: token or "no token")
async def test_every_route_as_caller(token: str, cloud: Cloud) -> None:
    for (method, path), (body, statuses) in WALK.items():
        await cloud.admin.call("PUT", "/quotas/p1", 200, {"quota": dict.fromkeys(NO_LIMIT, -1)})
        records = await _records(cloud)
        kind = path.split("/")[2].removesuffix("s") if path.count("/") > 1 else ""
        target = path.replace("{id}", records.get(kind, "")).replace("{tag}", "t").replace("{project_id}", "p1")
        target = target.replace("{alias}", "quotas")
        answer = await cloud.client.request(
            method, f"/network{target}", json=_filled(body, records), headers={"x-auth-token": token} if token else {}
        )
        status = statuses[CALLERS.index(token)]
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text[:300]}"
        if status >= 400:
            assert set(answer.json()["NeutronError"]) == {"type", "message", "detail"}


async def test_lists_show_only_what_one_may_see(cloud: Cloud) -> None:
    records = await _records(cloud)
    for kind in ("network", "subnet", "port", "security_group", "security_group_rule"):
        record_id = records[kind.replace("_", "-")]
        assert record_id in [one["id"] for one in await cloud.member.list(kind)]
        assert record_id in [one["id"] for one in await cloud.admin.list(kind)]
        assert record_id not in [one["id"] for one in await cloud.other.list(kind)]
        assert await cloud.other.list(kind, f"?id={record_id}") == []
