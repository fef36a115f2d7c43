"""Builds the guest image, step by step; called by `instar image build-guest` and by the first start of the demo."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import msgspec

from instar.images.guest.boot_disk import DISK_MIB, build_grub_core, write_boot_disk
from instar.images.guest.elf_loader import Loader
from instar.images.guest.host_programs import check_host_programs, run
from instar.images.guest.kernel import KernelModules
from instar.images.guest.packages import PackageSet, fetch_packages, find_one, unpack
from instar.images.guest.root_tree import BUSYBOX_STATIC_PATTERN, build_root_tree


class GuestImage(msgspec.Struct, frozen=True):
    """A finished image file, qcow2. Sizes in bytes; `virtual_size_bytes` is the size of the disk that a guest sees."""

    path: Path
    size_bytes: int
    virtual_size_bytes: int
    sha256: str


def build_guest(output: Path, *, work_dir: Path, progress: Callable[[str], None]) -> GuestImage:
    """Build the guest image at `output`, replacing what is there only when all is done. Blocks for some seconds.

    Packages are kept in `work_dir`/packages and used again without any network. Needs no root. `progress` gets one
    line for each step. Raises GuestBuildFailed (CommandFailed, ProgramsMissing, PackageContentMissing), OSError.
    """
    check_host_programs()
    work_dir.mkdir(parents=True, exist_ok=True)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    package_folder = work_dir.absolute() / "packages"
    packages = fetch_packages(package_folder, progress=progress)
    with tempfile.TemporaryDirectory(prefix="build-", dir=work_dir.absolute()) as scratch:
        raw = _build_raw_disk(Path(scratch), package_folder, packages, progress)
        temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
        try:
            progress("writing the qcow2 image")
            run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, temporary])
            image = _describe(temporary, output)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    progress(f"built {output.name}: {image.size_bytes / 2**20:.1f} MiB, a disk of {DISK_MIB} MiB")
    return image


def recipe_fingerprint() -> str:
    """What an image is made by, in a few characters: builds of another recipe are other images. Blocks for a moment."""
    digest = hashlib.sha256()
    folder = files(__package__)
    own = sorted((entry for place in (folder, folder / "files") for entry in place.iterdir() if entry.is_file()), key=_name)
    for entry in own:
        content = entry.read_bytes()
        digest.update(f"{entry.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _name(entry: Traversable) -> str:
    return entry.name


def _build_raw_disk(scratch: Path, folder: Path, packages: PackageSet, progress: Callable[[str], None]) -> Path:
    progress(f"unpacking {len(packages.files)} packages")
    tree, static_tree = scratch / "packages", scratch / "busybox-static"
    # Both busybox packages bring /bin/busybox, so the static one has a tree of its own.
    static_files = tuple(name for name in packages.files if name.startswith("busybox-static_"))
    others = tuple(name for name in packages.files if name not in static_files)
    unpack(folder, static_files, static_tree)
    unpack(folder, others, tree)
    loader = Loader(tree)
    modules = KernelModules(tree, packages.kernel)
    progress(f"assembling the root file system with kernel {modules.release}")
    root = scratch / "root"
    build_root_tree(root, tree, find_one(static_tree, BUSYBOX_STATIC_PATTERN), modules, loader)
    progress("making the disk with its boot loader")
    raw = scratch / "disk.raw"
    boot_sector, core = build_grub_core(tree, scratch, loader)
    write_boot_disk(raw, root, boot_sector, core)
    return raw


def _describe(written: Path, output: Path) -> GuestImage:
    with written.open("rb") as image:
        digest = hashlib.file_digest(image, "sha256").hexdigest()
        os.fsync(image.fileno())
    virtual_size_bytes = DISK_MIB * 1024 * 1024
    return GuestImage(
        path=output, size_bytes=written.stat().st_size, virtual_size_bytes=virtual_size_bytes, sha256=digest
    )
