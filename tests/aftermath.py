"""Ends what a run of the tests leaves behind, however the run ends: also by SIGKILL, with guests, servers and networks up.

Started by conftest.py beside each run. It waits until the run is gone, which closes its end of the pipe; what the run has
ended itself is not there any more, so usually nothing is to be done. Knows what is the run's own by a variable that all its
processes have in their environment: others' are left alone, also those of other runs of the tests.

    python -m tests.aftermath VALUE < pipe
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "INSTAR_TEST_RUN"
LOOK_EVERY_S = 3.0
GRACE_S = 15.0  # workers and watchers of single servers end by themselves
MADE = ("bench", "demo", "distributed", "e2e", "libvirtd", "life", "model", "pg", "rabbitmq", "recorded", "sim", "two")
FOLDERS = ("/run/instar-", "/tmp/openstack-client-", *(f"/tmp/instar-{what}-" for what in MADE))
SHARED = Path("/run/instar-net")  # each cloud has a folder in it, which `instar down` removes
DOWN_MAX_S = 120.0


class Run:
    """A run of the tests with this mark. `look` from time to time: a process that was started with another environment
    is known by its parent, as long as it has one."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}"
        self._seen: set[tuple[int, str]] = set()  # with the time of their start: numbers are used again
        self.folders: set[Path] = set()

    def look(self) -> dict[int, list[str]]:
        """What of it lives: pid → command line."""
        mine: set[int] = set()
        parents, starts, words = {}, {}, {}
        for path in Path("/proc").iterdir():
            if not path.name.isdigit() or int(path.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                pid, facts = int(path.name), (path / "stat").read_text().rpartition(")")[2].split()
                parents[pid], starts[pid], words[pid] = int(facts[1]), facts[19], _words(path / "cmdline")
                environ = _words(path / "environ")
                homes = {Path(word.partition("=")[2]) for word in environ if word.startswith("HOME=/")}
                marked = self._mark in environ or any(home.is_relative_to(one) for one in self.folders for home in homes)
                if marked or (pid, starts[pid]) in self._seen:
                    mine.add(pid)
        while found := {pid for pid, parent in parents.items() if parent in mine and pid not in mine}:
            mine |= found
        left = {pid: words[pid] for pid in mine if pid in words and words[pid] != [""]}  # else it is dead already
        self._seen = {(pid, starts[pid]) for pid in left}
        for command in left.values():
            self.folders |= folders_of(command)
        return left

    def clear(self) -> None:
        """Nothing of it is left on this machine."""
        ours: set[Path] = set()
        for _ in range(20):  # whoever is watched over is started again until the watcher has ended
            left = self.look()
            if not left:
                break
            for pid, words in left.items():
                print(f"left behind by the tests: {pid} {' '.join(words)[:300]}", file=sys.stderr)
                ours |= folders_of(words)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        for folder in ours | {folder for folder in self.folders if folder.exists()}:
            _remove(folder)
        for path in Path("/proc").glob("[0-9]*"):  # `instar down` has started a libvirtd to ask, and was killed too
            with contextlib.suppress(OSError):
                if int(path.name) != os.getpid() and folders_of(_words(path / "cmdline")) & ours:
                    os.kill(int(path.name), signal.SIGKILL)


def _words(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").split("\0")


def _remove(folder: Path) -> None:
    instar = Path(sys.executable).with_name("instar")
    for cloud in [path.parent for path in folder.glob("**/cloud-id")]:
        end = ["distributed", "down"] if (cloud / "postgresql").is_dir() else ["down"]
        with contextlib.suppress(subprocess.TimeoutExpired):  # its namespaces, links and rules
            subprocess.run([instar, *end, "--dir", cloud], capture_output=True, timeout=DOWN_MAX_S, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def folders_of(words: list[str]) -> set[Path]:
    """Folders made by a run of the tests that a command line names."""
    return {
        Path(*Path(part).parts[:3]) for word in words for part in word.replace("=", " ").replace(",", " ").split()
        if part.startswith(FOLDERS)
    } - {SHARED}  # fmt: skip


def main() -> None:
    run = Run(sys.argv[1])
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    while not select.select([sys.stdin], [], [], LOOK_EVERY_S)[0]:  # the run goes on
        run.look()
    deadline = time.monotonic() + GRACE_S
    while run.look() and time.monotonic() < deadline:
        time.sleep(0.2)
    run.clear()


if __name__ == "__main__":
    main()
