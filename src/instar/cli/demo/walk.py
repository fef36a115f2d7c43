"""The walk itself: each method is one operation on the guest, through the public APIs, and what it must have changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from openstack.connection import Connection
from openstack.exceptions import ConflictException, SDKException

from instar.cli.client import CloudClient
from instar.cli.demo.cloud import DemoCloud
from instar.cli.demo.guest import Console, DemoFailed, Domain, answers_ping, read_console
from instar.cli.demo.report import Row, Story, times_of
from instar.errors import InstarError

IMAGE, FLAVOR, NETWORK = "tiny", "m1.nano", "private"
OPERATION_DEADLINE_S = 120
GUEST_DEADLINE_S = 90.0
POLL_S = 0.2


class Walk:
    """`story` grows as it goes. The first operation that fails ends the walk: what follows would only repeat it."""

    def __init__(
        self,
        cloud: DemoCloud,
        connection: Connection,
        client: CloudClient,
        libvirt_uri: str,
        story: Story,
        say: Callable[[str], None],
    ) -> None:
        self._story = story
        self._cloud = cloud
        self._connection = connection
        self._client = client
        self._libvirt_uri = libvirt_uri
        self._say = say
        self._server: Any = None
        self._address = ""
        self._boots = 0
        self._forget_times()

    def go(self) -> None:
        steps: tuple[tuple[str, Callable[[], str]], ...] = (
            ("create", self._create),
            ("soft reboot", self._soft_reboot),
            ("hard reboot", self._hard_reboot),
            ("stop", self._stop),
            ("start", self._start),
            ("console log", self._console_log),
            ("server events", self._events),
            ("delete", self._delete),
        )
        for name, step in steps:
            if not self._do(name, step):
                return

    def _do(self, name: str, step: Callable[[], str]) -> bool:
        self._say(f"{name} …")
        self._forget_times()
        began = time.monotonic()
        try:
            remark, ok = step(), True
        except (DemoFailed, InstarError, SDKException) as error:
            remark, ok = str(error), False
        seconds = self._seconds if self._seconds is not None else time.monotonic() - began
        self._story.rows.append(Row(name, ok, seconds, self._hypervisor_s, self._control_s, self._guest_s, remark))
        self._say(f"{name}: {'ok' if ok else 'FAILED'}, {remark}")
        return ok

    def _forget_times(self) -> None:
        """Of the operation before."""
        self._seconds: float | None = None
        self._hypervisor_s: float | None = None
        self._control_s: float | None = None
        self._guest_s: float | None = None

    # --- the operations -------------------------------------------------------------------------------------------

    def _create(self) -> str:
        network = self._connection.network.find_network(NETWORK, ignore_missing=False)
        image = self._connection.image.find_image(IMAGE, ignore_missing=False)
        flavor = self._connection.compute.find_flavor(FLAVOR, ignore_missing=False)
        self._let_pings_in()
        with self._operation("create"):
            self._server = self._connection.compute.create_server(
                name="demo", image_id=image.id, flavor_id=flavor.id, networks=[{"uuid": network.id}], config_drive=True
            )
            self._cloud.footprint.instance_ids.add(self._server.id)
            self._server = self._wait_for("ACTIVE")
        self._address = next(iter(self._server.addresses.values()))[0]["addr"]
        self._cloud.footprint.taps.update(self._domain.nics())
        self._boots = self._wait_for_boot()
        self._wait_for_ping()
        self._story.diagram = self._client.get(f"/v1/servers/{self._server.id}/diagram").decode()
        return f"{self._address} is on the guest's console and answers ping"

    def _soft_reboot(self) -> str:
        before = self._domain.running_id()
        with self._operation("reboot"):
            self._connection.compute.reboot_server(self._server, "SOFT")
            self._wait_for("ACTIVE")
        return self._check_restarted(before)

    def _hard_reboot(self) -> str:
        before = self._domain.running_id()
        self._domain.remove_nics(deadline_s=30)
        if answers_ping(self._address):
            raise DemoFailed("The guest answers ping without a NIC.")
        self._say("removed the NIC from the running domain, behind the cloud's back: no ping any more")
        with self._operation("reboot"):
            self._connection.compute.reboot_server(self._server, "HARD")
            self._wait_for("ACTIVE")
        nics = self._domain.nics()
        if len(nics) != 1:
            raise DemoFailed(f"The domain has {len(nics)} NICs after the hard reboot.")
        return f"the NIC is back, {self._check_restarted(before)}"

    def _check_restarted(self, before: int | None) -> str:
        """The guest itself restarted: another domain id, and the counter on its disk went up by one."""
        after = self._domain.running_id()
        if after is None or after == before:
            raise DemoFailed(f"The domain id is {after}, and was {before} before the reboot.")
        boots, self._boots = self._boots, self._wait_for_boot()
        if self._boots != boots + 1:
            raise DemoFailed(f"The boot counter on the guest's disk is {self._boots}, after {boots}.")
        self._wait_for_ping()
        return f"domain id {before} → {after}, boots on its disk {boots} → {self._boots}"

    def _stop(self) -> str:
        with self._operation("stop"):
            self._connection.compute.stop_server(self._server)
            self._wait_for("SHUTOFF")
        if (running := self._domain.running_id()) is not None:
            raise DemoFailed(f"The server is SHUTOFF, but its domain runs as {running}.")
        return "the guest shut down, its domain does not run"

    def _start(self) -> str:
        with self._operation("start"):
            self._connection.compute.start_server(self._server)
            self._wait_for("ACTIVE")
        boots, self._boots = self._boots, self._wait_for_boot()
        if self._boots != boots + 1:
            raise DemoFailed(f"The boot counter on the guest's disk is {self._boots}, after {boots}.")
        self._wait_for_ping()
        return f"boots on its disk {boots} → {self._boots}, answers ping"

    def _console_log(self) -> str:
        with self._timed():
            log = self._console()
        last = [line.strip() for line in log.splitlines() if "INSTAR-" in line][-1]
        return f"{len(log.splitlines())} lines, the last of the guest's own: {last}"

    def _events(self) -> str:
        with self._timed():
            actions = [one.action for one in self._connection.compute.server_actions(self._server)]
        expected = ["start", "stop", "reboot", "reboot", "create"]
        if actions != expected:
            raise DemoFailed(f"The server's actions are {actions}, not {expected}.")
        return ", ".join(reversed(actions))

    def _delete(self) -> str:
        server_id = self._server.id
        with self._operation("delete"):
            self._connection.compute.delete_server(self._server)
            self._connection.compute.wait_for_delete(self._server, interval=POLL_S, wait=OPERATION_DEADLINE_S)
        if Domain(self._libvirt_uri, server_id).running_id() is not None:
            raise DemoFailed("The server is deleted, but its domain runs.")
        return "server and domain are gone"

    # --- waiting --------------------------------------------------------------------------------------------------

    @property
    def _domain(self) -> Domain:
        return Domain(self._libvirt_uri, self._server.id)

    def _let_pings_in(self) -> None:
        """The default security group lets nothing in from outside."""
        project = self._connection.current_project_id
        group = next(iter(self._connection.network.security_groups(name="default", project_id=project)))
        try:
            self._connection.network.create_security_group_rule(
                security_group_id=group.id, direction="ingress", ethertype="IPv4", protocol="icmp"
            )
        except ConflictException:
            return

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds = time.monotonic() - began

    @contextmanager
    def _operation(self, action: str) -> Iterator[None]:
        """The user's seconds, and afterwards whose they were, from the journal."""
        with self._timed():
            yield
        newest = self._client.get_json(f"/v1/servers/{self._server.id}/operations")["operations"][0]
        if newest["action"] != action or newest["result"] != "Success":
            raise DemoFailed(f"The journal's last operation is {newest['action']}: {newest['message'] or newest['result']}")
        self._hypervisor_s, self._control_s = times_of(newest)

    def _wait_for(self, status: str) -> Any:
        # Read anew: the SDK believes the status that it has seen last, which is that of before.
        now = self._connection.compute.get_server(self._server.id)
        return self._connection.compute.wait_for_server(now, status=status, interval=POLL_S, wait=OPERATION_DEADLINE_S)

    def _console(self) -> str:
        return str(self._connection.compute.get_server_console_output(self._server)["output"])

    def _wait_for_boot(self) -> int:
        """The guest tells on its console that it is up, with its address, for a boot that it had not told of before.

        The number of the boot, which it counts on its disk."""
        began = time.monotonic()
        console = Console(0, 0, [])
        while time.monotonic() - began < GUEST_DEADLINE_S:
            console = read_console(self._console())
            if console.ready > self._boots and console.ready == console.boots and self._address in console.addresses:
                self._guest_s = time.monotonic() - began
                return console.boots
            time.sleep(POLL_S)
        raise DemoFailed(
            f"The guest's console shows boot {console.boots}, ready {console.ready}, addresses {console.addresses} after "
            f"{GUEST_DEADLINE_S:g} s, and not a new boot with {self._address}."
        )

    def _wait_for_ping(self) -> None:
        deadline = time.monotonic() + GUEST_DEADLINE_S
        while not answers_ping(self._address):
            if time.monotonic() > deadline:
                raise DemoFailed(f"{self._address} did not answer ping within {GUEST_DEADLINE_S:g} s.")
            time.sleep(POLL_S)
