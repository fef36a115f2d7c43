"""What is true of the cloud as a whole: a few names and values. Called where a cloud is started."""

from __future__ import annotations

from instar.store.contract import Statement, Store


async def cloud_fact(store: Store, name: str) -> str | None:
    rows = await store.read("SELECT value FROM cloud_facts WHERE name = :name", {"name": name})
    return str(rows[0]["value"]) if rows else None


async def cloud_fact_set(store: Store, name: str, value: str) -> None:
    """The fact has this value from now on."""
    sql = "INSERT INTO cloud_facts (name, value) VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = :value"
    await store.write(Statement(sql, {"name": name, "value": value}))
