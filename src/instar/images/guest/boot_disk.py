"""A disk that boots by BIOS from a root tree: GRUB, one partition, an ext4 file system; no root and no loop device.

Layout: sector 0 holds GRUB's boot code and the partition table, GRUB's core follows from sector 1, the partition starts
at 1 MiB. What `grub-bios-setup` would patch into the boot code is written here (GRUB: include/grub/i386/pc/boot.h).
"""

from __future__ import annotations

import struct
from pathlib import Path

from instar.images.guest.elf_loader import Loader
from instar.images.guest.failures import GuestBuildFailed
from instar.images.guest.host_programs import run
from instar.images.guest.packages import find_one

SECTOR_BYTES = 512
PARTITION_START_SECTOR = 2048
DISK_MIB = 64

# no_timer_check: without KVM, on a busy machine, the timer comes too late for the kernel's own check, which panics then.
KERNEL_COMMAND_LINE = "root=/dev/vda1 console=ttyS0 quiet no_timer_check"
GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux")
# The commands are built into GRUB's core: no menu, no file to parse, nothing to wait for.
GRUB_COMMANDS = f"""\
set root=(hd0,msdos1)
linux /boot/vmlinuz {KERNEL_COMMAND_LINE}
initrd /boot/initrd
boot
"""

BOOT_CODE_BYTES = 440
CORE_START_OFFSET = 0x5C  # 8 bytes: the sector where GRUB's core starts
BOOT_DRIVE_OFFSET = 0x64  # 1 byte: 0xff is "the drive the BIOS booted from"
DRIVE_CHECK_OFFSET = 0x66  # 2 bytes: a jump around a work-around for old BIOSes, two no-operations switch it on
PARTITION_ENTRY_OFFSET = 446
PARTITION_TYPE_LINUX = 0x83


def build_grub_core(packages: Path, work_dir: Path, loader: Loader) -> tuple[bytes, bytes]:
    """(GRUB's boot sector, GRUB's core with the boot commands inside), made by the downloaded grub-mkimage."""
    boot_image = find_one(packages, "usr/lib/grub/i386-pc/boot.img")
    commands, core = work_dir / "grub.cfg", work_dir / "core.img"
    commands.write_text(GRUB_COMMANDS)
    options: list[str | Path] = ["-O", "i386-pc", "-d", boot_image.parent, "-p", "(hd0,msdos1)/boot/grub"]
    options += ["-c", commands, "-o", core]
    run([*loader.command(find_one(packages, "usr/bin/grub-mkimage")), *options, *GRUB_MODULES])
    return boot_image.read_bytes(), core.read_bytes()


def write_boot_disk(raw: Path, root_tree: Path, boot_sector: bytes, core: bytes) -> None:
    """Write the whole disk, raw and sparse, to `raw`. Raises CommandFailed, GuestBuildFailed."""
    sectors = DISK_MIB * 1024 * 1024 // SECTOR_BYTES
    if SECTOR_BYTES + len(core) > PARTITION_START_SECTOR * SECTOR_BYTES:
        raise GuestBuildFailed(f"GRUB's core has {len(core)} bytes and does not fit before the partition.")
    with raw.open("wb") as disk:
        disk.write(_first_sector(boot_sector, sectors - PARTITION_START_SECTOR))
        disk.write(core)
        disk.truncate(sectors * SECTOR_BYTES)
    _make_file_system(raw, root_tree)


def _first_sector(boot_sector: bytes, partition_sectors: int) -> bytes:
    sector = bytearray(SECTOR_BYTES)
    sector[:BOOT_CODE_BYTES] = boot_sector[:BOOT_CODE_BYTES]
    struct.pack_into("<Q", sector, CORE_START_OFFSET, 1)
    sector[BOOT_DRIVE_OFFSET] = 0xFF
    sector[DRIVE_CHECK_OFFSET : DRIVE_CHECK_OFFSET + 2] = b"\x90\x90"
    # Cylinder, head and sector are set to their maximum: everyone reads the linear addresses that follow.
    entry = (0x80, b"\xfe\xff\xff", PARTITION_TYPE_LINUX, b"\xfe\xff\xff", PARTITION_START_SECTOR, partition_sectors)
    struct.pack_into("<B3sB3sII", sector, PARTITION_ENTRY_OFFSET, *entry)
    sector[510:512] = b"\x55\xaa"
    return bytes(sector)


def _make_file_system(raw: Path, root_tree: Path) -> None:
    """4 KiB blocks, though the disk is small: the boot loader reads block by block through the BIOS."""
    offset_bytes = PARTITION_START_SECTOR * SECTOR_BYTES
    size_kib = DISK_MIB * 1024 - offset_bytes // 1024
    options = f"root_owner=0:0,offset={offset_bytes},lazy_itable_init=0,lazy_journal_init=1"
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-J", "size=4", "-m", "0", "-L", "instar-root"]
    run([*command, "-E", options, "-d", root_tree, raw, f"{size_kib}k"])
    if root_tree.stat().st_uid != 0:
        _give_files_to_root(raw, root_tree, offset_bytes)


def _give_files_to_root(raw: Path, root_tree: Path, offset_bytes: int) -> None:
    """mke2fs took over the builder's user as the owner of all files: name root instead, without being root."""
    requests: list[str] = []
    for path in sorted(root_tree.rglob("*")):
        name = f'"/{path.relative_to(root_tree)}"'
        requests += [f"set_inode_field {name} {field} 0" for field in ("uid", "gid")]
    run(["debugfs", "-w", "-f", "-", f"{raw}?offset={offset_bytes}"], stdin="\n".join(requests) + "\n")
