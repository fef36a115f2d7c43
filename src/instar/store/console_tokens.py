"""SQL of console tokens: kept as hashes, taken once. Called by `lifecycle.consoles`; the engine revokes.

A token is good for one connection, until it expires, and while its instance runs on the host that it was made for. Tokens
are random and long, so a plain hash keeps them: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from instar.clock import now_us
from instar.store.contract import Statement, Store

TOKENS_MAX = 20  # of one instance; a newer one takes the place of the oldest

# The record may be behind the truth (a guest that ended a moment ago): then there is no socket to connect to.
_GOOD = """token_hash = :token_hash AND expires_at > :now AND EXISTS (
    SELECT 1 FROM instances i WHERE i.id = console_tokens.instance_id AND i.deleted = 0
    AND i.host = console_tokens.host AND i.power_state IN (1, 3))"""


class ConsoleAccess(msgspec.Struct, frozen=True):
    """What a token gives access to. `kind` vnc|serial; `address` and `port`: where the host takes streams."""

    instance_id: str
    kind: str
    host: str
    address: str
    port: int
    expires_at: int


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", errors="surrogatepass")).hexdigest()


def _from_row(row: Mapping[str, Any]) -> ConsoleAccess:
    return ConsoleAccess(**{name: row[name] for name in ConsoleAccess.__struct_fields__})


async def console_token_insert(store: Store, token: str, access: ConsoleAccess) -> None:
    """Keeps a new token, and removes what is expired or too many."""
    now = now_us()
    await store.write(
        Statement("DELETE FROM console_tokens WHERE expires_at <= :now", {"now": now}),
        Statement(
            """DELETE FROM console_tokens WHERE token_hash IN (
                 SELECT token_hash FROM console_tokens WHERE instance_id = :instance_id
                 ORDER BY created_at DESC LIMIT 1000 OFFSET :kept)""",
            {"instance_id": access.instance_id, "kept": TOKENS_MAX - 1},
        ),
        Statement(
            """INSERT INTO console_tokens (token_hash, instance_id, kind, host, address, port, created_at, expires_at)
               VALUES (:token_hash, :instance_id, :kind, :host, :address, :port, :now, :expires_at)""",
            {
                "token_hash": _hash(token), "instance_id": access.instance_id, "kind": access.kind, "host": access.host,
                "address": access.address, "port": access.port, "now": now, "expires_at": access.expires_at,
            },
            rows=1,
        ),
    )  # fmt: skip


async def console_token_fetch(store: Store, token: str) -> ConsoleAccess | None:
    """What the token is good for, without using it up; None when it is not good (any more)."""
    rows = await store.read(
        f"SELECT * FROM console_tokens WHERE {_GOOD}",  # noqa: S608 - our words
        {"token_hash": _hash(token), "now": now_us()},
    )
    return _from_row(rows[0]) if rows else None  # type: ignore[arg-type]


async def console_token_take(store: Store, token: str) -> ConsoleAccess | None:
    """As `console_token_fetch`, and uses it up: of any number of takers, in any process, one gets it."""
    (result,) = await store.write(
        Statement(
            f"DELETE FROM console_tokens WHERE {_GOOD} RETURNING *",  # noqa: S608 - our words
            {"token_hash": _hash(token), "now": now_us()},
        )
    )
    return _from_row(result.rows[0]) if result.rows else None  # type: ignore[arg-type]


def console_tokens_revoke(instance_id: str) -> Statement:
    """No token of the instance is good any more: it leaves its host, stops, or is deleted."""
    return Statement("DELETE FROM console_tokens WHERE instance_id = :instance_id", {"instance_id": instance_id})
