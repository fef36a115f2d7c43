"""Taps of the libvirt driver's guests: libvirt makes and plugs them, and is not alone at it."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from instar.hypervisor.libvirt.private_daemon import PrivateDaemon
from instar.model.states import PowerState
from tests.patience import PATIENCE_S

from .libvirt_harness import LibvirtHarness
from .test_contract import definition, provide

STARTS_MAX = 20


class Plugger:
    """Plugs a tap into a bridge as soon as there is one, once: what repairs a network does so when it happens to look."""

    def __init__(self, tap: str, bridge: str) -> None:
        self._tap, self._bridge = Path("/sys/class/net", tap), bridge
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Plugger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        with subprocess.Popen(["ip", "-batch", "-"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as batch:
            assert batch.stdin is not None
            while not self._ended.is_set() and not self._tap.exists():
                pass
            if not (self._tap / "master").exists():
                batch.stdin.write(f"link set {self._tap.name} master {self._bridge}\n")
            batch.stdin.close()
            batch.wait(PATIENCE_S)


@pytest.mark.host
async def test_a_tap_that_somebody_plugs_before_libvirt_does_holds_no_start_up(
    private_daemon: PrivateDaemon, tmp_path: Path
) -> None:
    """libvirt finds the tap that it has just made in the bridge, fails with EBUSY, and unmakes everything."""
    host = await LibvirtHarness.opened(private_daemon, tmp_path / "host")
    try:
        for _ in range(STARTS_MAX):
            guest = definition(host, ports=1)
            await provide(host, guest)
            with Plugger(guest.ports[0].tap_name, host.bridge(guest.ports[0].network)):
                state = await host.hypervisor.ensure_running(guest)
            assert state.power_state is PowerState.RUNNING
            await host.hypervisor.ensure_absent(guest.instance_id, keep_disks=False)
    finally:
        await host.close()
