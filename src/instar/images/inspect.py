"""Is this file what it says, and is it safe to give to a host? Called for every upload, before anything becomes active.

Three looks, none of which trusts the other: the field's own format inspectors (oslo.utils, kept by those who had the
advisories) say what the bytes are; `qcow2_header.py` refuses what they do not look at; qemu-img, in a process of its
own with limits and a deadline and with the format forced, says that QEMU can open it.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import structlog

from instar.errors import HypervisorError, ImageUnusable, UnsupportedMedia
from instar.images.qcow2_header import HEADER_READ_BYTES, check_qcow2_header

log = structlog.get_logger()

DISK_FORMATS = ("raw", "qcow2")
HARMLESS_IN_RAW = frozenset({"raw", "gpt", "iso"})  # partition tables and optical discs are what guests see as well

_PROBE_CHUNK_BYTES = 4096
_PROBE_MAX_BYTES = 4 << 20  # the inspectors have decided long before; a file is not read further
_QEMU_IMG_MEMORY_BYTES = 1 << 30
_QEMU_IMG_OUTPUT_MAX_BYTES = 1 << 20


async def inspect_image(path: Path, disk_format: str, *, virtual_size_max_bytes: int, deadline_s: float) -> int:
    """The virtual size in bytes of the image at this absolute path, which is of that format and safe.

    Raises UnsupportedMedia where the content is of another format, ImageUnusable where it is broken or dangerous."""
    virtual_size = await asyncio.to_thread(_look_at_bytes, path, disk_format)
    if virtual_size > virtual_size_max_bytes:
        raise ImageUnusable(
            f"The virtual size of the image, {virtual_size} bytes, is more than the {virtual_size_max_bytes} allowed."
        )
    if disk_format == "qcow2":
        await _ask_qemu_img(path, disk_format, virtual_size, deadline_s)
    return virtual_size


# --- the bytes ------------------------------------------------------------------------------------------------------


def _look_at_bytes(path: Path, disk_format: str) -> int:
    size = path.stat().st_size
    if size == 0:
        raise ImageUnusable("The image has no data.")
    found = _formats_of(path)
    if disk_format == "raw":
        foreign = sorted(found - HARMLESS_IN_RAW)
        if foreign:
            raise UnsupportedMedia(f"The image is declared as raw, but its content is {' and '.join(foreign)}.")
        return size
    if found != {disk_format}:
        told = " and ".join(sorted(found)) or "unknown"
        raise UnsupportedMedia(f"The image is declared as {disk_format}, but its content is {told}.")
    with path.open("rb") as file:
        return check_qcow2_header(file.read(HEADER_READ_BYTES), file_size_bytes=size)


def _formats_of(path: Path) -> set[str]:
    """Every format that the content could be taken for; raises ImageUnusable for one that is not safe."""
    # Imported here: this library costs a tenth of a second, which is not to be paid by every start.
    from oslo_utils.imageutils import format_inspector

    with path.open("rb") as file:
        wrapper = format_inspector.InspectWrapper(cast("IO[bytes]", _Padded(file.read(_PROBE_MAX_BYTES))))
        while wrapper.formats is None and wrapper.read(_PROBE_CHUNK_BYTES):
            pass
        wrapper.close()
    inspectors = wrapper.formats or []
    for inspector in inspectors:
        if inspector.NAME != "qcow2":
            continue
        try:
            inspector.safety_check()
        except format_inspector.SafetyCheckFailed as error:
            reasons = "; ".join(str(failure) for failure in error.failures.values())
            raise ImageUnusable(f"The qcow2 image is not allowed: {reasons}.") from error
        except format_inspector.ImageFormatError as error:
            raise ImageUnusable("The qcow2 header cannot be read.") from error
    return {inspector.NAME for inspector in inspectors}


class _Padded:
    """The beginning of a file, with empty lines behind its end.

    An inspector that waits for more of a header than a tiny file has would call it raw, while QEMU would open it as
    what its magic says. Lines, not zeros: a VMDK descriptor is taken for one only while all of it is text."""

    _PADDED_MIN_BYTES = 2 << 20

    def __init__(self, data: bytes) -> None:
        self._data = data.ljust(self._PADDED_MIN_BYTES, b"\n")
        self._position = 0

    def read(self, size: int) -> bytes:
        chunk = self._data[self._position : self._position + size]
        self._position += len(chunk)
        return chunk


# --- qemu-img -------------------------------------------------------------------------------------------------------


class _Info(msgspec.Struct, rename="kebab"):
    """What is read of the output of `qemu-img info --output=json`."""

    format: str
    virtual_size: int
    backing_filename: str | None = None
    encrypted: bool = False
    format_specific: dict[str, Any] = {}


async def _ask_qemu_img(path: Path, disk_format: str, virtual_size: int, deadline_s: float) -> None:
    limits = [
        f"--cpu={max(1, round(deadline_s))}", f"--as={_QEMU_IMG_MEMORY_BYTES}", "--fsize=0", "--core=0", "--nofile=64",
    ]
    if shutil.which("qemu-img") is None:
        raise HypervisorError(reason="qemu-img is not installed where the image service runs")
    try:
        # In a thread: subprocesses of uvloop that start side by side are not reliable (see linux_network/host_commands).
        ended = await asyncio.to_thread(
            subprocess.run,
            ["prlimit", *limits, "--", "qemu-img", "info", "--output=json", "-f", disk_format, str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ImageUnusable(f"The image could not be inspected within {deadline_s:g} seconds.") from error
    if ended.returncode != 0 or len(ended.stdout) > _QEMU_IMG_OUTPUT_MAX_BYTES:
        # Its words hold the path of the file: they are for the log, not for the user.
        log.warning("image.qemu_img_refused", exit_code=ended.returncode, says=ended.stderr[:500].decode(errors="replace"))
        raise ImageUnusable(f"QEMU cannot open the image as {disk_format}.")
    try:
        info = msgspec.json.decode(ended.stdout, type=_Info)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # names in a header need not be text
        raise ImageUnusable(f"QEMU cannot describe the image as {disk_format}.") from error
    _check_info(info, disk_format, virtual_size)


def _check_info(info: _Info, disk_format: str, virtual_size: int) -> None:
    data = info.format_specific.get("data", {})
    if info.format != disk_format or info.virtual_size != virtual_size:
        raise ImageUnusable("QEMU reads the image differently than its header says.")
    if info.backing_filename is not None:
        raise ImageUnusable("The image has a backing file, which is not allowed.")
    if data.get("data-file") or data.get("data-file-raw"):
        raise ImageUnusable("The image asks for an external data file, which is not allowed.")
    if info.encrypted:
        raise ImageUnusable("The image is encrypted, which is not supported.")
    if data.get("corrupt"):
        raise ImageUnusable("The image is marked as corrupt.")
