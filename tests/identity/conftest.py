"""A real identity service behind a real port, with a database of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from instar.http.app import build_app
from instar.http.server import HttpServer
from instar.identity.api import identity_service
from instar.identity.bootstrap import bootstrap
from instar.identity.local import LocalIdentity
from instar.store.sqlite import SqliteStore
from tests.identity.identity_cloud import CHEAP, Cloud
from tests.patience import PATIENCE_S


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[Cloud]:
    store = SqliteStore(tmp_path / "instar.db", durable=False)
    await store.open()
    identity = LocalIdentity(store, CHEAP, tmp_path)
    await identity.start()
    first = await bootstrap(identity)
    assert first is not None
    app = build_app([identity_service(identity)], identity, body_max_bytes=CHEAP.api.body_max_bytes)
    server = HttpServer(app, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{await server.start()}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, verify=False) as client:
            yield Cloud(url, identity, app, first, client)
    finally:
        await server.stop()
        await identity.close()
        await store.close()
