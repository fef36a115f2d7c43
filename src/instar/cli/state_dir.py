"""The directory that holds everything of one cloud, and the lock that keeps a second process out of it."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from instar.errors import StartupError

STREAMS = "streams"  # the directory of the key by which others know a process or a host
PID_WIDTH = 16  # in the lock file; several that share it overwrite each other, at once and whole
MODE = 0o711  # the hypervisor's processes pass through; what is secret has 0600 of its own


def default_dir() -> Path:
    """Where a cloud lives when nobody says: the system's place for root, else the user's own."""
    if os.geteuid() == 0:
        return Path("/var/lib/instar")
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "instar"


class StateDir:
    """`path` is made when it is not there. `cloud_id` tells this cloud's things on a host from another's; one that is given
    wins over the directory's own.

    Raises StartupError when the directory cannot be used."""

    def __init__(self, path: Path, *, cloud_id: str = "") -> None:
        self.path = path.absolute()
        self._cloud_id = cloud_id
        try:
            self.path.mkdir(mode=MODE, parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"The directory {path} cannot be used: {error.strerror}.") from error
        self.database = self.path / "instar.db"
        self.fences = self.path / "fences"
        self.simulated_log = self.path / "simulated.log"
        self.clouds_yaml = self.path / "clouds.yaml"
        self.bus_socket = self.path / "bus.sock"
        self.hosts = self.path / "hosts"
        self._lock_path = self.path / "lock"
        self._lock: int | None = None

    @property
    def cloud_id(self) -> str:
        """8 hexadecimal digits, made at the first start."""
        if self._cloud_id:
            return self._cloud_id
        path = self.path / "cloud-id"
        try:
            return path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            made = secrets.token_hex(4)
            new = path.with_suffix(".new")
            new.write_text(made + "\n", encoding="ascii")
            new.replace(path)
            return made
        except OSError as error:
            raise StartupError(f"The directory {self.path} cannot be used: {error.strerror}.") from error

    def lock(self, *, shared: bool = False) -> None:
        """This process alone uses the directory until it ends; `shared`: together with others of a cloud of many processes.
        Raises StartupError that names who has it."""
        try:
            file = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(f"The directory {self.path} cannot be used: {error.strerror}.") from error
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(file, PID_WIDTH, 0).decode("ascii", errors="ignore").strip() or "?"
            os.close(file)
            raise StartupError(
                f"Another instar (pid {pid}) runs on {self.path}: stop it, or choose another --dir."
            ) from error
        os.pwrite(file, f"{os.getpid()}\n".ljust(PID_WIDTH).encode("ascii"), 0)
        self._lock = file

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
