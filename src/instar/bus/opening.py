"""Which bus a process uses, by its settings. For the program alone: nobody else knows which one it is."""

from __future__ import annotations

from instar.bus.contract import Bus
from instar.bus.memory import MemoryBus
from instar.bus.rabbitmq import RabbitMqBus
from instar.bus.rabbitmq_wire import AGENT_QUEUE
from instar.config import Settings


def bus_of(settings: Settings, *, name: str = "instar", agent: str = "") -> Bus:
    """Not opened yet. `name` is the process's, for the broker's lists. `agent`: of an agent of many hosts, a name that it
    keeps from start to start; all its hosts share one queue then."""
    if not settings.bus:
        return MemoryBus()
    return RabbitMqBus(settings.bus, settings.rabbitmq, shared_queue=AGENT_QUEUE + agent if agent else "", name=name)
