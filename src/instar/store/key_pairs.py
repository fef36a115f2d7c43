"""SQL of key pairs. They belong to a user, not to a project. Called by the Compute API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from instar.errors import Conflict, NotFound
from instar.store.contract import Statement, Store
from instar.store.quotas import quota_take_one


class KeyPair(msgspec.Struct, frozen=True):
    """`type` ssh|x509; `public_key` is the OpenSSH line or the PEM certificate. Private keys are never kept."""

    id: str
    user_id: str
    name: str
    type: str
    fingerprint: str
    public_key: str
    created_at: int


def _from_row(row: Mapping[str, Any]) -> KeyPair:
    return KeyPair(**{name: row[name] for name in KeyPair.__struct_fields__})


async def key_pair_insert(store: Store, key: KeyPair, *, limit: int) -> None:
    """Keeps a key pair if the user has fewer than `limit` (-1: any). Raises Conflict for a known name, QuotaExceeded."""
    insert = Statement(
        """INSERT INTO key_pairs (user_id, name, type, fingerprint, public_key, created_at, id)
           VALUES (:user_id, :name, :type, :fingerprint, :public_key, :now, :id)""",
        {
            "user_id": key.user_id, "name": key.name, "type": key.type, "fingerprint": key.fingerprint,
            "public_key": key.public_key, "now": key.created_at, "id": key.id,
        },
        rows=1,
        duplicate=Conflict(f"Key pair '{key.name}' already exists."),
    )  # fmt: skip
    await store.write(*quota_take_one("key_pairs", key.user_id, limit), insert)


async def key_pair_fetch(store: Store, user_id: str, name: str) -> KeyPair:
    """Raises NotFound."""
    rows = await store.read(
        "SELECT * FROM key_pairs WHERE user_id = :user_id AND name = :name", {"user_id": user_id, "name": name}
    )
    if not rows:
        raise NotFound(kind="Keypair", id=name)
    return _from_row(rows[0])  # type: ignore[arg-type]


async def key_pair_list(store: Store, user_id: str, *, after: str | None, limit: int) -> list[KeyPair]:
    """Key pairs of a user by name, after the one named `after`."""
    rows = await store.read(
        """SELECT * FROM key_pairs WHERE user_id = :user_id AND (CAST(:after AS TEXT) IS NULL OR name > :after)
           ORDER BY name LIMIT :limit""",
        {"user_id": user_id, "after": after, "limit": limit},
    )
    return [_from_row(row) for row in rows]  # type: ignore[arg-type]


async def key_pair_delete(store: Store, user_id: str, name: str) -> None:
    """Servers that were built with it keep the public key. Raises NotFound."""
    await store.write(
        Statement(
            "DELETE FROM key_pairs WHERE user_id = :user_id AND name = :name",
            {"user_id": user_id, "name": name},
            rows=1,
            error=NotFound(kind="Keypair", id=name),
        )
    )
