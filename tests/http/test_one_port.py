"""What every API has from the HTTP room: ids, authentication, policy, fault shapes, bounds. Over a real port."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
import structlog

from instar.errors import Conflict, NotFound, StartupError, Unauthorized, Unavailable
from instar.http.answer import Answer, empty_answer, json_answer, stream_answer
from instar.http.app import HEADERS_MAX, URL_MAX_BYTES, Service, build_app
from instar.http.faults import compute_fault, identity_fault, image_fault, network_fault
from instar.http.paging import next_links, read_page
from instar.http.policy import ADMIN, ANYONE, MEMBER, OPEN, READER, Policy, own_project
from instar.http.request import Request
from instar.http.routing import Route
from instar.http.server import HEAD_MAX_BYTES, HttpServer
from instar.identity.contract import Authenticated
from tests.patience import PATIENCE_S

BODY_MAX = 2048
REQUEST_ID = re.compile(r"req-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SHAPES = {"compute": compute_fault, "identity": identity_fault, "image": image_fault, "network": network_fault}


class Moth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    legs: int = 6


class ThreeRoles:
    """Tokens are `<roles>@<project>`; an identity service of the contract, without a database."""

    async def authenticate_token(self, token: str) -> Authenticated:
        roles, at, project = token.partition("@")
        if not at:
            raise Unauthorized()
        return Authenticated("u", "user", "default", project, project, "default", frozenset(roles.split(",")), 9e9)

    async def project_exists(self, project_id: str) -> bool:
        return True


async def moth_show(request: Request) -> Answer:
    own_project(request.context, "p1", "Moth", request.params["id"])
    return json_answer({"id": request.params["id"], "base": request.base_url, "context": {
        "request_id": request.context.request_id, "global": request.context.global_request_id}})  # fmt: skip


async def moth_create(request: Request) -> Answer:
    return json_answer(await request.json(Moth), 201)


async def moth_list(request: Request) -> Answer:
    page = read_page(request, 100)
    return json_answer({"limit": page.limit, "marker": page.marker, "links": next_links(request, "m9")})


async def moth_upload(request: Request) -> Answer:
    size = 0
    async for chunk in request.stream(10_000_000):
        size += len(chunk)
    return json_answer({"size": size})


async def moth_download(request: Request) -> Answer:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 10_000

    return stream_answer(chunks(), length_bytes=1_000_000)


async def moth_fail(request: Request) -> Answer:
    kind = request.params["kind"]
    if kind == "conflict":
        raise Conflict("The moth <b>flew</b> away.")
    if kind == "unavailable":
        raise Unavailable(retry_after_s=3)
    raise RuntimeError("/var/lib/secret is broken")


async def moth_remove(request: Request) -> Answer:
    return empty_answer()


async def versions(request: Request) -> Answer:
    return json_answer({"href": request.base_url}, 300)


ROUTES = [
    Route("GET", "", "versions", versions),
    Route("GET", "/v1/moths", "list", moth_list),
    Route("POST", "/v1/moths", "create", moth_create),
    Route("GET", "/v1/moths/detail", "versions", versions),
    Route("GET", "/v1/moths/{id}", "show", moth_show),
    Route("DELETE", "/v1/moths/{id}", "remove", moth_remove),
    Route("PUT", "/v1/moths/{id}/file", "show", moth_upload),
    Route("GET", "/v1/moths/{id}/file", "show", moth_download),
    Route("GET", "/v1/fail/{kind}", "any", moth_fail),
]
RULES = Policy({"versions": OPEN, "list": READER, "show": READER, "create": MEMBER, "remove": ADMIN, "any": ANYONE})


class Running(NamedTuple):
    client: httpx.AsyncClient
    port: int

    async def get(self, path: str, token: str = "reader@p1", method: str = "GET", **more: Any) -> httpx.Response:
        headers = {"x-auth-token": token} if token else {}
        headers |= more.pop("headers", {})
        return await self.client.request(method, path, headers=headers, **more)

    async def raw(self, data: bytes) -> bytes:
        """What the server answers to bytes, until it closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(PATIENCE_S):
                writer.write(data)
                return await reader.read()
        finally:
            writer.close()


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    services = [
        Service(name, name, f"/{name}", ROUTES, RULES, shape,
                extra_request_id=b"x-compute-request-id" if name == "compute" else None)
        for name, shape in SHAPES.items()
    ]  # fmt: skip
    server = HttpServer(build_app(services, ThreeRoles(), body_max_bytes=BODY_MAX), "127.0.0.1", 0)
    port = await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, verify=False) as client:
            yield Running(client, port)
    finally:
        await server.stop()


async def test_every_answer_has_a_request_id_of_ours(running: Running) -> None:
    given = "req-12345678-1234-1234-1234-123456789abc"
    answer = await running.get("/compute/v1/moths/m1", headers={"x-openstack-request-id": given})
    ours = answer.headers["x-openstack-request-id"]
    assert REQUEST_ID.fullmatch(ours) and ours != given
    assert answer.headers["x-compute-request-id"] == ours
    assert answer.json()["context"] == {"request_id": ours, "global": given}
    for wrong in ("req-nonsense", given + "\tx", "x" * 300):
        answer = await running.get("/compute/v1/moths/m1", headers={"x-openstack-request-id": wrong})
        assert answer.json()["context"]["global"] == ""
    for path in ("/", "/nowhere", "/image/v1/nowhere", "/network/v1/moths"):
        assert REQUEST_ID.fullmatch((await running.get(path, "")).headers["x-openstack-request-id"])


async def test_no_token_is_401_and_says_where_to_get_one(running: Running) -> None:
    for token in ("", "forged", "x" * 5000):
        answer = await running.get("/compute/v1/moths", token)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == f'Keystone uri="http://127.0.0.1:{running.port}/identity"'


async def test_a_role_lets_through_or_not_and_a_project_is_needed(running: Running) -> None:
    for token, method, path, status in (
        ("reader@p1", "GET", "/compute/v1/moths/m1", 200),
        ("reader@p2", "GET", "/compute/v1/moths/m1", 404),
        ("admin,reader@p2", "GET", "/compute/v1/moths/m1", 200),
        ("reader@", "GET", "/compute/v1/moths", 403),
        ("reader@p1", "POST", "/compute/v1/moths", 403),
        ("reader,member@p1", "DELETE", "/compute/v1/moths/m1", 403),
        ("admin@p1", "DELETE", "/compute/v1/moths/m1", 204),
    ):
        answer = await running.get(path, token, method)
        assert answer.status_code == status, (token, method, path)


async def test_each_api_has_its_own_shape_of_a_fault(running: Running) -> None:
    message = "The moth <b>flew</b> away."
    bodies = {name: await running.get(f"/{name}/v1/fail/conflict") for name in SHAPES}
    assert {answer.status_code for answer in bodies.values()} == {409}
    assert bodies["compute"].json() == {"conflictingRequest": {"code": 409, "message": message}}
    assert bodies["identity"].json() == {"error": {"code": 409, "title": "Conflict", "message": message}}
    assert bodies["network"].json() == {"NeutronError": {"type": "Conflict", "message": message, "detail": ""}}
    assert "<b>" not in bodies["image"].text and "&lt;b&gt;" in bodies["image"].text


async def test_unknown_paths_and_methods_have_that_shape_too(running: Running) -> None:
    for name in SHAPES:
        assert (await running.get(f"/{name}/v1/nowhere")).status_code == 404
        answer = await running.get(f"/{name}/v1/moths/m1", method="PATCH")
        assert answer.status_code == 405 and answer.headers["allow"] == "DELETE, GET"
    assert "itemNotFound" in (await running.get("/compute/v1/nowhere")).json()
    assert "NeutronError" in (await running.get("/network/v1/nowhere")).json()
    assert (await running.get("/volumes/v3")).status_code == 404


@pytest.mark.parametrize("name", sorted(SHAPES))
async def test_an_unexpected_error_tells_nothing_and_is_logged_with_its_request_id(running: Running, name: str) -> None:
    with structlog.testing.capture_logs() as logs:
        answer = await running.get(f"/{name}/v1/fail/unexpected")
    assert answer.status_code == 500
    assert "secret" not in answer.text and "Traceback" not in answer.text and "RuntimeError" not in answer.text
    logged = next(entry for entry in logs if entry["event"] == "http.unexpected")
    assert logged["request_id"] == answer.headers["x-openstack-request-id"]
    assert "secret is broken" in logged["traceback"] and "reader@p1" not in str(logged)


async def test_what_is_away_for_a_moment_says_when_to_come_back(running: Running) -> None:
    answer = await running.get("/compute/v1/fail/unavailable")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    "body, told",
    [
        (b'{"name": 3}', "$.name"),
        (b'{"name": "a", "legs": "6"}', "$.legs"),
        (b'{"name": "a", "wings": 4}', "wings"),
        (b"{", "Malformed"),
        (b"", "Malformed"),
        (b"\xff\xfe", "Malformed"),
        (b"[" * 2000, ""),
    ],
)
async def test_a_body_that_does_not_fit_is_400_with_the_path_and_the_rule(
    running: Running, body: bytes, told: str
) -> None:
    answer = await running.get("/compute/v1/moths", "member@p1", "POST", content=body)
    assert answer.status_code == 400 and told in answer.json()["badRequest"]["message"]


async def test_bodies_are_bounded_with_and_without_a_length(running: Running) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b'{"name": "' + b"x" * 50_000

    content: Any
    for content in (b"x" * (BODY_MAX + 1), endless()):
        answer = await running.get("/compute/v1/moths", "member@p1", "POST", content=content)
        assert answer.status_code == 413 and answer.headers["connection"] == "close"
    assert (await running.get("/compute/v1/moths", "member@p1", "POST", content=b'{"name": "a"}')).status_code == 201


async def test_streams_go_both_ways_past_the_bound_of_bodies(running: Running) -> None:
    path = "/image/v1/moths/m1/file"
    answer = await running.get(path, method="PUT", content=b"x" * 3_000_000)
    assert answer.json() == {"size": 3_000_000}
    answer = await running.get(path)
    assert len(answer.content) == 1_000_000 and answer.headers["content-length"] == "1000000"
    answer = await running.get(path, method="HEAD")
    assert answer.status_code == 200 and answer.content == b""


async def test_heads_are_bounded(running: Running) -> None:
    answer = await running.get("/compute/v1/moths?x=" + "a" * URL_MAX_BYTES)
    assert answer.status_code == 414
    answer = await running.get("/compute/v1/moths", headers={f"x-{number}": "1" for number in range(HEADERS_MAX)})
    assert answer.status_code == 431
    answer = await running.get("/compute/v1/moths?" + "&".join(f"a={number}" for number in range(300)))
    assert answer.status_code == 400
    start = b"GET / HTTP/1.1\r\nhost: x\r\nx-long: "
    assert (await running.raw(start + b"a" * (4 * HEAD_MAX_BYTES))).startswith(b"HTTP/1.1 431")
    assert (await running.raw(b"nonsense\r\n\r\n")).startswith(b"HTTP/1.1 400")


async def test_paths_keep_encoded_slashes_and_forgive_one_at_the_end(running: Running) -> None:
    for asked, seen in (("a%2Fb", "a/b"), ("m1/", "m1"), ("%C3%A9", "é")):
        assert (await running.get(f"/compute/v1/moths/{asked}")).json()["id"] == seen
    assert (await running.get("/compute/v1/moths/%ff")).status_code == 400
    assert (await running.get("/compute/v1/moths/detail")).status_code == 300
    assert (await running.get("/compute/v1/moths/detail", method="DELETE", token="admin@p1")).status_code == 204
    assert (await running.get("/compute/", "")).json() == {"href": f"http://127.0.0.1:{running.port}/compute"}


async def test_links_name_the_host_that_the_client_used_if_it_is_one(running: Running) -> None:
    answer = await running.get("/compute", "", headers={"host": "cloud.example:80"})
    assert answer.json() == {"href": "http://cloud.example:80/compute"}
    assert (await running.get("/compute", "", headers={"host": 'evil"><script>'})).status_code == 400
    services = (await running.get("/", "")).json()["services"]
    assert {one["href"] for one in services} == {f"http://127.0.0.1:{running.port}/{name}/" for name in SHAPES}


async def test_pages(running: Running) -> None:
    page = (await running.get("/compute/v1/moths?limit=5&marker=m1&name=a%26b")).json()
    assert (page["limit"], page["marker"]) == (5, "m1")
    assert page["links"][0]["href"].endswith("/compute/v1/moths?limit=5&name=a%26b&marker=m9")
    assert (await running.get("/compute/v1/moths?limit=100000")).json()["limit"] == 100
    for wrong in ("limit=-1", "limit=x", "limit=²", "limit=1&limit=2", "limit=99999999999999", "marker=" + "m" * 256):
        assert (await running.get(f"/compute/v1/moths?{wrong}")).status_code == 400, wrong


def test_a_route_without_a_rule_and_a_route_twice_are_refused_at_start() -> None:
    for routes in ([Route("GET", "/x", "no-such-rule", versions)], [ROUTES[0], ROUTES[0]]):
        with pytest.raises(ValueError):
            build_app([Service("a", "a", "/a", routes, RULES, compute_fault)], ThreeRoles(), body_max_bytes=1)


async def test_a_port_that_is_taken_is_a_clear_refusal_and_stopping_frees_it(running: Running) -> None:
    app = build_app([], ThreeRoles(), body_max_bytes=1)
    with pytest.raises(StartupError, match=str(running.port)):
        await HttpServer(app, "127.0.0.1", running.port).start()
    first = HttpServer(app, "127.0.0.1", 0)
    port = await first.start()
    await first.stop()
    await first.stop()
    second = HttpServer(app, "127.0.0.1", port)
    assert await second.start() == port
    await second.stop()


async def test_a_request_in_flight_ends_before_the_server_does() -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> Answer:
        entered.set()
        await release.wait()
        raise NotFound(kind="moth", id="m1")

    service = Service("a", "a", "/a", [Route("GET", "/slow", "versions", slow)], RULES, compute_fault)
    server = HttpServer(build_app([service], ThreeRoles(), body_max_bytes=1), "127.0.0.1", 0)
    port = await server.start()
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/a/slow"))
        await entered.wait()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        release.set()
        assert (await asking).status_code == 404
        await stopping
