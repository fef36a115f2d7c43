"""The owner of the volumes' data, where that is another process: reached by the bus. For APIs and conductors.

Where the owner does not answer it is asked again for a while (`patience_s`), as a step of an operation should; an API gives
it less. Whether work has ended is read from the database: no message has to arrive for that.
"""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

import msgspec
import structlog

from instar.bus.contract import Bus, Message, NobodyListens, Reply
from instar.errors import StorageAway, Unavailable, revive
from instar.model.storage import STORAGE_QUEUE, LookAt, ReleaseVolume, ServeVolume, StorageSubject, StorageWish, TellServed
from instar.model.volume import VolumeConnection
from instar.store import volumes as sql
from instar.store.contract import Store

log = structlog.get_logger()

_T = TypeVar("_T")
_encode = msgspec.msgpack.Encoder().encode

CALL_MAX_S = 30.0  # an owner that works answers sooner; what it did is found done when it is asked again
RETRY_FIRST_S, RETRY_MAX_S = 0.05, 1.0
LOOK_FIRST_S, LOOK_MAX_S = 0.01, 0.5
RETRY_AFTER_S = 5


class RemoteStorage:
    """Implements `Storage`. `patience_s`: how long an owner that is away is waited for."""

    def __init__(self, bus: Bus, store: Store, *, patience_s: float = 60.0) -> None:
        self._bus = bus
        self._store = store
        self._patience_s = patience_s

    async def wake(self, subject: StorageSubject) -> None:
        try:
            await self._bus.send(STORAGE_QUEUE, _message(LookAt(subject), CALL_MAX_S))
        except (NobodyListens, TimeoutError, Unavailable, OSError) as error:
            log.info("storage.not_woken", subject=subject.id, reason=str(error))  # it looks by itself when it is back

    async def ended(self, subject: StorageSubject) -> None:
        pause_s = LOOK_FIRST_S
        while await sql.has_work(self._store, subject.kind, subject.id):
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LOOK_MAX_S)

    async def serve(self, attachment_id: str, *, host_ip: str) -> VolumeConnection:
        return await self._ask(ServeVolume(attachment_id, host_ip), VolumeConnection)

    async def release(self, volume_id: str) -> None:
        await self._ask(ReleaseVolume(volume_id), None)

    async def served(self) -> tuple[str, ...]:
        return await self._ask(TellServed(), tuple[str, ...])

    async def _ask(self, wish: StorageWish, kind: type[_T] | None) -> _T:
        ends_at, pause_s = time.monotonic() + self._patience_s, RETRY_FIRST_S
        while True:
            left_s = max(ends_at - time.monotonic(), 1.0)
            try:
                reply = await self._bus.call(STORAGE_QUEUE, _message(wish, min(left_s, CALL_MAX_S)))
            except (NobodyListens, TimeoutError, Unavailable, OSError) as error:
                if time.monotonic() + pause_s > ends_at:
                    log.warning("storage.away", wish=type(wish).__name__, reason=repr(error))
                    raise StorageAway(retry_after_s=RETRY_AFTER_S) from error
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
                continue
            return _answer(reply, kind)


def _message(wish: StorageWish, deadline_s: float) -> Message:
    return Message(type(wish).__name__, _encode(wish), deadline_s)


def _answer(reply: Reply, kind: type[_T] | None) -> _T:
    if reply.error is not None:
        raise revive(*reply.error)
    return msgspec.msgpack.decode(reply.body, type=kind) if kind is not None else None  # type: ignore[return-value]
