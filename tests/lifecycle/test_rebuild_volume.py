"""A server that boots from a volume is rebuilt: the volume has the image's data, or what it had where the rebuild fails."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

import msgspec

from instar.errors import HypervisorError
from instar.lifecycle.rebuild import RebuildArguments
from instar.model.instance import Instance, RequestedVolume
from instar.model.states import VmState
from tests.lifecycle.device_acts import check_built
from tests.lifecycle.harness import Plane

SIZE_BYTES = 1 << 20


async def image_of(one: Plane, tmp_path: Path, word: bytes) -> str:
    path = tmp_path / word.decode()
    path.write_bytes(word.ljust(SIZE_BYTES, b"\0"))
    name = f"image of {word.decode()}"
    await one.control.images.register(name, path, disk_format="raw", properties={})
    rows = await one.control.store.read("SELECT id FROM images WHERE name = :name", {"name": name})
    return str(rows[0]["id"])


async def booted_from_volume(one: Plane, image_id: str) -> Instance:
    root = RequestedVolume(
        str(uuid.uuid4()), str(uuid.uuid4()), boot_index=0, delete_on_termination=True, create=True, size_gib=1,
        image_id=image_id, device="vda",
    )  # fmt: skip
    data = str(uuid.uuid4())
    await one.control.volumes.create(data, project_id="demo", user_id="user", size_gib=1, name="data")
    await one.control.volumes.until_available(data, 20)
    second = RequestedVolume(data, str(uuid.uuid4()), size_gib=1, device="vdb")
    instance = await one.created("victim", volumes=(root, second))
    assert instance.vm_state is VmState.ACTIVE, instance.facts.fault
    return instance


def data_of(one: Plane, instance: Instance, tmp_path: Path) -> bytes:
    """The first word on its root volume."""
    (root,) = [volume for volume in instance.facts.volumes if volume.boot_index == 0]
    raw = tmp_path / "root.raw"
    volume = one.state.path / "volumes" / f"{root.volume_id}.qcow2"
    subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", volume, raw], check=True, timeout=20)
    return raw.read_bytes()[:64].rstrip(b"\0")


async def rebuilt(one: Plane, instance: Instance, image_id: str) -> Instance:
    wanted = RebuildArguments(
        image=None, spec=msgspec.structs.replace(instance.spec, metadata={"again": "yes"}), name="again",
        volume_image_id=image_id,
    )  # fmt: skip
    await one.control.lifecycle.rebuild(one.context(), instance, wanted)
    await one.settled()
    return await one.fetch(instance.id)


async def test_the_root_volume_gets_the_data_of_the_image(one: Plane, tmp_path: Path) -> None:
    first, second = [await image_of(one, tmp_path, word) for word in (b"first", b"second")]
    instance = await booted_from_volume(one, first)
    assert data_of(one, instance, tmp_path) == b"first"
    for image_id, word in ((second, b"second"), (first, b"first"), (first, b"first")):
        ended = await rebuilt(one, instance, image_id)
        assert (ended.vm_state, ended.facts.fault) == (VmState.ACTIVE, None)
        assert (ended.name, ended.spec.metadata, ended.spec.image) == ("again", {"again": "yes"}, instance.spec.image)
        assert data_of(one, ended, tmp_path) == word
        assert [volume.volume_id for volume in ended.facts.volumes] == [v.volume_id for v in instance.facts.volumes]
        await check_built(one, ended, True)
        root = await one.control.volumes.volume_fetch(ended.facts.volumes[0].volume_id, project_id="", is_admin=True)
        assert root.image_metadata["image_id"] == image_id
    assert await one.findings() == []


async def test_a_rebuild_that_fails_late_gives_back_the_data(one: Plane, tmp_path: Path) -> None:
    first, second = [await image_of(one, tmp_path, word) for word in (b"first", b"second")]
    instance = await booted_from_volume(one, first)
    assert instance.host is not None
    one.world.host(instance.host).faults.fail_next("ensure_running", HypervisorError(reason="not today"))
    ended = await rebuilt(one, instance, second)
    assert ended.vm_state is VmState.ACTIVE
    assert ended.facts.fault is not None
    assert data_of(one, ended, tmp_path) == b"first"
    assert not list((one.state.path / "volumes").glob("*.kept"))
    await check_built(one, ended, True)
    assert await one.findings() == []
    assert data_of(one, await rebuilt(one, ended, second), tmp_path) == b"second"
