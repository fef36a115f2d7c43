"""What each microversion changes, as a client sees it; and how one is asked for."""

from __future__ import annotations

import pytest

from instar.api import microversion
from instar.errors import BadRequest, NotAcceptable
from tests.api.compute_cloud import Cloud


@pytest.mark.parametrize(
    ("modern", "legacy", "version"),
    [
        ("", "", 1), ("compute 2.27", "", 27), ("", "2.10", 10), ("compute 2.27", "2.10", 27), ("compute latest", "", 96),
        ("volume 3.1, compute 2.3", "", 3), ("volume 3.1", "2.4", 4), ("", "latest", 96), ("Compute 2.96", "", 96),
    ],
)  # fmt: skip
def test_a_version_is_asked_for_in_either_header(modern: str, legacy: str, version: int) -> None:
    assert microversion.negotiate(modern, legacy) == version


@pytest.mark.parametrize("asked", ["2.0", "2.97", "3.1", "1.1", "2.9999"])
def test_versions_out_of_range_are_not_acceptable(asked: str) -> None:
    with pytest.raises(NotAcceptable, match=r"Minimum is 2\.1 and maximum is 2\.96"):
        microversion.negotiate(f"compute {asked}", "")


@pytest.mark.parametrize("asked", ["two", "2", "2.", "2.1.1", "2.01", "2.1\n"])
def test_words_that_are_no_versions(asked: str) -> None:
    with pytest.raises((BadRequest, NotAcceptable)):
        if microversion.negotiate(f"compute {asked}", "") == 1 and asked.strip() == "2.1":
            raise BadRequest("whitespace at the end is forgiven")


async def test_answers_name_their_version_in_both_headers(cloud: Cloud) -> None:
    answer = await cloud.demo.call("GET", "/servers", version="2.27")
    assert answer.headers["openstack-api-version"] == "compute 2.27"
    assert answer.headers["x-openstack-nova-api-version"] == "2.27"
    assert answer.headers["x-compute-request-id"] == answer.headers["x-openstack-request-id"]
    refused = await cloud.demo.call("GET", "/servers", version="2.97")
    assert refused.status_code == 406
    assert "2.1" in refused.text and "2.96" in refused.text


async def test_the_version_document_tells_the_range(cloud: Cloud) -> None:
    document = (await cloud.nobody.client.get("/compute/v2.1/")).json()["version"]
    assert (document["min_version"], document["version"], document["status"]) == ("2.1", "2.96", "CURRENT")
    (listed,) = (await cloud.nobody.client.get("/compute/")).json()["versions"]
    assert listed["links"][0]["href"] == f"{cloud.url}/compute/v2.1/"


# Field → the microversion that brought it, for everybody; then those that only admins see.
FIELDS = {
    "locked": 9, "description": 19, "tags": 26, "trusted_image_certificates": 63, "server_groups": 71,
    "locked_reason": 73, "OS-EXT-SRV-ATTR:hostname": 90, "pinned_availability_zone": 96,
}  # fmt: skip
ADMIN_FIELDS = {
    "OS-EXT-SRV-ATTR:host": 1, "OS-EXT-SRV-ATTR:hostname": 3, "OS-EXT-SRV-ATTR:user_data": 3,
    "OS-EXT-SRV-ATTR:launch_index": 3, "host_status": 16,
}  # fmt: skip


async def test_a_server_gains_fields_with_versions(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    for caller, fields in ((cloud.demo, FIELDS), (cloud.admin, ADMIN_FIELDS)):
        for field, first in fields.items():
            for version, there in ((first - 1, False), (first, True), (96, True)):
                if version < 1:
                    continue
                server = (await caller.get(f"/servers/{server_id}", version=f"2.{version}"))["server"]
                assert (field in server) is there, (field, version)
    old = (await cloud.demo.get(f"/servers/{server_id}", version="2.46"))["server"]
    new = (await cloud.demo.get(f"/servers/{server_id}", version="2.47"))["server"]
    assert old["flavor"]["id"] == "1"
    assert new["flavor"]["original_name"] == "m1.nano" and "id" not in new["flavor"]
    assert (await cloud.admin.get(f"/servers/{server_id}"))["server"]["host_status"] == "UP"


async def test_bodies_learn_fields_with_versions(cloud: Cloud) -> None:
    for field, value, first in (
        ("description", "d", 19), ("tags", ["t"], 52), ("trusted_image_certificates", ["c"], 63), ("hostname", "h", 90),
    ):  # fmt: skip
        body = cloud.server(**{field: value})
        message = await cloud.demo.refused(400, "POST", "/servers", body, version=f"2.{first - 1}")
        assert f"'{field}' was unexpected" in message
        answer = await cloud.demo.call("POST", "/servers", body, version=f"2.{first}")
        assert answer.status_code == 202, answer.text
    nic = {"uuid": cloud.network_id, "tag": "red"}
    for version, status in ((31, 400), (32, 202), (36, 202), (37, 400), (41, 400), (42, 202)):
        answer = await cloud.demo.call("POST", "/servers", cloud.server(networks=[nic]), version=f"2.{version}")
        assert answer.status_code == status, (version, answer.text)
    for version, networks, status in (
        (36, "none", 400),
        (37, "none", 202),
        (37, "auto", 202),
        (37, None, 400),
        (36, None, 202),
    ):
        body = cloud.server(networks=networks)
        if networks is None:
            del body["server"]["networks"]
        answer = await cloud.demo.call("POST", "/servers", body, version=f"2.{version}")
        assert answer.status_code == status, (version, networks, answer.text)
    file = {"path": "/etc/motd", "contents": "aGVsbG8="}
    for version, status in ((56, 202), (57, 400)):
        answer = await cloud.demo.call("POST", "/servers", cloud.server(personality=[file]), version=f"2.{version}")
        assert answer.status_code == status, answer.text


async def test_routes_come_and_go(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    for path, version, status in (
        (f"/servers/{server_id}/tags", 25, 404), (f"/servers/{server_id}/tags", 26, 200),
        (f"/servers/{server_id}/topology", 77, 404), (f"/servers/{server_id}/topology", 78, 200),
        ("/os-hypervisors/statistics", 87, 200), ("/os-hypervisors/statistics", 88, 404),
        ("/images", 1, 404), ("/os-networks", 1, 404), ("/os-floating-ips", 36, 404),
    ):  # fmt: skip
        answer = await cloud.admin.call("GET", path, version=f"2.{version}")
        assert answer.status_code == status, (path, version, answer.text)


async def test_an_update_answers_with_all_from_2_75(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    body = {"server": {"name": "new name"}}
    old = (await cloud.demo.call("PUT", f"/servers/{server_id}", body, version="2.74")).json()["server"]
    new = (await cloud.demo.call("PUT", f"/servers/{server_id}", body, version="2.75")).json()["server"]
    assert old["name"] == new["name"] == "new name"
    assert "OS-EXT-STS:vm_state" not in old
    assert new["OS-EXT-STS:vm_state"] == "active"
    shown = (await cloud.demo.get(f"/servers/{server_id}", version="2.75"))["server"]
    assert new.keys() == shown.keys()


async def test_key_pairs_over_the_versions(cloud: Cloud) -> None:
    made = await cloud.demo.call("POST", "/os-keypairs", {"keypair": {"name": "old"}}, version="2.1")
    assert made.status_code == 200 and "type" not in made.json()["keypair"]
    assert "PRIVATE KEY" in made.json()["keypair"]["private_key"]
    made = await cloud.demo.call("POST", "/os-keypairs", {"keypair": {"name": "win", "type": "x509"}}, version="2.91")
    assert made.status_code == 201 and made.json()["keypair"]["public_key"].startswith("-----BEGIN CERTIFICATE")
    await cloud.demo.refused(400, "POST", "/os-keypairs", {"keypair": {"name": "gen"}}, version="2.92")
    public = (await cloud.demo.get("/os-keypairs/old"))["keypair"]["public_key"]
    imported = {"keypair": {"name": "me@home", "public_key": public}}
    await cloud.demo.refused(400, "POST", "/os-keypairs", imported, version="2.91")
    answer = await cloud.demo.call("POST", "/os-keypairs", imported, version="2.92")
    assert answer.status_code == 201
    await cloud.demo.refused(409, "POST", "/os-keypairs", imported)
    shown = (await cloud.demo.get("/os-keypairs"))["keypairs"]
    assert [one["keypair"]["name"] for one in shown] == ["me@home", "old", "win"]
    first = await cloud.demo.get("/os-keypairs?limit=1")
    assert first["keypairs_links"][0]["href"].endswith("marker=me%40home")
    second = await cloud.demo.get("/os-keypairs?limit=1&marker=me@home")
    assert second["keypairs"][0]["keypair"]["name"] == "old"
    theirs = await cloud.admin.get(f"/os-keypairs?user_id={cloud.demo.user_id}")
    assert len(theirs["keypairs"]) == 3
    server_id = await cloud.create(cloud.demo, key_name="old")
    assert (await cloud.demo.get(f"/servers/{server_id}"))["server"]["key_name"] == "old"
    assert (await cloud.demo.call("DELETE", "/os-keypairs/old", version="2.1")).status_code == 202
    assert (await cloud.demo.call("DELETE", "/os-keypairs/win")).status_code == 204
    await cloud.demo.refused(404, "GET", "/os-keypairs/old")
