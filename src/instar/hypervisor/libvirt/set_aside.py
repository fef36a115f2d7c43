"""The directory of an instance put aside, and back: what a move keeps until it is confirmed. The driver calls it.

A rename, so it is done or not. Everything here blocks for no longer than removing files takes; the guest is off.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from instar.file_sync import sync_path
from instar.hypervisor.libvirt import ownership
from instar.hypervisor.libvirt.disk_offer import remove_markers
from instar.hypervisor.libvirt.disks import make_directory
from instar.hypervisor.libvirt.host_paths import HostPaths


def is_aside(paths: HostPaths, instance_id: str, host: str) -> bool:
    """Something of the instance is set aside here."""
    aside = paths.aside(instance_id)
    return aside.is_dir() and ownership.is_owned_by(aside, host)


def set_aside(paths: HostPaths, instance_id: str, host: str) -> None:
    """Everything of the instance is put aside; an instance without local disks has an empty directory."""
    directory, aside = paths.instance(instance_id), paths.aside(instance_id)
    make_directory(directory)
    remove_markers(directory)  # what was offered before was not this
    ownership.write_owner(directory, ownership.Ownership(host))
    directory.rename(aside)
    sync_path(paths.instances)
    paths.release_link()  # nothing runs from what is aside


def bring_back(paths: HostPaths, instance_id: str, host: str) -> None:
    """What is aside is the instance's again, what took its place is gone. On storage that hosts share the latter may be
    another host's: it has lost it."""
    directory, aside = paths.instance(instance_id), paths.aside(instance_id)
    if not is_aside(paths, instance_id, host):
        return
    remove_markers(aside)
    _remove(directory)
    aside.rename(directory)
    sync_path(paths.instances)


def forget_aside(paths: HostPaths, instance_id: str, host: str) -> None:
    """Nothing is aside. Disks that were made of it keep what they need: they have links of their own to it."""
    if is_aside(paths, instance_id, host):
        _remove(paths.aside(instance_id))


def _remove(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
