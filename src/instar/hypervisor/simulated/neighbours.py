"""Simulated hosts of other processes: what one asks the other when disks or a guest go over. Called by `moves.py`.

Each process has one unix socket for this, which it grants as a stream to the process that may come. A question is one
record, and so is its answer. Hosts of one process do without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from instar.errors import HypervisorError, StreamBroken
from instar.hypervisor.console_offer import SocketGrants
from instar.hypervisor.simulated.machine import Machine
from instar.hypervisor.simulated.records import SimulatedDisk, SimulatedGuest
from instar.hypervisor.simulated.socket_folder import SocketFolder
from instar.model.stream import StreamAddress

VALID_S = 3600.0
ANSWER_MAX_S = 10.0
RECORD_MAX_BYTES = 16 << 20


class AskDisks(msgspec.Struct, frozen=True, tag=True):
    """The disks of the instance that `host` has set aside."""

    host: str
    instance_id: str


class AskReady(msgspec.Struct, frozen=True, tag=True):
    """Whether a guest with these disks and ports could come to `host` now, or runs there already."""

    host: str
    instance_id: str
    disks: tuple[str, ...]
    ports: tuple[str, ...]


class TakeGuest(msgspec.Struct, frozen=True, tag=True):
    """The guest runs on `host` from now on, with this on its disks."""

    host: str
    guest: SimulatedGuest
    disks: dict[str, SimulatedDisk]


class Answer(msgspec.Struct, frozen=True):
    """`refused` says why not; `runs`: the guest is there already."""

    disks: dict[str, SimulatedDisk] = {}
    runs: bool = False
    refused: str = ""


Question = AskDisks | AskReady | TakeGuest
_question = msgspec.msgpack.Decoder(Question)
_answer = msgspec.msgpack.Decoder(Answer)
_encode = msgspec.msgpack.Encoder().encode


class Connects(Protocol):
    """The other side of grants: `streams.StreamClient`."""

    async def connect(self, peer: StreamAddress, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]: ...


class Neighbours:
    """`find` knows the hosts of this process."""

    def __init__(self, grants: SocketGrants, client: Connects, find: Callable[[str], Machine | None]) -> None:
        self._grants, self._client, self._find = grants, client, find
        self._folder: SocketFolder | None = None
        self._server: asyncio.AbstractServer | None = None

    async def open(self) -> None:
        self._folder = await asyncio.to_thread(SocketFolder)
        self._server = await asyncio.start_unix_server(self._serve, self._folder.path / "neighbours")

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            await asyncio.to_thread(folder.remove)

    def address(self, host: str) -> StreamAddress:
        return msgspec.structs.replace(self._grants.address, host=host)

    def let_in(self, peer: StreamAddress, instance_id: str) -> None:
        """The peer's process may ask about this instance. `open` comes first."""
        assert self._folder is not None
        self._grants.grant_socket(peer, _name(instance_id), self._folder.path / "neighbours", valid_s=VALID_S)

    async def ask(self, peer: StreamAddress, instance_id: str, question: Question) -> Answer:
        """Raises StreamBroken where the peer is not there, does not answer, or has not got the disks; StreamRefused where
        it has not let us in; HypervisorError where it cannot take the guest."""
        reader, writer = await self._client.connect(peer, _name(instance_id))
        try:
            async with asyncio.timeout(ANSWER_MAX_S):
                writer.write(_encode(question))
                writer.write_eof()
                answer = _answer.decode(await reader.read())
        except (OSError, TimeoutError, msgspec.DecodeError) as error:
            raise StreamBroken(what=instance_id, host=peer.host, reason="the host does not answer") from error
        finally:
            writer.close()
        if answer.refused and isinstance(question, AskDisks):
            raise StreamBroken(what=instance_id, host=peer.host, reason=answer.refused)
        if answer.refused:
            raise HypervisorError(reason=answer.refused)
        return answer

    # --- what others ask of us ----------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(ANSWER_MAX_S):
                body = await reader.read(RECORD_MAX_BYTES)
                while not reader.at_eof() and len(body) < RECORD_MAX_BYTES:
                    body += await reader.read(RECORD_MAX_BYTES - len(body))
                writer.write(_encode(self._answer(_question.decode(body))))
                await writer.drain()
        except (OSError, TimeoutError, msgspec.DecodeError):
            pass  # whoever asked asks again, or gives up
        finally:
            writer.close()

    def _answer(self, question: Question) -> Answer:
        machine = self._find(question.host)
        if machine is None or machine.away or machine.cut_off:
            return Answer(refused=f"host {question.host} cannot be reached")
        match question:
            case AskDisks(instance_id=instance_id):
                directory = machine.aside.get(instance_id)
                if directory is None:
                    return Answer(refused="the host does not offer the disks any more")
                return Answer(disks=directory.disks)
            case AskReady():
                if machine.running(question.instance_id) is not None:
                    return Answer(runs=True)
                return Answer(refused=machine.lacks(question.instance_id, question.disks, question.ports))
            case TakeGuest(guest=guest, disks=disks):
                if machine.running(guest.instance_id) is None:
                    machine.take_over(guest, disks)
                return Answer(runs=True)


def _name(instance_id: str) -> str:
    return f"simulated/{instance_id}"
