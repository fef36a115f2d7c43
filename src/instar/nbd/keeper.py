"""The relays that are wanted: started, adopted, watched, started again, ended. One beside the volumes, one on each host.

What is wanted is written down (PLANS/NAME.json, for our eyes only) before it is made so: whoever comes after a crash goes
on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import structlog

from instar.nbd.daemon import daemons
from instar.nbd.making import to_its_end
from instar.nbd.monitor import MonitorError
from instar.nbd.relay import Relay, RelayPlan

log = structlog.get_logger()

RESTART_PAUSE_S = 0.2
RESTART_PAUSE_MAX_S = 10.0
DIRECTORY_ATTEMPTS_MAX = 10
STABLE_S = 10.0  # a process that lived so long died of something new
_decoder = msgspec.json.Decoder(RelayPlan)


class _Kept:
    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.lock = asyncio.Lock()
        self.plan: RelayPlan | None = None  # None: nobody wants it any more
        self.pid = 0
        self.pid_descriptor: int | None = None
        self.started_at = 0.0
        self.pause_s = RESTART_PAUSE_S


class RelayKeeper:
    """`runtime` is a directory of our own, short enough for sockets; `plans` may be kept when the machine restarts."""

    def __init__(self, runtime: Path, plans: Path) -> None:
        self._runtime = runtime
        self._plans = plans
        self._kept: dict[str, _Kept] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Go on with what is written down; what is not ends. One that cannot be started is tried again and again."""
        plans = await asyncio.to_thread(self._read_plans)
        for name in await asyncio.to_thread(daemons, self._runtime):
            if name not in plans:
                await asyncio.to_thread(Relay(self._runtime, name).end)
        for name, plan in plans.items():
            kept = self._of(name)
            kept.plan = plan
            self._bring_back(name, kept)

    async def close(self) -> None:
        """Nobody is watched any more. The processes go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for kept in self._kept.values():
            self._unwatch(kept)

    def plans(self) -> dict[str, RelayPlan]:
        return {name: kept.plan for name, kept in self._kept.items() if kept.plan is not None}

    def is_planned(self, name: str) -> bool:
        """Whether the relay is wanted; also before `open`. Blocking."""
        return (self._plans / f"{name}.json").exists()

    def socket(self, name: str) -> Path:
        """Where a relay to a Unix socket listens."""
        return Relay(self._runtime, name).socket

    async def ensure(self, name: str, plan: RelayPlan, *, anew: bool = False) -> None:
        """The relay is as planned; `anew`: its source is opened again (it may have grown), clients connect again by
        themselves. Raises MonitorError; then it is as if it had never been."""
        async with self._held(name) as kept:
            before, kept.plan = kept.plan, plan
            if before != plan:
                try:
                    await asyncio.to_thread(self._write_plan, name, plan)
                except OSError as error:
                    kept.plan = before  # what is not written down would be ended by whoever comes after us
                    raise MonitorError(description=f"the plan of a relay could not be written: {error}") from error
            try:
                if anew or (before is not None and _opened(before) != _opened(plan)):
                    self._unwatch(kept)
                    await asyncio.to_thread(kept.relay.end)
                await self._ensure(name, kept)
            except MonitorError:
                if before is None:
                    await self._drop(name, kept)
                else:
                    self._bring_back(name, kept)
                raise

    async def end(self, name: str) -> None:
        """There is no such relay. Again: nothing."""
        async with self._held(name) as kept:
            await self._drop(name, kept)

    # --- one relay ----------------------------------------------------------------------------------------------------

    def _of(self, name: str) -> _Kept:
        if name not in self._kept:
            self._kept[name] = _Kept(Relay(self._runtime, name))
        return self._kept[name]

    @contextlib.asynccontextmanager
    async def _held(self, name: str) -> AsyncIterator[_Kept]:
        """The relay is ours meanwhile; it is forgotten afterwards when nobody wants it."""
        while True:
            kept = self._of(name)
            async with kept.lock:
                if self._kept.get(name) is not kept:
                    continue  # forgotten while we waited
                try:
                    yield kept
                finally:
                    if kept.plan is None:
                        self._kept.pop(name, None)
                return

    async def _drop(self, name: str, kept: _Kept) -> None:
        kept.plan = None
        self._unwatch(kept)
        await asyncio.to_thread(kept.relay.end)
        await asyncio.to_thread(self._remove_plan, name)

    async def _ensure(self, name: str, kept: _Kept) -> None:
        assert kept.plan is not None, "looked at by the caller"
        pid = await to_its_end(partial(kept.relay.ensure, kept.plan))
        if kept.pid_descriptor is not None and kept.pid == pid:
            return
        self._unwatch(kept)
        try:
            kept.pid, kept.pid_descriptor = pid, os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise MonitorError(description="the relay died") from error
        kept.started_at = time.monotonic()
        asyncio.get_running_loop().add_reader(kept.pid_descriptor, self._on_end, name, kept)

    def _unwatch(self, kept: _Kept) -> None:
        if kept.pid_descriptor is not None:
            asyncio.get_running_loop().remove_reader(kept.pid_descriptor)
            os.close(kept.pid_descriptor)
            kept.pid_descriptor = None

    def _on_end(self, name: str, kept: _Kept) -> None:
        self._unwatch(kept)
        if time.monotonic() - kept.started_at >= STABLE_S:
            kept.pause_s = RESTART_PAUSE_S
        log.warning("relay.died", relay=name)
        self._bring_back(name, kept)

    def _bring_back(self, name: str, kept: _Kept) -> None:
        task = asyncio.create_task(self._restart(name, kept), name=f"restart relay {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restart(self, name: str, kept: _Kept) -> None:
        """Until it runs, or nobody wants it any more."""
        while True:
            async with kept.lock:
                if kept.plan is None:
                    return
                try:
                    await self._ensure(name, kept)
                    log.info("relay.runs", relay=name)
                    return
                except Exception as error:  # whatever it is, guests wait for their data
                    log.error("relay.not_started", relay=name, reason=str(error))
            await asyncio.sleep(kept.pause_s)
            kept.pause_s = min(kept.pause_s * 2, RESTART_PAUSE_MAX_S)

    # --- what is written down (blocking) --------------------------------------------------------------------------------

    def _read_plans(self) -> dict[str, RelayPlan]:
        found = {}
        for path in self._plans.glob("*.json"):
            try:
                found[path.stem] = _decoder.decode(path.read_bytes())
            except (OSError, msgspec.MsgspecError) as error:
                log.error("relay.plan_unreadable", relay=path.stem, reason=str(error))
        return found

    def _write_plan(self, name: str, plan: RelayPlan) -> None:
        part = self._plans / f".{name}.{secrets.token_hex(8)}"
        try:
            with os.fdopen(self._created(part), "wb") as opened:
                opened.write(msgspec.json.encode(plan))
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(self._plans / f"{name}.json")
        finally:
            part.unlink(missing_ok=True)

    def _created(self, part: Path) -> int:
        """A descriptor. Again where the end of the last other relay takes the empty directory away between two steps."""
        failure: OSError | None = None
        for _ in range(DIRECTORY_ATTEMPTS_MAX):
            try:
                self._plans.mkdir(mode=0o700, parents=True, exist_ok=True)
                return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except (FileNotFoundError, FileExistsError) as error:  # the second: it went after it was found to be there
                failure = error
        assert failure is not None, "there was an attempt"
        raise failure

    def _remove_plan(self, name: str) -> None:
        (self._plans / f"{name}.json").unlink(missing_ok=True)
        for directory in (self._plans, self._runtime):
            with contextlib.suppress(OSError):  # others are in it, or it never was
                directory.rmdir()


def _opened(plan: RelayPlan) -> tuple[object, ...]:
    """What cannot be changed while the process runs."""
    return plan.source, plan.address, plan.port, plan.size_bytes
