"""`instar up` as a process of its own, as a user starts it, and the ways in which tests talk to it and end it."""

from __future__ import annotations

import functools
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.endtoend.openstack_shell import OpenstackShell
from tests.patience import patience

INSTAR = Path(sys.executable).with_name("instar")
READY_MAX_S = 60.0
STOP_MAX_S = 30.0
LATEST = "2.96"
# What a test would otherwise wait for; nothing that changes what happens.
SETTINGS = {
    "INSTAR_IDENTITY_ARGON2_MEMORY_KIB": "1024",
    "INSTAR_HOST_HEARTBEAT_S": "0.5",
    "INSTAR_HOST_DOWN_AFTER_S": "8",  # on a busy machine an agent may not get a word in for half of this
    "INSTAR_LIFECYCLE_SHUTDOWN_GRACE_S": "120",
    "INSTAR_LIFECYCLE_WAIT_SOFT_REBOOT_SECONDS": "120",
}


class Caller:
    """A user of the APIs over plain HTTP, for what no client shows: statuses, headers, the shape of faults."""

    def __init__(self, url: str, auth: dict[str, Any]) -> None:
        self.http = httpx.Client(base_url=url, timeout=300, verify=False)
        user = {"name": auth["username"], "domain": {"name": "Default"}, "password": auth["password"]}
        scope = {"project": {"name": auth["project_name"], "domain": {"name": "Default"}}}
        identity = {"methods": ["password"], "password": {"user": user}}
        answer = self.http.post("/identity/v3/auth/tokens", json={"auth": {"identity": identity, "scope": scope}})
        assert answer.status_code == 201, answer.text
        self.token = answer.headers["x-subject-token"]
        self.project_id: str = answer.json()["token"]["project"]["id"]

    def call(self, method: str, path: str, body: Any = None, *, version: str | None = LATEST) -> httpx.Response:
        """A request of the Compute API."""
        headers = {"x-auth-token": self.token}
        if version is not None:
            headers["openstack-api-version"] = f"compute {version}"
        return self.http.request(method, f"/compute/v2.1{path}", json=body, headers=headers)

    def get(self, path: str) -> Any:
        answer = self.call("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def act(self, server_id: str, body: dict[str, Any]) -> httpx.Response:
        return self.call("POST", f"/servers/{server_id}/action", body)

    def other(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """A request of any API of the port."""
        return self.http.request(method, path, json=body, headers={"x-auth-token": self.token})

    def findings(self) -> list[dict[str, Any]]:
        """What the leak audit of the product finds."""
        answer = self.other("GET", "/instar/v1/audit")
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["findings"]
        return found


class RunningCloud:
    """One `instar up`. It may be ended, killed and started again on the same directory."""

    def __init__(self, directory: Path, hypervisor: str, *options: str, settings: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.log_path = directory.with_name(directory.name + ".log")
        self.url = ""
        self._argv = [
            str(INSTAR), "up", "--dir", str(directory), "--port", "0", "--hypervisor", hypervisor, *options,
        ]  # fmt: skip
        self._environ = dict(os.environ) | SETTINGS | (settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._shells: list[OpenstackShell] = []

    # --- the process ------------------------------------------------------------------------------------------------

    def start(self) -> float:
        """Returns how many seconds it took to `ready:`."""
        began = time.monotonic()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=self._environ
            )
        self.url = self._await_ready()
        self._forget_callers()
        return time.monotonic() - began

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._ended()

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._ended()

    def down(self, *options: str) -> str:
        """`instar down`: what it printed."""
        done = subprocess.run(
            [INSTAR, "down", "--dir", self.directory, *options], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        """End it in any case, and remove all that it has on this host."""
        for shell in self._shells:
            shell.close()
        self._shells.clear()
        if self._process is not None and self._process.poll() is None:
            self.terminate()
        if self.directory.exists():
            self.down("--delete")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # --- who talks to it --------------------------------------------------------------------------------------------

    def environ(self, cloud: str = "instar") -> dict[str, str]:
        """What a user of OpenStack's clients exports."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
        return inherited | {"OS_CLIENT_CONFIG_FILE": str(self.directory / "clouds.yaml"), "OS_CLOUD": cloud}

    def shell(self, cloud: str = "instar", **more: str) -> OpenstackShell:
        shell = OpenstackShell(self.environ(cloud) | more)
        self._shells.append(shell)
        return shell

    @functools.cached_property
    def admin(self) -> Caller:
        return self._caller("instar")

    @functools.cached_property
    def demo(self) -> Caller:
        return self._caller("instar-demo")

    def settled(self, server_id: str, *statuses: str, within_s: float = 10.0) -> dict[str, Any]:
        """The server once it has one of these statuses (none given: any) and no task."""
        server: dict[str, Any] = {}

        def is_settled() -> bool:
            server.update(self.admin.get(f"/servers/{server_id}")["server"])
            return server["OS-EXT-STS:task_state"] is None and (not statuses or server["status"] in statuses)

        try:
            wait_until(is_settled, within_s)
        except AssertionError:
            shown = {key: server.get(key) for key in ("id", "status", "OS-EXT-STS:task_state", "fault")}
            raise AssertionError(f"wanted {statuses or 'any status'} within {within_s:g} s, is {shown}") from None
        return server

    def gone(self, server_id: str, within_s: float = 10.0) -> None:
        wait_until(lambda: self.admin.call("GET", f"/servers/{server_id}").status_code == 404, within_s)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _caller(self, cloud: str) -> Caller:
        clouds = yaml.safe_load((self.directory / "clouds.yaml").read_text())["clouds"]
        return Caller(self.url, clouds[cloud]["auth"])

    def _forget_callers(self) -> None:
        """The port may be another one now."""
        for name in ("admin", "demo"):
            caller: Caller | None = self.__dict__.pop(name, None)
            if caller is not None:
                caller.http.close()

    def _ended(self) -> int:
        assert self._process is not None
        try:
            code = self._process.wait(STOP_MAX_S * patience())
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"instar up did not end within {STOP_MAX_S:g} s; {self.log()[-2000:]}") from None
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def _await_ready(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        deadline, said = time.monotonic() + READY_MAX_S * patience(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0 and selector.select(left):
                chunk = os.read(self._process.stdout.fileno(), 65_536)
                said += chunk
                for line in said.decode().splitlines(keepends=True):
                    if line.startswith("ready: ") and line.endswith("\n"):
                        return line.removeprefix("ready: ").strip()
                if not chunk:
                    break
        self._process.kill()
        self._process.wait()
        raise AssertionError(f"instar up did not become ready; it said {said!r} and {self.log()[-3000:]}")


def wait_until(holds: Callable[[], bool], within_s: float, *, every_s: float = 0.05) -> None:
    """Raises AssertionError when it does not hold within the time, which is longer on a machine that is busy otherwise."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within_s * patience(), f"not within {within_s:g} s, {patience():.1f} times"
        time.sleep(every_s)
