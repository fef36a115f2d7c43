"""What all chapters of the walk stand on: the cloud as its users see it, the one server, and how a row is told.

A chapter is a file of functions beside this one; each does one operation on the server, checks what it must have changed,
and returns what was seen. It raises DemoFailed for what did not come true.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from openstack.connection import Connection
from openstack.exceptions import SDKException

from instar.cli.client import CloudClient
from instar.cli.demo.cloud import DemoCloud
from instar.cli.demo.guest import Console, DemoFailed, Domain, read_console
from instar.cli.demo.places import Places
from instar.cli.demo.report import Row, Story, times_of
from instar.cli.demo.shell import run_in_guest
from instar.errors import InstarError

OPERATION_DEADLINE_S = 120
GUEST_DEADLINE_S = 180.0  # seconds where nothing else runs; a busy machine takes its time
POLL_S = 0.1
LETTER = "/root/letter"


class Life(NamedTuple):
    """What a guest loses when it is restarted: its uptime, and what a program in it has counted."""

    uptime_s: float
    counted: int


class Stage:
    """`user` is the member of a project whose server it is, `admin` moves it between hosts; both are the SDK unmodified.
    `operators` asks for the journal, `story` grows with every row."""

    def __init__(
        self,
        cloud: DemoCloud,
        user: Connection,
        admin: Connection,
        operators: CloudClient,
        story: Story,
        say: Callable[[str], None],
    ) -> None:
        self.cloud = cloud
        self.user = user
        self.admin = admin
        self.operators = operators
        self.places = Places(cloud.directory)
        self.say = say
        self.server_id = ""
        self.host = ""
        self.address = ""
        self.boots = 0  # as the guest counts them on its disk
        self.letter = ""  # what the file on its disk has
        self.volume_id = ""
        self.port_id = ""  # of the second interface
        self.image_id = ""  # of the snapshot
        self.image_boots, self.image_letter = 0, ""  # the guest's count, and the file, when the snapshot was made
        self.before = Life(0, 0)  # as it was when the guest was suspended
        self.left_host = ""  # where the server was before it was shelved, or its host was lost
        self.actions: list[str] = []  # of the operations that the journal must have, oldest first
        self._story = story
        self._forget_times()

    # --- a row of the table -------------------------------------------------------------------------------------------

    def play(self, name: str, step: Callable[[Stage], str]) -> bool:
        self.say(f"{name} …")
        self._forget_times()
        began = time.monotonic()
        try:
            remark, ok = step(self), True
        except (DemoFailed, InstarError, SDKException) as error:
            remark, ok = str(error), False
        seconds = self._seconds if self._seconds is not None else time.monotonic() - began
        self._story.rows.append(Row(name, ok, seconds, self._hypervisor_s, self._control_s, self._guest_s, remark))
        self.say(f"{name}: {'ok' if ok else 'FAILED'}, {remark}")
        return ok

    def _forget_times(self) -> None:
        """Of the row before."""
        self._seconds: float | None = None
        self._hypervisor_s: float | None = None
        self._control_s: float | None = None
        self._guest_s: float | None = None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The seconds of the row, as a user waits."""
        began = time.monotonic()
        yield
        self._seconds = time.monotonic() - began

    @contextmanager
    def operation(self, *actions: str) -> Iterator[None]:
        """The user's seconds, and afterwards whose they were, from the journal, which must have `actions` and no others."""
        known = len(self._journal()) if self.server_id else 0
        with self.timed():
            yield
        new = self._finished_since(known)
        self.actions += actions
        if [one["action"] for one in new] != list(actions):
            raise DemoFailed(f"The journal has {[one['action'] for one in new]}, not {list(actions)}.")
        for one in new:
            if one["result"] != "Success":
                raise DemoFailed(f"{one['action']} ended as {one['result']}: {one['message']}")
        times = [times_of(one) for one in new]
        self._hypervisor_s, self._control_s = sum(each[0] for each in times), sum(each[1] for each in times)

    def _finished_since(self, known: int) -> list[dict[str, Any]]:
        """Operations that have no task_state, such as attaching, may end a moment after their effect is seen."""
        deadline = time.monotonic() + OPERATION_DEADLINE_S
        while True:
            new = self._journal()[known:]
            if all(one["finished_at"] is not None for one in new):
                return new
            if time.monotonic() > deadline:
                raise DemoFailed(f"{new[-1]['action']} is in flight after {OPERATION_DEADLINE_S} s.")
            time.sleep(POLL_S)

    def _journal(self) -> list[dict[str, Any]]:
        """Operations on the server, oldest first."""
        found = self.operators.get_json(f"/v1/servers/{self.server_id}/operations")["operations"]
        return list(reversed(found))

    def diagram(self, operation: str) -> None:
        """That of the newest operation is shown at the end."""
        text = self.operators.get(f"/v1/servers/{self.server_id}/diagram").decode()
        self._story.operation, self._story.diagram = operation, text

    # --- the server ---------------------------------------------------------------------------------------------------

    def settled(self, status: str, *passing: str) -> Any:
        """The server, once no operation is in flight and it is `status`; `passing` may be seen before."""
        deadline = time.monotonic() + OPERATION_DEADLINE_S
        while True:
            server = self.admin.compute.get_server(self.server_id)
            if server.task_state is None and server.status == status:
                self.host = server.compute_host or ""
                return server
            if server.task_state is None and server.status not in passing:
                fault = (server.fault or {}).get("message", "no fault")
                raise DemoFailed(f"The server is {server.status}, not {status}: {fault}")
            if time.monotonic() > deadline:
                raise DemoFailed(f"The server is {server.status}, {server.task_state}, after {OPERATION_DEADLINE_S} s.")
            time.sleep(POLL_S)

    @property
    def domain(self) -> Domain:
        return self.places.domain(self.host, self.server_id)

    def moved(self, before: str, wanted: str) -> None:
        if self.host != wanted:
            raise DemoFailed(f"The server is on {self.host}, not on {wanted}.")
        if self.places.domain(before, self.server_id).running_id() is not None:
            raise DemoFailed(f"A guest of the server still runs on {before}.")

    # --- the guest ----------------------------------------------------------------------------------------------------

    def run(self, command: str) -> str:
        """What `command` prints in the guest's own shell. Raises DemoFailed."""
        return run_in_guest(self.user, self.server_id, command)

    def write_letter(self, text: str) -> None:
        self.run(f"echo '{text}' > {LETTER}; sync")
        self.letter = text

    def check_letter(self, path: str = LETTER) -> None:
        if (read := self.run(f"cat {path}")) != self.letter:
            raise DemoFailed(f"The guest's disk has {read!r}, and {self.letter!r} was written on it.")

    def start_counting(self) -> None:
        """A program in the guest counts on in its memory until the guest ends."""
        # Renamed: a reader never finds it empty.
        self.run(
            "(n=0; while :; do n=$((n+1)); echo $n > /tmp/new; mv /tmp/new /tmp/count; sleep 1; done) > /dev/null 2>&1 &"
            " usleep 300000"
        )

    def life(self) -> Life:
        uptime, _, counted = self.run("cat /proc/uptime /tmp/count").replace("\n", " ").split(" ")
        return Life(float(uptime), int(counted))

    def check_alive(self, before: Life) -> str:
        """The guest is the one of `before`, and goes on."""
        deadline = time.monotonic() + GUEST_DEADLINE_S
        while (now := self.life()).counted <= before.counted:
            if now.uptime_s < before.uptime_s or time.monotonic() > deadline:
                raise DemoFailed(f"The guest does not go on: {before}, then {now}.")
        if now.uptime_s < before.uptime_s:
            raise DemoFailed(f"The guest was restarted: {before}, then {now}.")
        return f"its program counts on, {before.counted} → {now.counted}, up {now.uptime_s:.0f} s"

    def console(self) -> str:
        return str(self.user.compute.get_server_console_output(self.server_id)["output"])

    def wait_for_boot(self, number: int | None = None) -> str:
        """The guest tells on its console that it is up, with its address, and answers ping; then the words for it.

        `number` is what it counts this boot as on its disk: the next one, unless the disk is another."""
        before, number = self.boots, self.boots + 1 if number is None else number
        began = time.monotonic()
        while not _is_up(console := read_console(self.console()), number, self.address):
            if time.monotonic() - began > GUEST_DEADLINE_S:
                raise DemoFailed(
                    f"The guest's console shows boot {console.boots}, ready {console.ready}, addresses "
                    f"{console.addresses} after {GUEST_DEADLINE_S:g} s, and not boot {number} with {self.address}."
                )
            time.sleep(POLL_S)
        self.wait_for_ping()
        self._guest_s = time.monotonic() - began
        self.boots = number
        return f"boots on its disk {before} → {number}"

    def wait_for_ping(self) -> None:
        deadline = time.monotonic() + GUEST_DEADLINE_S
        while not self.places.answers_ping(self.host, self.address):
            if time.monotonic() > deadline:
                raise DemoFailed(f"{self.address} did not answer ping within {GUEST_DEADLINE_S:g} s.")
            time.sleep(POLL_S)

    def audit(self) -> list[str]:
        """What on the hosts and in the records has no owner, a line each."""
        findings = json.loads(self.operators.get("/v1/audit"))["findings"]
        return [f"{one['kind']}: {one['subject']} on {one['host']}" for one in findings]


def wait_until(holds: Callable[[], bool], within_s: float, what: str) -> None:
    """Raises DemoFailed with `what` did not happen in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what} within {within_s:g} s.")
        time.sleep(POLL_S)


def _is_up(console: Console, number: int, address: str) -> bool:
    return console.ready == console.boots == number and address in console.addresses
