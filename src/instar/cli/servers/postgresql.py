"""A private PostgreSQL: a server in a directory of its own, on loopback, for one cloud. Used where a whole distributed
cloud is on one machine, and by tests, which also kill it.

Where we are root it runs as the account `postgres`, as PostgreSQL wants it. It has a password of its own, so that other
users of the machine stay out. All calls block: use `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import BinaryIO

from instar.errors import StartupError

ACCOUNT = "postgres"
ROLE = "instar"
DATABASE = "instar"
START_S = 60.0  # with the recovery after a crash
STOP_S = 30.0
PROGRAM_S = 180.0  # a new cluster takes half a second on an idle machine
INSTALL = "install PostgreSQL (packaging/install.sh distributed)"
LIBRARIES = Path("/usr/lib/postgresql")  # where Debian has one directory for each version
# For tests and trials: as fast as memory, and worth nothing after a crash of the machine (one of PostgreSQL loses nothing).
FAST = ("fsync=off", "full_page_writes=off", "shared_buffers=32MB")
SETTINGS = (
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "dynamic_shared_memory_type=mmap",  # nothing is left in /dev/shm when it is killed
    "max_connections=200",
    "logging_collector=off",
    "log_checkpoints=off",
    "password_encryption=scram-sha-256",
)


class PrivatePostgresql:
    """The server in `directory`, which is made where it is not there. `durable`: what is committed survives a power cut.

    Raises StartupError: not installed, or it does not start."""

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self._directory = directory.absolute()
        self._data = self._directory / "data"
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of the cloud's database, with the password."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        return f"postgresql://{ROLE}:{self._password()}@127.0.0.1:{self.port}/{database}"

    @property
    def port(self) -> int:
        """The same at each start."""
        return int((self._directory / "port").read_text(encoding="ascii"))

    @property
    def log_file(self) -> Path:
        return self._directory / "postgresql.log"

    def start(self) -> None:
        """Running and answering when this returns, with the cloud's database. One that runs already is left alone."""
        self._prepare()
        if self._is_ready():
            return
        self._remove_remains()
        options = [part for setting in (*SETTINGS, *(() if self._durable else FAST)) for part in ("-c", setting)]
        with self.log_file.open("ab") as log:
            self._process = self._popen([_program("postgres"), "-D", str(self._data), "-p", str(self.port), *options], log)
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise StartupError(f"PostgreSQL does not start: see {self.log_file}.")
            time.sleep(0.02)
        self._ensure_database()

    def stop(self) -> None:
        """Ended in good order, clients or not; nothing is left but the directory."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """As a crash ends it: the server and all its processes, at once."""
        self._end(signal.SIGKILL)

    @property
    def is_running(self) -> bool:
        return self._pid() is not None

    @property
    def pid(self) -> int | None:
        """Of the server; None when it does not run."""
        return self._pid()

    # --- how ----------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Directory, port, password, cluster. Half of it from an interrupted first start is made anew."""
        account = _account()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if account is not None:
                os.chown(self._directory, account.pw_uid, account.pw_gid)
            self._directory.chmod(0o700)
        except OSError as error:
            raise StartupError(f"The directory {self._directory} cannot be used: {error.strerror}.") from error
        if account is not None:
            self._check_reachable()
        if not (self._directory / "port").exists():
            self._write("port", str(_free_port()))
        if not (self._directory / "password").exists():
            self._write("password", secrets.token_hex(16))
        if (self._directory / "made").exists():
            return
        shutil.rmtree(self._data, ignore_errors=True)
        sync = () if self._durable else ("--no-sync",)
        self._run(
            "initdb", "-D", str(self._data), "-U", ROLE, "-A", "scram-sha-256",
            "--pwfile", str(self._directory / "password"), "-E", "UTF8", "--locale=C", *sync,
        )  # fmt: skip
        self._write("made", "")

    def _check_reachable(self) -> None:
        """The server's account must be able to pass through the directories above."""
        done = self._call(["test", "-x", str(self._directory)])
        if done.returncode != 0:
            raise StartupError(f"The account {ACCOUNT} cannot reach {self._directory}: let others pass (chmod o+x).")

    def _write(self, name: str, text: str) -> None:
        new = self._directory / f"{name}.new"
        new.touch(mode=0o600)
        new.write_text(text, encoding="ascii")
        account = _account()
        if account is not None:
            os.chown(new, account.pw_uid, account.pw_gid)
        new.replace(self._directory / name)

    def _password(self) -> str:
        return (self._directory / "password").read_text(encoding="ascii").strip()

    def _ensure_database(self) -> None:
        found = self.sql(f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'")  # noqa: S608 - a constant
        if not found.strip():
            self.sql(f"CREATE DATABASE {DATABASE}")

    def sql(self, text: str) -> str:
        """What psql prints of these statements in the database `postgres`; for setting up and looking in."""
        environment = {"PGPASSWORD": self._password(), "PATH": os.environ.get("PATH", "")}
        return self._run(
            "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(self.port), "-U", ROLE,
            "-d", "postgres", "-c", text, environment=environment,
        )  # fmt: skip

    def _run(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
        done = self._call([_program(name), *arguments], environment)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            raise StartupError(f"{name} failed: {lines[-1] if lines else done.returncode}.")
        return done.stdout.decode(errors="replace")

    def _call(self, command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
        user, group, groups = _ids()
        try:
            return subprocess.run(
                command, check=False, capture_output=True, timeout=PROGRAM_S, cwd="/", stdin=subprocess.DEVNULL,
                env=environment, user=user, group=group, extra_groups=groups,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise StartupError(f"{Path(command[0]).name} did not end in {PROGRAM_S:.0f} s.") from None

    def _popen(self, command: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
        user, group, groups = _ids()
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True,
            user=user, group=group, extra_groups=groups,
        )  # fmt: skip

    def _pid_file(self) -> list[str]:
        try:
            return (self._data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []

    def _pid(self) -> int | None:
        """Of the server, if it runs: the number may be another program's by now."""
        lines = self._pid_file()
        if not lines or not lines[0].isdigit():
            return None
        if self._process is not None:
            self._process.poll()
        try:
            command = Path(f"/proc/{lines[0]}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        return int(lines[0]) if str(self._data).encode() in command else None

    def _is_ready(self) -> bool:
        lines = self._pid_file()
        return self._pid() is not None and len(lines) >= 8 and lines[7].strip() == "ready"

    def _end(self, how: signal.Signals) -> None:
        pid = self._pid()
        if pid is None and self._process is not None and self._process.poll() is None:
            pid = self._process.pid  # it has not written its file yet
        group = _children(pid) if pid is not None else []
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
            if not _gone(pid, self._process, STOP_S):
                os.kill(pid, signal.SIGKILL)
                _gone(pid, self._process, STOP_S)
            for child in group:  # they end by themselves when their parent is gone, but not at once
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            for child in group:
                _gone(child, None, STOP_S)
        self._process = None
        self._remove_remains()

    def _remove_remains(self) -> None:
        """The segment of shared memory that a killed server leaves, by which the next one would look for survivors."""
        lines = self._pid_file()
        if self._pid() is None and len(lines) >= 7 and (match := re.fullmatch(r"\s*\d+\s+(\d+)\s*", lines[6])):
            subprocess.run(["ipcrm", "-m", match[1]], check=False, capture_output=True, timeout=PROGRAM_S)


def _program(name: str) -> str:
    """Of the newest version that is installed."""
    versions = sorted(LIBRARIES.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]), reverse=True)
    found = str(versions[0]) if versions else shutil.which(name)
    if found is None:
        raise StartupError(f"{name} is missing: {INSTALL}.")
    return found


def _account() -> pwd.struct_passwd | None:
    """Whose the server's files are; None: ours."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(ACCOUNT)
    except KeyError:
        raise StartupError(f"The account {ACCOUNT} is missing: {INSTALL}.") from None


def _ids() -> tuple[int | None, int | None, list[int] | None]:
    """user, group and further groups of the server's processes; None: ours."""
    account = _account()
    return (None, None, None) if account is None else (account.pw_uid, account.pw_gid, [])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(child) for child in text.split()]


def _gone(pid: int, process: subprocess.Popen[bytes] | None, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process is not None:
            process.poll()  # reaps it
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        if state in ("Z", "X"):  # whose parent takes its time
            return True
        time.sleep(0.01)
    return False
