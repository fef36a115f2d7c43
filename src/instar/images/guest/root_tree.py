"""The guest's root file system as a folder: programs of the unpacked packages, kernel, initrd, and our own scripts."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from instar.images.guest.elf_loader import LOADER_PATH_IN_GUEST, Loader
from instar.images.guest.host_programs import run
from instar.images.guest.initrd import build_initrd
from instar.images.guest.kernel import GUEST_MODULES, KernelModules
from instar.images.guest.packages import find_one

DIRECTORIES = (
    *("bin", "sbin", "usr/bin", "usr/sbin", "lib64", "lib/modules", "lib/instar/modules", "boot"),
    *("dev", "proc", "sys", "run", "tmp", "mnt", "root/.ssh", "etc/dropbear", "etc/acpi/PWRF", "var/lib/instar"),
    *("var/log", "var/tmp"),
)
PRIVATE_DIRECTORIES = ("root", "root/.ssh", "etc/dropbear")

# Programs other than busybox, by where they are in the guest and in the packages.
PROGRAMS = {
    "bin/busybox": "**/bin/busybox",
    "usr/sbin/dropbear": "usr/sbin/dropbear",
    "usr/bin/dropbearkey": "usr/bin/dropbearkey",
    "sbin/resize2fs": "**/sbin/resize2fs",
    "usr/sbin/qemu-ga": "usr/sbin/qemu-ga",
}
BUSYBOX_STATIC_PATTERN = "**/bin/busybox"

# Our own files, by where they are in the guest and under files/ here, with their modes.
OWN_FILES = (
    ("etc/inittab", "inittab", 0o644),
    ("etc/passwd", "passwd", 0o644),
    ("etc/group", "group", 0o644),
    ("etc/shadow", "shadow", 0o600),
    ("etc/shells", "shells", 0o644),
    ("etc/acpi/PWRF/00000080", "acpi-power-button", 0o755),
    ("usr/sbin/chpasswd", "chpasswd", 0o755),
    ("lib/instar/start", "start", 0o755),
    ("lib/instar/stop", "stop", 0o755),
    ("lib/instar/modules.sh", "modules.sh", 0o644),
    ("lib/instar/config-drive", "config-drive", 0o755),
    ("lib/instar/flatten-json.awk", "flatten-json.awk", 0o644),
    ("lib/instar/hotplug", "hotplug", 0o755),
    ("lib/instar/nic", "nic", 0o755),
    ("lib/instar/dhcp", "dhcp", 0o755),
    ("lib/instar/user-data", "user-data", 0o755),
)
# Ours come before busybox's of the same name.
OWN_LINKS = {
    "sbin/poweroff": "/lib/instar/stop",
    "sbin/reboot": "/lib/instar/stop",
    "sbin/halt": "/lib/instar/stop",
    "etc/resolv.conf": "/run/resolv.conf",
    "etc/mtab": "/proc/mounts",
}


def build_root_tree(tree: Path, packages: Path, busybox_static: Path, modules: KernelModules, loader: Loader) -> None:
    """Fill `tree`, which must not exist. Raises PackageContentMissing, CommandFailed."""
    for name in DIRECTORIES:
        (tree / name).mkdir(parents=True, exist_ok=True)
    for directory in [tree, *(path for path in tree.rglob("*") if path.is_dir())]:
        directory.chmod(0o755)
    for name in PRIVATE_DIRECTORIES:
        (tree / name).chmod(0o700)
    for name in ("tmp", "var/tmp"):
        (tree / name).chmod(0o1777)
    _add_programs(tree, packages, loader)
    _add_own_files(tree)
    _add_applet_links(tree, loader)
    _add_kernel(tree, busybox_static, modules)


def own_file(name: str) -> bytes:
    """The content of one of our files for the guest."""
    return files(__package__).joinpath("files", name).read_bytes()


def _add_programs(tree: Path, packages: Path, loader: Loader) -> None:
    libraries: dict[str, Path] = {}
    for name, pattern in PROGRAMS.items():
        program = find_one(packages, pattern)
        _copy(program, tree / name, 0o755)
        libraries |= loader.libraries(program)
    for name, library in libraries.items():
        _copy(library, tree / "lib" / Path(name).name, 0o755)
    _copy(loader.path, tree / LOADER_PATH_IN_GUEST, 0o755)


def _add_own_files(tree: Path) -> None:
    for place, name, mode in OWN_FILES:
        _write(tree / place, own_file(name), mode)
    for place, target in OWN_LINKS.items():
        (tree / place).symlink_to(target)


def _add_applet_links(tree: Path, loader: Loader) -> None:
    busybox = tree / "bin/busybox"
    for line in run([*loader.command(busybox, name="busybox"), "--list-full"]).split():
        place = tree / line
        # Only where programs are looked for; `linuxrc` and the like stay out.
        searched = place.parent in (tree / "bin", tree / "sbin", tree / "usr/bin", tree / "usr/sbin")
        if searched and not place.exists() and not place.is_symlink():
            place.symlink_to("/bin/busybox")


def _add_kernel(tree: Path, busybox_static: Path, modules: KernelModules) -> None:
    _copy(modules.image, tree / "boot/vmlinuz", 0o644)
    _write(tree / "boot/initrd", build_initrd(busybox_static, own_file("initrd-init"), modules), 0o644)
    for kind, names in GUEST_MODULES.items():
        order = modules.load_order(names)
        _write(tree / "lib/instar/modules" / kind, "".join(f"{name}\n" for name in order).encode(), 0o644)
        for name in order:
            _write(tree / f"lib/modules/{name}.ko", modules.content(name), 0o644)


def _copy(source: Path, target: Path, mode: int) -> None:
    shutil.copyfile(source, target)
    target.chmod(mode)


def _write(target: Path, content: bytes, mode: int) -> None:
    target.write_bytes(content)
    target.chmod(mode)
