"""What a libvirt error means to our callers: the daemon is away, a file system is full, or the hypervisor refused.

Texts of libvirt and QEMU name files of the host; what users may see has none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import libvirt

from instar.errors import HypervisorError, HypervisorUnavailable, OperationError
from instar.hypervisor.libvirt.host_paths import FULL, disk_full

REASON_LENGTH_MAX = 300

_AWAY = frozenset(
    {
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    }
)
_QUOTED_PATH = re.compile(r"""(['"])[^'"\n]*/[^'"\n]*\1""")
_BARE_PATH = re.compile(r"[^\s'\"(),;=]*/[^\s'\"(),;]+")


def safe_reason(text: str) -> str:
    """The first line of `text` without paths, bounded."""
    line = text.strip().split("\n", 1)[0]
    return _BARE_PATH.sub("a file of the host", _QUOTED_PATH.sub("a file of the host", line))[:REASON_LENGTH_MAX]


def explain(error: libvirt.libvirtError, *, host: str, state_dir: Path, alive: bool) -> OperationError:
    """Our error for `error`. `alive`: the connection is still up. Blocking (looks for a mount point)."""
    code, domain = error.get_error_code(), error.get_error_domain()
    if not alive or code in _AWAY or domain in (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE):
        return HypervisorUnavailable(host=host)
    text = str(error.get_error_message() or error)
    if any(os.strerror(number) in text for number in FULL):
        return disk_full(state_dir, host)
    return HypervisorError(reason=safe_reason(text))
