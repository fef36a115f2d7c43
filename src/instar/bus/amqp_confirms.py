"""Messages that the broker is to confirm, on one channel of a lane. Used by `rabbitmq_link.py`."""

from __future__ import annotations

from collections.abc import Callable

from pamqp.commands import Basic

from instar.bus import amqp_frames as frames
from instar.bus.amqp_lane import Delivered, Lane, LaneChannel
from instar.bus.contract import NobodyListens


class LinkLost(Exception):
    """The connection ended; whether the broker has what was sent last is not known."""


class Unroutable(Exception):
    """No queue is bound for this key."""


class Overfull(Exception):
    """The broker did not take it: the queue has all that it may have."""


class Refused(NobodyListens):
    """Who is logged in may not do this."""


Told = Callable[[Exception | None], None]  # None: the broker has it


class Confirms:
    """Of the channel `number`, whose messages the broker confirms, and on which nobody else sends. `frame_max` in bytes."""

    def __init__(self, lane: Lane, number: int, frame_max: int) -> None:
        self._lane, self._number, self._frame_max = lane, number, frame_max
        self._sent = 0  # the broker counts with us
        self._open: dict[int, tuple[Told, str]] = {}  # in the order of their numbers; with the id of what may come back
        self._mandatory: dict[str, int] = {}  # message id → number
        lane.watch(LaneChannel(number, on_delivery=self._came_back, on_confirm=self._on_confirm))

    def send(
        self, exchange: str, key: str, body: bytes, properties: Basic.Properties, told: Told, *, mandatory: bool
    ) -> None:
        """`told` is called once: with None when the broker has it, on its disk where it is to be kept; with Overfull, with
        what `end` says, and where it is `mandatory` with Unroutable, when not. Raises ConnectionError, and ValueError for
        a name that is too long; nobody is told then."""
        message = frames.publish(
            self._number, exchange, key, properties, body, mandatory=mandatory, frame_max=self._frame_max
        )
        self._lane.write(message)
        self._sent += 1
        id_ = (properties.message_id or "") if mandatory else ""
        self._open[self._sent] = told, id_
        if id_:
            self._mandatory[id_] = self._sent

    def end(self, why: type[Exception]) -> None:
        """Nothing more will be confirmed."""
        unconfirmed, self._open = self._open, {}
        self._mandatory.clear()
        for told, _ in unconfirmed.values():
            told(why())

    def _on_confirm(self, number: int, all_before: bool, kept: bool) -> None:
        if not all_before:
            self._confirm(number, kept)
            return
        reached = []
        for one in self._open:
            if one > number:
                break
            reached.append(one)
        for one in reached:
            self._confirm(one, kept)

    def _confirm(self, number: int, kept: bool) -> None:
        waiting = self._open.pop(number, None)
        if waiting is None:
            return  # it came back
        told, id_ = waiting
        if id_ and self._mandatory.get(id_) == number:
            del self._mandatory[id_]
        told(None if kept else Overfull())

    def _came_back(self, returned: Delivered) -> None:
        """No queue is bound for its key. It is confirmed as well, after this, which means nothing."""
        id_ = returned.properties.message_id if returned.properties is not None else None
        waiting = self._open.pop(self._mandatory.pop(id_ or "", 0), None)
        if waiting is not None:
            waiting[0](Unroutable())
