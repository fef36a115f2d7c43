"""What stands on disks that belong to no host: volumes, and images that were made of simulated disks.

One for all hosts of a world, which give it to each of their machines.
"""

from __future__ import annotations

from instar.hypervisor.simulated.records import NOTHING, SimulatedContent

VOLUMES_MAX = 100_000  # nobody tells a host that a volume is deleted: of more than these, the oldest is blank again
IMAGES_MAX = 100_000  # far more than hosts have in their caches at a time


class SharedContents:
    __slots__ = ("images", "volumes")

    def __init__(self) -> None:
        self.images: dict[str, SimulatedContent] = {}  # by sha256; only those that have something on them
        self.volumes: dict[str, SimulatedContent] = {}  # by volume id; only those that a guest has written

    def of_image(self, sha256: str) -> SimulatedContent:
        return self.images.get(sha256, NOTHING)

    def keep_image(self, sha256: str, content: SimulatedContent) -> None:
        _keep(self.images, sha256, content, IMAGES_MAX)

    def of_volume(self, volume_id: str) -> SimulatedContent:
        return self.volumes.get(volume_id, NOTHING)

    def write_volume(self, volume_id: str, content: SimulatedContent) -> None:
        _keep(self.volumes, volume_id, content, VOLUMES_MAX)


def _keep(contents: dict[str, SimulatedContent], key: str, content: SimulatedContent, most: int) -> None:
    contents[key] = content
    if len(contents) > most:
        del contents[next(iter(contents))]
