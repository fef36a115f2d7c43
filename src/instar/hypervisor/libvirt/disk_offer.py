"""What the disks of an instance consist of, as another host has to know it to have them too. Used by disk_moves.py.

A disk is a chain of files: NAME.qcow2, perhaps on layers beside it (NAMEbelowN.qcow2: what it was before a resize on the
same host), perhaps on a cached image. Everything here blocks, for a moment.
"""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path

import msgspec

from instar.errors import HypervisorError
from instar.hypervisor.libvirt import ownership
from instar.hypervisor.libvirt.disks import make_directory
from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.libvirt.qcow2_header import Qcow2Header, read_header
from instar.hypervisor.stream_peers import StreamGrants
from instar.model.guest import DiskFile, DiskOffer
from instar.model.stream import StreamAddress

CHAIN_MAX = 32
OFFER_VALID_S = 86_400.0
CONSOLE_LOGS = ("console.log", "console.previous")
CONFIG_DRIVE = "config.iso"
OTHER_FILES = (*CONSOLE_LOGS, CONFIG_DRIVE)
_BLOCK_BYTES = 512  # unit of st_blocks, whatever the file system's own
_MARKER = ".offer-"
_MARKER_PATH = re.compile(r"[0-9a-f-]{36}(_resize)?/\.offer-[0-9a-f]{32}")
_WORD = re.compile(r"[A-Za-z0-9]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LAYER = re.compile(r"(?P<disk>[A-Za-z0-9]+?)below(?P<number>[0-9]{1,4})")


def stream_name(instance_id: str, what: str) -> str:
    """The name by which a file of the instance is granted."""
    return f"disks/{instance_id}/{what}"


def base_name(sha256: str) -> str:
    return f"base-{sha256}"


def files_of(paths: HostPaths, directory: Path) -> tuple[DiskFile, ...]:
    """All files that the disks in the directory need, what others stand on first; not what no disk needs any more."""
    found: dict[str, DiskFile] = {}
    for path in sorted(directory.glob("*.qcow2")):
        if _WORD.fullmatch(path.stem):
            found[path.stem] = _disk_file(paths, path)
    ordered: dict[str, DiskFile] = {}
    for name in found:
        if not _LAYER.fullmatch(name):
            for file in reversed(chain_of(tuple(found.values()), name)):
                ordered[file.name] = file
    return tuple(ordered.values())


def chain_of(files: tuple[DiskFile, ...], name: str) -> list[DiskFile]:
    """The file of this name and those that it stands on, downwards. Raises HypervisorError where one is missing."""
    by_name = {file.name: file for file in files}
    chain: list[DiskFile] = []
    while name:
        if name not in by_name or len(chain) >= CHAIN_MAX:
            raise HypervisorError(reason=f"the files of disk {chain[0].name if chain else name} are not complete")
        chain.append(by_name[name])
        name = chain[-1].below
    return chain


def disks_among(files: tuple[DiskFile, ...]) -> tuple[DiskFile, ...]:
    """Those that are disks themselves, on which no other stands."""
    below = {file.below for file in files}
    return tuple(file for file in files if file.name not in below)


def next_layer(files: tuple[DiskFile, ...], disk: str) -> str:
    """A name for what is a disk now and will be the layer below it."""
    numbers = [int(found["number"]) for file in files if (found := _LAYER.fullmatch(file.name)) and found["disk"] == disk]
    return f"{disk}below{max(numbers, default=0) + 1}"


def _disk_file(paths: HostPaths, path: Path) -> DiskFile:
    header = read_header(path)
    size_bytes = path.stat().st_blocks * _BLOCK_BYTES
    if not header.backing:
        return DiskFile(path.stem, header.virtual_size_bytes, size_bytes)
    backing = Path(header.backing)
    if backing.name == header.backing and backing.suffix == ".qcow2":
        return DiskFile(path.stem, header.virtual_size_bytes, size_bytes, below=backing.stem)
    if not _SHA256.fullmatch(backing.name) or not paths.image(backing.name).exists():
        raise HypervisorError(reason=f"the image below disk {path.stem} is not on the host")
    return DiskFile(path.stem, header.virtual_size_bytes, size_bytes, backing.name, header.backing_format or "raw")


def stands_right(path: Path, file: DiskFile, base: Path | None) -> bool:
    """The file names what is below it as it is to be found on this host."""
    return _names_right(read_header(path), path.parent, file, base)


def _names_right(header: Qcow2Header, directory: Path, file: DiskFile, base: Path | None) -> bool:
    if base is None:
        return header.backing == backing_name(file)
    named = directory / header.backing
    return bool(header.backing) and named.exists() and named.samefile(base)


def backing_name(file: DiskFile) -> str:
    """How a file names the one beside it that it stands on; empty for none."""
    return f"{file.below}.qcow2" if file.below else ""


# --- offering ---------------------------------------------------------------------------------------------------------


def offer_aside(paths: HostPaths, instance_id: str, streams: StreamGrants, to: StreamAddress) -> DiskOffer:
    """Everything that is set aside, with the console's log; for OFFER_VALID_S."""
    aside = paths.aside(instance_id)
    offer = make_offer(paths, instance_id, aside, streams, to, standing_on=False, valid_s=OFFER_VALID_S)
    logs = {name: aside / name for name in CONSOLE_LOGS}
    others = grant_others(streams, to, instance_id, logs, valid_s=OFFER_VALID_S)
    return msgspec.structs.replace(offer, other_files=others)


def offer_running(paths: HostPaths, instance_id: str, streams: StreamGrants, to: StreamAddress) -> DiskOffer:
    """What the disks of the running guest stand on, its config drive as it knows it, and its console's log as it is now."""
    directory = paths.instance(instance_id)
    make_directory(directory)
    ownership.claim(directory, streams.address.host)  # what is older than such marks: the other host might take it for its
    offer = make_offer(paths, instance_id, directory, streams, to, standing_on=True, valid_s=OFFER_VALID_S)
    others = {CONFIG_DRIVE: directory / CONFIG_DRIVE, CONSOLE_LOGS[1]: directory / CONSOLE_LOGS[1]}
    log = directory / CONSOLE_LOGS[0]
    if log.is_file():
        others[log.name] = log.with_name(f".{log.name}.offered")  # the log itself changes while it is sent
        shutil.copyfile(log, others[log.name])
    granted = grant_others(streams, to, instance_id, others, valid_s=OFFER_VALID_S)
    return msgspec.structs.replace(offer, other_files=granted)


def make_offer(
    paths: HostPaths, instance_id: str, directory: Path, streams: StreamGrants, to: StreamAddress, *,
    standing_on: bool, valid_s: float,
) -> DiskOffer:  # fmt: skip
    """Grants the files to the host `to`, and says what they are; `standing_on` alone: what the disks stand on (the disks
    of a guest that runs change)."""
    files = files_of(paths, directory)
    tops = {file.name for file in disks_among(files)} if standing_on else set()
    for file in files:
        if file.name not in tops:
            path = directory / f"{file.name}.qcow2"
            streams.grant_file(to, stream_name(instance_id, file.name), path, valid_s=valid_s)
        if file.base_sha256 is not None:
            name = stream_name(instance_id, base_name(file.base_sha256))
            streams.grant_file(to, name, paths.image(file.base_sha256), valid_s=valid_s)
    marker = _ensure_marker(directory)
    return DiskOffer(streams.address, files, marker=f"{directory.name}/{marker}")


def grant_others(
    streams: StreamGrants, to: StreamAddress, instance_id: str, files: dict[str, Path], *, valid_s: float
) -> tuple[str, ...]:
    """Grants small files that are there; their names."""
    there = {name: path for name, path in files.items() if path.is_file() and path.stat().st_size}
    for name, path in there.items():
        streams.grant_file(to, stream_name(instance_id, name), path, valid_s=valid_s)
    return tuple(there)


def check_offer(offer: DiskOffer, instance_id: str) -> None:
    """Raises HypervisorError for names that must never become paths."""
    names = [*(file.name for file in offer.disks), *(file.below for file in offer.disks if file.below)]
    bases = [file.base_sha256 for file in offer.disks if file.base_sha256 is not None]
    if (
        not all(_WORD.fullmatch(name) for name in names)
        or not all(_SHA256.fullmatch(base) for base in bases)
        or not set(offer.other_files) <= set(OTHER_FILES)
        or not (_MARKER_PATH.fullmatch(offer.marker) and offer.marker.startswith(instance_id))
    ):
        raise HypervisorError(reason="the other host's offer of disks makes no sense")


def _ensure_marker(directory: Path) -> str:
    """A file that is there as long as the directory is as it is offered."""
    for path in directory.glob(_MARKER + "*"):
        return path.name
    name = _MARKER + uuid.uuid4().hex
    (directory / name).touch(mode=0o600)
    return name


def remove_markers(directory: Path) -> None:
    for path in directory.glob(_MARKER + "*"):
        path.unlink(missing_ok=True)
