"""The bounded image cache of a libvirt host: what is evicted and when, what never is, and what is damaged."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from instar.config import LibvirtSettings
from instar.errors import HypervisorError
from instar.hypervisor.libvirt import cache_use
from instar.hypervisor.libvirt.cache_use import DisksInMotion, images_in_use
from instar.hypervisor.libvirt.disks import InstanceDisks
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.image_cache import ImageCache
from instar.model.guest import DiskDefinition, ImageSource
from tests.patience import PATIENCE_S

MIB = 1 << 20
# One MiB of cache, and a timer that never rings by itself: tests say when to sweep.
SETTINGS = LibvirtSettings(
    image_cache_max_gib=1 / 1024, image_cache_keep_s=60, image_cache_unused_s=1000, image_cache_sweep_s=1e6
)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Host:
    """A cache, disks, and an image store on the same machine."""

    def __init__(self, directory: Path, settings: LibvirtSettings = SETTINGS, *, by_itself: bool = False) -> None:
        self.directory, self.settings, self.clock, self.by_itself = directory, settings, Clock(), by_itself
        self.paths = HostPaths(directory / "state", runtime_root=directory / "run")
        self.paths.instances.mkdir(parents=True)
        self.disks = InstanceDisks(self.paths, settings=settings, host="h")
        self.images = self._cache()

    def _cache(self) -> ImageCache:
        cache = ImageCache(self.paths, settings=self.settings, host="h", clock=self.clock)
        if not self.by_itself:
            cache.sweeper.want = lambda: None  # type: ignore[method-assign]  # sweeps only when the test says so
        return cache

    async def restart(self) -> None:
        await self.images.close()
        self.images = self._cache()
        await self.images.open()

    async def image(self, *, in_store: bool = False) -> ImageSource:
        """A new cached image of half a MiB; one that the image store has as well costs nothing."""
        data = os.urandom(MIB // 2)
        path = self.directory / f"{uuid4()}.raw"
        path.write_bytes(data)
        image = ImageSource(
            id=path.stem, location=path.as_uri(), format="raw", sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data), virtual_size_bytes=len(data),
        )  # fmt: skip
        await self.images.ensure(image)
        if not in_store:
            path.unlink()
        self.clock.now += 1
        return image

    async def disk(self, image: ImageSource, name: str = "root") -> str:
        instance_id = str(uuid4())
        async with self.images.hold(image.sha256):
            await self.disks.ensure(instance_id, DiskDefinition(name, MIB, image))
        return instance_id

    async def sweep(self, *, after_s: float = 0) -> list[str]:
        """What is cached after a sweep so much later."""
        self.clock.now += after_s
        await self.images.sweeper.sweep()
        return list(self.paths.cached_images())

    def is_cached(self, image: ImageSource) -> bool:
        return self.paths.image(image.sha256).exists()


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path)
    await host.images.open()
    yield host
    await host.images.close()


# --- what goes -------------------------------------------------------------------------------------------------------


async def test_above_the_bound_the_least_recently_used_goes(host: Host) -> None:
    first, second, third, fourth = [await host.image() for _ in range(4)]
    async with host.images.hold(first.sha256):
        pass
    assert len(await host.sweep()) == 4, "young images stay although they are too many"
    assert await host.sweep(after_s=100) == sorted([first.sha256, fourth.sha256])
    assert not host.is_cached(second)
    assert not host.is_cached(third)


async def test_an_image_unused_for_long_goes_though_there_is_room(host: Host) -> None:
    image = await host.image()
    assert await host.sweep(after_s=900) == [image.sha256]
    assert await host.sweep(after_s=200) == []
    assert not (host.paths.state_dir / "image-cache.json").read_text().count(image.sha256)


async def test_what_the_image_store_holds_too_costs_nothing(host: Host) -> None:
    images = [await host.image(in_store=True) for _ in range(4)]
    assert len(await host.sweep(after_s=100)) == 4
    for image in images[1:]:
        (host.directory / f"{image.id}.raw").unlink()  # deleted in the image service: now the cache pays alone
    assert len(await host.sweep()) == 3
    assert host.is_cached(images[0])
    assert len(await host.sweep(after_s=2000)) == 0


async def test_an_image_that_a_disk_stands_on_stays(host: Host) -> None:
    images = [await host.image() for _ in range(4)]
    ids = [await host.disk(image) for image in images]
    assert len(await host.sweep(after_s=5000)) == 4
    await host.disks.ensure_none(ids[0])
    # It was in use until now, as far as anybody saw.
    assert len(await host.sweep(after_s=30)) == 4
    assert len(await host.sweep(after_s=60)) == 3
    assert not host.is_cached(images[0])


async def test_a_disk_set_aside_or_half_made_or_below_another_counts(host: Host) -> None:
    aside, half, deep, odd = [await host.image() for _ in range(4)]
    moved = await host.disk(aside)
    host.paths.instance(moved).rename(host.paths.instances / f"{moved}_resize")
    made = await host.disk(half)
    host.paths.disk(made, "root").rename(host.paths.instance(made) / ".root.qcow2.0123")
    lower = await host.disk(deep)
    elsewhere = host.directory / "lower.qcow2"
    host.paths.disk(lower, "root").rename(elsewhere)
    top = host.paths.disk(lower, "root")
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(elsewhere), "-F", "qcow2", str(top))
    blockdev = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{host.paths.image(odd.sha256)}"}}}}'
    nested = host.paths.instances / str(uuid4()) / "kept"
    nested.mkdir(parents=True)
    qemu_img("create", "-q", "-f", "qcow2", "-b", blockdev, "-F", "raw", str(nested / "x.qcow2"))
    assert images_in_use(host.paths) == {image.sha256 for image in (aside, half, deep, odd)}
    assert len(await host.sweep(after_s=5000)) == 4


def qemu_img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, timeout=30)


# --- what must not go between -----------------------------------------------------------------------------------------


async def test_a_held_image_stays(host: Host) -> None:
    image = await host.image()
    async with host.images.hold(image.sha256):
        assert await host.sweep(after_s=5000) == [image.sha256]


async def test_a_disk_made_during_the_look_keeps_its_image(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    image = await host.image()
    loop = asyncio.get_running_loop()
    looked = images_in_use

    def look_then_somebody_builds(paths: HostPaths) -> set[str]:
        found = looked(paths)
        asyncio.run_coroutine_threadsafe(host.disk(image), loop).result(30)
        return found

    monkeypatch.setattr("instar.hypervisor.libvirt.cache_sweep.images_in_use", look_then_somebody_builds)
    assert await host.sweep(after_s=5000) == [image.sha256]


async def test_nothing_goes_soon_after_a_start(host: Host) -> None:
    """A crash loses the last uses; a build that is taken up after it still finds what it has fetched."""
    images = [await host.image() for _ in range(4)]
    assert len(await host.sweep()) == 4
    host.clock.now += 500
    await host.restart()
    assert len(await host.sweep()) == 4
    assert len(await host.sweep(after_s=70)) == 2
    assert host.is_cached(images[3])


async def test_builds_and_sweeps_side_by_side_leave_every_disk_its_image(tmp_path: Path) -> None:
    """Nothing is kept for being young here: only the hold stands between a build and the eviction."""
    settings = LibvirtSettings(image_cache_max_gib=0, image_cache_keep_s=0, image_cache_unused_s=0, image_cache_sweep_s=1e6)
    host = Host(tmp_path, settings)
    await host.images.open()
    try:
        done = False

        async def sweep_on() -> None:
            while not done:
                await host.sweep(after_s=1)

        sweeper = asyncio.create_task(sweep_on())
        image = await host.image(in_store=True)

        async def build() -> None:
            async with host.images.hold(image.sha256):
                await host.images.ensure(image)
                await host.disk(image)

        for _ in range(5):
            await asyncio.gather(*(build() for _ in range(4)))
        done = True
        await sweeper
        assert host.is_cached(image)
        assert len(host.paths.instance_ids()) == 20
    finally:
        await host.images.close()


def test_disks_that_are_renamed_during_the_look_are_seen(tmp_path: Path) -> None:
    host = Host(tmp_path)
    sha256 = "a" * 64
    base = host.paths.image(sha256)
    base.parent.mkdir()
    base.write_bytes(bytes(MIB))
    directory = host.paths.instances / str(uuid4())
    directory.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(directory / "root.qcow2"))
    aside = directory.with_name(directory.name + "_resize")
    stop = threading.Event()

    def rename_on() -> None:
        while not stop.is_set():
            directory.rename(aside)
            (aside / "root.qcow2").rename(aside / "rootkept.qcow2")
            aside.rename(directory)
            (directory / "rootkept.qcow2").rename(directory / "root.qcow2")
            stop.wait(0.0005)

    mover = threading.Thread(target=rename_on)
    mover.start()
    try:
        for _ in range(300):
            try:
                assert images_in_use(host.paths) == {sha256}
            except DisksInMotion:
                continue
    finally:
        stop.set()
        mover.join()


async def test_a_look_that_cannot_be_finished_evicts_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    image = await host.image()
    await host.disk(image)
    monkeypatch.setattr(cache_use, "_backing_name", lambda path: (_ for _ in ()).throw(PermissionError()))
    with pytest.raises(PermissionError):
        await host.sweep(after_s=5000)
    assert host.is_cached(image)


# --- what is damaged --------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")


async def test_a_damaged_unused_image_is_removed_and_fetched_again(host: Host) -> None:
    image = await host.image(in_store=True)
    path = host.paths.image(image.sha256)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)  # no link any more: the store's file is another
    assert await host.sweep() == [image.sha256]
    damage(path)
    assert await host.sweep() == []
    await host.images.ensure(image)
    assert path.read_bytes() == data


async def test_a_damaged_image_in_use_is_reported_and_repaired_when_it_is_wanted(host: Host) -> None:
    image = await host.image(in_store=True)
    path = host.paths.image(image.sha256)
    data = path.read_bytes()
    await host.disk(image)
    path.unlink()
    path.write_bytes(data)
    damage(path)
    assert await host.sweep() == [image.sha256]
    assert host.images.damaged() == (image.sha256,)
    await host.restart()
    assert host.images.damaged() == (image.sha256,), "a restart forgets the damage"
    await host.images.ensure(image)
    assert host.images.damaged() == ()
    assert path.read_bytes() == data


async def test_a_damaged_image_that_cannot_be_repaired_is_refused(host: Host) -> None:
    image = await host.image(in_store=True)
    await host.disk(image)
    damage(host.paths.image(image.sha256))  # the store's own file
    await host.sweep()
    with pytest.raises(HypervisorError, match="checksum"):
        await host.images.ensure(image)
    assert host.is_cached(image), "its guests need it all the same"


async def test_one_image_is_verified_in_a_sweep_and_none_twice(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that an earlier version left, or another program put there, are looked at one by one."""
    images = [await host.image() for _ in range(2)]
    (host.paths.state_dir / "image-cache.json").unlink(missing_ok=True)
    host.images = host._cache()
    read: list[str] = []
    sweeper = host.images.sweeper
    is_right = sweeper._is_right
    monkeypatch.setattr(sweeper, "_is_right", lambda sha256: (read.append(sha256), is_right(sha256))[1])
    for verified in (1, 2, 2):
        await host.sweep()
        assert len(read) == verified
    assert set(read) == {image.sha256 for image in images}


async def test_the_sweep_comes_by_itself_after_a_new_image(tmp_path: Path) -> None:
    settings = LibvirtSettings(image_cache_keep_s=0, image_cache_unused_s=0, image_cache_sweep_s=1e6)
    host = Host(tmp_path, settings, by_itself=True)
    await host.images.open()
    try:
        image = await host.image()
        async with asyncio.timeout(PATIENCE_S):
            while host.is_cached(image):
                await asyncio.sleep(0.01)
    finally:
        await host.images.close()


@pytest.mark.parametrize("options", [["-b", "/etc/hostname", "-F", "raw"], ["-o", "data_file=data.raw,data_file_raw=on"]])
async def test_an_image_that_refers_to_other_files_is_refused(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "image.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "1M"]
    await asyncio.to_thread(subprocess.run, command, check=True, cwd=tmp_path)
    content = path.read_bytes()
    image = ImageSource(
        id=str(uuid4()), location=path.as_uri(), format="qcow2", sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content), virtual_size_bytes=MIB,
    )  # fmt: skip
    host = Host(tmp_path / "host")
    with pytest.raises(HypervisorError, match="refers to other files"):
        await host.images.ensure(image)
    assert not host.paths.image(image.sha256).exists()
