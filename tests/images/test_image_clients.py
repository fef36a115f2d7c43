"""Unmodified clients of the field against the running Image API."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys

import pytest

from tests.fixtures.openstack_client import Runs, run_apart, run_openstack

pytestmark = pytest.mark.slow

CLIENT_DEADLINE_S = 180

SDK_SESSION = """
import hashlib, io, sys
import openstack
from openstack import exceptions

url, path = sys.argv[1:]

def connect(project):
    auth = dict(auth_url=url, username="member", password="x", project_name=project, user_domain_id="default",
                project_domain_id="default")
    return openstack.connect(auth=auth, region_name="R")

cloud = connect("p1")
data = open(path, "rb").read()
image = cloud.image.create_image(
    "from-sdk", filename=path, disk_format="qcow2", container_format="bare", tags=["a"], hw_disk_bus="virtio",
    wait=True, validate_checksum=True,
)
image = cloud.image.get_image(image.id)
assert (image.status, image.hw_disk_bus, image.size) == ("active", "virtio", len(data)), image
assert image.hash_value == hashlib.sha512(data).hexdigest()
assert cloud.image.find_image("from-sdk").id == image.id
assert [one.id for one in cloud.image.images(limit=1, name="from-sdk", sort="name:asc")] == [image.id]
image = cloud.image.update_image(image, name="renamed", tags=["a", "b"], min_disk=1, os_type="linux")
image = cloud.image.get_image(image.id)
assert (image.name, sorted(image.tags), image.min_disk, image.os_type) == ("renamed", ["a", "b"], 1, "linux")
cloud.image.add_tag(image, "c")
cloud.image.remove_tag(image, "a")
target = io.BytesIO()
cloud.image.download_image(image, stream=True, output=target)
assert target.getvalue() == data
cloud.image.add_member(image, member_id="p2")
assert [one.status for one in cloud.image.members(image)] == ["pending"]
guest = connect("p2")
guest.image.update_member("p2", image, status="accepted")
assert [one.name for one in guest.image.images()] == ["renamed"]
cloud.image.deactivate_image(image)
assert cloud.image.get_image(image.id).status == "deactivated"
cloud.image.reactivate_image(image)
assert cloud.image.get_images_schema().properties["images"]
for number in range(5):
    cloud.image.create_image(f"page-{number}", disk_format="raw", container_format="bare", allow_duplicates=True)
assert len(list(cloud.image.images(limit=2))) == 6
try:
    cloud.image.create_image("evil", data=data, disk_format="raw", container_format="bare")
except exceptions.SDKException as error:
    assert "declared as raw" in str(error), error
else:
    raise SystemExit("a qcow2 was taken for raw")
cloud.image.delete_image(image)
assert cloud.image.find_image("renamed") is None
print("done")
"""


async def run(*command: str, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": environment.pop("HOME"), **environment},
    )  # fmt: skip
    try:
        async with asyncio.timeout(CLIENT_DEADLINE_S):
            output, trouble = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, (command, output.decode(), trouble.decode())
    return output.decode()


async def test_openstackclient_first_session(cloud, tmp_path, qemu_img):
    path = qemu_img("disk.qcow2", "4M", "-f", "qcow2")
    base = [
        "--os-auth-url", f"{cloud.url}/identity/v3", "--os-username", "member", "--os-password", "x",
        "--os-project-name", "p1", "--os-user-domain-id", "default", "--os-project-domain-id", "default",
    ]  # fmt: skip

    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    async def openstack(*words: str, fails: bool = False, runs: Runs = run_openstack) -> str:
        said = await runs(environ, *base, "image", *words)
        assert bool(said.status) == fails, (words, said)
        return said.out + (said.err if fails else "")

    created = json.loads(await openstack(
        "create", "--file", str(path), "--disk-format", "qcow2", "--container-format", "bare", "--min-disk", "1",
        "--property", "os_distro=debian", "--tag", "t", "-f", "json", "cirros",
    ))  # fmt: skip
    # The client shows what it created before it uploaded: the status is told by `show`.
    assert (created["name"], created["properties"]["os_distro"], created["tags"]) == ("cirros", "debian", ["t"])
    shown = json.loads(await openstack("show", "-f", "json", "cirros"))
    assert shown["checksum"] == hashlib.md5(path.read_bytes()).hexdigest()
    assert (shown["status"], shown["size"], shown["min_disk"]) == ("active", path.stat().st_size, 1)
    [listed] = json.loads(await openstack("list", "--long", "-f", "json", runs=run_apart))
    assert (listed["Name"], listed["Status"], listed["Visibility"]) == ("cirros", "active", "shared")

    await openstack("save", "--file", str(tmp_path / "saved"), "cirros")
    assert (tmp_path / "saved").read_bytes() == path.read_bytes()
    await openstack("set", "--name", "renamed", "--property", "a=b", "--tag", "u", "--protected", "--private", "cirros")
    await openstack("delete", "renamed", fails=True)
    await openstack("unset", "--property", "os_distro", "--tag", "t", "renamed")
    await openstack("set", "--unprotected", "renamed")
    shown = json.loads(await openstack("show", "-f", "json", "renamed"))
    assert (shown["tags"], shown["visibility"], shown["properties"]["a"]) == (["u"], "private", "b")
    assert "os_distro" not in shown["properties"]
    refused = await openstack(
        "create", "--file", str(path), "--disk-format", "raw", "--container-format", "bare", "evil", fails=True
    )
    assert "declared as raw" in refused
    await openstack("delete", "renamed")
    assert json.loads(await openstack("list", "-f", "json")) == []
    assert cloud.files() == []


async def test_openstacksdk_session(cloud, tmp_path, qemu_img):
    path = qemu_img("disk.qcow2", "4M", "-f", "qcow2")
    script = tmp_path / "session.py"
    script.write_text(SDK_SESSION)
    assert "done" in await run(sys.executable, str(script), f"{cloud.url}/identity/v3", str(path), HOME=str(tmp_path))
