"""Every route as each role and as another project. A route that is not in the table fails the test."""

from __future__ import annotations

import pytest

from instar.http.app import App

PATCH = {"content-type": "application/openstack-images-v2.1-json-patch"}
DATA = {"content-type": "application/octet-stream"}
NAME = [{"op": "replace", "path": "/name", "value": "n"}]

# (method, path) → (request, status for: no token, nobody, reader, member, another project's member, admin).
# The image is private and active, of project p1; {queued} is one without data.
WALK = {
    ("GET", "/"): ({}, (300, 300, 300, 300, 300, 300)),
    ("GET", "/versions"): ({}, (200, 200, 200, 200, 200, 200)),
    ("GET", "/v2/images"): ({}, (401, 403, 200, 200, 200, 200)),
    ("POST", "/v2/images"): ({"json": {"name": "n"}}, (401, 403, 403, 201, 201, 201)),
    ("GET", "/v2/images/{image_id}"): ({}, (401, 403, 200, 200, 404, 200)),
    ("PATCH", "/v2/images/{image_id}"): ({"json": NAME, "headers": PATCH}, (401, 403, 403, 200, 404, 200)),
    ("DELETE", "/v2/images/{image_id}"): ({}, (401, 403, 403, 204, 404, 204)),
    ("GET", "/v2/images/{image_id}/file"): ({}, (401, 403, 200, 200, 404, 200)),
    ("PUT", "/v2/images/{image_id}/file"): ({"content": b"x", "headers": DATA}, (401, 403, 403, 204, 404, 204)),
    ("POST", "/v2/images/{image_id}/actions/deactivate"): ({}, (401, 403, 403, 204, 404, 204)),
    ("POST", "/v2/images/{image_id}/actions/reactivate"): ({}, (401, 403, 403, 204, 404, 204)),
    ("PUT", "/v2/images/{image_id}/tags/{tag}"): ({}, (401, 403, 403, 204, 404, 204)),
    ("DELETE", "/v2/images/{image_id}/tags/{tag}"): ({}, (401, 403, 403, 204, 404, 204)),
    ("GET", "/v2/images/{image_id}/members"): ({}, (401, 403, 200, 200, 404, 200)),
    ("POST", "/v2/images/{image_id}/members"): ({"json": {"member": "p9"}}, (401, 403, 403, 200, 404, 200)),
    ("GET", "/v2/images/{image_id}/members/{project_id}"): ({}, (401, 403, 200, 200, 404, 200)),
    # The owner may not answer for the member; the member itself is in test_sharing.
    ("PUT", "/v2/images/{image_id}/members/{project_id}"): (
        {"json": {"status": "accepted"}}, (401, 403, 403, 403, 404, 200),
    ),
    ("DELETE", "/v2/images/{image_id}/members/{project_id}"): ({}, (401, 403, 403, 204, 404, 204)),
    # Signed URLs, which this cloud's hosts need none of: see test_reach_by_http.
    ("GET", "/hosts/images/{image_id}"): ({}, (404, 404, 404, 404, 404, 404)),
    ("PUT", "/hosts/images/{image_id}"): ({"content": b"x"}, (404, 404, 404, 404, 404, 404)),
    ("GET", "/v2/schemas/{name}"): ({}, (401, 403, 200, 200, 200, 200)),
    ("GET", "/v2/info/import"): ({}, (401, 403, 200, 200, 200, 200)),
    ("GET", "/v2/info/stores"): ({}, (401, 403, 200, 200, 200, 200)),
}  # fmt: skip

CALLERS = ("", "nobody@p1", "reader@p1", "member@p1", "member@p2", "admin@p0")


def test_every_route_is_walked(cloud):
    app: App = cloud.app
    service = app.services[0]
    assert {(route.method, route.path) for route in service.routes} == set(WALK)
    assert {route.policy for route in service.routes} == set(service.policy)


@pytest.mark.parametrize(("method", "path"), list(WALK), ids=lambda value: value)
async def test_route_as_each_caller(method, path, as_role, cloud):
    request, statuses = WALK[method, path]
    owner = as_role("member@p1")
    for token, status in zip(CALLERS, statuses, strict=True):
        image = await owner.create(tags=["t"])
        if not (path.endswith("/file") and method == "PUT"):
            await owner.upload(image["id"], b"x" * 100)
        await owner.call("POST", f"/v2/images/{image['id']}/members", 200, json={"member": "p8"})
        if "members" not in path:
            change = {"op": "replace", "path": "/visibility", "value": "private"}
            await owner.patch(image["id"], change)
        filled = path.format(image_id=image["id"], tag="t", project_id="p8", name="image")
        await as_role(token).call(method, filled, status, **request)
