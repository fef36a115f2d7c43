"""What no command shows: microversions, the shape of faults, paging, other projects, and refusals with their reasons."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager

import openstack
import pytest
from openstack import exceptions

from tests.endtoend.running_cloud import Caller, RunningCloud, wait_until

UNKNOWN = "3f1c2b5e-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def sdk(simulated_cloud: RunningCloud) -> Iterator[openstack.connection.Connection]:
    with sdk_of(simulated_cloud) as connection:
        yield connection


@contextmanager
def sdk_of(cloud: RunningCloud) -> Iterator[openstack.connection.Connection]:
    """As a member of project demo."""
    config = openstack.config.OpenStackConfig(config_files=[str(cloud.directory / "clouds.yaml")])
    with openstack.connection.Connection(config=config.get_one(cloud="instar-demo")) as connection:
        yield connection


def fields(caller: Caller, **more: object) -> dict[str, object]:
    (image,) = caller.other("GET", "/image/v2/images?name=tiny").json()["images"]
    return {"server": {"name": "s", "flavorRef": "1", "imageRef": image["id"], "networks": "auto"} | more}


def refused(caller: Caller, status: int, kind: str, method: str, path: str, body: object = None) -> str:
    """The message of a fault that has this status and the Compute API's shape."""
    answer = caller.call(method, path, body)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == [kind] and answer.json()[kind]["code"] == status
    message: str = answer.json()[kind]["message"]
    assert "Traceback" not in message and "/src/" not in message
    return message


def test_the_sdk_builds_waits_reboots_and_deletes(sdk: openstack.connection.Connection) -> None:
    image, network = sdk.image.find_image("tiny"), sdk.network.find_network("private")
    flavor = sdk.compute.find_flavor("m1.nano")
    server = sdk.compute.create_server(
        name="by-sdk", image_id=image.id, flavor_id=flavor.id, networks=[{"uuid": network.id}]
    )
    server = sdk.compute.wait_for_server(server, interval=0.1, wait=20)
    assert server.status == "ACTIVE" and server.addresses["private"]
    sdk.compute.reboot_server(server, "HARD")
    sdk.compute.wait_for_server(server, interval=0.1, wait=20)
    assert {action.action for action in sdk.compute.server_actions(server)} == {"create", "reboot"}
    sdk.compute.delete_server(server)
    sdk.compute.wait_for_delete(server, interval=0.1, wait=20)
    with pytest.raises(exceptions.NotFoundException):
        sdk.compute.get_server(server.id)


def test_microversions_are_negotiated(simulated_cloud: RunningCloud) -> None:
    demo = simulated_cloud.demo
    (version,) = [one for one in demo.call("GET", "/").json().values() if isinstance(one, dict)]
    highest = version["version"]
    oldest = demo.call("GET", "/servers", version="2.1")
    assert oldest.headers["openstack-api-version"] == "compute 2.1" and "OpenStack-API-Version" in oldest.headers["vary"]
    assert demo.call("GET", "/servers", version=None).headers["openstack-api-version"] == "compute 2.1"
    assert demo.call("GET", "/servers", version="latest").headers["openstack-api-version"] == f"compute {highest}"
    answer = demo.call("GET", "/servers", version="2.999")
    assert answer.status_code == 406
    assert re.search(rf"2\.999 .*2\.1 .*{re.escape(highest)}", answer.text), answer.text
    assert demo.call("GET", "/servers", version="two").status_code == 400


def test_lists_are_paged_by_links_and_other_projects_see_nothing(simulated_cloud: RunningCloud) -> None:
    demo, admin = simulated_cloud.demo, simulated_cloud.admin
    made = []
    for number in range(5):
        answer = demo.call("POST", "/servers", fields(demo, name=f"page-{number}"))
        assert answer.status_code == 202, answer.text
        made.append(answer.json()["server"]["id"])
    seen, path = [], "/servers?limit=2"
    while path:
        page = demo.get(path)
        assert len(page["servers"]) <= 2
        seen += [server["id"] for server in page["servers"]]
        (href,) = [link["href"] for link in page.get("servers_links", []) if link["rel"] == "next"] or [""]
        assert not href or href.startswith(simulated_cloud.url)
        path = href.partition("/compute/v2.1")[2]
    assert sorted(seen) == sorted(made)
    with sdk_of(simulated_cloud) as sdk:
        assert sorted(server.id for server in sdk.compute.servers(limit=2)) == sorted(made)
    answer = admin.call("POST", "/servers", fields(admin, name="admins"))
    other = answer.json()["server"]["id"]
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/action")):
        refused(demo, 404, "itemNotFound", method, f"/servers/{other}{path}", {"os-stop": None} if path else None)
    assert demo.get("/servers?all_tenants=0")["servers"] and admin.call("DELETE", f"/servers/{other}").status_code == 204
    for server_id in made:
        assert demo.call("DELETE", f"/servers/{server_id}").status_code == 204
    simulated_cloud.gone(other)
    wait_until(lambda: demo.get("/servers")["servers"] == [], 10)


def test_over_quota_says_which_and_how_much(simulated_cloud: RunningCloud) -> None:
    demo, admin = simulated_cloud.demo, simulated_cloud.admin
    path = f"/os-quota-sets/{demo.project_id}"
    assert admin.call("PUT", path, {"quota_set": {"cores": 1}}).status_code == 200
    message = refused(demo, 403, "forbidden", "POST", "/servers", fields(demo, min_count=2))
    assert message == "Quota exceeded for cores: Requested 2, but already used 0 of 1 cores"
    assert admin.call("DELETE", path).status_code == 202


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"flavorRef": "no-such"}, "no-such"),
        ({"imageRef": UNKNOWN}, UNKNOWN),
        ({"networks": [{"uuid": UNKNOWN}]}, UNKNOWN),
        ({"key_name": "no-key"}, "no-key"),
        ({"name": " "}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"user_data": "$$$"}, "user_data"),
        ({"user_data": base64.b64encode(b"x" * 65_536).decode()}, "user_data"),
        ({"colour": "red"}, "colour"),
        ({"flavorRef": "1", "metadata": {"k": 1}}, "metadata"),
    ],
)
def test_bad_input_is_refused_by_its_name(simulated_cloud: RunningCloud, bad: dict[str, object], word: str) -> None:
    demo = simulated_cloud.demo
    assert word in refused(demo, 400, "badRequest", "POST", "/servers", fields(demo, **bad))


def test_actions_that_cannot_be(simulated_cloud: RunningCloud) -> None:
    demo = simulated_cloud.demo
    server_id = demo.call("POST", "/servers", fields(demo)).json()["server"]["id"]
    simulated_cloud.settled(server_id, "ACTIVE")
    path = f"/servers/{server_id}/action"
    message = refused(demo, 409, "conflictingRequest", "POST", path, {"os-start": None})
    assert message == f"Cannot 'start' instance {server_id} while it is in vm_state active"
    assert "os-explode" in refused(demo, 400, "badRequest", "POST", path, {"os-explode": None})
    refused(demo, 400, "badRequest", "POST", path, {"reboot": {"type": "MEDIUM"}})
    refused(demo, 403, "forbidden", "POST", path, {"os-resetState": {"state": "active"}})
    refused(demo, 404, "itemNotFound", "GET", f"/servers/{UNKNOWN}")
    assert demo.http.get("/compute/v2.1/servers").status_code == 401
    assert demo.call("DELETE", f"/servers/{server_id}").status_code == 204
    simulated_cloud.gone(server_id)
