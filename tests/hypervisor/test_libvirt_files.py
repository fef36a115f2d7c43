"""The files of the libvirt driver: image cache, overlays, config drive, console log, and what a full disk does."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import libvirt
import msgspec
import pytest

from instar.errors import DiskFull, HypervisorError, HypervisorUnavailable, ImageGone
from instar.hypervisor.libvirt import console
from instar.hypervisor.libvirt.config_drive import write_config_drive
from instar.hypervisor.libvirt.disks import InstanceDisks
from instar.hypervisor.libvirt.failures import explain, safe_reason
from instar.hypervisor.libvirt.host_paths import SOCKET_PATH_MAX, HostPaths, mount_point
from instar.hypervisor.libvirt.image_cache import ImageCache
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import ConfigDrive, DiskDefinition, ImageSource
from tests.fixtures.small_http_server import Asked, SmallHttpServer

from .tiny_guest import write_image

SETTINGS = LibvirtSettings()
MIB = 1 << 20


class ImageServer:
    """Serves one body at every path; remembers the headers it was asked with."""

    def __init__(self, body: bytes, status: int = 200) -> None:
        self._body, self._status = body, status
        self.headers: list[dict[str, str]] = []
        server = SmallHttpServer("GET", self._answer)
        self.url, self.close = f"{server.url}/v2/images/x/file?a=b", server.close

    def _answer(self, asked: Asked) -> tuple[int, bytes]:
        self.headers.append(dict(asked.headers))
        return self._status, self._body


@pytest.fixture
def full_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB without a free block."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=True, timeout=20)
    try:
        (mount / "instances").mkdir()
        (mount / "cache").mkdir()
        with pytest.raises(OSError), (mount / "filler").open("wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True, timeout=20)


def cache(paths: HostPaths, settings: LibvirtSettings = SETTINGS, token: str | None = None) -> ImageCache:
    return ImageCache(paths, settings=settings, host="host-1", bearer_token=(lambda: token) if token else None)


def disks(paths: HostPaths) -> InstanceDisks:
    return InstanceDisks(paths, settings=SETTINGS, host="host-1")


def source(location: str, body: bytes) -> ImageSource:
    return ImageSource(
        id="4711", location=location, format="raw", sha256=hashlib.sha256(body).hexdigest(),
        size_bytes=len(body), virtual_size_bytes=len(body),
    )  # fmt: skip


# --- image cache -----------------------------------------------------------------------------------------------------


async def test_a_local_image_is_linked_and_read_only(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a b.raw")
    paths = HostPaths(tmp_path / "state")
    await cache(paths).ensure(image)
    cached = paths.image(image.sha256)
    assert cached.samefile(tmp_path / "a b.raw")
    assert cached.stat().st_mode & 0o222 == 0
    assert [entry.name for entry in paths.cache.iterdir()] == [image.sha256]


@pytest.mark.host
async def test_an_image_of_another_file_system_is_copied(tmp_path: Path) -> None:
    mount = tmp_path / "other"
    mount.mkdir()
    await asyncio.to_thread(subprocess.run, ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount], check=True)
    try:
        image = write_image(mount / "tiny.raw")
        paths = HostPaths(tmp_path / "state")
        await cache(paths).ensure(image)
        assert paths.image(image.sha256).read_bytes() == (mount / "tiny.raw").read_bytes()
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", mount], check=True)


async def test_an_image_is_streamed_over_http_once_for_many_callers_with_the_token(tmp_path: Path) -> None:
    body = bytes(range(256)) * 8192
    server = ImageServer(body)
    try:
        paths = HostPaths(tmp_path)
        images = cache(paths, token="secret")
        image = source(server.url, body)
        await asyncio.gather(*(images.ensure(image) for _ in range(5)))
        assert paths.image(image.sha256).read_bytes() == body
        assert len(server.headers) == 1
        assert server.headers[0]["Authorization"] == "Bearer secret"
    finally:
        server.close()


@pytest.mark.parametrize("body", [b"short", b"x" * 100_000], ids=["too short", "too long"])
async def test_an_answer_that_is_not_the_image_leaves_nothing(tmp_path: Path, body: bytes) -> None:
    server = ImageServer(body)
    try:
        paths = HostPaths(tmp_path)
        with pytest.raises(HypervisorError):
            await cache(paths).ensure(source(server.url, b"y" * 50_000))
        assert list(paths.cache.iterdir()) == []
    finally:
        server.close()


async def test_an_image_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    server = ImageServer(b"", status=404)
    try:
        for location in (server.url, (tmp_path / "none.raw").as_uri()):
            with pytest.raises(ImageGone) as caught:
                await cache(HostPaths(tmp_path)).ensure(source(location, b"x"))
            assert caught.value.image_id == "4711"
    finally:
        server.close()


async def test_a_location_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    for location in ("ftp://127.0.0.1/x", "/etc/passwd", "file://elsewhere/etc/passwd"):
        with pytest.raises(HypervisorError):
            await cache(HostPaths(tmp_path)).ensure(source(location, b"x"))


async def test_an_image_that_refers_to_another_file_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(MIB))
    evil = tmp_path / "evil.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(evil)]
    await asyncio.to_thread(subprocess.run, command, check=True)
    image = source(evil.as_uri(), evil.read_bytes())
    image = msgspec.structs.replace(image, format="qcow2", virtual_size_bytes=MIB)
    with pytest.raises(HypervisorError, match="other files"):
        await cache(HostPaths(tmp_path / "state")).ensure(image)


async def test_a_cancelled_caller_does_not_take_the_copy_from_the_others(tmp_path: Path) -> None:
    image = write_image(tmp_path / "tiny.raw")
    paths = HostPaths(tmp_path / "state")
    images = cache(paths)
    first = asyncio.ensure_future(images.ensure(image))
    second = asyncio.ensure_future(images.ensure(image))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert paths.image(image.sha256).exists()


async def test_unfinished_copies_of_an_earlier_process_are_removed(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path)
    paths.cache.mkdir()
    (paths.cache / ".part-dead").write_bytes(b"x")
    await cache(paths).open()
    assert list(paths.cache.iterdir()) == []


# --- a full disk -----------------------------------------------------------------------------------------------------


def assert_names_the_mount_point(error: DiskFull, mount: Path) -> None:
    assert error.filesystem == str(mount)
    assert error.message == f"No space left on file system {mount} of host host-1."


@pytest.mark.host
async def test_a_full_disk_is_named_by_its_mount_point_when_an_image_is_copied(
    full_file_system: Path, tmp_path: Path
) -> None:
    settings = msgspec.structs.replace(SETTINGS, disk_reserved_mib=-1024)  # so that the write itself runs full
    for used in (SETTINGS, settings):
        with pytest.raises(DiskFull) as caught:
            await cache(HostPaths(full_file_system), used).ensure(write_image(tmp_path / "tiny.raw"))
        assert_names_the_mount_point(caught.value, full_file_system)
    assert list((full_file_system / "cache").iterdir()) == []


@pytest.mark.host
async def test_a_full_disk_is_named_by_its_mount_point_when_a_disk_is_made(full_file_system: Path) -> None:
    paths = HostPaths(full_file_system)
    instance_id = str(uuid4())
    with pytest.raises(DiskFull) as caught:
        await disks(paths).ensure(instance_id, DiskDefinition("root", 64 * MIB))
    assert_names_the_mount_point(caught.value, full_file_system)
    await disks(paths).ensure_none(instance_id)
    assert list(paths.instances.iterdir()) == []


@pytest.mark.host
async def test_a_full_disk_is_named_by_its_mount_point_when_a_config_drive_is_made(full_file_system: Path) -> None:
    paths = HostPaths(full_file_system)
    path = paths.config_drive(str(uuid4()))
    with pytest.raises(DiskFull) as caught:
        await write_config_drive(ConfigDrive("{}" * 4096, "{}"), path, settings=SETTINGS, host="host-1")
    assert_names_the_mount_point(caught.value, full_file_system)
    assert not path.parent.exists() or list(path.parent.iterdir()) == []


def test_the_mount_point_of_a_path_that_does_not_exist_is_that_of_its_parent() -> None:
    assert mount_point(Path("/proc/does/not/exist")) == Path("/proc")


# --- disks, config drive, console ------------------------------------------------------------------------------------


async def test_a_disk_is_never_smaller_than_its_image(tmp_path: Path) -> None:
    image = write_image(tmp_path / "tiny.raw")
    paths = HostPaths(tmp_path / "state")
    await cache(paths).ensure(image)
    instance_id = str(uuid4())
    await disks(paths).ensure(instance_id, DiskDefinition("root", 512, image=image))
    command = ["qemu-img", "info", "--output=json", str(paths.disk(instance_id, "root"))]
    info = msgspec.json.decode((await asyncio.to_thread(subprocess.run, command, capture_output=True)).stdout)
    assert info["virtual-size"] == image.virtual_size_bytes
    assert info["full-backing-filename"] == str(paths.image(image.sha256))


@pytest.mark.parametrize("name", ["../root", "", "a/b", ".hidden"])
async def test_a_disk_name_that_is_no_word_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HypervisorError):
        await disks(HostPaths(tmp_path)).ensure(str(uuid4()), DiskDefinition(name, MIB))


@pytest.mark.parametrize("since", ["nothing", "said otherwise", "damaged", "replaced", "note lost"])
async def test_a_config_drive_is_written_anew_unless_it_is_as_it_was_written(tmp_path: Path, since: str) -> None:
    path = tmp_path / "instance" / "config.iso"
    drive = ConfigDrive(meta_data="{}", network_data="{}")
    await write_config_drive(drive, path, settings=SETTINGS, host="host-1")
    written = path.read_bytes()
    if since == "said otherwise":
        drive = ConfigDrive(meta_data='{"uuid": "1"}', network_data="{}")
    elif since == "damaged":
        path.write_bytes(written[:100])
    elif since == "replaced":
        path.unlink()
        path.write_bytes(written)
    elif since == "note lost":
        path.with_name(".config.iso.note").unlink()
    inode = path.stat().st_ino
    with path.open("rb"):  # so that its number is not given to a new file
        await write_config_drive(drive, path, settings=SETTINGS, host="host-1")
        assert (path.stat().st_ino == inode) == (since == "nothing")
    assert len(path.read_bytes()) == len(written)


async def test_a_config_drive_has_the_label_and_the_files_that_guests_look_for(tmp_path: Path) -> None:
    path = tmp_path / "instance" / "config.iso"
    drive = ConfigDrive(meta_data='{"uuid": "é"}', network_data='{"links": []}', user_data=b"#!/bin/sh\n\xff")
    for _ in range(2):
        await write_config_drive(drive, path, settings=SETTINGS, host="host-1")
    assert {entry.name for entry in path.parent.iterdir()} == {"config.iso", ".config.iso.note"}
    assert path.stat().st_mode & 0o777 == 0o600

    def read(name: str) -> bytes:
        command = ["isoinfo", "-R", "-i", str(path), "-x", f"/openstack/latest/{name}"]
        return subprocess.run(command, check=True, capture_output=True, timeout=20).stdout

    assert await asyncio.to_thread(read, "meta_data.json") == drive.meta_data.encode()
    assert await asyncio.to_thread(read, "network_data.json") == drive.network_data.encode()
    assert await asyncio.to_thread(read, "user_data") == drive.user_data
    assert path.read_bytes()[32808:32840].decode().strip() == "config-2"


def test_a_console_log_beyond_its_limit_is_cut_and_its_end_can_still_be_read(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"a" * 900 + b"b" * 200)
    with log.open("ab") as guest:  # QEMU has it open all the time
        assert console.bound_log(log, max_bytes=1000, keep_bytes=300)
        guest.write(b"after")
    assert not console.bound_log(log, max_bytes=1000, keep_bytes=300)
    assert log.read_bytes() == b"after"
    assert console.read_tail(log, 7) == b"bbafter"
    assert console.read_tail(log, 5000) == b"a" * 100 + b"b" * 200 + b"after"
    assert console.read_tail(log, -1) == b""


async def test_socket_paths_stay_short_however_long_the_state_directory_is(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path / ("long" * 40), runtime_root=tmp_path / "run")
    instance_id = str(uuid4())
    paths.instance(instance_id).mkdir(parents=True)
    short = HostPaths(Path("/x"), runtime_root=Path("/y")).socket(instance_id, "vnc.sock")
    assert short == Path("/x/instances") / instance_id / "vnc.sock"
    linked = paths.socket(instance_id, "vnc.sock")
    assert linked.parent.samefile(paths.instance(instance_id))
    assert len(str(linked)) - len(str(tmp_path / "run")) + len("/run") < SOCKET_PATH_MAX
    await disks(paths).ensure_none(instance_id)
    assert not paths.runtime.exists()


# --- what libvirt says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("Could not open '/srv/a b/root.qcow2': Permission denied", "Could not open a file of the host: Permission denied"),
        ("cannot stat /srv/x/y: gone", "cannot stat a file of the host gone"),
        ("-drive file=/srv/x,if=none: bad\nsecond line", "-drive file=a file of the host,if=none: bad"),
        ("operation failed: domain is not running", "operation failed: domain is not running"),
    ],
)
def test_a_reason_shows_no_path(text: str, safe: str) -> None:
    assert safe_reason(text) == safe
    assert "/" not in safe_reason(text)


def test_libvirt_errors_become_ours(tmp_path: Path) -> None:
    def error(code: int, domain: int, message: str) -> libvirt.libvirtError:
        made = libvirt.libvirtError("x")
        made.err = (code, domain, message, 2, None, None, None, -1, -1)
        return made

    def ours(made: libvirt.libvirtError, *, alive: bool = True) -> type:
        return type(explain(made, host="host-1", state_dir=tmp_path, alive=alive))

    internal = libvirt.VIR_ERR_INTERNAL_ERROR
    assert ours(error(internal, libvirt.VIR_FROM_QEMU, "some text")) is HypervisorError
    assert ours(error(internal, libvirt.VIR_FROM_QEMU, "some text"), alive=False) is HypervisorUnavailable
    assert ours(error(internal, libvirt.VIR_FROM_RPC, "client socket is closed")) is HypervisorUnavailable
    assert ours(error(internal, libvirt.VIR_FROM_QEMU, "write: No space left on device")) is DiskFull
