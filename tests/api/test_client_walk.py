"""Unmodified python-openstackclient leads servers through every operation, on three simulated hosts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.api.compute_cloud import Cloud
from tests.api.test_openstack_clients import openstack
from tests.patience import PATIENCE_S

AS_JSON = ("-f", "json")


async def _boot(cloud: Cloud, name: str) -> str:
    return await cloud.created(cloud.demo, name)


async def _names(cloud: Cloud, *words: str) -> list[str]:
    return [one["Name"] for one in await openstack(cloud, *words, *AS_JSON)]


async def _sleeps_and_is_copied(cloud: Cloud) -> None:
    server_id = await _boot(cloud, "sleeper")
    for word, status in (("pause", "PAUSED"), ("unpause", "ACTIVE"), ("suspend", "SUSPENDED"), ("resume", "ACTIVE")):
        await openstack(cloud, "server", word, "sleeper")
        await cloud.until(cloud.demo, server_id, status)
    await openstack(cloud, "server", "image", "create", "--wait", "--name", "snap", "--property", "a=b", "sleeper")
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    await openstack(
        cloud, "server", "backup", "create", "--wait", "--type", "daily", "--rotate", "1", "--name", "backup", "sleeper"
    )
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert {"snap", "backup"} <= set(await _names(cloud, "image", "list"))
    await openstack(cloud, "server", "rebuild", "--wait", "--image", "snap", "--name", "rebuilt", "sleeper")
    server = await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert server["name"] == "rebuilt"
    await openstack(cloud, "server", "rescue", "--image", "snap", "rebuilt")
    await cloud.until(cloud.demo, server_id, "RESCUE")
    await openstack(cloud, "server", "unrescue", "rebuilt")
    await cloud.until(cloud.demo, server_id, "ACTIVE")


async def _is_shelved(cloud: Cloud) -> None:
    server_id = await _boot(cloud, "shelved")
    for words in (
        (), ("--availability-zone", "nova"), ("--host", "sim-1", "--no-availability-zone"),
    ):  # fmt: skip
        await openstack(cloud, "server", "shelve", "--offload", "--wait", server_id, admin=True)
        await cloud.until(cloud.demo, server_id, "SHELVED_OFFLOADED")
        await openstack(
            cloud, "--os-compute-api-version", "2.91", "server", "unshelve", "--wait", *words, server_id, admin=True
        )
        await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await cloud.host_of(server_id) == "sim-1"


async def _is_resized(cloud: Cloud) -> None:
    server_id = await _boot(cloud, "resized")
    for end, flavor in (("revert", "m1.nano"), ("confirm", "m1.small")):
        await openstack(cloud, "server", "resize", "--wait", "--flavor", "m1.small", "resized")
        await cloud.until(cloud.demo, server_id, "VERIFY_RESIZE")
        await openstack(cloud, "server", "resize", end, "resized")
        assert (await cloud.until(cloud.demo, server_id, "ACTIVE"))["flavor"]["original_name"] == flavor


async def _is_migrated(cloud: Cloud) -> None:
    server_id = await _boot(cloud, "mover")
    as_admin: dict[str, Any] = {"admin": True}
    await openstack(cloud, "server", "migrate", "--wait", server_id, **as_admin)
    await cloud.until(cloud.demo, server_id, "VERIFY_RESIZE")
    await openstack(cloud, "server", "migration", "confirm", server_id, **as_admin)
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    await openstack(cloud, "server", "migrate", "--live-migration", "--wait", server_id, **as_admin)
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    listed = await openstack(cloud, "server", "migration", "list", "--server", server_id, *AS_JSON, **as_admin)
    assert [(one["Type"], one["Status"]) for one in listed] == [("live-migration", "completed"), ("migration", "confirmed")]
    number = str(listed[0]["Id"])
    for words in (("abort",), ("force", "complete"), ("show",)):
        await openstack(cloud, "server", "migration", *words, server_id, number, status=1, **as_admin)
    source = str(await cloud.host_of(server_id))
    cloud.world.host(source).faults.live_never_converges = True
    await openstack(cloud, "server", "migrate", "--live-migration", server_id, **as_admin)
    async with asyncio.timeout(PATIENCE_S):
        while not (found := (await cloud.admin.get(f"/servers/{server_id}/migrations"))["migrations"]) or (
            found[0]["status"] != "running"
        ):
            await asyncio.sleep(0.05)
    number = str(found[0]["id"])
    # By its uuid: given a number, this client takes it for the server's id.
    shown = await openstack(cloud, "server", "migration", "show", server_id, found[0]["uuid"], *AS_JSON, **as_admin)
    assert (shown["Status"], shown["Source Compute"]) == ("running", source)
    await openstack(cloud, "server", "migration", "abort", server_id, number, **as_admin)
    await cloud.until(cloud.demo, server_id, "ACTIVE")
    assert await cloud.host_of(server_id) == source


@pytest.mark.slow
async def test_openstackclient_saves_a_server_from_its_host_and_from_deletion(three_hosts: Cloud) -> None:
    cloud = three_hosts
    server_id = await _boot(cloud, "survivor")
    host = str(await cloud.host_of(server_id))
    as_admin: dict[str, Any] = {"admin": True}
    await openstack(cloud, "server", "evacuate", server_id, status=1, **as_admin)
    await openstack(cloud, "compute", "service", "set", "--down", host, "nova-compute", **as_admin)
    # Without --wait: this client compares the status in small letters with ACTIVE, and would wait for ever.
    await openstack(cloud, "server", "evacuate", server_id, **as_admin)
    await cloud.until(cloud.demo, server_id, "SHUTOFF")
    assert await cloud.host_of(server_id) != host
    await openstack(cloud, "compute", "service", "set", "--up", host, "nova-compute", **as_admin)
    await openstack(cloud, "server", "delete", server_id)
    await cloud.until(cloud.demo, server_id, "SOFT_DELETED")
    await openstack(cloud, "server", "restore", server_id)
    await cloud.until(cloud.demo, server_id, "SHUTOFF")
    await openstack(cloud, "server", "delete", "--force", server_id)
    await cloud.gone(cloud.demo, server_id)


@pytest.mark.slow
async def test_openstackclient_leads_servers_through_every_operation(three_hosts: Cloud) -> None:
    cloud = three_hosts
    # Side by side: each command is a process that takes a second of a core before it says a word.
    await asyncio.gather(_sleeps_and_is_copied(cloud), _is_shelved(cloud), _is_resized(cloud), _is_migrated(cloud))
