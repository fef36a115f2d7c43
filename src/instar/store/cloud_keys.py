"""Secret keys that the processes of one cloud share by the database. Called by instar.identity and instar.images.

They stand there as they are. Sealing them would need another key on every machine, and with such a file at hand the key
itself can be that file (setting identity.token_key_file). Whoever can write the database is an admin of the cloud by one
row anyway; a backup of it is to be kept like a password, until the keys are changed: delete the row, restart the APIs.
"""

from __future__ import annotations

import secrets

from instar.clock import now_us
from instar.store.contract import Statement, Store

KEY_BYTES = 32


async def cloud_key(store: Store, name: str) -> bytes:
    """The key of that name, 32 bytes, made at its first use: who comes second, also at the same moment, gets the same."""
    found = await _fetch(store, name)
    if found is None:
        await store.write(
            Statement(
                "INSERT INTO cloud_keys (name, key_hex, made_at) VALUES (:name, :key_hex, :now) "
                "ON CONFLICT (name) DO NOTHING",
                {"name": name, "key_hex": secrets.token_hex(KEY_BYTES), "now": now_us()},
            )
        )
        found = await _fetch(store, name)
        assert found is not None
    return found


async def _fetch(store: Store, name: str) -> bytes | None:
    rows = await store.read("SELECT key_hex FROM cloud_keys WHERE name = :name", {"name": name})
    return bytes.fromhex(rows[0]["key_hex"]) if rows else None
