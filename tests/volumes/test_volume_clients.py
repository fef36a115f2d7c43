"""Unmodified clients of the field against the running Block Storage API."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from instar.store import volume_snapshots as snapshot_sql
from instar.store import volumes as sql
from instar.volumes.storage import snapshot_subject, volume_subject
from tests.fixtures.openstack_client import Runs, run_apart, run_openstack
from tests.volumes.volume_cloud import VolumeCloud

pytestmark = pytest.mark.slow

DEADLINE_S = 180

SDK_SESSION = """
import sys
import openstack
from openstack import exceptions

auth = dict(auth_url=sys.argv[1], username="member", password="x", project_name="p1", user_domain_id="default",
            project_domain_id="default")
cloud = openstack.connect(auth=auth, region_name="R")
volume = cloud.create_volume(1, wait=True, name="from-sdk", timeout=90)
assert cloud.block_storage.find_volume("from-sdk").id == volume.id
cloud.block_storage.set_volume_metadata(volume, a="1")
snapshot = cloud.create_volume_snapshot(volume.id, wait=True, name="s", timeout=90)
copy = cloud.create_volume(2, wait=True, snapshot_id=snapshot.id, timeout=90)
assert copy.size == 2
cloud.block_storage.extend_volume(copy, 3)
copy = cloud.block_storage.wait_for_status(cloud.block_storage.get_volume(copy.id), "available", interval=0.2, wait=90)
assert copy.size == 3
attachment = cloud.block_storage.create_attachment(copy, instance=sys.argv[2])
attachment = cloud.block_storage.update_attachment(attachment, connector={"host": "h1"})
cloud.block_storage.complete_attachment(attachment)
assert cloud.block_storage.get_volume(copy.id).status == "in-use"
cloud.block_storage.delete_attachment(attachment)
assert {one.name for one in cloud.block_storage.types()} == {"multiattach", "__DEFAULT__"}
assert cloud.block_storage.get_limits().absolute.total_volumes_used == 2
assert len(list(cloud.block_storage.volumes(limit=1))) == 2
try:
    cloud.create_volume(1, image_id=sys.argv[2])
except exceptions.SDKException as error:
    assert sys.argv[2] in str(error), error
else:
    raise SystemExit("a volume of an image that does not exist")
cloud.delete_volume_snapshot(snapshot.id, wait=True)
for one in (volume, copy):
    assert cloud.delete_volume(one.id, wait=True)
print("done")
"""


async def run(*command: str, home: Path) -> str:
    ended = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
    )  # fmt: skip
    assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
    return ended.stdout


async def test_openstackclient_first_session(cloud: VolumeCloud, tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    async def openstack(*words: str, role: str = "member", fails: bool = False, runs: Runs = run_openstack) -> str:
        base = [
            "--os-auth-url", f"{cloud.url}/identity/v3", "--os-username", role, "--os-password", "x",
            "--os-project-name", "p1", "--os-user-domain-id", "default", "--os-project-domain-id", "default",
        ]  # fmt: skip
        said = await runs(environ, *base, *words)
        assert bool(said.status) == fails, (words, said)
        return said.out + (said.err if fails else "")

    async def told(*words: str, role: str = "member", runs: Runs = run_openstack) -> Any:
        return json.loads(await openstack(*words, "-f", "json", role=role, runs=runs))

    async def settled() -> None:
        """What was begun has ended: asked of the service."""
        volumes = [volume_subject(one.id) for one in await sql.volumes_with_work(cloud.store)]
        snapshots = [snapshot_subject(one.id) for one in await snapshot_sql.snapshots_with_work(cloud.store)]
        for subject in (*volumes, *snapshots):
            await cloud.volumes.owner.jobs.ended(subject)

    created = await told("volume", "create", "--size", "1", "--description", "d", "--property", "a=b", "data")
    assert (created["name"], created["size"], created["properties"]) == ("data", 1, {"a": "b"})
    await settled()
    [listed] = await told("volume", "list", runs=run_apart)
    assert (listed["Name"], listed["Status"], listed["Size"]) == ("data", "available", 1)
    await openstack("volume", "set", "--name", "renamed", "--size", "2", "--property", "c=d", "--bootable", "data")
    await settled()
    shown = await told("volume", "show", "renamed")
    assert (shown["status"], shown["size"], shown["bootable"]) == ("available", 2, True)
    assert shown["properties"] == {"a": "b", "c": "d"}
    await openstack("volume", "unset", "--property", "a", "renamed")
    snapshot = await told("volume", "snapshot", "create", "--volume", "renamed", "snap")
    await settled()
    [listed] = await told("volume", "snapshot", "list")
    assert (listed["Name"], listed["Status"]) == ("snap", "available")
    await told("volume", "create", "--snapshot", snapshot["id"], "--size", "2", "copy")
    await settled()
    kind = await told("volume", "type", "create", "--multiattach", "shared", role="admin")
    assert kind["properties"] == {"multiattach": "<is> True"}
    await openstack("volume", "type", "set", "--property", "k=v", "shared", role="admin")
    assert {one["Name"] for one in await told("volume", "type", "list")} == {"__DEFAULT__", "multiattach", "shared"}
    await openstack("volume", "type", "delete", "shared", role="admin")
    await openstack("volume", "set", "--state", "error", "copy", role="admin")
    assert "Invalid volume" in await openstack("volume", "delete", "renamed", fails=True)  # it has a snapshot
    await openstack("volume", "snapshot", "delete", "snap")
    await settled()
    await openstack("volume", "delete", "copy", "renamed")
    await settled()
    assert await told("volume", "list") == []
    assert cloud.files() == []


async def test_openstacksdk_session(cloud: VolumeCloud, tmp_path: Path) -> None:
    script = tmp_path / "session.py"
    script.write_text(SDK_SESSION)
    said = await run(sys.executable, str(script), f"{cloud.url}/identity/v3", str(uuid.uuid4()), home=tmp_path)
    assert "done" in said
    assert cloud.files() == []
