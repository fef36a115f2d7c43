"""Debian packages for the guest image: which ones, fetched once into a folder, and unpacked from there.

The folder keeps a manifest of what a complete download brought. While it is whole, nothing here touches the network
or apt: the image is built offline. Delete the folder to get newer packages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from instar.images.guest.failures import GuestBuildFailed, PackageContentMissing
from instar.images.guest.host_programs import run

KERNEL_META_PACKAGE = "linux-image-cloud-amd64"

# Files are taken from these; the libraries they need are found by following their dependencies.
PROGRAM_PACKAGES: tuple[str, ...] = (
    "busybox",  # the guest's userland, dynamic: shares libc with the ssh server
    "busybox-static",  # the initrd's only program
    "dropbear-bin",
    "e2fsprogs",  # resize2fs
    "grub-common",  # grub-mkimage, run here
    "grub-pc-bin",  # boot sector and modules of the boot loader
    "qemu-guest-agent",  # sets passwords, and freezes the disk for a snapshot
)

DOWNLOAD_TIMEOUT_S = 300
MANIFEST = "manifest.json"
# A dependency closure far beyond this is a mistake, not an ssh server.
PACKAGES_MAX = 80


class PackageSet(msgspec.Struct, frozen=True):
    """A complete download: `kernel` is the package's name, `files` are the names of all .deb files."""

    recipe: tuple[str, ...]
    kernel: str
    files: tuple[str, ...]


def fetch_packages(folder: Path, *, progress: Callable[[str], None]) -> PackageSet:
    """What `folder` holds already, else downloaded by apt-get. Raises CommandFailed, GuestBuildFailed."""
    known = _read_manifest(folder)
    if known is not None:
        progress(f"using {len(known.files)} packages downloaded before")
        return known
    folder.mkdir(parents=True, exist_ok=True)
    kernel = _kernel_package()
    names = sorted({kernel, *_with_libraries(PROGRAM_PACKAGES)})
    progress(f"downloading {len(names)} packages ({kernel}, {', '.join(PROGRAM_PACKAGES)} and their libraries)")
    # apt drops root for downloads and then complains that its own user cannot write here; the signatures in the
    # package lists are checked all the same.
    run(
        ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *names], cwd=folder, timeout_s=DOWNLOAD_TIMEOUT_S
    )
    files = _file_names(names)
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise GuestBuildFailed(f"apt-get download reported success but left no {', '.join(absent)}.")
    found = PackageSet(recipe=PROGRAM_PACKAGES, kernel=kernel, files=tuple(files))
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    temporary.write_bytes(msgspec.json.encode(found))
    temporary.replace(folder / MANIFEST)
    return found


def unpack(folder: Path, files: tuple[str, ...], target: Path) -> None:
    """Unpack the .deb files into `target`, one tree. No maintainer script runs. Raises CommandFailed."""
    target.mkdir(parents=True)
    for name in files:
        run(["dpkg-deb", "-x", folder / name, target])


def find_one(tree: Path, pattern: str) -> Path:
    """The one file (not a link) that matches a glob `pattern` in an unpacked tree. Raises PackageContentMissing."""
    for path in sorted(tree.glob(pattern)):
        if path.is_file() and not path.is_symlink():
            return path
    raise PackageContentMissing(what=pattern)


def _read_manifest(folder: Path) -> PackageSet | None:
    try:
        known = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=PackageSet)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    whole = known.recipe == PROGRAM_PACKAGES and all((folder / name).is_file() for name in known.files)
    return known if whole else None


def _kernel_package() -> str:
    """The current cloud kernel's package: the meta package depends on exactly one linux-image-<version>-cloud-amd64."""
    answer = run(["apt-cache", "depends", KERNEL_META_PACKAGE])
    found = re.search(r"Depends: (linux-image-\S+)", answer)
    if found is None:
        raise GuestBuildFailed(
            f"apt knows no {KERNEL_META_PACKAGE}: run apt-get update, with Debian's main section for amd64 as a source."
        )
    return found.group(1)


def _with_libraries(names: tuple[str, ...]) -> set[str]:
    """`names` and every library package that they need, however indirectly."""
    answer = run(["apt-cache", "depends", "--recurse", "--important", *names])
    closure = {line.strip() for line in answer.splitlines() if line and not line.startswith((" ", "<", "|"))}
    absent = set(names) - closure
    if absent:
        raise GuestBuildFailed(f"apt knows no package {', '.join(sorted(absent))}: run apt-get update.")
    wanted = set(names) | {name for name in closure if name.startswith(("lib", "zlib"))}
    if len(wanted) > PACKAGES_MAX:
        raise GuestBuildFailed(f"{len(wanted)} packages would be needed where {PACKAGES_MAX} are the most expected.")
    return wanted


def _file_names(names: list[str]) -> list[str]:
    """The file that `apt-get download` writes for each package. A line of the answer: 'http://…/x.deb' x.deb 1234 …"""
    answer = run(["apt-get", "-q", "--print-uris", "download", *names])
    files = re.findall(r"^'\S+' (\S+\.deb) \d+", answer, flags=re.MULTILINE)
    if len(files) != len(names):
        raise GuestBuildFailed(f"apt offers {len(files)} files for the {len(names)} packages that the image needs.")
    return sorted(files)
