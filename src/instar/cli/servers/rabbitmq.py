"""A private RabbitMQ broker in a directory of its own, on free ports of loopback. For `make up-distributed` and tests.

It outlives the process that started it: whoever makes a `PrivateRabbitMq` of the same directory stops, kills, or starts
it again with what it kept. Every method blocks; call them in a thread. Needs Debian's rabbitmq-server, whose own service
stays untouched.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import msgspec

from instar.errors import StartupError

PROGRAMS = Path("/usr/lib/rabbitmq/bin")  # not the wrapper on PATH, which insists on the system's own paths
START_MAX_S = 90.0
STOP_MAX_S = 30.0
CTL_MAX_S = 60.0
POLL_S = 0.05
LOOPBACK = "127.0.0.1"
USER = "rabbitmq"
ADMIN = "instar"


class Tls(msgspec.Struct, frozen=True):
    """PEM files of the broker; clients are asked for certificates of the same authority, and may have none."""

    authority: Path
    certificate: Path
    key: Path


class _Broker(msgspec.Struct, frozen=True):
    """What stays the same from one start to the next."""

    name: str
    port: int
    tls_port: int
    distribution_port: int
    epmd_port: int
    password: str


class PrivateRabbitMq:
    """The broker of `directory`, which only its own user needs to reach. It listens on loopback and on `also_on`, addresses
    that this machine has. Raises StartupError where it cannot run."""

    def __init__(self, directory: Path, *, tls: Tls | None = None, also_on: Sequence[str] = ()) -> None:
        self.directory = directory.absolute()
        self._tls = tls
        self._also_on = also_on
        self._record = self.directory / "broker.json"
        self._known: _Broker | None = None

    # --- where it is ------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return self._broker().port

    @property
    def tls_port(self) -> int:
        return self._broker().tls_port

    @property
    def password(self) -> str:
        """Of the user `instar`, who may do everything."""
        return self._broker().password

    def url(
        self, vhost: str = "/", *, user: str = ADMIN, password: str | None = None, tls: bool = False, at: str = "localhost"
    ) -> str:
        """The setting `bus` for this broker, with the password in it."""
        scheme, port = ("amqps", self.tls_port) if tls else ("amqp", self.port)
        secret = quote(self.password if password is None else password, safe="")
        return f"{scheme}://{quote(user, safe='')}:{secret}@{at}:{port}/{quote(vhost, safe='')}"

    @property
    def pid(self) -> int | None:
        """Of the broker, while it runs."""
        try:
            pid = int((self.directory / "pid").read_text(encoding="ascii"))
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        home = str(self.directory / "home").encode()
        return pid if home in command.split(b"\0") else None  # else the number is another process's by now

    # --- start and end ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """It answers. Nothing to do where it runs already."""
        if self.pid is not None:
            self._wait_until_it_answers(None)
            return
        if not (PROGRAMS / "rabbitmq-server").exists():
            raise StartupError("RabbitMQ is not installed: Debian's package is rabbitmq-server.")
        self._prepare()
        with (self.directory / "log" / "start").open("ab") as output:
            starting = subprocess.Popen(
                [*self._as_its_user(), str(PROGRAMS / "rabbitmq-server")], env=self._environment(), cwd=self.directory,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_until_it_answers(starting)
        except BaseException:
            starting.kill()
            starting.wait()
            self._end_epmd()
            raise

    def stop(self) -> None:
        """In order: it writes down what it has, and its helper processes end, too."""
        self._end(signal.SIGTERM)
        self._end_epmd()

    def kill(self) -> None:
        """As in a crash (SIGKILL). What it has promised to keep is in its files."""
        self._end(signal.SIGKILL)

    def remove(self) -> None:
        """It is gone, with its directory."""
        if self._record.exists():
            self.kill()
            self._end_epmd()
        shutil.rmtree(self.directory, ignore_errors=True)

    def control(self, *arguments: str, stdin: str = "") -> str:
        """What `rabbitmqctl` prints. Secrets go in by `stdin`: arguments are for all to see. Raises StartupError."""
        done = subprocess.run(
            [*self._as_its_user(), str(PROGRAMS / "rabbitmqctl"), "-q", *arguments], env=self._environment(),
            cwd=self.directory, input=stdin, capture_output=True, text=True, timeout=CTL_MAX_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise StartupError(f"rabbitmqctl {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")
        return done.stdout

    # --- how --------------------------------------------------------------------------------------------------------

    def _broker(self) -> _Broker:
        if self._known is None:
            try:
                self._known = msgspec.json.decode(self._record.read_bytes(), type=_Broker)
            except FileNotFoundError:
                raise StartupError(f"There is no broker in {self.directory}.") from None
        return self._known

    def _prepare(self) -> None:
        for part in ("home", "log", "mnesia"):
            (self.directory / part).mkdir(mode=0o750, parents=True, exist_ok=True)
        if not self._record.exists():
            ports = _free_ports(4)
            name, password = f"instar-{secrets.token_hex(4)}@localhost", secrets.token_urlsafe(24)
            made = _Broker(name, ports[0], ports[1], ports[2], ports[3], password)
            _write_secret(self._record, msgspec.json.encode(made).decode())
        _write_secret(self.directory / "rabbitmq.conf", self._configuration())
        (self.directory / "env").write_text("", encoding="ascii")
        (self.directory / "enabled_plugins").write_text("[].", encoding="ascii")
        (self.directory / "pid").unlink(missing_ok=True)
        if self._as_its_user():
            owner = pwd.getpwnam(USER)
            self.directory.chmod(0o755)  # what is secret below has modes of its own
            for path in (self.directory, *self.directory.rglob("*")):
                os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)

    def _configuration(self) -> str:
        broker = self._broker()
        lines = [
            f"listeners.tcp.1 = {LOOPBACK}:{broker.port}",
            *(f"listeners.tcp.{number} = {address}:{broker.port}" for number, address in enumerate(self._also_on, 2)),
            f"default_user = {ADMIN}",
            f"default_pass = {broker.password}",
            "default_user_tags.administrator = true",
            "loopback_users = none",
            "disk_free_limit.absolute = 50MB",
            "log.file.level = warning",
        ]
        if self._tls is not None:
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{broker.tls_port}",
                f"ssl_options.cacertfile = {self._tls.authority}",
                f"ssl_options.certfile = {self._tls.certificate}",
                f"ssl_options.keyfile = {self._tls.key}",
                "ssl_options.verify = verify_peer",
                "ssl_options.fail_if_no_peer_cert = false",
            ]
        return "\n".join(lines) + "\n"

    def _environment(self) -> dict[str, str]:
        broker, directory = self._broker(), self.directory
        return {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "LANG": "C.UTF-8",
            "HOME": str(directory / "home"),
            "RABBITMQ_NODENAME": broker.name,
            "RABBITMQ_DIST_PORT": str(broker.distribution_port),
            "ERL_EPMD_PORT": str(broker.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "env"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S1:1 +sbwt none",
            "RUNNING_UNDER_SYSTEMD": "1",  # the script becomes the broker: one process, whose number is known
        }

    def _as_its_user(self) -> list[str]:
        if os.geteuid() != 0:
            return []
        return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]

    def _wait_until_it_answers(self, starting: subprocess.Popen[bytes] | None) -> None:
        deadline = time.monotonic() + START_MAX_S
        while not self._answers():
            if starting is not None and starting.poll() is not None:
                raise StartupError(f"RabbitMQ ended at its start: see {self.directory / 'log'}.")
            if time.monotonic() > deadline:
                raise StartupError(f"RabbitMQ did not answer for {START_MAX_S:.0f} s: see {self.directory / 'log'}.")
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        """It says the first word of its protocol, which it does only when everything behind it has begun."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return connection.recv(1) == b"\x01"
        except OSError:
            return False

    def _end(self, how: signal.Signals) -> None:
        pid = self.pid
        if pid is None:
            return
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, how)
            deadline = time.monotonic() + STOP_MAX_S
            while self._runs(pid):
                if time.monotonic() > deadline:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    break
                time.sleep(POLL_S)
        except ProcessLookupError:
            pass
        finally:
            os.close(descriptor)
        (self.directory / "pid").unlink(missing_ok=True)

    def _runs(self, pid: int) -> bool:
        """Our own child is reaped here."""
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return False
        return Path(f"/proc/{pid}").exists()

    def _end_epmd(self) -> None:
        """The name server of this broker alone, which would stay behind. It refuses while a node is known to it."""
        deadline = time.monotonic() + STOP_MAX_S
        port = self._broker().epmd_port
        while _listens(port) and time.monotonic() < deadline:
            subprocess.run(
                ["epmd", "-port", str(port), "-kill"], capture_output=True, timeout=CTL_MAX_S, check=False,
                env=self._environment(),
            )  # fmt: skip
            time.sleep(POLL_S)


def _free_ports(count: int) -> list[int]:
    """Held all at once while they are chosen, so that they differ."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            held = stack.enter_context(socket.socket())
            held.bind(("127.0.0.1", 0))
            ports.append(held.getsockname()[1])
        return ports


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _write_secret(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)
