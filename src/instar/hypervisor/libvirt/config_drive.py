"""The config drive: an ISO 9660 image labelled config-2 in the layout that guests of OpenStack look for.

Attached as a cdrom on virtio-scsi (see domain_xml.py): cloud kernels have no AHCI, so a SATA cdrom is not seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from instar.hypervisor.libvirt.host_command import run_limited
from instar.hypervisor.libvirt.host_paths import FULL, disk_full
from instar.hypervisor.libvirt.settings import LibvirtSettings
from instar.model.guest import ConfigDrive

VOLUME_ID = "config-2"
VERSIONS = ("latest", "2018-08-27")  # guests look for `latest`, or for the newest dated version that they know


async def write_config_drive(drive: ConfigDrive, path: Path, *, settings: LibvirtSettings, host: str) -> None:
    """The drive is at `path`: written atomically, unless the one that is there says the same and was not touched since. It
    may hold secrets: only the owner may read it. Raises DiskFull, HypervisorError."""
    note, says = path.with_name(f".{path.name}.note"), _digest(drive)
    if await asyncio.to_thread(_is_current, path, note, says):
        return
    tree = await asyncio.to_thread(_write_tree, drive, path, host)
    image = tree.with_suffix(".iso")
    try:
        options = ["-quiet", "-ldots", "-allow-lowercase", "-allow-multidot", "-l", "-r", "-J", "-V", VOLUME_ID]
        command = ["genisoimage", "-o", str(image), *options, str(tree)]
        await run_limited(command, settings=settings, host=host, writes_to=path)
        await asyncio.to_thread(_publish, image, path, note, says)
    finally:
        await asyncio.to_thread(_remove, tree, image)


def _write_tree(drive: ConfigDrive, path: Path, host: str) -> Path:
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    tree = None
    try:
        tree = Path(tempfile.mkdtemp(prefix=".config-", dir=path.parent))
        for version in VERSIONS:
            folder = tree / "openstack" / version
            folder.mkdir(parents=True)
            (folder / "meta_data.json").write_text(drive.meta_data, encoding="utf-8")
            (folder / "network_data.json").write_text(drive.network_data, encoding="utf-8")
            (folder / "vendor_data.json").write_text("{}", encoding="utf-8")
            if drive.user_data is not None:
                (folder / "user_data").write_bytes(drive.user_data)
    except OSError as error:
        if tree is not None:
            shutil.rmtree(tree, ignore_errors=True)
        if error.errno in FULL:
            raise disk_full(path, host) from error
        raise
    return tree


def _publish(image: Path, path: Path, note: Path, says: str) -> None:
    """The note is gone before its drive is, and comes after it: there is never one of another drive."""
    image.chmod(0o600)
    note.unlink(missing_ok=True)
    os.replace(image, path)  # noqa: PTH105 - the one word that says it overwrites
    with contextlib.suppress(OSError):  # without it the drive is only written again next time
        note.write_text(_noted(path, says))


def _is_current(path: Path, note: Path, says: str) -> bool:
    try:
        return note.read_text() == _noted(path, says)
    except (OSError, UnicodeDecodeError):
        return False


def _noted(path: Path, says: str) -> str:
    """Of a drive that says this, and is the very file that was written for it."""
    stat = path.stat()
    return f"{says} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"


def _digest(drive: ConfigDrive) -> str:
    return hashlib.sha256(msgspec.msgpack.encode((VERSIONS, drive))).hexdigest()


def _remove(tree: Path, image: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    image.unlink(missing_ok=True)
