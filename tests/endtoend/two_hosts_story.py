"""A cloud of two hosts and its operator, for stories in which long-lived guests are taken through everything."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openstack

from instar.cli.hosts.local_host import LocalHost
from instar.volumes.local import volumes_runtime
from tests.endtoend.conftest import clean_host
from tests.endtoend.host_leftovers import processes
from tests.endtoend.hosted_guest import HostedGuest
from tests.endtoend.running_cloud import LATEST, RunningCloud, wait_until

HOSTS = ("host-1", "host-2")
SETTLED_MAX_S = 90.0
FOLLOWS_MAX_S = 30.0


class TwoHostsStory:
    """`sdk` is OpenStack's own, as the operator: who else chooses hosts, migrates and evacuates?"""

    def __init__(self, cloud: RunningCloud, folder: Path, stack: ExitStack) -> None:
        self.cloud, self._stack = cloud, stack
        self.connect()
        self.hosts = {name: LocalHost(cloud.directory / "hosts", name) for name in HOSTS}
        self.key = folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True, timeout=120)
        self.sdk.compute.create_keypair(name="story", public_key=self.key.with_suffix(".pub").read_text().strip())
        group = self.sdk.network.find_security_group("default", project_id=self.sdk.current_project_id)
        for protocol, port in (("icmp", None), ("tcp", 22)):
            self.sdk.network.create_security_group_rule(
                security_group_id=group.id, direction="ingress", ethertype="IPv4", protocol=protocol,
                port_range_min=port, port_range_max=port,
            )  # fmt: skip
        self.image = self.sdk.image.find_image("tiny")
        self.network = self.sdk.network.find_network("private")

    def connect(self) -> None:
        """Again after a restart of the cloud, whose port may be another one then."""
        self.sdk: openstack.connection.Connection = self._stack.enter_context(_sdk(self.cloud, "instar"))

    def build(self, name: str, host: str, image_id: str | None = None, **more: Any) -> HostedGuest:
        """Accepted, not yet there."""
        server: dict[str, Any] = {
            "name": name, "flavorRef": "1", "networks": [{"uuid": self.network.id}], "key_name": "story",
            "config_drive": True, "availability_zone": f"nova:{host}",
        }  # fmt: skip
        if "block_device_mapping_v2" not in more:
            server["imageRef"] = image_id or self.image.id
        answer = self.cloud.admin.call("POST", "/servers", {"server": server | more})
        assert answer.status_code == 202, answer.text
        return HostedGuest(self.cloud, answer.json()["server"]["id"], self.key)

    def other_than(self, host: str) -> str:
        return HOSTS[1 - HOSTS.index(host)]

    def done(self, guest: HostedGuest, action: str, status: str) -> dict[str, Any]:
        """The server, when it is idle: its newest action was this one, has succeeded, and it has this status."""
        server: dict[str, Any] = {}

        def is_done() -> bool:
            server.update(self.cloud.settled(guest.id, within_s=SETTLED_MAX_S))
            newest = self.actions(guest)[0]
            assert (newest["action"], newest["message"]) == (action, None), (newest, server.get("fault"))
            return bool(server["status"] == status)  # some have no task while they are in flight

        wait_until(is_done, SETTLED_MAX_S)
        return server

    def failed(self, guest: HostedGuest, action: str, status: str) -> dict[str, Any]:
        """The fault, when the server is idle again, as it was before."""
        server = self.cloud.settled(guest.id, status, within_s=SETTLED_MAX_S)
        newest = self.actions(guest)[0]
        assert (newest["action"], newest["message"]) == (action, "Error"), newest
        fault: dict[str, Any] = server["fault"]
        return fault

    def actions(self, guest: HostedGuest) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.cloud.admin.get(f"/servers/{guest.id}/os-instance-actions")["instanceActions"]
        return found

    # --- hosts ------------------------------------------------------------------------------------------------------

    def is_up(self, host: str) -> bool:
        return any(
            one["state"] == "up"
            for one in self.cloud.admin.get(f"/os-services?host={host}")["services"]
            if one["binary"] == "nova-compute"
        )

    def instances_on(self, host: str) -> set[str]:
        """Of which this host keeps files."""
        folder = self.hosts[host].directory / "instances"
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def hide_volumes_from(self, host: str) -> None:
        """As if the host were another machine: it does not see the directory of the volumes' sockets."""
        directory = volumes_runtime(self.cloud.directory)
        directory.mkdir(mode=0o711, exist_ok=True)
        (directory / "stays").touch()  # a directory that goes and comes again would be seen
        hide = self.hosts[host].inside("mount", "-t", "tmpfs", "-o", "mode=0711", "hidden", str(directory))
        subprocess.run(hide, check=True, capture_output=True, timeout=120)

    def relays_on(self, host: str) -> list[int]:
        """Processes by which guests of this host reach volumes of other machines."""
        folder = str(self.hosts[host].runtime / "volumes")
        return [pid for pid, words in processes() if "qemu-storage-daemon" in words.split()[0] and folder in words]

    # --- volumes ----------------------------------------------------------------------------------------------------

    def volume(self, **fields: Any) -> str:
        """The id of a new one, which is there. `fields` as of the SDK's create_volume."""
        volume_id = str(self.sdk.block_storage.create_volume(**fields).id)
        self.volume_is(volume_id, "available")
        return volume_id

    def volume_is(self, volume_id: str, status: str) -> None:
        wait_until(lambda: self.sdk.block_storage.get_volume(volume_id).status == status, SETTLED_MAX_S)

    def attach(self, guest: HostedGuest, volume_id: str) -> None:
        """And the guest sees it."""
        self.sdk.compute.create_volume_attachment(guest.id, volume_id=volume_id)
        self.volume_is(volume_id, "in-use")
        wait_until(lambda: guest.device_of(volume_id) is not None, FOLLOWS_MAX_S, every_s=0.3)

    def detach(self, guest: HostedGuest, volume_id: str) -> None:
        self.sdk.compute.delete_volume_attachment(guest.id, volume_id)
        self.volume_is(volume_id, "available")
        wait_until(lambda: guest.device_of(volume_id) is None, FOLLOWS_MAX_S, every_s=0.3)

    # --- the end ----------------------------------------------------------------------------------------------------

    def delete(self, *guests: HostedGuest) -> None:
        for guest in guests:
            self.sdk.compute.delete_server(guest.id)
        for guest in guests:
            self.cloud.gone(guest.id, SETTLED_MAX_S)
            assert guest.emulators() == []

    def check_nothing_leaked(self) -> None:
        """Hosts are told of what they have to forget, and do it soon after."""
        try:
            wait_until(lambda: self.cloud.admin.findings() == [], FOLLOWS_MAX_S, every_s=0.2)
        except AssertionError:
            raise AssertionError(self.cloud.admin.findings()) from None


@contextmanager
def story_of_two_hosts(folder: Path, **settings: str) -> Iterator[TwoHostsStory]:
    with clean_host() as make, ExitStack() as stack:
        cloud = make("libvirt", "--hosts", "2", **settings)
        cloud.start()
        yield TwoHostsStory(cloud, folder, stack)
        assert cloud.terminate() == 0


@contextmanager
def _sdk(cloud: RunningCloud, name: str) -> Iterator[openstack.connection.Connection]:
    config = openstack.config.OpenStackConfig(config_files=[str(cloud.directory / "clouds.yaml")])
    region = config.get_one(cloud=name, compute_default_microversion=LATEST)
    with openstack.connection.Connection(config=region) as connection:
        yield connection
