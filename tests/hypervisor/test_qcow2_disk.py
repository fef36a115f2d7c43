"""Empty qcow2 disks that are written without QEMU, as QEMU itself sees them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from instar.hypervisor.libvirt.qcow2_disk import SIZE_MAX_BYTES, write_empty_disk
from instar.hypervisor.libvirt.qcow2_header import read_header

GIB = 1 << 30


def ask(*command: str) -> Any:
    ended = subprocess.run(["qemu-img", *command], check=True, capture_output=True, timeout=60)
    return json.loads(ended.stdout)


@pytest.mark.parametrize("size_bytes", [512, 1 << 20, GIB, GIB + 1, 513 * GIB, 8192 * GIB, SIZE_MAX_BYTES])
def test_a_disk_is_what_qemu_would_have_made(tmp_path: Path, size_bytes: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_empty_disk(ours, size_bytes, None)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(theirs), str(size_bytes)], check=True, timeout=60)
    checked = ask("check", "--output=json", "-f", "qcow2", str(ours))
    assert (checked["check-errors"], checked.get("leaks", 0), checked.get("corruptions", 0)) == (0, 0, 0)
    found, wanted = (ask("info", "--output=json", "-f", "qcow2", str(path)) for path in (ours, theirs))
    for name in ("virtual-size", "cluster-size", "format-specific"):
        assert found[name] == wanted[name]
    assert ours.stat().st_mode & 0o777 == 0o600


def test_what_is_written_to_a_disk_on_another_stays_in_it(tmp_path: Path) -> None:
    base, disk = tmp_path / "base", tmp_path / "disk"
    base.write_bytes(b"b" * (1 << 20))
    write_empty_disk(disk, 3 << 20, (str(base), "raw"))
    header = read_header(disk)
    assert (header.backing, header.backing_format, header.virtual_size_bytes) == (str(base), "raw", 3 << 20)
    writes = ["write -P 0x63 128k 64k", "write -P 0x64 2M 1M"]
    reads = ["read -P 0x62 0 128k", "read -P 0x63 128k 64k", "read -P 0x62 192k 832k"]
    reads += ["read -P 0 1M 1M", "read -P 0x64 2M 1M"]
    for commands in (writes, reads):
        given = ["qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), str(disk)]
        ended = subprocess.run(given, capture_output=True, text=True, timeout=60, check=True)
        assert "failed" not in ended.stdout
    assert ask("check", "--output=json", "-f", "qcow2", str(disk))["check-errors"] == 0
    assert base.read_bytes() == b"b" * (1 << 20)


def test_a_file_that_exists_is_left_alone_and_impossible_disks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_text("somebody's")
    with pytest.raises(FileExistsError):
        write_empty_disk(path, GIB, None)
    assert path.read_text() == "somebody's"
    for size_bytes, backing in ((0, None), (SIZE_MAX_BYTES + 1, None), (GIB, ("x" * 1024, "raw"))):
        with pytest.raises(ValueError, match="no disk"):
            write_empty_disk(tmp_path / "other", size_bytes, backing)
    assert not (tmp_path / "other").exists()
