"""Hosts that this machine plays: what is their own, how they die, and what joins them."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from instar.cli.control_plane import machine_boot_id
from instar.cli.hosts.local_host import OFF, LocalHost, local_hosts_of
from instar.cli.hosts.local_hosts import remove_local_hosts
from instar.cli.hosts.underlay import Underlay
from instar.errors import StartupError
from instar.hypervisor.linux_network.host_commands import run
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def namespaces_of_machine() -> list[str]:
    return [path.name for path in Path("/run/netns").glob("*")]


def started(argv: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv)


class Pair:
    """Two hosts on an underlay of their own."""

    def __init__(self, hosts_dir: Path, cloud_id: str) -> None:
        self.underlay = Underlay(cloud_id, hosts_dir / "underlay")
        self.one, self.two = LocalHost(hosts_dir, "host-1"), LocalHost(hosts_dir, "host-2")

    async def start(self) -> None:
        await self.underlay.ensure()
        for number, host in enumerate((self.one, self.two), 1):
            await self.underlay.connect(number, host.ensure_started())

    def said(self, host: LocalHost, *command: str) -> str:
        done = subprocess.run(host.inside(*command), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        return done.stdout if done.returncode == 0 else f"failed: {done.stderr}"

    def reaches(self, host: LocalHost, address: str) -> bool:
        return "failed" not in self.said(host, "busybox", "ping", "-c", "1", "-W", "1", address)

    def wait_to_reach(self, host: LocalHost, address: str) -> None:
        """At once on an idle machine; on a busy one an answer may take longer than a ping waits."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.reaches(host, address):
            assert time.monotonic() < deadline


def links_of(underlay: Underlay) -> list[str]:
    tag = underlay.bridge.removeprefix("ul-")
    return [path.name for path in Path("/sys/class/net").iterdir() if tag in path.name]


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    hosts_dir, cloud_id = tmp_path / "hosts", secrets.token_hex(4)
    hosts_dir.mkdir()
    pair = Pair(hosts_dir, cloud_id)
    try:
        await pair.start()
        yield pair
    finally:
        await remove_local_hosts(cloud_id, hosts_dir)
    assert not pair.one.runtime.exists() and not pair.one.directory.exists()
    assert links_of(pair.underlay) == []


async def test_each_has_a_name_a_network_and_processes_of_its_own(pair: Pair) -> None:
    assert pair.said(pair.one, "hostname") == "host-1\n"
    assert set(pair.said(pair.one, "ls", "/sys/class/net").split()) == {"lo", "underlay"}
    assert len(pair.said(pair.one, "sh", "-c", "ls -d /proc/[0-9]*").split()) <= 4
    boot_ids = {pair.said(host, "cat", "/proc/sys/kernel/random/boot_id") for host in (pair.one, pair.two)}
    assert len(boot_ids | {machine_boot_id() + "\n"}) == 3
    pair.said(pair.one, "ip", "netns", "add", "mine")
    assert pair.said(pair.one, "ls", "/run/netns") == "mine\n"
    assert pair.said(pair.two, "ls", "/run/netns") == ""
    assert "mine" not in namespaces_of_machine()


async def test_they_reach_each_other_and_starting_again_changes_nothing(pair: Pair) -> None:
    processes = pair.one.process, pair.two.process
    await pair.start()
    assert (pair.one.process, pair.two.process) == processes
    pair.wait_to_reach(pair.one, pair.underlay.address(2))
    pair.wait_to_reach(pair.two, pair.underlay.address(1))


async def test_a_bridge_that_somebody_removed_is_made_again(pair: Pair) -> None:
    await run("ip", "link", "del", pair.underlay.bridge)
    assert not pair.reaches(pair.one, pair.underlay.address(2))
    await pair.start()
    pair.wait_to_reach(pair.one, pair.underlay.address(2))


async def test_power_off_kills_every_process_and_power_on_is_another_boot(pair: Pair) -> None:
    before = pair.said(pair.one, "cat", "/proc/sys/kernel/random/boot_id")
    kept = pair.one.directory / "disk"
    kept.touch()
    sleeper = started(pair.one.inside("sleep", "600"))
    pair.said(pair.one, "ip", "netns", "add", "forgotten")
    pair.one.power_off()
    assert sleeper.wait(PATIENCE_S) != 0
    assert pair.one.process is None and pair.one.is_off
    async with asyncio.timeout(PATIENCE_S):  # the kernel takes its time to end a network namespace
        while pair.reaches(pair.two, pair.underlay.address(1)):
            await asyncio.sleep(0.01)
    with pytest.raises(StartupError):
        pair.one.inside("true")
    pair.one.power_on()
    assert not pair.one.is_off
    await pair.start()
    assert pair.said(pair.one, "cat", "/proc/sys/kernel/random/boot_id") != before
    assert pair.said(pair.one, "ls", "/run/netns") == ""
    assert kept.exists()
    pair.wait_to_reach(pair.two, pair.underlay.address(1))


async def test_a_host_that_is_switched_off_while_it_starts_is_off(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.one.kill()
    started_by = subprocess.run

    def switched_off_meanwhile(*words: object, **options: object) -> object:
        ended = started_by(*words, **options)  # type: ignore[call-overload]
        (pair.one.directory / OFF).touch()  # and nothing is there yet that could be killed
        return ended

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", switched_off_meanwhile)
        with pytest.raises(StartupError):
            pair.one.ensure_started()
    assert pair.one.process is None


async def test_hosts_keep_their_addresses(pair: Pair) -> None:
    again = Underlay("ffffffff", pair.one.directory.parent / "underlay")
    again.bridge = pair.underlay.bridge
    await again.ensure()
    assert again.address(1) == pair.underlay.address(1)


@pytest.mark.parametrize("name", ["", "Host", "a/b", "..", "-a", "x" * 64, "a b"])
def test_a_name_that_could_mean_something_else_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError):
        LocalHost(tmp_path, name)
    assert local_hosts_of(tmp_path) == []
