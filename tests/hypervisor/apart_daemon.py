"""A private libvirtd in a network namespace of its own, so that two of them are two hosts with taps of the same name."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from pathlib import Path

from instar.hypervisor.libvirt.private_daemon import PrivateDaemon

START_TIMEOUT_S = 60.0
_START = """
import asyncio, sys
from pathlib import Path
from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
asyncio.run(PrivateDaemon(Path(sys.argv[1]), host_uuid=sys.argv[2]).ensure_running())
"""


class ApartDaemon:
    """Blocking, bounded; `stop` removes whatever `start` has made."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.namespace = directory, f"instar-t-{uuid.uuid4().hex[:8]}"
        self._uuid = str(uuid.uuid4())
        self.daemon = PrivateDaemon(directory, host_uuid=self._uuid)

    def start(self) -> None:
        self.directory.mkdir(mode=0o755)
        for arguments in (
            ["ip", "netns", "add", self.namespace],
            ["ip", "-n", self.namespace, "link", "set", "lo", "up"],
            # The daemon takes the namespace of whoever starts it.
            ["ip", "netns", "exec", self.namespace, sys.executable, "-c", _START, str(self.directory), self._uuid],
        ):
            subprocess.run(arguments, check=True, capture_output=True, timeout=START_TIMEOUT_S)

    def stop(self) -> None:
        asyncio.run(self.daemon.ensure_stopped())
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False, capture_output=True, timeout=20)
