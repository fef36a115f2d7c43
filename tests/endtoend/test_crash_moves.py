"""The cloud is killed while real guests are shelved, resized and migrated live between two hosts: each comes out whole.

Three guests are worked on at once, so that each kill meets three operations, at moments of which one is chosen.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.endtoend.hosted_guest import HostedGuest
from tests.endtoend.running_cloud import Caller, wait_until
from tests.endtoend.two_hosts_story import HOSTS, TwoHostsStory, story_of_two_hosts
from tests.hypervisor.tiny_guest import write_image

pytestmark = [pytest.mark.host, pytest.mark.guest, pytest.mark.slow]

ACTIVE_MAX_S = 60.0
SETTLED_MAX_S = 30.0
MOMENT_MAX_S = 20.0


class Moment(NamedTuple):
    """The cloud is killed when this operation has this task, or so long after it was asked for."""

    action: str
    task: str | None = None
    after_s: float = 0.0


MOMENTS = (
    Moment("shelve", "shelving"),
    Moment("resize", "resize_migrating"),
    Moment("live", after_s=0.4),
    Moment("shelve", "shelving_image_uploading"),
    Moment("resize", "resize_finish"),
    Moment("live", after_s=1.0),
)


class Crashes:
    """A guest for each operation; what is asked of it, and what it may be when all is settled."""

    def __init__(self, story: TwoHostsStory, image_id: str) -> None:
        self.story, self.cloud = story, story.cloud
        self.guests = {
            name: story.build(name, host, image_id, networks="none", config_drive=False)
            for name, host in (("shelve", "host-1"), ("resize", "host-2"), ("live", "host-1"))
        }
        for guest in self.guests.values():
            story.done(guest, "create", "ACTIVE")
        flavors = (story.sdk.compute.create_flavor(name=f"f{n}", ram=128 + n, vcpus=1, disk=1) for n in (1, 2))
        self._flavors = [flavor.id for flavor in flavors]
        self._boots = dict.fromkeys(self.guests, 1)

    def ask(self) -> None:
        """Each guest's operation begins."""
        flavor_id = self._flavors[0]
        self._flavors.reverse()
        live = {"host": self.story.other_than(self.guests["live"].host), "block_migration": "auto"}
        self._act("shelve", {"shelve": None})
        self._act("resize", {"resize": {"flavorRef": flavor_id}})
        self._act("live", {"os-migrateLive": live})

    def wait_for(self, moment: Moment) -> dict[str, Any]:
        """Returns what was seen last of each guest."""
        admin, seen = self.cloud.admin, {}
        if moment.task is None:
            time.sleep(moment.after_s)  # the moment itself: nothing is waited for
        guest = self.guests[moment.action]

        def is_there() -> bool:
            seen[moment.action] = self._task(admin, guest)
            return moment.task is None or seen[moment.action] in (moment.task, None)

        wait_until(is_there, MOMENT_MAX_S, every_s=0.005)
        return seen

    def check_settled(self) -> float:
        """Every guest is in a state that it may be in, runs once or not at all, and has its disk. Returns the seconds."""
        began, ends = time.monotonic(), {"shelve": "SHELVED_OFFLOADED", "resize": "VERIFY_RESIZE", "live": "ACTIVE"}
        for name, guest in self.guests.items():
            server = self.cloud.settled(guest.id, ends[name], "ACTIVE", within_s=SETTLED_MAX_S)
            newest = self.story.actions(guest)[0]
            # Carried on or put back, and the user can tell which.
            assert server["status"] == ends[name] or newest["message"] == "Error", newest
        took_s = time.monotonic() - began
        self.story.check_nothing_leaked()
        for guest in self.guests.values():
            is_off = self.cloud.admin.get(f"/servers/{guest.id}")["server"]["status"] == "SHELVED_OFFLOADED"
            assert len(guest.emulators()) == (0 if is_off else 1)
        return took_s

    def bring_back(self) -> None:
        """All are active again, and none has lost its disk, on which it counts its boots."""
        for name, status, body in (
            ("resize", "VERIFY_RESIZE", {"confirmResize": None}), ("shelve", "SHELVED_OFFLOADED", {"unshelve": None}),
        ):  # fmt: skip
            if self.cloud.admin.get(f"/servers/{self.guests[name].id}")["server"]["status"] == status:
                self._act(name, body)
        for name, guest in self.guests.items():
            self.cloud.settled(guest.id, "ACTIVE", within_s=ACTIVE_MAX_S)
            guest.wait_for_line("TINY boots=.")
            boots = _boots(guest)
            assert boots >= self._boots[name], f"{name} has booted {boots} times, and had {self._boots[name]} times before"
            self._boots[name] = boots
        assert self._boots["live"] == 1, "it never went down"
        self.story.check_nothing_leaked()

    def _act(self, name: str, body: dict[str, Any]) -> None:
        answer = self.cloud.admin.act(self.guests[name].id, body)
        assert answer.status_code in (202, 204), answer.text

    def _task(self, admin: Caller, guest: HostedGuest) -> str | None:
        task: str | None = admin.get(f"/servers/{guest.id}")["server"]["OS-EXT-STS:task_state"]
        return task


def _boots(guest: HostedGuest) -> int:
    """As the guest counts them; a digit and what follows it in ASCII."""
    said = re.findall(r"TINY boots=(.)", guest.console())
    return ord(said[-1]) - ord("0") if said else 0


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = tmp_path_factory.mktemp("crashes")
    write_image(folder / "tiny.raw")
    with story_of_two_hosts(folder, INSTAR_LIFECYCLE_SHUTDOWN_GRACE_S="2") as story:
        image = story.sdk.image.create_image(
            "boot-sector", filename=str(folder / "tiny.raw"), disk_format="raw", container_format="bare", wait=True
        )
        yield Crashes(story, image.id)


def test_killed_while_guests_are_shelved_resized_and_migrated_live(crashes: Crashes) -> None:
    cloud = crashes.cloud
    for moment in MOMENTS:
        crashes.ask()
        seen = crashes.wait_for(moment)
        cloud.kill()
        start_s = cloud.start()
        crashes.story.connect()
        settled_s = crashes.check_settled()
        print(f"killed at {moment}, seen {seen}: ready after {start_s:.2f} s, settled {settled_s:.2f} s later")
        crashes.bring_back()
    crashes.story.delete(*crashes.guests.values())
    crashes.story.check_nothing_leaked()
    assert [crashes.story.instances_on(host) for host in HOSTS] == [set(), set()]
