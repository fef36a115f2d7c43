"""Guests on two hosts through the whole life of an instance: what was written, counted and attached before is there after.

One story, told in parts: each takes the guests as the part before left them, since a boot costs seconds.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openstack.exceptions import ConflictException

from tests.endtoend.host_leftovers import processes
from tests.endtoend.hosted_guest import HostedGuest
from tests.endtoend.running_cloud import wait_until
from tests.endtoend.two_hosts_story import FOLLOWS_MAX_S, HOSTS, TwoHostsStory, story_of_two_hosts
from tests.patience import patience

pytestmark = [pytest.mark.host, pytest.mark.guest, pytest.mark.slow]

KEPT = "/root/kept"
SILENCE_MAX_S = 1.0  # longer than what is usual now
CALM_S = 3.0
GIB = 1024  # MiB
PASSWORD = "correct horse, battery: staple"
# The salt is part of what the file keeps: hashed again with it, the password must give the same.
IS_PASSWORD = """
salt=$(awk -F '[:$]' '$1 == "root" { print $4 }' /etc/shadow)
[ "$(mkpasswd -m sha512 -S "$salt" "$password")" = "$(awk -F : '$1 == "root" { print $2 }' /etc/shadow)" ] && echo yes
"""

# Each number is on the volume, past all caches, before it is told.
WRITE = """
writing='n=0; while [ ! -e /run/enough ]; do n=$((n + 1)); echo number $n > /run/next
echo $n > /run/soon
dd if=/run/next of=/dev/{device} conv=fsync 2> /run/said && mv /run/soon /run/written || cat /run/said >> /run/complaints
usleep 50000; done; : > /run/finished'
echo 0 > /run/written; : > /run/complaints
setsid sh -c "$writing" < /dev/null > /dev/null 2>&1 &
"""


class Life:
    """`guest` is taken from host to host; `neighbour` looks on, and is broken and repaired. `volume` is the guest's."""

    def __init__(self, story: TwoHostsStory) -> None:
        self.story, self.cloud, self.sdk = story, story.cloud, story.sdk
        self.guest = story.build("guest", "host-1")
        self.neighbour = story.build("neighbour", "host-2")
        self.volume = story.volume(name="moving", size=1)
        self.image_id = ""
        for one in (self.guest, self.neighbour):
            story.done(one, "create", "ACTIVE")
        for one in (self.guest, self.neighbour):
            one.wait_for_new_boot()
        self.guest.start_counting()
        self.more = self.sdk.compute.create_flavor(name="more", ram=160, vcpus=1, disk=2)

    def check_kept(self) -> None:
        """Of the guest: what it wrote on its own disk, and what it wrote on its volume."""
        assert self.guest.read(KEPT) == "precious"
        assert self.guest.ssh(f"head -n 1 /dev/{self.guest.device_of(self.volume)}") == "on the volume"


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with story_of_two_hosts(tmp_path_factory.mktemp("story"), INSTAR_VOLUME_LISTEN="0.0.0.0") as story:
        story.hide_volumes_from("host-2")
        yield Life(story)


def test_guests_on_two_hosts_reach_each_other(life: Life) -> None:
    assert (life.guest.host, life.neighbour.host) == HOSTS
    wait_until(lambda: life.guest.reaches(life.neighbour) and life.neighbour.reaches(life.guest), 10)


def test_a_volume_goes_from_guest_to_guest(life: Life) -> None:
    story, volume = life.story, life.volume
    story.attach(life.neighbour, volume)
    device = life.neighbour.device_of(volume)
    assert device is not None and life.neighbour.disk_mib(device) == GIB
    life.neighbour.ssh(f"echo on the volume | dd of=/dev/{device} conv=fsync 2> /dev/null")
    story.detach(life.neighbour, volume)
    story.attach(life.guest, volume)
    life.guest.write(KEPT, "precious")
    life.check_kept()


def test_a_volume_of_another_machine_is_written_on_whoever_is_killed(life: Life) -> None:
    """The neighbour's host does not see the volumes: its agent only sees to the processes between them."""
    story, neighbour = life.story, life.neighbour
    volume = story.volume(name="afar", size=1)
    story.attach(neighbour, volume)
    device = neighbour.device_of(volume)
    (relay,) = story.relays_on("host-2")
    neighbour.ssh(WRITE.format(device=device))

    def written() -> int:
        return int(neighbour.ssh("cat /run/written").splitlines()[-1])

    def goes_on() -> None:
        before = written()
        wait_until(lambda: written() > before + 1, 60, every_s=0.2)

    goes_on()
    agent = story.hosts["host-2"].agent
    assert agent is not None
    os.kill(agent, signal.SIGKILL)
    goes_on()
    serving = [pid for pid, words in processes() if "qemu-storage-daemon" in words and volume in words]
    assert len(serving) == 2  # the volume's own, and the one that gives it to other machines
    for pid in serving:
        os.kill(pid, signal.SIGKILL)
        goes_on()
    assert story.relays_on("host-2") == [relay]
    wait_until(lambda: story.hosts["host-2"].agent not in (None, agent) and story.is_up("host-2"), 30)
    os.kill(relay, signal.SIGKILL)
    goes_on()
    neighbour.ssh("touch /run/enough; while [ ! -e /run/finished ]; do usleep 50000; done")
    assert "error" not in neighbour.ssh("cat /run/complaints")
    number = written()
    story.detach(neighbour, volume)
    assert story.relays_on("host-2") == []
    story.attach(life.guest, volume)  # where it is seen
    assert story.relays_on("host-1") == []
    assert life.guest.ssh(f"head -n 1 /dev/{life.guest.device_of(volume)}") == f"number {number}"
    story.detach(life.guest, volume)


def test_pause_and_suspend_keep_the_memory(life: Life) -> None:
    guest, compute = life.guest, life.sdk.compute
    before = guest.pulse()
    compute.pause_server(guest.id)
    life.story.done(guest, "pause", "PAUSED")
    assert not life.neighbour.reaches(guest)
    compute.unpause_server(guest.id)
    life.story.done(guest, "unpause", "ACTIVE")
    guest.check_goes_on(before)
    compute.suspend_server(guest.id)
    life.story.done(guest, "suspend", "SUSPENDED")
    assert guest.emulators() == []
    compute.resume_server(guest.id)
    life.story.done(guest, "resume", "ACTIVE")
    guest.check_goes_on(before)
    life.check_kept()


def test_a_network_interface_comes_and_goes_while_it_runs(life: Life) -> None:
    guest, compute = life.guest, life.sdk.compute
    port = compute.create_server_interface(guest.id, net_id=life.story.network.id)
    address = port.fixed_ips[0]["ip_address"]
    wait_until(lambda: f" {address}/" in guest.ssh("ip -4 -o address show"), FOLLOWS_MAX_S, every_s=0.3)
    assert len(guest.nic_names()) == 2
    compute.delete_server_interface(port.port_id, server=guest.id)
    wait_until(lambda: len(guest.nic_names()) == 1, FOLLOWS_MAX_S, every_s=0.3)
    wait_until(lambda: life.sdk.network.find_port(port.port_id) is None, FOLLOWS_MAX_S)


def test_the_guest_agent_sets_the_password(life: Life) -> None:
    guest = life.neighbour
    life.sdk.compute.change_server_password(guest.id, PASSWORD)
    life.story.done(guest, "changePassword", "ACTIVE")
    assert has_password(guest, PASSWORD)
    guest.ssh("kill $(cat /run/qemu-ga.pid); sleep 1")
    with pytest.raises(ConflictException, match="runs no guest agent"):
        life.sdk.compute.change_server_password(guest.id, "another one")
    assert has_password(guest, PASSWORD)


def has_password(guest: HostedGuest, password: str) -> bool:
    return guest.ssh(f"password='{password}'; {IS_PASSWORD}", may_end=True) == "yes"


def test_a_running_guest_does_not_notice_that_an_image_is_made_of_it(life: Life) -> None:
    guest, before = life.guest, life.guest.pulse()
    guest.write("/root/in-the-image", "copied")
    life.image_id = life.sdk.compute.create_server_image(guest.id, "of-a-running-guest").id
    life.story.done(guest, "createImage", "ACTIVE")
    guest.check_goes_on(before)
    shown = life.sdk.image.get_image(life.image_id)
    assert (shown.status, shown.properties["image_type"]) == ("active", "snapshot")


def test_live_migration_is_hardly_noticed(life: Life) -> None:
    guest, before, source = life.guest, life.guest.pulse(), life.guest.host
    began = life.neighbour.start_pinging(guest)
    time.sleep(CALM_S)
    calm_s = life.neighbour.longest_silence(began)  # of a machine that has other things to do, too
    began = life.neighbour.start_pinging(guest)
    life.sdk.compute.live_migrate_server(guest.id, host=None, block_migration="auto")
    life.story.done(guest, "live-migration", "ACTIVE")
    silence_s = life.neighbour.longest_silence(began)
    print(f"longest silence of a live migration: {silence_s:.2f} s, before it: {calm_s:.2f} s")
    assert guest.host == life.story.other_than(source)
    assert len(guest.emulators()) == 1
    guest.check_goes_on(before)
    life.check_kept()
    guest.write("/root/written-there", "yes")
    (migration,) = life.cloud.admin.get(f"/os-migrations?instance_uuid={guest.id}")["migrations"]
    assert (migration["migration_type"], migration["status"]) == ("live-migration", "completed")
    assert silence_s < SILENCE_MAX_S * patience() + 3 * calm_s
    life.story.check_nothing_leaked()


def test_moved_and_repaired_they_keep_what_they_had(life: Life) -> None:
    """Two guests at once: a boot keeps one core busy, and there are two."""
    with ThreadPoolExecutor(2) as threads:
        tales = [threads.submit(tale, life) for tale in (moves_of_the_guest, repairs_of_the_neighbour)]
    for tale in tales:
        tale.result()
    wait_until(lambda: life.neighbour.reaches(life.guest), 10)
    life.story.check_nothing_leaked()


def moves_of_the_guest(life: Life) -> None:
    check_cold_migration(life)
    check_resize_and_revert(life)
    check_resize_and_confirm(life)
    check_shelve_and_unshelve_elsewhere(life)


def check_cold_migration(life: Life) -> None:
    story, guest, source = life.story, life.guest, life.guest.host
    life.sdk.compute.migrate_server(guest.id)
    story.done(guest, "migrate", "VERIFY_RESIZE")
    assert guest.host == story.other_than(source)
    guest.wait_for_new_boot()
    life.check_kept()
    life.sdk.compute.confirm_server_resize(guest.id)
    story.done(guest, "confirmResize", "ACTIVE")


def check_resize_and_revert(life: Life) -> None:
    story, guest, source = life.story, life.guest, life.guest.host
    life.sdk.compute.resize_server(guest.id, life.more)
    story.done(guest, "resize", "VERIFY_RESIZE")
    life.sdk.compute.revert_server_resize(guest.id)
    story.done(guest, "revertResize", "ACTIVE")
    guest.wait_for_new_boot()
    assert guest.host == source and guest.disk_mib() == GIB
    life.check_kept()


def check_resize_and_confirm(life: Life) -> None:
    guest = life.guest
    life.sdk.compute.resize_server(guest.id, life.more)
    life.story.done(guest, "resize", "VERIFY_RESIZE")
    guest.wait_for_new_boot()
    assert guest.disk_mib() == 2 * GIB
    wait_until(lambda: guest.root_mib() > 1.8 * GIB, FOLLOWS_MAX_S, every_s=0.3)  # it grows it after the boot
    life.sdk.compute.confirm_server_resize(guest.id)
    life.story.done(guest, "confirmResize", "ACTIVE")
    life.check_kept()


def check_shelve_and_unshelve_elsewhere(life: Life) -> None:
    story, guest, source, address = life.story, life.guest, life.guest.host, life.guest.address
    life.sdk.compute.shelve_server(guest.id)
    server = story.done(guest, "shelve", "SHELVED_OFFLOADED")
    assert server["OS-EXT-SRV-ATTR:host"] is None and guest.emulators() == []
    life.sdk.compute.unshelve_server(guest.id, host=story.other_than(source))
    story.done(guest, "unshelve", "ACTIVE")
    guest.wait_for_new_boot()
    assert (guest.host, guest.address) == (story.other_than(source), address)
    assert guest.disk_mib() == 2 * GIB
    life.check_kept()


def repairs_of_the_neighbour(life: Life) -> None:
    check_rescue_and_unrescue(life)
    check_rebuild_with_the_image_of_the_other(life)


def check_rescue_and_unrescue(life: Life) -> None:
    story, guest = life.story, life.neighbour
    guest.write("/root/config", "broken")
    life.sdk.compute.rescue_server(guest.id)
    story.done(guest, "rescue", "RESCUE")
    guest.wait_for_new_boot()
    assert guest.read("/root/config") == "", "it runs from the rescue disk"
    guest.ssh("mount /dev/vdb1 /mnt && grep -q broken /mnt/root/config && echo repaired > /mnt/root/config && umount /mnt")
    life.sdk.compute.unrescue_server(guest.id)
    story.done(guest, "unrescue", "ACTIVE")
    guest.wait_for_new_boot()
    assert guest.read("/root/config") == "repaired"


def check_rebuild_with_the_image_of_the_other(life: Life) -> None:
    guest, before = life.neighbour, (life.neighbour.id, life.neighbour.host, life.neighbour.address)
    life.sdk.compute.rebuild_server(guest.id, life.image_id, metadata={"rebuilt": "yes"})
    server = life.story.done(guest, "rebuild", "ACTIVE")
    guest.wait_for_new_boot()
    assert (server["id"], guest.host, guest.address) == before
    assert (server["image"]["id"], server["metadata"]) == (life.image_id, {"rebuilt": "yes"})
    assert guest.read("/root/in-the-image") == "copied" and guest.read(KEPT) == "precious"
    assert guest.read("/root/config") == ""


def test_guests_of_a_dead_host_live_on_elsewhere_and_only_there(life: Life) -> None:
    """One that boots from a volume keeps what it wrote; of the other one there is what its image has."""
    story, neighbour = life.story, life.neighbour
    dead, left = neighbour.host, story.other_than(neighbour.host)
    if life.guest.host == dead:  # it is not its turn
        life.sdk.compute.live_migrate_server(life.guest.id, host=left, block_migration="auto")
        story.done(life.guest, "live-migration", "ACTIVE")
    volume = story.volume(name="root", size=1, image_id=story.image.id)
    boot = {"boot_index": 0, "uuid": volume, "source_type": "volume", "destination_type": "volume"}
    booted = story.build("on-a-volume", dead, block_device_mapping_v2=[boot])
    story.done(booted, "create", "ACTIVE")
    booted.wait_for_new_boot()
    assert booted.device_of(volume) == "vda"
    booted.write(KEPT, "on-a-volume")
    neighbour.write("/root/on-the-dead-host", "lost")
    from_the_image = neighbour.read("/root/in-the-image")
    story.hosts[dead].power_off()
    wait_until(lambda: not story.is_up(dead), FOLLOWS_MAX_S)
    for guest in (booted, neighbour):
        assert guest.emulators() == []
        life.sdk.compute.evacuate_server(guest.id, host=left)
    for guest in (booted, neighbour):
        story.done(guest, "evacuate", "SHUTOFF")  # since microversion 2.95: whoever evacuated it looks at it first
        assert guest.host == left
        life.sdk.compute.start_server(guest.id)
    for guest in (booted, neighbour):
        story.done(guest, "start", "ACTIVE")
        assert len(guest.emulators()) == 1
    processes = {guest.id: guest.emulators() for guest in (booted, neighbour)}
    story.hosts[dead].power_on()
    for guest in (booted, neighbour):
        guest.wait_for_new_boot()
    assert booted.read(KEPT) == "on-a-volume"
    assert (neighbour.read("/root/in-the-image"), neighbour.read("/root/on-the-dead-host")) == (from_the_image, "")
    wait_until(lambda: story.is_up(dead), FOLLOWS_MAX_S)
    story.check_nothing_leaked()
    assert {guest.id: guest.emulators() for guest in (booted, neighbour)} == processes
    assert story.instances_on(dead) == set()
    story.delete(booted, neighbour)


def test_a_suspended_guest_outlives_a_crash_of_its_host(life: Life) -> None:
    story, guest = life.story, life.guest
    guest.start_counting()
    before, host = guest.pulse(), guest.host
    life.sdk.compute.suspend_server(guest.id)
    story.done(guest, "suspend", "SUSPENDED")
    story.hosts[host].power_off()
    wait_until(lambda: not story.is_up(host), FOLLOWS_MAX_S)
    story.hosts[host].power_on()
    wait_until(lambda: story.is_up(host), FOLLOWS_MAX_S)
    life.sdk.compute.resume_server(guest.id)
    story.done(guest, "resume", "ACTIVE")
    guest.check_goes_on(before)
    life.check_kept()


def test_nothing_is_left_when_all_are_gone(life: Life) -> None:
    story = life.story
    guests = [HostedGuest(life.cloud, one["id"], story.key) for one in life.cloud.admin.get("/servers")["servers"]]
    story.delete(*guests)
    for volume in life.sdk.block_storage.volumes():
        story.volume_is(volume.id, "available")
        life.sdk.block_storage.delete_volume(volume)
    wait_until(lambda: not list(life.sdk.block_storage.volumes()), FOLLOWS_MAX_S)
    made = [image for image in life.sdk.image.images() if image.name != "tiny"]
    assert {image.id for image in made} <= {life.image_id}, "images of shelved servers go with the shelving"
    for image in made:
        life.sdk.image.delete_image(image)
    story.check_nothing_leaked()
    assert [story.instances_on(host) for host in HOSTS] == [set(), set()]
