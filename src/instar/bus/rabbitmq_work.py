"""Commands from a broker that are worked on: limits, and what is answered when one comes twice. Used by `rabbitmq.py`.

A command comes twice when the broker did not hear of its acknowledgement, and when a caller asks again after a lost
connection: both copies have one id. The second finds the work at hand, or its answer for a while; after that the work is
done again, which handlers stand.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

import structlog

from instar.bus import rabbitmq_wire as wire
from instar.bus.contract import CommandHandler, Message, Reply

log = structlog.get_logger()

ANSWERS_MAX = 2000
ANSWERS_KEPT_S = 120.0
ANSWER_KEPT_MAX_BYTES = 65_536

Answer = tuple[str, bytes]  # type and body of what is sent back


class Served:
    """One `serve` of the contract: a handler and how many it works on at once."""

    def __init__(self, queue: str, handler: CommandHandler, concurrency_max: int) -> None:
        self.queue = queue
        self.concurrency_max = concurrency_max
        self._handler = handler
        # Also here: the work that an earlier connection brought may still be at hand when the next one brings more, and
        # a process of many hosts takes more from the broker than one host may work on.
        self._slots = asyncio.Semaphore(concurrency_max)

    async def work(self, message: Message) -> Reply:
        async with self._slots:
            return await self._handler(message)


class Work:
    """All commands at hand in this process, by their id."""

    def __init__(self, message_max_bytes: int) -> None:
        self._message_max_bytes = message_max_bytes
        self._running: dict[str, _Running] = {}
        self._answers: OrderedDict[str, tuple[float, Answer]] = OrderedDict()

    def begin(self, id_: str, served: Served, message: Message, settle: Callable[[Answer], None]) -> None:
        """`settle` is called with the answer, once; not when `close` comes first."""
        if (kept := self._answers.get(id_)) is not None:
            settle(kept[1])
        elif (running := self._running.get(id_)) is not None:
            running.settle.append(settle)
        else:
            running = self._running[id_] = _Running([settle])
            running.task = asyncio.create_task(self._do(id_, served, message, running))

    async def close(self) -> None:
        """What is at hand ends; the broker gives it to the next."""
        tasks = [one.task for one in self._running.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _do(self, id_: str, served: Served, message: Message, running: _Running) -> None:
        answer: Answer
        try:
            body = wire.encode_reply(await served.work(message))
            answer = (wire.REPLY, body)
            if len(body) > self._message_max_bytes:
                answer = (wire.FAILED, b"the reply is too large")
        except Exception as error:
            log.exception("bus.command_failed", queue=served.queue, kind=message.kind)
            answer = (wire.FAILED, type(error).__name__.encode())
        finally:
            self._running.pop(id_, None)
        self._keep(id_, answer)
        for settle in running.settle:
            settle(answer)

    def _keep(self, id_: str, answer: Answer) -> None:
        now = time.monotonic()
        while self._answers and (
            len(self._answers) >= ANSWERS_MAX or next(iter(self._answers.values()))[0] < now - ANSWERS_KEPT_S
        ):
            self._answers.popitem(last=False)
        if answer[0] == wire.REPLY and len(answer[1]) <= ANSWER_KEPT_MAX_BYTES:
            self._answers[id_] = (now, answer)


class _Running:
    """A command at hand, and what is to be done with its answer for each time that it came."""

    def __init__(self, settle: list[Callable[[Answer], None]]) -> None:
        self.settle = settle
        self.task: asyncio.Task[None] | None = None  # held here: the loop itself does not keep it
