"""A machine of its own for a file of tests, as far as networks go: a network and a mount namespace that the process enters.

Whatever comes and goes on the real machine meanwhile, other tests' networks among it, is neither seen nor in the way, and
nothing is left of it in the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

CLONE_FS, CLONE_NEWNS, CLONE_NEWNET = 0x200, 0x20000, 0x40000000
OWN_DIRECTORIES = ("/run/netns", "/run/instar-net")
ADDRESS, ROUTER = "203.0.113.2", "203.0.113.1"  # of a machine that has an outside
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def own_machine() -> Iterator[None]:
    """Of the calling thread, its processes, and threads that it starts meanwhile. Needs root."""
    before = {kind: os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY) for kind in ("net", "mnt")}
    folder = Path.cwd()
    try:
        _call("unshare", CLONE_NEWNS | CLONE_NEWNET)
        try:
            _furnish()
            yield
        finally:
            _call("unshare", CLONE_FS)  # a thread that lives longer has it from us: with it we could not go back
            for descriptor in before.values():
                _call("setns", descriptor, 0)
            os.chdir(folder)
    finally:
        for descriptor in before.values():
            os.close(descriptor)


def _furnish() -> None:
    for command in (
        "mount --make-rprivate /",
        "mount -t sysfs sysfs /sys",  # that of before shows the links of before
        *(f"mount -t tmpfs -o mode=0755 tmpfs {directory}" for directory in OWN_DIRECTORIES),
        "ip link set lo up",
        "ip link add eth0 type veth peer name outside",
        "ip link set outside up",
        "ip link set eth0 up",
        f"ip addr add {ADDRESS}/24 dev eth0",
        f"ip route add default via {ROUTER}",
    ):
        if command.startswith("mount -t tmpfs"):
            Path(command.split()[-1]).mkdir(exist_ok=True)
        subprocess.run(command.split(), check=True, capture_output=True, timeout=20)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
