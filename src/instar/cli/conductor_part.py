"""A conductor's part of a process: what runs operations, and what sees to everything that no operation does."""

from __future__ import annotations

from instar.cli.services import Part, Services, Together
from instar.engine.conductor import Conductor
from instar.engine.hearing import Hearing
from instar.engine.keeper import Keeper
from instar.engine.notifications import LeftOutbox
from instar.lifecycle.drain import Drainer
from instar.lifecycle.operations import operations, taken
from instar.lifecycle.progress import ProgressKeeper
from instar.lifecycle.reconcile import Reconciler
from instar.lifecycle.timers import Timers
from instar.networks.filter_notes import FilterKeeper


class ConductorPart:
    """`alone`: nobody else uses this database. Open `kept` and `conductor` when `services` are open.

    `kept` is done only while this conductor is the one that does it for all."""

    def __init__(self, services: Services, *, alone: bool) -> None:
        cloud = services.cloud
        self.conductor = Conductor(
            services.store, services.bus, operations(cloud), services.settings.engine, alone=alone, taken=taken(cloud),
            fell_silent=services.hosts.fell_silent, session_of=services.hosts.session_of,
        )  # fmt: skip
        services.hosts.answer = Hearing(services.bus, self.conductor).answer
        self.reconciler = Reconciler(cloud, services.lifecycle)
        self.progress = ProgressKeeper(services.store, services.bus)
        self.timers = Timers(cloud, services.lifecycle)
        self.drainer = Drainer(cloud, services.lifecycle)
        # What one process does for all: it hears what hosts say, compares, and asks for what is due.
        left = LeftOutbox(services.store, services.bus)
        kept: list[Part] = [services.hosts.persister, self.reconciler, self.progress, left, self.timers, self.drainer]
        if services.settings.bus:  # else whoever changes a network tells the hosts itself
            kept.append(FilterKeeper(services.store, services.bus, services.ports.refresh_or_late))
        self.kept = Keeper(services.store, self.conductor, Together(*kept), lease_s=services.settings.engine.lease_s)
