"""What an upload may contain: real files of qemu-img, and files that nobody should accept."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instar.errors import ImageUnusable, InstarError, UnsupportedMedia
from instar.images.inspect import inspect_image
from instar.images.qcow2_header import check_qcow2_header

TIB = 1 << 40


async def inspect(path: Path, disk_format: str, virtual_size_max_bytes: int = 16 * TIB) -> int:
    return await inspect_image(path, disk_format, virtual_size_max_bytes=virtual_size_max_bytes, deadline_s=20)


def edited(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


async def test_honest_images_have_their_virtual_size(tmp_path, qemu_img):
    assert await inspect(qemu_img("a.qcow2", "64M", "-f", "qcow2"), "qcow2") == 64 << 20
    assert await inspect(qemu_img("old.qcow2", "8M", "-f", "qcow2", "-o", "compat=0.10"), "qcow2") == 8 << 20
    assert await inspect(qemu_img("c.qcow2", "8M", "-f", "qcow2", "-o", "cluster_size=512"), "qcow2") == 8 << 20
    assert await inspect(qemu_img("a.raw", "3M", "-f", "raw"), "raw") == 3 << 20


async def test_partition_tables_and_optical_discs_are_raw(tmp_path):
    mbr = bytearray(1 << 20)
    mbr[446:462] = struct.pack("<B3BB3BII", 0x80, 0, 2, 0, 0x83, 0, 0, 0, 2048, 1000)
    mbr[510:512] = b"\x55\xaa"
    assert await inspect(written(tmp_path / "mbr", bytes(mbr)), "raw") == 1 << 20
    iso = bytearray(1 << 20)
    iso[32768:32775] = b"\x01CD001\x01"
    assert await inspect(written(tmp_path / "iso", bytes(iso)), "raw") == 1 << 20


async def test_internal_snapshots_are_fine(qemu_img):
    path = qemu_img("s.qcow2", "4M", "-f", "qcow2")
    await asyncio.to_thread(subprocess.run, ["qemu-img", "snapshot", "-c", "one", str(path)], check=True, timeout=30)
    assert await inspect(path, "qcow2") == 4 << 20


@pytest.mark.parametrize("disk_format", ["qcow2", "qed", "vmdk", "vdi", "vpc", "vhdx"])
async def test_raw_that_is_another_format_is_refused(disk_format, qemu_img):
    path = qemu_img("other", "1M", "-f", disk_format)
    with pytest.raises(UnsupportedMedia, match="declared as raw"):
        await inspect(path, "raw")


async def test_raw_that_is_a_vmdk_descriptor_is_refused(qemu_img):
    """A text of a few lines that makes QEMU, when it guesses the format, open any file that the text names."""
    with pytest.raises(UnsupportedMedia, match="vmdk"):
        await inspect(qemu_img("flat.vmdk", "1M", "-f", "vmdk", "-o", "subformat=monolithicFlat"), "raw")


async def test_raw_that_is_luks_is_refused(tmp_path):
    head = b"LUKS\xba\xbe\x00\x01" + bytes(1 << 20)
    with pytest.raises(UnsupportedMedia, match="luks"):
        await inspect(written(tmp_path / "luks", head), "raw")


@pytest.mark.parametrize("length", [30, 100, 511])
async def test_raw_that_is_a_cut_off_qcow2_is_refused(length, tmp_path, qemu_img):
    """QEMU reads zeros behind the end of a file, so even the beginning of a header is an image to it."""
    head = qemu_img("a.qcow2", "1M", "-f", "qcow2").read_bytes()[:length]
    with pytest.raises(InstarError, match="qcow2"):
        await inspect(written(tmp_path / "cut", head), "raw")


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", bytes(1 << 16)])
async def test_qcow2_that_is_none_is_refused(content, tmp_path):
    with pytest.raises((ImageUnusable, UnsupportedMedia)):
        await inspect(written(tmp_path / "none", content), "qcow2")


@pytest.mark.parametrize("length", [30, 71, 100, 104, 512, 65536, 131072])
async def test_cut_off_qcow2_is_refused(length, tmp_path, qemu_img):
    whole = qemu_img("a.qcow2", "1M", "-f", "qcow2").read_bytes()
    with pytest.raises(ImageUnusable):
        await inspect(written(tmp_path / "cut.qcow2", whole[:length]), "qcow2")


async def test_backing_file_is_refused(qemu_img):
    base = qemu_img("base.qcow2", "1M", "-f", "qcow2")
    with pytest.raises(ImageUnusable, match="backing file"):
        await inspect(qemu_img("top.qcow2", "1M", "-f", "qcow2", "-b", str(base), "-F", "qcow2"), "qcow2")


async def test_external_data_file_is_refused(qemu_img):
    path = qemu_img("d.qcow2", "1M", "-f", "qcow2", "-o", "data_file=data.raw,data_file_raw=on")
    with pytest.raises(ImageUnusable, match="data"):
        await inspect(path, "qcow2")


async def test_external_data_file_is_refused_by_its_header_extension_alone(qemu_img):
    path = qemu_img("d.qcow2", "1M", "-f", "qcow2", "-o", "data_file=data.raw,data_file_raw=on")
    edited(path, 72, struct.pack(">Q", 0))  # the incompatible feature bits
    with pytest.raises(ImageUnusable, match="external data file"):
        await inspect(path, "qcow2")


@pytest.mark.parametrize("method", [1, 2])
async def test_encryption_is_refused(method, qemu_img):
    path = edited(qemu_img("e.qcow2", "1M", "-f", "qcow2"), 32, struct.pack(">I", method))  # AES, LUKS
    with pytest.raises(ImageUnusable, match="encrypted"):
        await inspect(path, "qcow2")


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (4, struct.pack(">I", 4)),  # version
        (4, struct.pack(">I", 1)),
        (20, struct.pack(">I", 40)),  # cluster bits
        (20, struct.pack(">I", 3)),
        (36, struct.pack(">I", 1 << 30)),  # entries of the level 1 table
        (36, struct.pack(">I", 0)),
        (40, struct.pack(">Q", 1 << 50)),  # where it stands
        (48, struct.pack(">Q", 1 << 50)),  # where the refcounts stand
        (72, struct.pack(">Q", 1 << 5)),  # unknown incompatible features
        (72, struct.pack(">Q", 1 << 40)),
        (72, struct.pack(">Q", 2)),  # corrupt
        (100, struct.pack(">I", 1 << 20)),  # header length
        (100, struct.pack(">I", 8)),
    ],
)
async def test_absurd_qcow2_header_is_refused(offset, data, qemu_img):
    path = edited(qemu_img("absurd.qcow2", "64M", "-f", "qcow2"), offset, data)
    with pytest.raises(ImageUnusable):
        await inspect(path, "qcow2")


async def test_huge_virtual_size_is_refused(qemu_img):
    with pytest.raises(ImageUnusable, match="virtual size"):
        await inspect(qemu_img("huge.qcow2", "32T", "-f", "qcow2"), "qcow2")
    with pytest.raises(ImageUnusable, match="virtual size"):
        await inspect(qemu_img("big.raw", "2M", "-f", "raw"), "raw", virtual_size_max_bytes=1 << 20)


async def test_refusals_name_no_path(tmp_path, qemu_img):
    path = edited(qemu_img("absurd.qcow2", "64M", "-f", "qcow2"), 48, struct.pack(">Q", 513))
    with pytest.raises(ImageUnusable) as refused:
        await inspect(path, "qcow2")
    assert str(tmp_path) not in refused.value.message


@given(st.binary(max_size=400), st.integers(0, 1 << 30))
def test_no_header_makes_the_check_fail_otherwise(rest, size):
    """Whatever stands behind the magic: a virtual size, or a refusal."""
    for version in (b"\0\0\0\2", b"\0\0\0\3"):
        with contextlib.suppress(ImageUnusable):
            assert check_qcow2_header(b"QFI\xfb" + version + rest, file_size_bytes=size) >= 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 130), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
async def test_damaged_headers_are_refused_or_read(edits, tmp_path, qemu_img):
    """The whole inspection, qemu-img included, on real headers with a few bytes changed."""
    path = qemu_img("damaged.qcow2", "1M", "-f", "qcow2")
    for offset, data in edits:
        edited(path, offset, data)
    try:
        assert await inspect(path, "qcow2") >= 0
    except (ImageUnusable, UnsupportedMedia) as refused:
        assert str(tmp_path) not in refused.message
