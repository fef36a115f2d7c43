"""What the demo reads out of a console and a ping, what it tells, and what it counts as left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from instar.cli.demo.footprint import Footprint
from instar.cli.demo.guest import read_console
from instar.cli.demo.pinger import checksum, echo_request, is_reply
from instar.cli.demo.report import Row, summary, times_of
from tests.patience import PATIENCE_S

LOG = """\
INSTAR-BOOT count=1 uuid=- hostname=demo
INSTAR-NET eth0 address=10.0.0.5/24 mac=52:54:00:00:00:01
INSTAR-READY count=1 uptime_s=6
login: INSTAR-BOOT count=2 uuid=- hostname=demo
"""


def test_a_guest_that_boots_again_is_not_ready_yet() -> None:
    console = read_console(LOG)
    assert (console.boots, console.ready, console.addresses) == (2, 1, [])


def test_addresses_are_those_of_the_last_boot() -> None:
    console = read_console(LOG + "INSTAR-NET eth0 address=10.0.0.6/24 mac=x\nINSTAR-READY count=2 uptime_s=6\n")
    assert (console.ready, console.addresses) == (2, ["10.0.0.6"])


def test_an_empty_console_tells_nothing() -> None:
    assert read_console("") == (0, 0, [])


def test_what_is_not_the_hypervisors_time_is_ours() -> None:
    steps = [{"hypervisor_us": 250_000}, {"hypervisor_us": 0}]
    assert times_of({"started_at": 0, "finished_at": 300_000, "steps": steps}) == (0.25, 0.05)


def test_a_reply_is_told_from_a_request_and_from_the_answer_to_somebody_else() -> None:
    request = echo_request(0x1234, 7)
    assert checksum(request) == 0, "a message with its checksum sums up to nothing"
    header = bytes([0x45]) + bytes(19)
    reply = bytes([0]) + request[1:]
    assert is_reply(header + reply, 0x1234)
    assert not is_reply(header + request, 0x1234)
    assert not is_reply(header + reply, 0x4321)
    assert is_reply(bytes([0x46]) + bytes(23) + reply, 0x1234), "IP options come before it"
    assert not is_reply(header + reply[:4], 0x1234)


def test_the_summary_counts() -> None:
    assert summary([Row("create", True, 1), Row("stop", False, 1)]) == "demo: 2 operations, 1 ok, 1 failed"


def test_a_directory_and_a_process_of_the_cloud_are_found_and_strangers_are_not(tmp_path: Path) -> None:
    directory = tmp_path / "cloud"
    directory.mkdir()
    footprint = Footprint(directory, "0123abcd")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(directory)])
    try:
        deadline = time.monotonic() + PATIENCE_S
        while len(footprint.found()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        found = footprint.found()
        assert len(found) == 2
        assert any(line.startswith(f"process {sleeper.pid}:") for line in found)
        assert f"directory {directory}" in found
    finally:
        sleeper.kill()
        sleeper.wait()
    directory.rmdir()
    assert footprint.found() == []
