"""Tokens of consoles: for one connection, for a short time, and only while the guest is where it was."""

from __future__ import annotations

import asyncio
import secrets

from instar.clock import now_us
from instar.store.console_tokens import (
    TOKENS_MAX,
    ConsoleAccess,
    console_token_fetch,
    console_token_insert,
    console_token_take,
)
from instar.store.instances import instance_fetch
from tests.api.compute_cloud import Cloud

HOUR_US = 3_600_000_000


async def _token(cloud: Cloud, server_id: str, *, lifetime_us: int = HOUR_US) -> str:
    instance = await instance_fetch(cloud.control.store, server_id)
    token = secrets.token_urlsafe(16)
    access = ConsoleAccess(server_id, "serial", instance.host or "", "192.0.2.1", 5900, now_us() + lifetime_us)
    await console_token_insert(cloud.control.store, token, access)
    return token


async def test_of_many_takers_one_gets_the_console(cloud: Cloud) -> None:
    store = cloud.control.store
    token = await _token(cloud, await cloud.created(cloud.demo))
    assert await console_token_fetch(store, token) is not None
    assert await console_token_fetch(store, token) is not None, "looking does not use it up"
    taken = await asyncio.gather(*[console_token_take(store, token) for _ in range(20)])
    assert sum(one is not None for one in taken) == 1
    assert await console_token_fetch(store, token) is None


async def test_the_database_does_not_know_tokens(cloud: Cloud) -> None:
    token = await _token(cloud, await cloud.created(cloud.demo))
    (row,) = await cloud.control.store.read("SELECT * FROM console_tokens")
    assert token not in [row[name] for name in row.keys()]  # noqa: SIM118 - a row of sqlite3
    assert await console_token_take(cloud.control.store, token[:-1]) is None
    assert await console_token_take(cloud.control.store, "") is None
    assert await console_token_take(cloud.control.store, "\ud800") is None


async def test_an_expired_token_is_void_and_removed_with_the_next_one(cloud: Cloud) -> None:
    store = cloud.control.store
    server_id = await cloud.created(cloud.demo)
    token = await _token(cloud, server_id, lifetime_us=-1)
    assert await console_token_fetch(store, token) is None
    assert await console_token_take(store, token) is None
    await _token(cloud, server_id)
    assert len(await store.read("SELECT 1 FROM console_tokens")) == 1


async def test_nobody_can_fill_the_table(cloud: Cloud) -> None:
    store = cloud.control.store
    server_id = await cloud.created(cloud.demo)
    tokens = [await _token(cloud, server_id) for _ in range(TOKENS_MAX + 5)]
    assert len(await store.read("SELECT 1 FROM console_tokens")) == TOKENS_MAX
    assert await console_token_take(store, tokens[0]) is None
    assert await console_token_take(store, tokens[-1]) is not None


async def test_a_stop_revokes_also_after_the_next_start(cloud: Cloud) -> None:
    store = cloud.control.store
    server_id = await cloud.created(cloud.demo)
    token = await _token(cloud, server_id)
    await cloud.demo.call("POST", f"/servers/{server_id}/action", {"os-stop": None})
    await cloud.until(cloud.demo, server_id, "SHUTOFF")
    assert await console_token_fetch(store, token) is None
    await cloud.demo.call("POST", f"/servers/{server_id}/action", {"os-start": None})
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await console_token_take(store, token) is None


async def test_a_reboot_keeps_the_token(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    token = await _token(cloud, server_id)
    await cloud.demo.call("POST", f"/servers/{server_id}/action", {"reboot": {"type": "HARD"}})
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await console_token_take(cloud.control.store, token) is not None


async def test_a_guest_that_shuts_itself_down_takes_its_tokens_along(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    token = await _token(cloud, server_id)
    host = (await instance_fetch(cloud.control.store, server_id)).host
    assert host is not None
    cloud.world.host(host).faults.guest_powers_off(server_id)
    await cloud.until(cloud.demo, server_id, "SHUTOFF")
    await cloud.demo.call("POST", f"/servers/{server_id}/action", {"os-start": None})
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await console_token_take(cloud.control.store, token) is None


async def test_a_deleted_server_leaves_no_token(cloud: Cloud) -> None:
    server_id = await cloud.created(cloud.demo)
    token = await _token(cloud, server_id)
    await cloud.demo.call("DELETE", f"/servers/{server_id}")
    await cloud.gone(cloud.demo, server_id)
    assert await console_token_take(cloud.control.store, token) is None
    assert await cloud.control.store.read("SELECT 1 FROM console_tokens") == []


async def test_a_token_of_another_host_is_void(cloud: Cloud) -> None:
    """The guest has moved: whoever was let in there has no business here."""
    server_id = await cloud.created(cloud.demo)
    token = secrets.token_urlsafe(16)
    access = ConsoleAccess(server_id, "serial", "elsewhere", "192.0.2.1", 5900, now_us() + HOUR_US)
    await console_token_insert(cloud.control.store, token, access)
    assert await console_token_take(cloud.control.store, token) is None
