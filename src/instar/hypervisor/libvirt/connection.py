"""One connection to libvirtd: calls in threads with deadlines, events to the loop, and a new connection after a loss.

Used by the driver alone. libvirt's calls block, so none runs on the event loop; libvirt's events come on one daemon thread
of the process and are handed to the loop. A callback there must make no libvirt call: it would wait for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import libvirt
import structlog

from instar.errors import HypervisorUnavailable, OperationError
from instar.hypervisor.libvirt.failures import explain
from instar.hypervisor.libvirt.settings import LibvirtSettings

T = TypeVar("T")
LifecycleHandler = Callable[[str, int, int], None]  # (domain UUID, event, detail), called on the loop

log = structlog.get_logger()

_event_thread_lock = threading.Lock()
_event_thread: threading.Thread | None = None


def _run_events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:
            log.error("libvirt.event_loop_failed", code=error.get_error_code())


def ensure_event_thread() -> None:
    """Register libvirt's event loop and run it. Must come before the first connection of the process."""
    global _event_thread
    with _event_thread_lock:
        if _event_thread is None:
            libvirt.registerErrorHandler(lambda _context, _error: None, None)  # else libvirt prints to stderr
            libvirt.virEventRegisterDefaultImpl()
            _event_thread = threading.Thread(target=_run_events, name="libvirt-events", daemon=True)
            _event_thread.start()


class LibvirtConnection:
    """A connection that comes back by itself. `on_connected` runs after each connect, `on_lost` after each loss."""

    def __init__(
        self,
        *,
        uri: str,
        host: str,
        state_dir: Path,
        settings: LibvirtSettings,
        on_lifecycle: LifecycleHandler,
        on_connected: Callable[[], Awaitable[None]],
        on_lost: Callable[[], None],
    ) -> None:
        self._uri, self._host, self._state_dir, self._settings = uri, host, state_dir, settings
        self._on_lifecycle, self._on_connected, self._on_lost = on_lifecycle, on_connected, on_lost
        self._connection: Any = None
        self._callback_id = -1
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="libvirt")
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._tried = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> None:
        """Connect. When the daemon is away this returns as well, after one try, and goes on trying."""
        self._loop = asyncio.get_running_loop()
        ensure_event_thread()
        self._keeper = asyncio.create_task(self._keep_connected(), name="libvirt-connection")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await self._tried.wait()

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.connect_timeout_s):
                    await asyncio.get_running_loop().run_in_executor(
                        self._threads, _disconnect, connection, self._callback_id
                    )
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def run(self, call: Callable[[Any], T], *, timeout_s: float | None = None) -> T:
        """`call(virConnect)` in a thread. Raises HypervisorUnavailable when there is no daemon or it does not answer in
        time (the call may still come to its end: look again), HypervisorError or DiskFull when it refuses."""
        connection = self._connection
        if connection is None:
            raise HypervisorUnavailable(host=self._host)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s or self._settings.call_timeout_s):
                return await loop.run_in_executor(self._threads, self._call, connection, call)
        except TimeoutError as error:
            raise HypervisorUnavailable(host=self._host) from error

    def _call(self, connection: Any, call: Callable[[Any], T]) -> T:
        try:
            return call(connection)
        except libvirt.libvirtError as error:
            alive = _is_alive(connection)
            failure = explain(error, host=self._host, state_dir=self._state_dir, alive=alive)
            log.warning("libvirt.call_failed", code=error.get_error_code(), alive=alive, text=str(error)[:1000])
            raise failure from None

    async def _keep_connected(self) -> None:
        wait_s = self._settings.reconnect_min_s
        while True:
            self._lost.clear()
            try:
                self._connection, self._callback_id = await self._connect()
            except libvirt.libvirtError as error:
                log.warning("libvirt.connect_failed", host=self._host, code=error.get_error_code())
                self._tried.set()
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, self._settings.reconnect_max_s)
                continue
            wait_s = self._settings.reconnect_min_s
            try:
                await self._on_connected()
            except HypervisorUnavailable:
                self._lost.set()  # gone again while we looked around
            except OperationError as error:
                log.error("libvirt.first_look_failed", host=self._host, reason=error.message)
            finally:
                self._tried.set()
            await self._lost.wait()
            connection, self._connection = self._connection, None
            log.warning("libvirt.connection_lost", host=self._host)
            self._on_lost()
            await asyncio.get_running_loop().run_in_executor(self._threads, _disconnect, connection, self._callback_id)

    async def _connect(self) -> tuple[Any, int]:
        """A new connection. In a daemon thread of its own: it blocks for as long as a daemon that hangs does."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[Any, int]] = loop.create_future()

        def finish(result: tuple[Any, int] | None, error: Exception | None) -> None:
            if future.cancelled():
                if result is not None:
                    threading.Thread(target=_disconnect, args=result, daemon=True).start()
            elif error is not None:
                future.set_exception(error)
            elif result is not None:
                future.set_result(result)

        def connect() -> None:
            result: tuple[Any, int] | None = None
            failure: Exception | None = None
            try:
                result = self._connect_blocking()
            except libvirt.libvirtError as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(finish, result, failure)

        threading.Thread(target=connect, name="libvirt-connect", daemon=True).start()
        return await future

    def _connect_blocking(self) -> tuple[Any, int]:
        connection = libvirt.open(self._uri)
        connection.registerCloseCallback(self._closed, None)
        connection.setKeepAlive(self._settings.keepalive_interval_s, self._settings.keepalive_count)
        callback_id = connection.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None
        )
        return connection, callback_id

    def _closed(self, _connection: Any, _reason: int, _opaque: object) -> None:
        self._on_loop(self._lost.set)

    def _lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: object) -> None:
        self._on_loop(self._on_lifecycle, domain.UUIDString(), event, detail)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
                self._loop.call_soon_threadsafe(call, *arguments)


def _is_alive(connection: Any) -> bool:
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def _disconnect(connection: Any, callback_id: int) -> None:
    """Blocking. Callbacks first: they hold a reference to the connection."""
    for step in (
        lambda: connection.domainEventDeregisterAny(callback_id),
        connection.unregisterCloseCallback,
        connection.close,
    ):
        with contextlib.suppress(libvirt.libvirtError):
            step()
