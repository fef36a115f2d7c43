"""A guest that fits into a boot sector: it counts its boots on its disk, says so on the serial console, and heeds ACPI: the
power button, and requests to let go of a PCI device.

The contract suite uses it where a Linux guest would only cost time: it is up about a second after the start, powers off
within milliseconds of the power button, and its disk proves whether it was kept. Assembled with
``as --32`` and ``ld -m elf_i386 -Ttext 0x7c00 --oformat binary`` from:

    .code16
    .globl _start
    _start:
        xor %ax,%ax
        mov %ax,%ds
        mov %ax,%es
        mov %ax,%ss
        mov $0x7c00,%sp
        mov %dl,drive
        call transfer_read
        incb 0x8000
        call transfer_write
        mov $text,%si
    1:  lodsb
        test %al,%al
        jz 2f
        call put
        jmp 1b
    2:  mov 0x8000,%al
        add $'0',%al
        call put
        mov $13,%al
        call put
        mov $10,%al
        call put
        mov $0x602,%dx
        mov $0x0100,%ax
        out %ax,%dx
    wait:
        sti
        hlt
        mov $0x600,%dx
        in %dx,%ax
        test $1,%ah
        jnz off
        mov $63,%ecx
    5:  mov $0xcd0,%dx
        mov %ecx,%eax
        out %eax,%dx
        mov $0xcc4,%dx
        in %dx,%eax
        test %eax,%eax
        jz 6f
        mov $0xcc8,%dx
        out %eax,%dx
    6:  dec %ecx
        jns 5b
        jmp wait
    off:
        mov $0x604,%dx
        mov $0x2000,%ax
        out %ax,%dx
        jmp wait
    put:
        mov %al,%bl
        mov $0x3fd,%dx
    3:  in %dx,%al
        test $0x20,%al
        jz 3b
        mov %bl,%al
        mov $0x3f8,%dx
        out %al,%dx
        ret
    transfer_read:
        mov $0x42,%ah
        jmp 4f
    transfer_write:
        mov $0x4300,%ax
    4:  mov $packet,%si
        mov drive,%dl
        int $0x13
        ret
    text: .asciz "TINY boots="
    drive: .byte 0
    .align 4
    packet: .byte 16,0
     .word 1, 0x8000, 0
     .quad 1
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from instar.model.guest import ImageSource

DISK_BYTES = 1 << 20

_CODE = bytes.fromhex(
    "31c08ed88ec08ed0bc007c8816a47ce87500fe060080e87200be987cac84c07405e85200ebf6a000800430e84800b00de843"
    "00b00ae83e00ba0206b80001effbf4ba0006edf6c401752366b93f000000bad00c6689c866efbac40c66ed6685c07405bac8"
    "0c66ef664979e5ebd2ba0406b80020efebc988c3bafd03eca82074fb88d8baf803eec3b442eb03b80043bea87c8a16a47ccd"
    "13c354494e5920626f6f74733d00008d740010000100008000000100000000000000"
)


def boots_line(count: int) -> bytes:
    """What the guest prints when it has booted for the `count`th time (1 to 9)."""
    return b"TINY boots=%d" % count


def write_image(path: Path, *, heeds_power_button: bool = True) -> ImageSource:
    """A raw image at `path`: the tiny guest, or an empty disk, on which the firmware waits for ever, deaf to ACPI."""
    boot_sector = _CODE.ljust(510, b"\0") + b"\x55\xaa" if heeds_power_button else b"deaf"
    content = boot_sector.ljust(DISK_BYTES, b"\0")
    path.write_bytes(content)
    return ImageSource(
        id=path.stem,
        location=path.as_uri(),
        format="raw",
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        virtual_size_bytes=len(content),
    )
