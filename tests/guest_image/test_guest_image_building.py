"""How the builder meets trouble, and the parts of it that need no guest to be seen."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from instar.images.guest import CommandFailed, ProgramsMissing, build_guest, host_programs
from instar.images.guest.boot_disk import write_boot_disk
from instar.images.guest.packages import MANIFEST, PROGRAM_PACKAGES, PackageSet
from instar.images.guest.root_tree import own_file

NOBODY = 65534


def test_failed_command_is_named_with_its_last_lines() -> None:
    with pytest.raises(CommandFailed) as failure:
        host_programs.run(["sh", "-c", "seq 100 >&2; echo no room left >&2; exit 3"])
    assert (failure.value.program, failure.value.exit_code) == ("sh", 3)
    assert failure.value.last_lines.endswith("100\nno room left")
    assert len(failure.value.last_lines.splitlines()) == host_programs.LAST_LINES_MAX


def test_command_that_hangs_is_ended() -> None:
    with pytest.raises(CommandFailed, match=r"sleep failed .* not finished after 0\.2 s"):
        host_programs.run(["sleep", "60"], timeout_s=0.2)


def test_missing_programs_are_all_named_with_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(host_programs, "SEARCH_PATH", str(tmp_path))
    with pytest.raises(ProgramsMissing) as failure:
        build_guest(tmp_path / "image", work_dir=tmp_path, progress=print)
    assert failure.value.programs == "mke2fs, debugfs, qemu-img"
    assert failure.value.packages == "e2fsprogs qemu-utils"


def test_failed_build_keeps_the_image_that_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "busybox-static_1_amd64.deb").write_text("not a package")
    manifest = PackageSet(recipe=PROGRAM_PACKAGES, kernel="linux-image-1", files=("busybox-static_1_amd64.deb",))
    (packages / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    output = tmp_path / "out/tiny.qcow2"
    output.parent.mkdir()
    output.write_text("the image of before")
    with pytest.raises(CommandFailed, match="dpkg-deb failed"):
        build_guest(output, work_dir=tmp_path, progress=print)
    assert output.read_text() == "the image of before"
    assert list(output.parent.iterdir()) == [output]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packages"]


def test_files_belong_to_root_in_the_guest_whoever_builds(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/shadow").write_text("root:*::::::\n")
    (tree / "etc/shadow").chmod(0o600)
    (tree / "link").symlink_to("/etc/shadow")
    if os.geteuid() == 0:
        for path in (tree, tree / "etc", tree / "etc/shadow", tree / "link"):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    disk = tmp_path / "disk"
    write_boot_disk(disk, tree, bytes(512), bytes(1000))
    for name, mode in (("/", "0755"), ("/etc", "0755"), ("/etc/shadow", "0600"), ("/link", "0777")):
        said = host_programs.run(["debugfs", "-R", f"stat {name}", f"{disk}?offset={2048 * 512}"]).split()
        assert said[said.index("User:") + 1] == said[said.index("Group:") + 1] == "0", name
        assert said[said.index("Mode:") + 1] == mode


def test_metadata_of_any_shape_becomes_one_line_for_each_value(tmp_path: Path) -> None:
    metadata = {
        "uuid": "u-1",
        "name": 'quote " backslash \\ slash / tab \t line \n end',
        "unicode": "Zürich €",
        "public_keys": {"my key": "ssh-ed25519 AAAA me@host\n"},
        "devices": [],
        "keys": [{"name": "a"}, {"name": "b"}],
        "meta": {},
        "launch_index": 0,
        "ratio": -1.5e3,
        "dedicated": False,
        "nothing": None,
    }
    (tmp_path / "script").write_bytes(own_file("flatten-json.awk"))
    for indent in (None, 4):
        document = json.dumps(metadata, indent=indent)
        command = ["awk", "-f", str(tmp_path / "script")]
        finished = subprocess.run(command, input=document.encode(), capture_output=True, check=True, timeout=5)
        assert finished.stdout.decode().splitlines() == [
            "uuid\tu-1",
            'name\tquote " backslash \\ slash / tab   line   end',
            "unicode\tZürich €",
            "public_keys/my key\tssh-ed25519 AAAA me@host",
            "keys/0/name\ta",
            "keys/1/name\tb",
            "launch_index\t0",
            "ratio\t-1500.0",
            "dedicated\tfalse",
            "nothing\tnull",
        ]


def test_broken_metadata_ends_the_reader(tmp_path: Path) -> None:
    (tmp_path / "script").write_bytes(own_file("flatten-json.awk"))
    for document in ("", "{", '{"uuid": "never closed', '{"a" "b"', "[1,,]", "{{{{"):
        command = ["awk", "-f", str(tmp_path / "script")]
        # A reader that looks for an end that never comes would run out of this time.
        finished = subprocess.run(command, input=document.encode(), capture_output=True, timeout=5, check=False)
        assert len(finished.stdout) <= 2 * len(document), document
