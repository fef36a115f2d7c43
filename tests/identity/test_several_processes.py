"""Two API processes on one database and one bus: tokens of one are good at the other, and so are changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from msgspec.structs import replace

from instar.bus.memory import MemoryBus
from instar.config import Settings
from instar.errors import Unauthorized
from instar.identity.bootstrap import FirstCredentials, bootstrap
from instar.identity.local import LocalIdentity
from instar.identity.login import log_in
from instar.identity.schemas import Auth
from instar.store.cloud_keys import cloud_key
from instar.store.identity import ROLES, Assignment
from instar.store.sqlite import SqliteStore
from tests.identity.identity_cloud import CHEAP, by_password

# Where the database is matters to the program alone. What is seen at once is not seen because the cache is over.
DISTRIBUTED = replace(CHEAP, database="postgresql://unused/here", identity=replace(CHEAP.identity, token_cache_s=60.0))


class Two(NamedTuple):
    one: LocalIdentity
    other: LocalIdentity
    first: FirstCredentials

    async def demo(self, at: LocalIdentity) -> str:
        body = by_password("demo", self.first.demo_password, "demo")
        token, _ = await log_in(at, msgspec.convert(body["auth"], Auth), "127.0.0.1")
        return token


async def _identity(folder: Path, bus: MemoryBus | None, settings: Settings) -> tuple[SqliteStore, LocalIdentity]:
    store = SqliteStore(folder / "instar.db", durable=False)
    await store.open()
    (folder / str(id(store))).mkdir()
    return store, LocalIdentity(store, settings, folder / str(id(store)), bus=bus)


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus | None]:
    yield MemoryBus()


@pytest.fixture
async def two(tmp_path: Path, bus: MemoryBus | None) -> AsyncIterator[Two]:
    pairs = [await _identity(tmp_path, bus, DISTRIBUTED) for _ in range(2)]
    one, other = (identity for _, identity in pairs)
    await asyncio.gather(one.start(), other.start())
    made = await asyncio.gather(bootstrap(one), bootstrap(other))
    [first] = [credentials for credentials in made if credentials is not None]
    yield Two(one, other, first)
    for store, identity in pairs:
        await identity.close()
        await store.close()


async def _take_role(two: Two, at: LocalIdentity) -> None:
    [member] = [role for role in await at.records.list(ROLES, {}, limit=10) if role.name == "member"]
    where = ("user", two.first.demo_user_id, "project", two.first.demo_project_id)
    await at.records.assignment_remove(Assignment(*where, member.id))


async def test_token_of_one_process_is_good_at_the_other(two):
    token = await two.demo(two.one)
    assert (await two.other.authenticate_token(token)).user_name == "demo"


async def test_role_taken_at_one_process_is_gone_at_the_other_at_once(two):
    token = await two.demo(two.one)
    assert (await two.other.authenticate_token(token)).roles
    await _take_role(two, two.one)
    async with asyncio.timeout(20):  # well below token_cache_s: the word came over the bus
        while True:
            try:
                await two.other.authenticate_token(token)
            except Unauthorized:
                break
            await asyncio.sleep(0.001)


async def test_change_of_which_no_word_came_is_seen_when_the_cache_is_over(tmp_path):
    now = 1_800_000_000.0
    pairs = []
    for _ in range(2):
        store, identity = await _identity(tmp_path, None, DISTRIBUTED)
        identity.clock = identity._cache._clock = lambda: now
        await identity.start()
        pairs.append((store, identity))
    one, other = (identity for _, identity in pairs)
    first = await bootstrap(one)
    assert first is not None
    two = Two(one, other, first)
    try:
        token = await two.demo(one)
        assert (await other.authenticate_token(token)).roles
        await _take_role(two, one)
        assert (await other.authenticate_token(token)).roles
        now += DISTRIBUTED.identity.token_cache_s
        with pytest.raises(Unauthorized):
            await other.authenticate_token(token)
    finally:
        for store, identity in pairs:
            await identity.close()
            await store.close()


async def test_bus_that_is_away_fails_no_change(two, bus, monkeypatch):
    async def away(*_given: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(bus, "publish", away)
    token = await two.demo(two.one)
    assert (await two.one.authenticate_token(token)).roles
    await _take_role(two, two.one)
    with pytest.raises(Unauthorized):
        await two.one.authenticate_token(token)


async def test_key_of_a_distributed_cloud_is_one_however_many_ask_for_it_first(tmp_path):
    pairs = [await _identity(tmp_path, None, DISTRIBUTED) for _ in range(4)]
    keys = await asyncio.gather(*(cloud_key(store, "tokens") for store, _ in pairs for _ in range(3)))
    assert len(set(keys)) == 1 and len(keys[0]) == 32
    assert await cloud_key(pairs[0][0], "another") != keys[0]
    for store, identity in pairs:
        await identity.close()
        await store.close()


async def test_key_file_of_the_settings_is_used_by_every_process(tmp_path):
    named = replace(DISTRIBUTED, identity=replace(CHEAP.identity, token_key_file=str(tmp_path / "shared.key")))
    pairs = [await _identity(tmp_path, None, named) for _ in range(2)]
    for _, identity in pairs:
        await identity.start()
    first = await bootstrap(pairs[0][1])
    assert first is not None and (tmp_path / "shared.key").exists()
    two = Two(pairs[0][1], pairs[1][1], first)
    assert (await two.other.authenticate_token(await two.demo(two.one))).user_name == "demo"
    for store, identity in pairs:
        await identity.close()
        await store.close()
