"""Flavors, quotas, hosts, aggregates, groups, usage, events: each through the API on a running cloud."""

from __future__ import annotations

from tests.api.compute_cloud import Cloud


async def test_flavors(cloud: Cloud) -> None:
    names = [one["name"] for one in (await cloud.demo.get("/flavors"))["flavors"]]
    assert names == ["m1.nano", "m1.micro", "m1.tiny", "m1.small", "m1.medium"]
    new = {"flavor": {"name": "own", "ram": 256, "vcpus": 1, "disk": 2, "os-flavor-access:is_public": False}}
    answer = await cloud.admin.call("POST", "/flavors", new)
    assert answer.status_code == 200, answer.text
    flavor_id = answer.json()["flavor"]["id"]
    await cloud.admin.refused(409, "POST", "/flavors", new)
    await cloud.demo.refused(404, "GET", f"/flavors/{flavor_id}")
    assert flavor_id in await cloud.demo.refused(400, "POST", "/servers", cloud.server(flavorRef=flavor_id))
    access = {"addTenantAccess": {"tenant": cloud.demo.project_id}}
    assert (await cloud.admin.call("POST", f"/flavors/{flavor_id}/action", access)).status_code == 200
    await cloud.admin.refused(409, "POST", f"/flavors/{flavor_id}/action", access)
    await cloud.admin.refused(409, "POST", "/flavors/1/action", access)
    assert (await cloud.demo.get(f"/flavors/{flavor_id}"))["flavor"]["name"] == "own"
    specs = f"/flavors/{flavor_id}/os-extra_specs"
    assert (
        await cloud.admin.call("POST", specs, {"extra_specs": {"hw:cpu_policy": "shared", "mine:x": "y"}})
    ).status_code == 200
    await cloud.admin.refused(400, "POST", specs, {"extra_specs": {"hw:cpu_policy": "odd"}})
    await cloud.admin.refused(400, "POST", specs, {"extra_specs": {"hw:nonsense": "1"}})
    assert (await cloud.admin.call("POST", specs, {"extra_specs": {"hw:nonsense": "1"}}, version="2.85")).status_code == 200
    assert (await cloud.admin.call("PUT", specs + "/mine:x", {"mine:x": "z"})).json() == {"mine:x": "z"}
    assert (await cloud.demo.get(specs + "/mine:x")) == {"mine:x": "z"}
    assert (await cloud.admin.call("DELETE", specs + "/mine:x")).status_code == 200
    await cloud.demo.refused(404, "GET", specs + "/mine:x")
    put = await cloud.admin.call("PUT", f"/flavors/{flavor_id}", {"flavor": {"description": "new"}})
    assert put.json()["flavor"]["description"] == "new"
    assert (await cloud.admin.call("DELETE", f"/flavors/{flavor_id}")).status_code == 202
    await cloud.admin.refused(404, "DELETE", f"/flavors/{flavor_id}")
    sizes = (await cloud.demo.get("/flavors/detail?minRam=1000&sort_key=memory_mb&sort_dir=desc"))["flavors"]
    assert [one["name"] for one in sizes] == ["m1.medium", "m1.small"]
    assert sizes[0]["swap"] == 0
    assert (await cloud.demo.get("/flavors/5", version="2.74"))["flavor"]["swap"] == ""
    page = await cloud.demo.get("/flavors?limit=2&marker=2")
    assert [one["id"] for one in page["flavors"]] == ["3", "4"]
    for bad in ({"ram": 0}, {"vcpus": "x"}, {"name": ""}, {"extra": 1}, {"disk": -1}):
        await cloud.admin.refused(400, "POST", "/flavors", {"flavor": {"name": "n", "ram": 1, "vcpus": 1, "disk": 1} | bad})


async def test_quotas_and_limits(cloud: Cloud) -> None:
    project_id = cloud.demo.project_id
    path = f"/os-quota-sets/{project_id}"
    assert (await cloud.demo.get(path))["quota_set"]["key_pairs"] == 5
    assert "injected_files" not in (await cloud.demo.get(path))["quota_set"]
    assert "injected_files" in (await cloud.demo.get(path, version="2.56"))["quota_set"]
    await cloud.created(cloud.demo)
    detail = (await cloud.demo.get(path + "/detail"))["quota_set"]
    assert detail["instances"] == {"limit": 100, "in_use": 1, "reserved": 0}
    await cloud.admin.refused(400, "PUT", path, {"quota_set": {"instances": 0}})
    assert (await cloud.admin.call("PUT", path, {"quota_set": {"instances": 0, "force": True}})).status_code == 200
    await cloud.demo.refused(403, "POST", "/servers", cloud.server())
    assert (await cloud.admin.call("DELETE", path)).status_code == 202
    assert (await cloud.demo.get(path))["quota_set"]["instances"] == 100
    default = {"quota_class_set": {"cores": 7}}
    assert (await cloud.admin.call("PUT", "/os-quota-class-sets/default", default)).status_code == 200
    assert (await cloud.demo.get(path + "/defaults"))["quota_set"]["cores"] == 7
    assert (await cloud.demo.get("/limits"))["limits"]["absolute"]["maxTotalCores"] == 7
    await cloud.admin.refused(400, "GET", "/os-quota-sets/no-such-project")
    await cloud.admin.refused(400, "PUT", path, {"quota_set": {"cores": -2}})
    await cloud.admin.refused(400, "PUT", path, {"quota_set": {"fixed_ips": 1}})


async def test_services_hypervisors_and_zones(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    host = (await cloud.admin.get(f"/servers/{server_id}"))["server"]["OS-EXT-SRV-ATTR:host"]
    services = {one["host"]: one for one in (await cloud.admin.get("/os-services"))["services"]}
    assert set(services) == {"sim-0", "sim-1"}
    assert (services[host]["state"], services[host]["status"], services[host]["zone"]) == ("up", "enabled", "nova")
    path = f"/os-services/{services[host]['id']}"
    await cloud.admin.refused(409, "DELETE", path)
    await cloud.admin.refused(400, "PUT", path, {})
    changed = await cloud.admin.call("PUT", path, {"status": "disabled", "disabled_reason": "fan"})
    assert changed.json()["service"]["disabled_reason"] == "fan"
    assert (await cloud.admin.get(f"/servers/{server_id}"))["server"]["host_status"] == "MAINTENANCE"
    other = await cloud.created(cloud.demo)
    assert (await cloud.admin.get(f"/servers/{other}"))["server"]["OS-EXT-SRV-ATTR:host"] != host
    old = {"host": host, "binary": "nova-compute"}
    assert (await cloud.admin.call("PUT", "/os-services/enable", old, version="2.52")).status_code == 200
    down = await cloud.admin.call("PUT", path, {"forced_down": True})
    assert (down.json()["service"]["state"], down.json()["service"]["forced_down"]) == ("down", True)
    await cloud.admin.call("PUT", path, {"forced_down": False})
    hypervisors = (await cloud.admin.get("/os-hypervisors/detail?with_servers=true"))["hypervisors"]
    assert {one["service"]["host"] for one in hypervisors} == {"sim-0", "sim-1"}
    assert sorted(server["uuid"] for one in hypervisors for server in one["servers"]) == sorted([server_id, other])
    shown = (await cloud.admin.get(f"/os-hypervisors/{hypervisors[0]['id']}", version="2.87"))["hypervisor"]
    assert shown["vcpus"] == 64
    assert "vcpus" not in hypervisors[0]
    number = (await cloud.admin.get("/os-hypervisors", version="2.1"))["hypervisors"][0]["id"]
    assert isinstance(number, int)
    assert (await cloud.admin.get(f"/os-hypervisors/{number}", version="2.1"))["hypervisor"]["id"] == number
    statistics = (await cloud.admin.get("/os-hypervisors/statistics", version="2.1"))["hypervisor_statistics"]
    assert (statistics["count"], statistics["vcpus_used"]) == (2, 2)
    pages = await cloud.admin.get("/os-hypervisors?limit=1")
    assert len(pages["hypervisors"]) == 1 and pages["hypervisors_links"]
    zones = (await cloud.demo.get("/os-availability-zone"))["availabilityZoneInfo"]
    assert zones == [{"zoneName": "nova", "zoneState": {"available": True}, "hosts": None}]


async def test_aggregates_make_zones(cloud: Cloud) -> None:
    made = await cloud.admin.call("POST", "/os-aggregates", {"aggregate": {"name": "agg", "availability_zone": "east"}})
    assert made.status_code == 200, made.text
    number = made.json()["aggregate"]["id"]
    path = f"/os-aggregates/{number}"
    added = await cloud.admin.call("POST", path + "/action", {"add_host": {"host": "sim-1"}})
    assert added.json()["aggregate"]["hosts"] == ["sim-1"]
    await cloud.admin.refused(409, "POST", path + "/action", {"add_host": {"host": "sim-1"}})
    await cloud.admin.refused(404, "POST", path + "/action", {"add_host": {"host": "sim-9"}})
    server_id = await cloud.created(cloud.demo, availability_zone="east")
    server = (await cloud.admin.get(f"/servers/{server_id}"))["server"]
    assert (server["OS-EXT-AZ:availability_zone"], server["pinned_availability_zone"]) == ("east", "east")
    assert server["OS-EXT-SRV-ATTR:host"] == "sim-1"
    await cloud.admin.refused(409, "PUT", path, {"aggregate": {"availability_zone": "west"}})
    metadata = {"set_metadata": {"metadata": {"ssd": "true", "old": None}}}
    answer = await cloud.admin.call("POST", path + "/action", metadata)
    assert answer.json()["aggregate"]["metadata"] == {"ssd": "true", "availability_zone": "east"}
    await cloud.admin.refused(409, "DELETE", path)
    await cloud.admin.refused(404, "GET", "/os-aggregates/99")


async def test_server_groups(cloud: Cloud) -> None:
    body = {"server_group": {"name": "apart", "policy": "anti-affinity", "rules": {"max_server_per_host": 2}}}
    group = (await cloud.demo.call("POST", "/os-server-groups", body)).json()["server_group"]
    assert (group["policy"], group["rules"]) == ("anti-affinity", {"max_server_per_host": 2})
    old = {"server_group": {"name": "near", "policies": ["affinity"]}}
    made = (await cloud.demo.call("POST", "/os-server-groups", old, version="2.1")).json()["server_group"]
    assert made["policies"] == ["affinity"] and "project_id" not in made
    await cloud.demo.refused(400, "POST", "/os-server-groups", old)
    soft = {"server_group": {"name": "x", "policies": ["soft-affinity"]}}
    await cloud.demo.refused(400, "POST", "/os-server-groups", soft, version="2.14")
    hints = {"os:scheduler_hints": {"group": group["id"]}}
    answer = await cloud.demo.call("POST", "/servers", cloud.server() | hints)
    server_id = answer.json()["server"]["id"]
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert (await cloud.demo.get(f"/os-server-groups/{group['id']}"))["server_group"]["members"] == [server_id]
    assert (await cloud.demo.get(f"/servers/{server_id}"))["server"]["server_groups"] == [group["id"]]
    unknown = {"os:scheduler_hints": {"group": "3f1c2b5e-0000-4000-8000-000000000000"}}
    await cloud.demo.refused(400, "POST", "/servers", cloud.server() | unknown)
    assert (await cloud.demo.call("DELETE", f"/os-server-groups/{group['id']}")).status_code == 204


async def test_usage_events_and_what_is_empty(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    usage = (await cloud.demo.get(f"/os-simple-tenant-usage/{cloud.demo.project_id}"))["tenant_usage"]
    assert usage["server_usages"][0]["instance_id"] == server_id
    assert usage["server_usages"][0]["state"] == "active"
    listed = (await cloud.admin.get("/os-simple-tenant-usage?detailed=1"))["tenant_usages"]
    assert [one["tenant_id"] for one in listed] == [cloud.demo.project_id]
    await cloud.admin.refused(400, "GET", "/os-simple-tenant-usage?start=2020-01-02T00:00:00&end=2020-01-01T00:00:00")
    event = {"name": "network-changed", "server_uuid": server_id}
    answer = await cloud.admin.call("POST", "/os-server-external-events", {"events": [event]})
    assert (answer.status_code, answer.json()["events"][0]["code"]) == (200, 200)
    unknown = event | {"server_uuid": "3f1c2b5e-0000-4000-8000-000000000000"}
    answer = await cloud.admin.call("POST", "/os-server-external-events", {"events": [event, unknown]})
    assert answer.status_code == 207
    await cloud.admin.refused(404, "POST", "/os-server-external-events", {"events": [unknown]})
    await cloud.admin.refused(400, "POST", "/os-server-external-events", {"events": [event | {"name": "party"}]})
    assert (await cloud.admin.get("/os-migrations"))["migrations"] == []
    assert (await cloud.demo.get(f"/servers/{server_id}/os-volume_attachments"))["volumeAttachments"] == []
    assert (await cloud.demo.get("/extensions/os-keypairs"))["extension"]["alias"] == "os-keypairs"
    interfaces = (await cloud.demo.get(f"/servers/{server_id}/os-interface"))["interfaceAttachments"]
    assert interfaces[0]["net_id"] == cloud.network_id
    port = await cloud.demo.get(f"/servers/{server_id}/os-interface/{interfaces[0]['port_id']}")
    assert port["interfaceAttachment"] == interfaces[0]
    assert (await cloud.demo.get(f"/servers/{server_id}/ips"))["addresses"]["private"][0]["version"] == 4
    assert (await cloud.demo.get(f"/servers/{server_id}/os-security-groups"))["security_groups"][0]["name"] == "default"
    diagnostics = await cloud.admin.get(f"/servers/{server_id}/diagnostics")
    assert (diagnostics["state"], diagnostics["num_cpus"]) == ("running", 1)


async def test_tags_of_a_server(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/tags"
    assert (await cloud.demo.call("PUT", path, {"tags": ["a", "b"]})).json() == {"tags": ["a", "b"]}
    assert (await cloud.demo.call("PUT", path + "/c")).status_code == 201
    assert (await cloud.demo.call("PUT", path + "/c")).status_code == 204
    assert (await cloud.demo.call("GET", path + "/c")).status_code == 204
    assert (await cloud.demo.call("DELETE", path + "/a")).status_code == 204
    await cloud.demo.refused(404, "DELETE", path + "/a")
    assert (await cloud.demo.get(path))["tags"] == ["b", "c"]
    await cloud.demo.refused(400, "PUT", path, {"tags": ["x" * 61]})
    assert (await cloud.demo.call("DELETE", path)).status_code == 204
    assert (await cloud.demo.get(path))["tags"] == []
    both = f"/compute/v2.1/{cloud.demo.project_id}/servers/{server_id}"
    answer = await cloud.demo.client.get(both, headers={"x-auth-token": cloud.demo.token})
    assert answer.json()["server"]["id"] == server_id
    wrong = await cloud.demo.client.get("/compute/v2.1/other/servers", headers={"x-auth-token": cloud.demo.token})
    assert wrong.status_code == 400
