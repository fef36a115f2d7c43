"""Runs the host's programs for the guest image builder: found first, bounded in time, clear when they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from instar.images.guest.failures import CommandFailed, ProgramsMissing

# Debian packages of the host, with the programs that the builder calls from each.
PROGRAMS_BY_PACKAGE: Mapping[str, tuple[str, ...]] = {
    "apt": ("apt-get", "apt-cache"),
    "dpkg": ("dpkg-deb",),
    "e2fsprogs": ("mke2fs", "debugfs"),
    "qemu-utils": ("qemu-img",),
}
HOST_PACKAGES: tuple[str, ...] = tuple(PROGRAMS_BY_PACKAGE)

LAST_LINES_MAX = 8

# mke2fs and debugfs live in sbin, which an ordinary user's PATH leaves out.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def check_host_programs() -> None:
    """Raises ProgramsMissing, naming every missing program and the packages to install."""
    missing = {
        package: [name for name in programs if shutil.which(name, path=SEARCH_PATH) is None]
        for package, programs in PROGRAMS_BY_PACKAGE.items()
    }
    packages = [package for package, programs in missing.items() if programs]
    if packages:
        programs = ", ".join(name for package in packages for name in missing[package])
        raise ProgramsMissing(programs=programs, packages=" ".join(packages))


def run(command: Sequence[str | Path], *, timeout_s: float = 60, cwd: Path | None = None, stdin: str = "") -> str:
    """Standard output of `command`, run in the C locale. Raises CommandFailed with the program's last lines."""
    arguments = [str(argument) for argument in command]
    program = Path(arguments[0]).name
    environment = os.environ | {"LC_ALL": "C", "PATH": SEARCH_PATH, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        finished = subprocess.run(
            arguments,
            cwd=cwd,
            env=environment,
            input=stdin.encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = _last_lines(error.stderr or b"")
        last_lines = f"not finished after {timeout_s:g} s; {said}"
        raise CommandFailed(program=program, exit_code=None, last_lines=last_lines) from None
    except OSError as error:
        raise CommandFailed(program=program, exit_code=None, last_lines=error.strerror or str(error)) from None
    if finished.returncode != 0:
        said = _last_lines(finished.stderr) if finished.stderr.strip() else _last_lines(finished.stdout)
        raise CommandFailed(program=program, exit_code=finished.returncode, last_lines=said)
    return finished.stdout.decode(errors="replace")


def _last_lines(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-LAST_LINES_MAX:]) or "(no output)"
