"""The demo on real guests: the short walk, and the whole life ended half-way. Nothing is left behind, and it says so.

The whole life to its end is `make demo` itself; tests/endtoend walks the same way with more checks."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from instar.cli.demo.walk import ONE_HOST
from tests.cli.program import INSTAR

pytestmark = [pytest.mark.host, pytest.mark.guest, pytest.mark.slow]


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*INSTAR, "demo", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def directory_of(output: str) -> Path:
    return Path(output.partition("starting a cloud in ")[2].splitlines()[0])


def walked(demo: subprocess.Popen[str], steps: int, within_s: float) -> str:
    output, _ = demo.communicate(timeout=within_s)
    assert demo.returncode == 0, output
    assert output.splitlines()[-1] == f"demo: {steps} operations, {steps} ok, 0 failed"
    assert "note over database: vm_state active, task_state null" in output
    assert "left behind" not in output
    assert not directory_of(output).exists()
    return output


def test_the_short_walk_needs_one_host() -> None:
    assert "The create as it really happened" in walked(start("--one-host"), len(ONE_HOST), 1000)


@pytest.mark.parametrize("line", ["starting a cloud", "attach volume: ok"])
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
        output += demo.communicate(timeout=600)[0]
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait(10)
    assert demo.returncode == 1, output
    assert "demo: interrupted" in output
    assert "left behind" not in output
    assert not directory_of(output).exists()
