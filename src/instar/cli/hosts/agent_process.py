"""How the agent of a host that this machine plays is started: inside the host's namespaces."""

from __future__ import annotations

import sys
from pathlib import Path

from instar.cli.hosts.local_host import LocalHost


def agent_command(
    host: LocalHost, cloud_dir: Path, *, address: str, shares: int, log_format: str, config: Path | None = None
) -> list[str]:
    """The agent ends when its standard input does, and is killed when nsenter is. Raises StartupError: the host is off."""
    return [
        *host.inside("setpriv", "--pdeathsig", "KILL"),
        *(sys.executable, "-m", "instar.cli", "agent", "--dir", str(cloud_dir), "--host", host.name),
        *("--address", address, "--libvirtd", "private", "--end-with-input"),
        *("--shares", str(shares), "--log-format", log_format),
        *(("--config", str(config)) if config is not None else ()),
    ]
