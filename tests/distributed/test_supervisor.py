"""The supervisor: what it starts, what it starts again, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from instar.cli.distributed.supervisor import Launch, Supervisor
from instar.errors import StartupError
from tests.patience import PATIENCE_S

READY = "print('ready: it works', flush=True);"
WAITS = f"import sys; {READY} sys.stdin.read()"


def python(program: str) -> Launch:
    return Launch(lambda: [sys.executable, "-c", program])


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with closing(Supervisor(tmp_path / "log")) as supervisor:
        supervisor.add("waits", python(WAITS))
        yield supervisor


def test_a_process_is_ready_when_it_says_so_and_ends_when_it_is_told_to(supervisor: Supervisor) -> None:
    assert supervisor.start("waits") == "it works"
    pid = supervisor.pid("waits")
    assert pid is not None and runs(pid)
    assert supervisor.start("waits") == "it works" and supervisor.pid("waits") == pid
    supervisor.stop("waits")
    assert supervisor.pid("waits") is None and not runs(pid)


def test_what_dies_is_started_again(supervisor: Supervisor) -> None:
    supervisor.start("waits")
    first = supervisor.pid("waits")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.pid("waits") not in (None, first))


def test_what_is_killed_stays_down_until_it_is_started(supervisor: Supervisor) -> None:
    supervisor.start("waits")
    supervisor.kill("waits")
    assert supervisor.pid("waits") is None
    time.sleep(0.5)
    assert supervisor.pid("waits") is None
    assert supervisor.start("waits") == "it works"


def test_without_restarts_what_dies_stays_dead(tmp_path: Path) -> None:
    with closing(Supervisor(tmp_path, restarts=False)) as supervisor:
        supervisor.add("waits", python(WAITS))
        supervisor.start("waits")
        pid = supervisor.pid("waits")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: supervisor.pid("waits") is None)
        time.sleep(0.5)
        assert supervisor.pid("waits") is None
        supervisor.start("waits")


def test_what_was_paused_goes_on_and_can_be_ended(supervisor: Supervisor) -> None:
    supervisor.start("waits")
    pid = supervisor.pid("waits")
    supervisor.pause("waits")
    until(lambda: " T " in Path(f"/proc/{pid}/stat").read_text())
    supervisor.resume("waits")
    until(lambda: " S " in Path(f"/proc/{pid}/stat").read_text())
    supervisor.pause("waits")
    supervisor.stop("waits")
    assert supervisor.pid("waits") is None


def test_a_failed_start_shows_the_end_of_the_log(tmp_path: Path) -> None:
    with closing(Supervisor(tmp_path, restarts=False)) as supervisor:
        supervisor.add("fails", python("import sys; sys.exit('this is why')"))
        with pytest.raises(StartupError, match="this is why"):
            supervisor.start("fails")
        with pytest.raises(StartupError, match="no process other"):
            supervisor.start("other")


def test_processes_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    """They hold the other end of its pipes: however it ends, they hear of it."""
    program = (
        "import sys; from pathlib import Path; from instar.cli.distributed.supervisor import Launch, Supervisor;"
        f"one = Supervisor(Path({str(tmp_path)!r}));"
        f"one.add('waits', Launch(lambda: [sys.executable, '-c', {WAITS!r}])); one.start('waits');"
        "print('ready: ' + str(one.pid('waits')), flush=True); sys.stdin.read()"
    )
    with closing(Supervisor(tmp_path / "outer", restarts=False)) as outer:
        outer.add("supervisor", python(program))
        pid = int(outer.start("supervisor"))
        assert runs(pid)
        outer.kill("supervisor")
        until(lambda: not runs(pid))


def test_what_is_held_waits_and_begins_when_it_is_let_go(tmp_path: Path) -> None:
    """A host that is switched off must not be started by whoever sees to its agent."""
    switch = tmp_path / "off"
    switch.touch()
    with closing(Supervisor(tmp_path)) as supervisor:
        supervisor.add("waits", Launch(python(WAITS).command, held=switch.exists))
        assert supervisor.start("waits") == "" and supervisor.pid("waits") is None
        switch.unlink()
        until(lambda: supervisor.pid("waits") is not None)
        switch.touch()
        os.kill(supervisor.pid("waits") or 0, signal.SIGKILL)
        time.sleep(0.8)
        assert supervisor.pid("waits") is None
