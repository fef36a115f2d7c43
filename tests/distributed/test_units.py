"""The systemd units: what systemd itself says of them, and that they start commands that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from instar.cli.main import instar

UNITS = sorted((Path(__file__).parents[2] / "packaging" / "systemd").iterdir())
PROGRAM = "/opt/instar/.venv/bin/instar"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_finds_nothing_wrong_with_them(tmp_path: Path) -> None:
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace(PROGRAM, "/bin/true"))
    names = [str(tmp_path / unit.name.replace("@.", "@1.")) for unit in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if str(tmp_path) in line or "instar" in line] == []


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.suffix == ".service"], ids=lambda unit: unit.name)
def test_their_commands_take_these_options(unit: Path) -> None:
    (command,) = re.findall(rf"^ExecStart={PROGRAM} (.*)$", unit.read_text(), flags=re.MULTILINE)
    words = command.replace("${AGENT_HOST}", "node-7").replace("${AGENT_ADDRESS}", "10.0.0.7").split()
    asked = CliRunner().invoke(instar, [*words, "--help"])
    assert asked.exit_code == 0
    for option in (word for word in words if word.startswith("--")):
        assert option in asked.output
