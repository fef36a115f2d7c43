"""Remote consoles over the public API: URLs, who gets one, and what the WebSocket behind them does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from instar.config import ApiSettings, ConsoleSettings
from tests.api.compute_cloud import SETTINGS, Caller, Cloud, running_cloud
from tests.patience import PATIENCE_S

SERIAL = {"remote_console": {"protocol": "serial", "type": "serial"}}
NOVNC = {"remote_console": {"protocol": "vnc", "type": "novnc"}}


async def serial_url(caller: Caller, server_id: str) -> str:
    answer = await caller.call("POST", f"/servers/{server_id}/remote-consoles", SERIAL)
    assert answer.status_code == 200, answer.text
    console = answer.json()["remote_console"]
    assert (console["protocol"], console["type"]) == ("serial", "serial")
    return console["url"]


def token_of(url: str) -> str:
    return parse_qs(urlsplit(url).query)["token"][0]


async def shown(connection: object, text: str) -> str:
    """All that came until `text` did."""
    seen = ""
    async with asyncio.timeout(PATIENCE_S):
        while text not in seen:
            seen += (await connection.recv()).decode()  # type: ignore[attr-defined]
    return seen


async def refused(url: str, **headers: str) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as raised:
        await connect(url, additional_headers=headers)
    return raised.value.response.status_code, (raised.value.response.body or b"").decode()


async def closed_because(connection: object) -> str:
    with pytest.raises(ConnectionClosed) as closed:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await connection.recv()  # type: ignore[attr-defined]
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000
    return closed.value.rcvd.reason


async def test_the_url_leads_to_the_serial_line_once(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    url = await serial_url(cloud.demo, server_id)
    assert url.startswith(cloud.url.replace("http:", "ws:") + "/?token=")
    async with connect(url, subprotocols=["binary"]) as connection:
        assert connection.subprotocol == "binary"
        assert f"uuid={server_id}" in await shown(connection, "hostname=")
        await connection.send(b"typed into the void\r")
        status, said = await refused(url)
        assert status == 404 and "has been used" in said and token_of(url) not in said
        await cloud.demo.call("POST", f"/servers/{server_id}/action", {"os-stop": None})
        assert await closed_because(connection) == "the guest ended the console"


@pytest.mark.parametrize(
    "path",
    [
        "/console/websocket?token={}", "/console/novnc/console/websocket?token={}", "/?path=%3Ftoken%3D{}",
        "/console/websocket?path=websockify%3Fa%3Db%26token%3D{}",
    ],
)  # fmt: skip
async def test_the_token_is_taken_where_novnc_puts_it(cloud: Cloud, path: str) -> None:
    token = token_of(await serial_url(cloud.demo, await cloud.created(cloud.demo)))
    async with connect(cloud.url.replace("http:", "ws:") + path.format(token)) as connection:
        await shown(connection, "INSTAR-BOOT")


async def test_of_two_who_open_the_serial_line_the_newer_has_it(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    async with connect(await serial_url(cloud.demo, server_id)) as older:
        await shown(older, "INSTAR-BOOT")
        async with connect(await serial_url(cloud.demo, server_id)) as newer:
            await shown(newer, "INSTAR-BOOT")
            assert "another one" in await closed_because(older)
            await newer.send(b"x")
            pong = await newer.ping()
            async with asyncio.timeout(PATIENCE_S):
                await pong


async def test_who_brings_no_good_token_is_refused(cloud: Cloud) -> None:
    root = cloud.url.replace("http:", "ws:")
    long = f"/?token={'x' * 5000}"
    for path in ("/", "/?token=", "/?token=x", long, "/?path=%3Ftoken%3Dx", "/console/websocket?token=x"):
        assert (await refused(root + path))[0] == 404, path
    assert (await refused(root + "/console/other?token=x"))[0] == 404


async def test_pages_of_other_sites_open_no_console(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    url = await serial_url(cloud.demo, server_id)
    for origin in ("https://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1:1", cloud.url + ".evil.example"):
        assert (await refused(url, origin=origin))[0] == 403, origin
    async with connect(url, additional_headers={"origin": cloud.url}) as connection:
        await shown(connection, "INSTAR-BOOT")  # and the token was not used up by the others


async def test_what_is_not_offered_is_named(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/remote-consoles"
    assert "novnc" in await cloud.demo.refused(400, "POST", path, NOVNC), "simulated guests have no screen"
    unknown = (("spice", "spice-html5"), ("rdp", "rdp-html5"), ("vnc", "serial"), ("vnc", "xvpvnc"), ("mks", "webmks"))
    for protocol, name in unknown:
        body = {"remote_console": {"protocol": protocol, "type": name}}
        message = await cloud.demo.refused(400, "POST", path, body)
        assert name in message and "vnc/novnc, serial/serial" in message
    for body in ({}, {"remote_console": {"protocol": "vnc"}}, {"remote_console": {"protocol": "telnet", "type": "novnc"}}):
        await cloud.demo.refused(400, "POST", path, body)


async def test_only_a_running_guest_of_the_own_project_has_a_console(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/remote-consoles"
    stranger = await cloud.new_user("stranger", "member")
    await stranger.refused(404, "POST", path, SERIAL)
    reader = await cloud.new_user("reading", "reader", cloud.demo.project_id)
    await reader.refused(403, "POST", path, SERIAL)
    await cloud.demo.call("POST", f"/servers/{server_id}/action", {"os-stop": None})
    await cloud.until(cloud.demo, server_id, "SHUTOFF")
    assert "no running guest" in await cloud.demo.refused(409, "POST", path, SERIAL)
    await cloud.demo.refused(404, "POST", "/servers/00000000-0000-4000-8000-000000000000/remote-consoles", SERIAL)


async def test_a_host_that_is_away_is_a_matter_of_trying_again(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    host = (await cloud.admin.get(f"/servers/{server_id}"))["server"]["OS-EXT-SRV-ATTR:host"]
    cloud.world.host(host).faults.down = True
    message = await cloud.demo.refused(503, "POST", f"/servers/{server_id}/remote-consoles", SERIAL)
    assert host not in message


async def test_older_versions_ask_by_an_action(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    path = f"/servers/{server_id}/action"
    answer = await cloud.demo.call("POST", path, {"os-getSerialConsole": {"type": "serial"}}, version="2.5")
    assert answer.status_code == 200 and answer.json()["console"]["type"] == "serial"
    async with connect(answer.json()["console"]["url"]) as connection:
        await shown(connection, "INSTAR-BOOT")
    await cloud.demo.refused(400, "POST", path, {"os-getVNCConsole": {"type": "novnc"}}, version="2.5")
    await cloud.demo.refused(400, "POST", path, {"os-getVNCConsole": {"type": "serial"}}, version="2.5")
    await cloud.demo.refused(400, "POST", path, {"os-getSPICEConsole": {"type": "spice-html5"}}, version="2.5")
    await cloud.demo.refused(404, "POST", path, {"os-getSerialConsole": {"type": "serial"}}, version="2.6")
    await cloud.demo.refused(404, "POST", f"/servers/{server_id}/remote-consoles", SERIAL, version="2.5")


async def test_admins_see_what_a_token_is_good_for(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    token = token_of(await serial_url(cloud.demo, server_id))
    console = (await cloud.admin.get(f"/os-console-auth-tokens/{token}"))["console"]
    assert console["instance_uuid"] == server_id and console["port"] > 0 and console["host"]
    assert console.keys() == {"instance_uuid", "host", "port", "internal_access_path"}
    await cloud.demo.refused(403, "GET", f"/os-console-auth-tokens/{token}")
    assert token not in await cloud.admin.refused(404, "GET", f"/os-console-auth-tokens/{token}x")
    await cloud.admin.refused(404, "GET", f"/os-console-auth-tokens/{token}", version="2.30")


async def test_urls_begin_as_the_operator_says(tmp_path: Path) -> None:
    api = ApiSettings(console_base_url="https://consoles.example/cloud/")
    async with running_cloud(tmp_path, msgspec.structs.replace(SETTINGS, api=api)) as cloud:
        server_id = await cloud.created(cloud.demo)
        url = await serial_url(cloud.demo, server_id)
        assert url.startswith("wss://consoles.example/cloud/?token=")
        there = cloud.url.replace("http:", "ws:") + f"/?token={token_of(url)}"
        async with connect(there, additional_headers={"origin": "https://consoles.example"}) as connection:
            await shown(connection, "INSTAR-BOOT")


async def test_consoles_are_bounded_in_number_and_in_idle_time(tmp_path: Path) -> None:
    console = ConsoleSettings(connections_max=1, idle_s=1.0)
    async with running_cloud(tmp_path, msgspec.structs.replace(SETTINGS, console=console)) as cloud:
        server_id = await cloud.created(cloud.demo)
        async with connect(await serial_url(cloud.demo, server_id)) as connection:
            await shown(connection, "INSTAR-BOOT")
            url = await serial_url(cloud.demo, server_id)
            assert (await refused(url))[0] == 503
            assert "nothing has moved" in await closed_because(connection)
        async with connect(url) as connection:  # being refused did not use it up
            await shown(connection, "INSTAR-BOOT")
