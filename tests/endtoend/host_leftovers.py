"""What a cloud has on a host, read from the kernel: after its end there must be nothing of it.

Only what bears the cloud's own marks counts: other clouds may come and go on the same host meanwhile.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from instar.hypervisor.libvirt.host_paths import HostPaths
from instar.hypervisor.linux_network.names import CloudNames

LINKS = Path("/sys/class/net")


def marks_of(directory: Path) -> tuple[str, ...]:
    """What appears in the name, path or command line of all that a cloud makes outside of its directory."""
    marks = [str(directory), HostPaths(directory).runtime.name]
    marks += [HostPaths(host).runtime.name for host in (directory / "hosts").glob("host-*")]
    with contextlib.suppress(FileNotFoundError):
        marks.append(CloudNames((directory / "cloud-id").read_text().strip()).tag)
    return tuple(marks)


def leftovers(marks: tuple[str, ...], taps_before: set[str]) -> dict[str, set[str]]:
    """By kind; empty when nothing is left. A tap bears no cloud's mark, but one that has no bridge is nobody's."""
    things = {
        "processes": {f"{pid} {words}" for pid, words in processes()},
        "links": {path.name for path in LINKS.iterdir()},
        "namespaces": {path.name for path in Path("/run/netns").glob("*")},
        "nft tables": set(_output("nft", "list", "tables").splitlines()),
        "routes": set(_output("ip", "-4", "route", "show", "table", "all").splitlines()),
        "runtime directories": {str(path) for path in Path("/run").glob("instar-*")},
        "network directories": {str(path) for path in Path("/run/instar-net").glob("*")},
        "mounts": {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
    }
    left = {kind: {one for one in found if any(mark in one for mark in marks)} for kind, found in things.items()}
    left["taps"] = {tap for tap in taps() - taps_before if not (LINKS / tap / "master").exists()}
    return {kind: found for kind, found in left.items() if found}


def taps() -> set[str]:
    return {path.name for path in LINKS.glob("tap*")}


def processes() -> list[tuple[int, str]]:
    """Every process that is not a zombie: pid and command line."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if words:
                    found.append((int(path.name), words))
    return found


def _output(*argv: str) -> str:
    """Empty where the program is not installed: then a cloud could not use it either."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False).stdout
    except FileNotFoundError:
        return ""
