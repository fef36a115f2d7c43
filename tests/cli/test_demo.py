"""The demo on a real guest: all of it, and ended half-way. Nothing is left behind, and it says so itself."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.program import INSTAR

pytestmark = [pytest.mark.host, pytest.mark.guest, pytest.mark.slow]


def start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*INSTAR, "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def directory_of(output: str) -> Path:
    return Path(output.partition("starting a cloud in ")[2].splitlines()[0])


@pytest.mark.timeout(400)
def test_the_demo_walks_a_real_guest_through_its_life() -> None:
    demo = start()
    output, _ = demo.communicate(timeout=380)
    assert demo.returncode == 0, output
    assert output.splitlines()[-1] == "demo: 8 operations, 8 ok, 0 failed"
    assert "note over database: vm_state active, task_state null" in output
    assert "left behind" not in output
    assert not directory_of(output).exists()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("line", ["starting a cloud", "create …", "create: ok"])
def test_ctrl_c_leaves_nothing_behind(line: str) -> None:
    demo = start()
    assert demo.stdout is not None
    output = ""
    try:
        for said in demo.stdout:
            output += said
            if line in said:
                break
        os.kill(demo.pid, signal.SIGINT)
        output += demo.communicate(timeout=120)[0]
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait(10)
    assert demo.returncode == 1, output
    assert "demo: interrupted" in output
    assert "left behind" not in output
    assert not directory_of(output).exists()
