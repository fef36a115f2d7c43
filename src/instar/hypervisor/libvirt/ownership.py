"""Whose the directory of an instance is, where several hosts see it: a host removes only what it owns.

Each directory has a small file, `owner`, that names its host and what is unfinished about it. Used by the disks, the moves
and the census. A directory without one is this host's, as all are that were made before there were such files. Everything
here blocks.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import msgspec
import structlog

OWNER = "owner"
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux
_QEMU_LOCKS, _QEMU_LOCKS_LENGTH = 100, 200  # the bytes that QEMU locks of an image it has open (block/file-posix.c)

log = structlog.get_logger()


class Ownership(msgspec.Struct, frozen=True):
    """`lent_by`: the host from which an evacuation took it, until the guest has run here. `received`: the offer that its
    disks came from, so that those of another offer are not taken for them. `going_to`: the host to which the guest is
    being migrated on storage that both share. `held_still`: the guest was paused only to end its migration."""

    host: str
    lent_by: str = ""
    received: str = ""
    going_to: str = ""
    held_still: bool = False


def owner_of(directory: Path) -> Ownership | None:
    """None where there is no such directory, or nothing is written of it."""
    try:
        return msgspec.json.decode((directory / OWNER).read_bytes(), type=Ownership)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.MsgspecError:
        log.error("ownership.unreadable", instance=directory.name)
        return None


def is_owned_by(directory: Path, host: str) -> bool:
    owner = owner_of(directory)
    return owner is None or owner.host == host


def write_owner(directory: Path, owner: Ownership) -> None:
    """Written through before it replaces what was said: it decides over disks."""
    part = directory / f".{OWNER}.part"
    with part.open("wb") as file:
        file.write(msgspec.json.encode(owner))
        file.flush()
        os.fsync(file.fileno())
    part.replace(directory / OWNER)


def claim(directory: Path, host: str) -> None:
    """The directory, which exists, is this host's. One that another host had is only lent until `keep`."""
    owner = owner_of(directory)
    if owner is None:
        write_owner(directory, Ownership(host))
    elif owner.host != host:
        log.info("ownership.taken", instance=directory.name, host=host, of=owner.host)
        write_owner(directory, Ownership(host, lent_by=owner.host))


def keep(directory: Path, host: str) -> None:
    """The guest runs here: what was lent is this host's for good."""
    owner = owner_of(directory)
    if owner is not None and owner.host == host and owner.lent_by:
        write_owner(directory, Ownership(host))


def give_back(directory: Path, host: str) -> bool:
    """True where the directory is not this host's to remove, or no longer: what was lent goes back to its owner, who will
    use it, or be told to remove it."""
    owner = owner_of(directory)
    if owner is None or (owner.host == host and not owner.lent_by and not owner.going_to):
        return False
    heir = owner.lent_by
    if owner.going_to and owner.host == host:
        # A migration of which nobody here saw the end. This host's guest is gone: who has the disks open is the other.
        if not is_in_use(directory):
            return False
        heir = owner.going_to
    if owner.host == host:
        write_owner(directory, Ownership(heir))
    log.info("ownership.left_alone", instance=directory.name, host=host, owner=heir or owner.host)
    return True


def hand_over(directory: Path, host: str, to: str) -> None:
    """The directory is another host's from now on, if it was this one's."""
    if directory.is_dir() and is_owned_by(directory, host):
        write_owner(directory, Ownership(to))


def is_in_use(directory: Path) -> bool:
    """Some QEMU has a disk of the directory open."""
    return any(_is_open(path) for path in directory.glob("*.qcow2"))


def _is_open(path: Path) -> bool:
    """Some QEMU has the disk open, on whatever host. Where that cannot be found out: yes."""
    try:
        with path.open("rb") as file:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _QEMU_LOCKS, _QEMU_LOCKS_LENGTH, 0)
            answer = fcntl.fcntl(file.fileno(), fcntl.F_OFD_GETLK, asked)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
