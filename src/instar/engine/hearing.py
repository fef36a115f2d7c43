"""Answers to the reports of hosts: that they were heard. An agent that hears none for its lease's time shuts its hosts.

Of many conductors two answer each question, by turns: so one that has just died is not missed.
"""

from __future__ import annotations

import msgspec

from instar.bus.contract import Bus, Message
from instar.engine.conductor import Conductor
from instar.model.commands import HOSTS_HEARD
from instar.model.host import HostReport

ANSWERS = 2


class Hearing:
    """`answer` is called by whoever follows the reports in the conductor's process."""

    def __init__(self, bus: Bus, conductor: Conductor) -> None:
        self._bus = bus
        self._conductor = conductor

    async def answer(self, report: HostReport) -> None:
        peers = self._conductor.peers
        place = peers.index(self._conductor.id)
        if any((report.ask + one) % len(peers) == place for one in range(ANSWERS)):
            body = msgspec.msgpack.encode(report.ask)
            await self._bus.publish(HOSTS_HEARD + report.answer_to, Message("HostHeard", body))
