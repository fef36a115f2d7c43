"""What operations lean on, handed to each lifecycle function: one record, made where the processes are put together."""

from __future__ import annotations

from typing import NamedTuple

from instar.bus.contract import Bus
from instar.config import Settings
from instar.images.contract import ImageService
from instar.networks.contract import NetworkService
from instar.scheduling.scheduler import Scheduler
from instar.store.contract import Store
from instar.volumes.contract import VolumeService


class Cloud(NamedTuple):
    store: Store
    bus: Bus
    scheduler: Scheduler
    images: ImageService
    networks: NetworkService
    volumes: VolumeService
    settings: Settings
