"""Starts named processes, starts those again that die, and ends them all: what systemd does for a cloud in earnest.

Used by `LocalCloud`; tests and benches also kill, stop and continue processes with it. Every method blocks, for a bounded
time; any thread may call it.
"""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import structlog

from instar.errors import InstarError, StartupError

log = structlog.get_logger()

READY = "ready: "
READY_MAX_S = 90.0
STOP_MAX_S = 20.0
END_MAX_S = 10.0  # after a SIGKILL
POLL_S = 0.02
SERVER_LOOK_S = 0.5
HELD_POLL_S = 0.3
RETRY_FIRST_S, RETRY_MAX_S = 0.2, 10.0
LIVED_WELL_S = 10.0  # a process that ran so long before it ended is started again at once
LOG_LINES_SHOWN = 15


class Launch(NamedTuple):
    """How a process is started. `command` is made at each start and may prepare what it needs, raising StartupError.

    `real_pid`: where what is started is not yet the process that is meant (but, say, the door to its namespaces). While
    `held` says so it is not started again: its host is switched off."""

    command: Callable[[], list[str]]
    environment: Mapping[str, str] = {}
    real_pid: Callable[[], int | None] | None = None
    held: Callable[[], bool] | None = None


class Server(Protocol):
    """A server that outlives who started it: a private database or broker. Everything blocks."""

    @property
    def pid(self) -> int | None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


class Supervisor:
    """Keeps logs and what processes said in `directory`. `restarts`: what dies by itself is started again.

    Processes end with their standard input, so that none outlives a supervisor that was killed."""

    def __init__(self, directory: Path, *, restarts: bool = True) -> None:
        self.directory = directory
        self._restarts = restarts
        self._children: dict[str, _Child | _KeptServer] = {}

    def add_server(self, name: str, server: Server) -> None:
        """Know a server by this name. It answers when `start` returns."""
        self._children[name] = _KeptServer(name, server, restarts=self._restarts)

    def add(self, name: str, launch: Launch) -> None:
        """Know a process by this name from now on; it is not started yet."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._children[name] = _Child(name, launch, self.directory, restarts=self._restarts)

    @property
    def names(self) -> list[str]:
        return list(self._children)

    def start(self, name: str, *, wait: bool = True) -> str:
        """It runs and (unless not to `wait`) said that it is ready: returns what it said. Nothing to do for one that runs.
        Raises StartupError with the end of its log."""
        child = self._child(name)
        child.start()
        return child.wait_until_ready() if wait else ""

    def start_all(self, names: list[str]) -> list[str]:
        """Side by side: what each said. Raises StartupError."""
        failures: list[Exception] = []

        def begin(name: str) -> None:
            try:
                self.start(name, wait=False)
            except Exception as error:  # handed on below: a thread has nobody to raise it to
                failures.append(error)

        _side_by_side(begin, names)
        if failures:
            raise failures[0]
        return [self._child(name).wait_until_ready() for name in names]

    def stop(self, name: str) -> None:
        """In order: it is asked to end, and given time. It stays down until `start`."""
        self._child(name).stop(signal.SIGTERM)

    def stop_all(self, names: list[str]) -> None:
        """Side by side."""
        _side_by_side(self.stop, names)

    def wait_until_ended(self, name: str, limit_s: float) -> None:
        """It has ended by itself, and well. Raises StartupError with the end of its log."""
        self._child(name).wait_until_ended(limit_s)

    def kill(self, name: str) -> None:
        """As in a crash: SIGKILL. It stays down until `start`."""
        self._child(name).stop(signal.SIGKILL)

    def pause(self, name: str) -> None:
        """Stopped in the middle of whatever it does (SIGSTOP)."""
        self._child(name).send(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._child(name).send(signal.SIGCONT)

    def pid(self, name: str) -> int | None:
        """None when it does not run."""
        return self._child(name).pid

    def log_end(self, name: str) -> str:
        """The last lines that it wrote to standard error."""
        return self._child(name).log_end()

    def seal(self) -> None:
        """Nothing is started from now on, also not by a thread that was about to."""
        for child in self._children.values():
            child.seal()

    def close(self) -> None:
        """Everything has ended, the last one that was added first."""
        self.seal()
        for name in reversed(self.names):
            self.stop(name)

    def _child(self, name: str) -> _Child | _KeptServer:
        if name not in self._children:
            raise StartupError(f"There is no process {name}: there are {', '.join(self.names)}.")
        return self._children[name]


class _Kept(abc.ABC):
    """What is kept under a name. Who starts or seals it has the turn."""

    def __init__(self, name: str, turn: threading.Condition) -> None:
        self.name = name
        self._turn = turn
        self._sealed = False

    @property
    @abc.abstractmethod
    def pid(self) -> int | None: ...

    def seal(self) -> None:
        """It is not started any more."""
        with self._turn:
            self._sealed = True

    def check_not_sealed(self) -> None:
        """Raises StartupError. The caller has the turn."""
        if self._sealed:
            raise StartupError(f"{self.name} is not started any more.")

    def send(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class _Child(_Kept):
    def __init__(self, name: str, launch: Launch, directory: Path, *, restarts: bool) -> None:
        self._change = threading.Condition()
        super().__init__(name, self._change)
        self._launch = launch
        self._restarts = restarts
        self._log = directory / f"{name}.log"
        self._said = directory / f"{name}.said"  # standard output of the present life
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._keeper: threading.Thread | None = None

    def start(self) -> None:
        with self._change:
            self.check_not_sealed()
            if self._wanted and (self.pid is not None or self._keeper is not None):
                return
            self._wanted = True
            if self._is_held():
                self._process = None  # the thread begins it when it is not held any more
            else:
                self._begin()
            self._keeper = threading.Thread(target=self._keep, name=f"keeps {self.name}", daemon=True)
            self._keeper.start()

    def _begin(self) -> None:
        command = self._launch.command()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("INSTAR_")}
        with self._said.open("wb") as said, self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=said, stderr=errors, cwd="/",
                env=inherited | dict(self._launch.environment), start_new_session=True,
            )  # fmt: skip

    def wait_until_ready(self) -> str:
        deadline = time.monotonic() + READY_MAX_S
        while time.monotonic() < deadline:
            process = self._process
            if process is None and self._is_held():
                return ""
            for line in _text(self._said).splitlines(keepends=True):
                if line.startswith(READY) and line.endswith("\n"):
                    return line.removeprefix(READY).strip()
            if process is None or (process.poll() is not None and not self._restarts):
                raise StartupError(f"{self.name} ended at its start:\n{self.log_end()}")
            time.sleep(POLL_S)
        raise StartupError(f"{self.name} was not ready within {READY_MAX_S:g} seconds:\n{self.log_end()}")

    def wait_until_ended(self, limit_s: float) -> None:
        process = self._process
        try:
            code = process.wait(limit_s) if process is not None else None
        except subprocess.TimeoutExpired:
            raise StartupError(f"{self.name} did not end within {limit_s:g} seconds:\n{self.log_end()}") from None
        if code:
            raise StartupError(f"{self.name} failed:\n{self.log_end()}")

    @property
    def pid(self) -> int | None:
        process = self._process
        if process is None or process.poll() is not None:
            return None
        return self._launch.real_pid() if self._launch.real_pid is not None else process.pid

    def stop(self, number: signal.Signals) -> None:
        with self._change:
            self._wanted = False
            self._change.notify_all()
            process, keeper = self._process, self._keeper
            self._keeper = None
        if process is None:
            return
        self.send(number)
        if number is not signal.SIGKILL:
            self.send(signal.SIGCONT)  # one that was stopped hears nothing else
        if process.stdin is not None:
            process.stdin.close()
        for limit_s, last in ((STOP_MAX_S, False), (END_MAX_S, True)):
            try:
                process.wait(limit_s)
                break
            except subprocess.TimeoutExpired:
                log.warning("supervisor.kills", name=self.name, waited_s=limit_s)
                self.send(signal.SIGKILL)
                if last:
                    process.kill()
        if keeper is not None:
            keeper.join(END_MAX_S)

    def _keep(self) -> None:
        """A thread: waits for the end of the process, and begins the next one."""
        pause_s = RETRY_FIRST_S
        while True:
            process, began = self._process, time.monotonic()
            if process is not None:
                code = process.wait()
                pause_s = RETRY_FIRST_S if time.monotonic() - began > LIVED_WELL_S else min(pause_s * 2, RETRY_MAX_S)
            with self._change:
                if not self._wanted:
                    return
                if process is not None:
                    if code or self._restarts:
                        log.warning("supervisor.ended", name=self.name, code=code, restarts=self._restarts)
                    if not self._restarts:
                        self._keeper = None
                        return
                    self._change.wait(pause_s)
                if not self._begin_again(pause_s):
                    return

    def _begin_again(self, pause_s: float) -> bool:
        """False: it is not wanted any more. The caller has the turn."""
        while self._wanted:
            if self._is_held():
                self._change.wait(HELD_POLL_S)
                continue
            try:
                self._begin()
                return True
            except (InstarError, OSError, subprocess.SubprocessError) as error:
                log.warning("supervisor.not_started", name=self.name, reason=str(error))
                pause_s = min(pause_s * 2, RETRY_MAX_S)
                self._change.wait(pause_s)
        return False

    def _is_held(self) -> bool:
        return self._launch.held is not None and self._launch.held()

    def log_end(self) -> str:
        return "\n".join(_text(self._log).splitlines()[-LOG_LINES_SHOWN:])


class _KeptServer(_Kept):
    def __init__(self, name: str, server: Server, *, restarts: bool) -> None:
        super().__init__(name, threading.Condition())
        self._server = server
        self._restarts = restarts
        self._wanted = threading.Event()
        self._keeper: threading.Thread | None = None

    def start(self) -> None:
        with self._turn:
            self.check_not_sealed()
            self._server.start()
            self._wanted.set()
        if self._restarts and self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name=f"keeps {self.name}", daemon=True)
            self._keeper.start()

    def wait_until_ready(self) -> str:
        return self.name

    @property
    def pid(self) -> int | None:
        return self._server.pid

    def stop(self, number: signal.Signals) -> None:
        with self._turn:
            self._wanted.clear()
            self.send(signal.SIGCONT)
            if number is signal.SIGKILL:
                self._server.kill()
            else:
                self._server.stop()

    def _keep(self) -> None:
        """A thread, for the life of this process: it is no child of ours that could be waited for."""
        while True:
            time.sleep(SERVER_LOOK_S)
            with self._turn:
                if not self._wanted.is_set() or self._server.pid is not None:
                    continue
                log.warning("supervisor.ended", name=self.name, restarts=True)
                try:
                    self._server.start()
                except (InstarError, OSError, subprocess.SubprocessError) as error:
                    log.warning("supervisor.not_started", name=self.name, reason=str(error))

    def wait_until_ended(self, limit_s: float) -> None:
        raise StartupError(f"{self.name} does not end by itself.")

    def log_end(self) -> str:
        return ""


def _side_by_side(work: Callable[[str], None], names: list[str]) -> None:
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
