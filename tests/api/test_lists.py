"""Lists of servers: filters, order, pages. And what may follow from a pattern that a user writes."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instar.api.patterns import compiled, literal
from instar.errors import BadRequest
from tests.api.compute_cloud import Cloud

PIECES = ["a", "b", ".", "*", "+", "?", "|", "(", ")", "^", "$", "[ab]", "[^a]", "{1,2}", "\\d", "\\."]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8), st.text("ab1.", max_size=8))
def test_patterns_find_what_regular_expressions_find(pieces: list[str], text: str) -> None:
    pattern = "".join(pieces)
    try:
        found = compiled(pattern)(text)
        wanted = re.compile(pattern).search(text) is not None
    except (BadRequest, re.error):
        return
    assert found is wanted
    plain = literal(pattern)
    if plain is not None and not (plain.at_start or plain.at_end):
        assert (plain.text in text) is wanted


def test_no_pattern_takes_long() -> None:
    began = time.process_time()
    for pattern in ("(a*)*b$", "(a|a)*b", "a*a*a*a*a*a*a*a*b", "((a{0,20}){0,20})b$"):
        assert not compiled(pattern)("a" * 255)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("pattern", ["(", "a**", "[a", "\\", "a{3,1}", "x" * 300, "(?=a)", "\\1", "a{65}"])
def test_patterns_that_are_not_understood_are_refused(pattern: str) -> None:
    with pytest.raises(BadRequest):
        compiled(pattern)


async def _names(cloud: Cloud, query: str, *, version: str = "2.96", admin: bool = False) -> list[str]:
    caller = cloud.admin if admin else cloud.demo
    return [
        one["name"]
        for one in (await caller.get(f"/servers?sort_key=display_name&sort_dir=asc&{query}", version=version))["servers"]
    ]


async def test_filters(cloud: Cloud) -> None:
    ids = {}
    for name, tags, size in (("web-1", ["red", "big"], "1"), ("web-2", ["red"], "2"), ("db.1", [], "1")):
        ids[name] = await cloud.created(cloud.demo, name, tags=tags, flavorRef=size, hostname=name.replace(".", "-"))
    await cloud.created(cloud.admin, "of-admin")
    everything = ["db.1", "web-1", "web-2"]
    address = (await cloud.demo.get(f"/servers/{ids['web-2']}"))["server"]["addresses"]["private"][0]["addr"]
    cases = {
        "": everything, "name=web": ["web-1", "web-2"], "name=^web-1$": ["web-1"], "name=1$": ["db.1", "web-1"],
        "name=(web|db).1": ["db.1", "web-1"], "name=web-[2-9]": ["web-2"], "name=WEB": [], "name=%25": [],
        "status=ACTIVE": everything, "status=active": everything, "status=SHUTOFF": [],
        "status=ACTIVE&status=ERROR": everything,
        "flavor=2": ["web-2"], f"image={cloud.image_id}": everything, "image=x": [], "tags=red": ["web-1", "web-2"],
        "tags=red,big": ["web-1"], "tags-any=big,blue": ["web-1"], "not-tags=red,big": ["db.1", "web-2"],
        "not-tags-any=red": ["db.1"], "locked=false": everything, f"uuid={ids['db.1']}": ["db.1"],
        f"ip={address}$".replace(".", "%5C."): ["web-2"], "ip=10.78.": everything, "ip=99.": [], "ip6=10.78": [],
        "vm_state=active": everything, "task_state=None": everything, "power_state=1": everything, "power_state=4": [],
        "key_name=x": [], "availability_zone=mars": [], "changes-since=2001-01-01T00:00:00Z": everything,
        "changes-since=2999-01-01T00:00:00Z": [], "changes-before=2001-01-01T00:00:00Z": [],
        "config_drive=True": everything,
        "host=sim-0": everything, "created_at=2001-01-01T00:00:00": [], f"user_id={cloud.demo.user_id}": everything,
    }  # fmt: skip
    for query, names in cases.items():
        assert await _names(cloud, query) == names, query
    everyone = await _names(cloud, "all_tenants=1", admin=True)
    assert everyone == ["db.1", "of-admin", "web-1", "web-2"]
    assert await _names(cloud, f"all_tenants=1&project_id={cloud.demo.project_id}", admin=True) == everything
    on_hosts = [await _names(cloud, f"all_tenants=1&host=sim-{n}", admin=True) for n in (0, 1)]
    assert sorted(on_hosts[0] + on_hosts[1]) == sorted(everyone)
    assert await _names(cloud, "all_tenants=1&hostname=^db-1$", admin=True) == ["db.1"]
    assert await _names(cloud, "colour=red", version="2.74") == everything
    for query in ("colour=red", "status=HAPPY", "sort_key=secret", "sort_dir=up", "limit=-1", "limit=x", "marker=none",
                  "changes-since=soon", "ip=%3B", "name=(", "locked=maybe"):  # fmt: skip
        await cloud.demo.refused(400, "GET", f"/servers?{query}")


async def test_deleted_servers_are_seen_by_those_who_ask_for_changes(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    await cloud.demo.call("DELETE", f"/servers/{server_id}")
    await cloud.gone(cloud.demo, server_id)
    found = (await cloud.demo.get("/servers/detail?changes-since=2001-01-01T00:00:00Z"))["servers"]
    assert [(one["id"], one["status"]) for one in found] == [(server_id, "DELETED")]
    assert (await cloud.admin.get("/servers?all_tenants=1&deleted=true"))["servers"][0]["id"] == server_id
    assert (await cloud.demo.get("/servers?deleted=true"))["servers"] == []
    await cloud.demo.refused(403, "GET", "/servers?status=deleted")
    actions = (await cloud.demo.get(f"/servers/{server_id}/os-instance-actions"))["instanceActions"]
    assert [one["action"] for one in actions] == ["delete", "create"]
    await cloud.demo.refused(404, "GET", f"/servers/{server_id}/os-instance-actions", version="2.20")


@pytest.mark.parametrize(
    "order", ["", "sort_key=display_name&sort_dir=asc", "sort_key=launched_at&sort_key=host&sort_dir=asc&sort_dir=desc"]
)
async def test_pages_have_every_server_once(cloud: Cloud, order: str) -> None:
    order = order.replace("host", "vm_state")
    made = {await cloud.created(cloud.demo, f"s{n}", tags=["odd"] if n % 2 else []) for n in range(7)}
    for extra, wanted in (("", 7), ("&tags=odd", 3)):
        seen: list[str] = []
        path = f"/servers?limit=2&{order}{extra}"
        for _ in range(10):
            page = await cloud.demo.get(path)
            seen += [one["id"] for one in page["servers"]]
            if "servers_links" not in page:
                break
            path = page["servers_links"][0]["href"].partition("/v2.1")[2]
        assert len(seen) == len(set(seen)) == wanted
        assert set(seen) <= made
