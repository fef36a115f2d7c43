"""Images fetched into the caches of an aggregate's hosts before any build: os-aggregates/{id}/images."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from instar.config import ImageSettings
from instar.engine.hosts import HostClient
from instar.errors import HypervisorError, Unavailable
from instar.hypervisor.simulated.driver import SimulatedHypervisor
from instar.images.contract import ImageDraft
from instar.lifecycle import prefetch
from instar.model.guest import ImageSource
from tests.api.compute_cloud import SETTINGS, Cloud, running_cloud
from tests.api.test_openstack_clients import openstack

HOSTS = ("sim-0", "sim-1")


async def aggregate(cloud: Cloud, *hosts: str) -> str:
    """The path of a new aggregate."""
    made = await cloud.admin.call("POST", "/os-aggregates", {"aggregate": {"name": f"of-{len(hosts)}"}})
    path = f"/os-aggregates/{made.json()['aggregate']['id']}"
    for host in hosts:
        assert (await cloud.admin.call("POST", path + "/action", {"add_host": {"host": host}})).status_code == 200
    return path


def wish(*image_ids: str) -> dict[str, Any]:
    return {"cache": [{"id": image_id} for image_id in image_ids]}


async def cached(cloud: Cloud, host: str) -> int:
    return len((await HostClient(cloud.control.bus).census(host)).cached_images)


async def test_every_host_of_the_aggregate_that_is_up_fetches_the_image(cloud: Cloud) -> None:
    path = await aggregate(cloud, *HOSTS)
    service = (await cloud.admin.get("/os-services?host=sim-1"))["services"][0]
    await cloud.admin.call("PUT", f"/os-services/{service['id']}", {"forced_down": True})
    answer = await cloud.admin.call("POST", path + "/images", wish(cloud.image_id))
    assert (answer.status_code, answer.content) == (202, b"")
    await cloud.control.lifecycle.prefetch.wait_until_done()
    assert [await cached(cloud, host) for host in HOSTS] == [1, 0]
    await cloud.admin.call("PUT", f"/os-services/{service['id']}", {"forced_down": False})
    assert (await cloud.admin.call("POST", path + "/images", wish(cloud.image_id))).status_code == 202
    await cloud.control.lifecycle.prefetch.wait_until_done()
    assert [await cached(cloud, host) for host in HOSTS] == [1, 1]


async def test_what_cannot_be_fetched_ahead_is_refused(cloud: Cloud) -> None:
    images = await aggregate(cloud, "sim-0") + "/images"
    refused, good = cloud.admin.refused, cloud.image_id
    await refused(404, "POST", images, wish(good), version="2.80")
    await refused(404, "POST", "/os-aggregates/99/images", wish(good))
    await cloud.demo.refused(403, "POST", images, wish(good))
    assert "Duplicate" in await refused(400, "POST", images, wish(good, good))
    assert "Duplicate" in await refused(400, "POST", images, wish(good, good.replace("-", "")))
    unknown = str(uuid.uuid4())
    assert unknown in await refused(400, "POST", images, wish(good, unknown))
    for body in ({}, {"cache": []}, {"cache": [{}]}, {"cache": [{"id": "x"}]}, {"cache": good}, wish(good) | {"x": 1}):
        await refused(400, "POST", images, body)
    await cloud.control.images.queue(unknown, ImageDraft("queued", cloud.admin.project_id, {}))
    assert "not active" in await refused(400, "POST", images, wish(unknown))
    assert await cached(cloud, "sim-0") == 0


async def test_few_fetch_at_once_and_a_failure_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = most = calls = 0

    async def slow(self: SimulatedHypervisor, image: ImageSource) -> None:
        nonlocal at_once, most, calls
        at_once, calls = at_once + 1, calls + 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        if self.name == "sim-1":
            raise HypervisorError(reason="the disk is on fire")

    monkeypatch.setattr(SimulatedHypervisor, "ensure_image", slow)
    settings = msgspec.structs.replace(
        SETTINGS,
        image=ImageSettings(prefetch_max=2),
        simulated=msgspec.structs.replace(SETTINGS.simulated, hosts=8),
    )
    async with running_cloud(tmp_path, settings) as cloud:
        path = await aggregate(cloud, *(f"sim-{number}" for number in range(8)))
        for _ in range(2):  # asked twice while it waits: done once
            assert (await cloud.admin.call("POST", path + "/images", wish(cloud.image_id))).status_code == 202
        await cloud.control.lifecycle.prefetch.wait_until_done()
        assert most == 2
        assert 8 <= calls <= 16
        monkeypatch.setattr(prefetch, "WAITING_MAX", 7)
        with pytest.raises(Unavailable):
            cloud.control.lifecycle.prefetch.ask([cloud.image_id], [f"sim-{number}" for number in range(8)])


@pytest.mark.slow
async def test_openstackclient_asks_for_images_ahead(cloud: Cloud) -> None:
    await aggregate(cloud, "sim-0")
    await openstack(cloud, "aggregate", "cache", "image", "of-1", cloud.image_id, admin=True)
    await cloud.control.lifecycle.prefetch.wait_until_done()
    assert await cached(cloud, "sim-0") == 1
