"""The connections to libvirtd: calls in threads with deadlines, events to the loop, and new connections after a loss.

Used by the driver alone. libvirt's calls block, so none runs on the event loop; libvirt's events come on one daemon thread
of the process and are handed to the loop. A callback there must make no libvirt call: it would wait for itself.

One connection tells events and that the daemon is gone, and makes no calls; each thread that makes calls has one of its
own. libvirt's client before 10.4 lets a thread use the freed stack of another one that shares its connection
(CVE-2024-4418): the whole process dies, for instance when several calls wait for a daemon that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import libvirt
import structlog

from instar.errors import HypervisorUnavailable, OperationError
from instar.hypervisor.libvirt.call_threads import CallThreads
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


_Connected = tuple[Any, tuple[int, ...]]  # a connection, and the ids of the callbacks on it


class _OwnConnection(threading.local):
    """The connection of one thread. `generation` counts reconnects: an older one leads to a daemon that is gone."""

    connection: Any = None
    generation: int = 0


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
        on_device_removed: Callable[[str], None],
        on_connected: Callable[[], Awaitable[None]],
        on_lost: Callable[[], None],
    ) -> None:
        self._uri, self._host, self._state_dir, self._settings = uri, host, state_dir, settings
        self._on_lifecycle, self._on_connected, self._on_lost = on_lifecycle, on_connected, on_lost
        self._on_device_removed = on_device_removed
        self._own = _OwnConnection()
        self._generation = 0
        self._connected = False
        self._threads = CallThreads(settings.threads, name="libvirt")
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
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        self._connected = False
        self._threads.close()

    @property
    def connected(self) -> bool:
        return self._connected

    async def run(self, call: Callable[[Any], T], *, timeout_s: float | None = None) -> T:
        """`call(virConnect)` in a thread. Raises HypervisorUnavailable when there is no daemon or it does not answer in
        time (the call may still come to its end: look again), HypervisorError or DiskFull when it refuses."""
        if not self._connected:
            raise HypervisorUnavailable(host=self._host)
        try:
            async with asyncio.timeout(timeout_s or self._settings.call_timeout_s):
                return await self._threads.run(lambda: self._call(call))
        except TimeoutError as error:
            raise HypervisorUnavailable(host=self._host) from error

    async def run_apart(self, call: Callable[[Any], T]) -> T:
        """As `run`, for a call that lasts: in a thread and on a connection of its own, so that others have theirs. It has
        no deadline, and a caller that is cancelled leaves it to its end."""
        threads = CallThreads(1, name="libvirt-long")
        try:
            return await threads.run(lambda: self._call_apart(call))
        finally:
            threads.close()

    def _call_apart(self, call: Callable[[Any], T]) -> T:
        connection = None
        try:
            connection = libvirt.open(self._uri)
            return call(connection)
        except libvirt.libvirtError as error:
            alive = connection is not None and _is_alive(connection)
            raise explain(error, host=self._host, state_dir=self._state_dir, alive=alive) from None

    def _call(self, call: Callable[[Any], T]) -> T:
        connection = None
        try:
            connection = self._connection_of_this_thread()
            return call(connection)
        except libvirt.libvirtError as error:
            alive = connection is not None and _is_alive(connection)
            log.warning("libvirt.call_failed", code=error.get_error_code(), alive=alive, text=str(error)[:1000])
            raise explain(error, host=self._host, state_dir=self._state_dir, alive=alive) from None

    def _connection_of_this_thread(self) -> Any:
        own, generation = self._own, self._generation
        if own.connection is None or own.generation != generation or not _is_alive(own.connection):
            own.connection = None  # closes the old one
            own.connection, own.generation = libvirt.open(self._uri), generation
        return own.connection

    async def _keep_connected(self) -> None:
        wait_s = self._settings.reconnect_min_s
        while True:
            self._lost.clear()
            try:
                connection, callback_ids = await self._connect()
            except Exception as error:  # whatever it is (no thread is left, for example): nobody else connects again
                code = error.get_error_code() if isinstance(error, libvirt.libvirtError) else None
                log.warning("libvirt.connect_failed", host=self._host, code=code, error=type(error).__name__)
                self._tried.set()
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, self._settings.reconnect_max_s)
                continue
            wait_s = self._settings.reconnect_min_s
            try:
                await self._stay_connected()
            finally:
                self._connected = False
                _let_go((connection, callback_ids))

    async def _stay_connected(self) -> None:
        """Returns when the daemon is gone."""
        self._generation += 1
        self._connected = True
        try:
            await self._on_connected()
        except HypervisorUnavailable:
            self._lost.set()  # gone again while we looked around, or it hangs: connect anew
            await asyncio.sleep(self._settings.reconnect_min_s)
        except OperationError as error:
            log.error("libvirt.first_look_failed", host=self._host, reason=error.message)
        except Exception:  # whatever it is (no file can be opened, for example): without this task nobody connects again
            log.exception("libvirt.first_look_failed", host=self._host)
        finally:
            self._tried.set()
        await self._lost.wait()
        self._connected = False
        log.warning("libvirt.connection_lost", host=self._host)
        self._on_lost()

    async def _connect(self) -> _Connected:
        """The connection for events. In a daemon thread of its own: it blocks for as long as a daemon that hangs does."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Connected] = loop.create_future()

        def finish(made: _Connected | None, error: Exception | None) -> None:
            if future.cancelled():
                if made is not None:
                    _let_go(made)
            elif made is not None:
                future.set_result(made)
            elif error is not None:
                future.set_exception(error)

        def connect() -> None:
            made: _Connected | None = None
            failure: Exception | None = None
            try:
                made = self._connect_blocking()
            except Exception as error:  # it belongs to the caller, whatever it is
                failure = error
            self._on_loop(finish, made, failure)

        threading.Thread(target=connect, name="libvirt-connect", daemon=True).start()
        return await future

    def _connect_blocking(self) -> _Connected:
        connection = libvirt.open(self._uri)
        connection.registerCloseCallback(self._closed, None)
        callback_ids = tuple(
            connection.domainEventRegisterAny(None, event, callback, None)
            for event, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, self._device_removed),
            )
        )
        connection.setKeepAlive(self._settings.keepalive_interval_s, self._settings.keepalive_count)
        return connection, callback_ids

    def _closed(self, _connection: Any, _reason: int, _opaque: object) -> None:
        self._on_loop(self._lost.set)

    def _lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: object) -> None:
        self._on_loop(self._on_lifecycle, domain.UUIDString(), event, detail)

    def _device_removed(self, _connection: Any, domain: Any, _alias: str, _opaque: object) -> None:
        self._on_loop(self._on_device_removed, domain.UUIDString())

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
                self._loop.call_soon_threadsafe(call, *arguments)


def _is_alive(connection: Any) -> bool:
    """Does not ask the daemon."""
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def _let_go(made: _Connected) -> None:
    """In a thread: it may block. Where the machine has none left the connection stays, which does no harm."""
    try:
        threading.Thread(target=_disconnect, args=made, name="libvirt-close", daemon=True).start()
    except RuntimeError as error:
        log.warning("libvirt.not_closed", reason=str(error))


def _disconnect(connection: Any, callback_ids: tuple[int, ...]) -> None:
    """Blocking. Callbacks first: they hold a reference to the connection."""
    for step in (
        *(partial(connection.domainEventDeregisterAny, callback_id) for callback_id in callback_ids),
        connection.unregisterCloseCallback,
        connection.close,
    ):
        with contextlib.suppress(libvirt.libvirtError):
            step()
