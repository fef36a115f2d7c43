"""The limits and timeouts of the libvirt driver, each with its unit and default."""

from __future__ import annotations

import msgspec


class LibvirtSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Passed to `LibvirtHypervisor`; the defaults are right for one host of any size."""

    virt_type: str = "auto"  # auto | kvm | qemu; auto asks acceleration.py what really works
    threads: int = 8  # libvirt calls at the same time
    starts_max: int = 4  # guests started at the same time: a boot takes a whole core under TCG

    connect_timeout_s: float = 5.0
    call_timeout_s: float = 15.0  # calls that only read or change a definition
    start_timeout_s: float = 120.0  # a start; the first of a fresh host probes the emulator
    destroy_timeout_s: float = 60.0
    acpi_retry_s: float = 10.0  # the power button is pressed again: a guest that was still booting had no ears
    keepalive_interval_s: int = 5  # a daemon that hangs is given up after interval * count
    keepalive_count: int = 3
    reconnect_min_s: float = 0.1
    reconnect_max_s: float = 5.0
    events_waiting_max: int = 10_000

    tb_cache_mib: int = 64  # TCG's translation cache for each guest; the default would be a gigabyte at worst
    pcie_root_ports: int = 8  # slots kept free for devices plugged into a running guest
    cpu_model_qemu: str = "qemu64"  # the same on every host, so that guests can migrate

    console_log_max_bytes: int = 4 << 20  # a longer console log is cut when the guest starts and while it runs
    console_log_keep_bytes: int = 1 << 20  # what is kept of it in the older half
    console_sweep_s: float = 30.0
    console_read_max_bytes: int = 8 << 20

    image_max_bytes: int = 1 << 40  # a location that sends more than the image's size is cut off anyway
    image_timeout_s: float = 3600.0
    image_idle_timeout_s: float = 30.0  # no byte of a download for so long
    disk_reserved_mib: int = 64  # left free on the file system by image copies
    program_timeout_s: float = 120.0  # qemu-img, genisoimage
    program_cpu_s: int = 60
    program_memory_mib: int = 2048
