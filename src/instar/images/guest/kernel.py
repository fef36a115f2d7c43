"""The kernel of the guest image: its file and its modules, in the order in which they must be loaded."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Mapping
from pathlib import Path

from instar.images.guest.failures import PackageContentMissing
from instar.images.guest.packages import find_one

# What the initrd loads to see the root disk.
ROOT_DISK_MODULES: tuple[str, ...] = ("virtio_pci", "virtio_blk")

# What the root file system holds, by the list that the guest loads: `base` at every boot, the others when a device of
# that kind is there (virtio device types of the virtio specification, section 5), `isofs` when there is a config drive.
GUEST_MODULES: Mapping[str, tuple[str, ...]] = {
    "base": ("button", "evdev"),
    "isofs": ("isofs",),
    "virtio1": ("virtio_net",),
    "virtio3": ("virtio_console",),
    "virtio4": ("virtio_rng",),
    "virtio5": ("virtio_balloon",),
    "virtio8": ("virtio_scsi", "sd_mod", "sr_mod"),
}


class KernelModules:
    """The loadable modules of an unpacked kernel package."""

    def __init__(self, tree: Path, kernel_package: str) -> None:
        """Raises PackageContentMissing when the package has no modules."""
        self.release = kernel_package.removeprefix("linux-image-")
        self._paths: dict[str, Path] = {}
        for prefix in ("lib", "usr/lib"):
            for path in (tree / prefix / "modules" / self.release).rglob("*.ko*"):
                self._paths[_module_name(path)] = path
        if not self._paths:
            raise PackageContentMissing(what=f"modules of kernel {self.release}")
        self._builtin = self._read_builtin(tree)
        self.image = find_one(tree, f"boot/vmlinuz-{self.release}")

    def load_order(self, names: Iterable[str]) -> list[str]:
        """`names` and all they depend on, dependencies first, not what is built in. Raises PackageContentMissing."""
        order: list[str] = []
        for name in names:
            self._visit(name, order)
        return order

    def content(self, name: str) -> bytes:
        """The module's file, unpacked: the kernel loads it without any helper."""
        path = self._paths[name]
        raw = path.read_bytes()
        return lzma.decompress(raw) if path.suffix == ".xz" else raw

    def _visit(self, name: str, order: list[str]) -> None:
        if name in order or name in self._builtin:
            return
        if name not in self._paths:
            raise PackageContentMissing(what=f"kernel module {name}")
        for needed in self._depends(name):
            self._visit(needed, order)
        order.append(name)

    def _depends(self, name: str) -> list[str]:
        """Names from the module's own `depends=` entry, where modprobe's index comes from as well."""
        for entry in self.content(name).split(b"\0"):
            if entry.startswith(b"depends="):
                return [needed.replace("-", "_") for needed in entry[8:].decode().split(",") if needed]
        return []

    def _read_builtin(self, tree: Path) -> frozenset[str]:
        listing = find_one(tree, f"**/modules/{self.release}/modules.builtin")
        return frozenset(_module_name(Path(line)) for line in listing.read_text().split())


def _module_name(path: Path) -> str:
    return path.name.split(".ko", 1)[0].replace("-", "_")
