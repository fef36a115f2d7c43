"""What all tests share: the private PostgreSQL, which whole files are too slow for `make test-fast` (they start a cloud for
each test, or walk every route), how long tests with guests may take, and who clears up after a run that was killed."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

import instar.store.sqlite
from instar.store.contract import Store
from instar.store.postgresql import PostgresqlStore
from tests import every_store_on_postgresql, migrated_once, rabbitmq_server
from tests.aftermath import MARK
from tests.postgresql_server import PATIENT, SERVER, TestServer

if every_store_on_postgresql.asked_for():
    every_store_on_postgresql.install(instar.store.sqlite)
else:
    migrated_once.install()

SLOW_FILES = frozenset({
    "images/test_image_lists.py", "images/test_image_api.py", "images/test_image_policy.py",
    "cli/test_operator_commands.py", "cli/test_up.py", "networks/test_networks_and_ports.py",
    "lifecycle/test_rebuild_volume.py", "lifecycle/test_live_abort.py",
    "lifecycle/test_every_step.py", "lifecycle/test_hosts_lost.py", "lifecycle/test_whole_life.py",
    "lifecycle/test_trouble_of_moves.py", "volumes/test_volume_policy.py", "volumes/test_volume_api.py",
    "volumes/test_volume_crash.py", "api/test_volume_attachments.py", "api/test_boot_from_volume.py",
    "api/test_interfaces.py", "api/test_server_actions.py", "lifecycle/test_taking_over.py",
    "engine/test_conductor_processes.py", "lifecycle/test_build_trouble.py", "images/test_reach_by_http.py",
    "networks/test_network_policy_walk.py", "networks/test_security_groups.py", "identity/test_records.py",
})  # fmt: skip
# Of the files with real guests and hosts, those that take longest: begun first, they do not end alone.
LONGEST_FILES = (
    "endtoend/test_whole_life.py", "cli/test_demo.py", "endtoend/test_crash_moves.py", "endtoend/test_crash_libvirt.py",
    "endtoend/test_real_guest.py", "endtoend/test_two_hosts.py", "distributed/test_processes.py", "bus/test_rabbitmq.py",
    "hypervisor/test_contract_moves.py", "hypervisor/test_contract.py", "endtoend/test_remote_consoles.py",
    "linux_network/test_host_life.py", "linux_network/test_reach_over_hosts.py",
)  # fmt: skip
HERE = Path(__file__).parent
AFTERMATH = pytest.StashKey[subprocess.Popen[bytes]]()
GUEST_MAX_S = 1200  # a boot takes a minute and a half on a machine that is busy otherwise, and some tests have six


def pytest_configure(config: pytest.Config) -> None:
    """In each process of pytest."""
    log_plainly()
    # The many processes of these tests need not compile everything anew, whatever is wished elsewhere.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs beside it; all would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if MARK in os.environ:  # a worker's, which has its run's mark, or a run in a test
        return
    os.environ[MARK] = secrets.token_hex(8)
    inherited = {name: value for name, value in os.environ.items() if name != MARK}
    watch = subprocess.Popen(  # ends after this process, whose end of the pipe closes then
        [sys.executable, "-m", "tests.aftermath", os.environ[MARK]], cwd=HERE.parent, env=inherited,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    config.stash[AFTERMATH] = watch


def pytest_unconfigure() -> None:
    migrated_once.remove()


def log_plainly() -> None:
    """A traceback with all variables of all frames takes a second, and nobody reads it."""
    *processors, _ = structlog.get_config()["processors"]
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*processors, plain])
    configure = structlog.configure

    def without_cache(**settings: Any) -> None:
        """A logger that was kept while a test of the command line logged as programs do would log so in all later tests."""
        configure(**settings | {"cache_logger_on_first_use": False})

    structlog.configure = without_cache


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    stays = every_store_on_postgresql.STAYS if every_store_on_postgresql.asked_for() else ()
    return True if collection_path.is_relative_to(HERE) and collection_path.relative_to(HERE).as_posix() in stays else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {item.path: item.path.relative_to(HERE).as_posix() for item in items}
    items.sort(key=lambda item: (*LONGEST_FILES, places[item.path]).index(places[item.path]))
    for item in items:
        if places[item.path] in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
        if {"guest", "host"} & {mark.name for mark in item.iter_markers()} and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(GUEST_MAX_S))


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[TestServer]:
    """A PostgreSQL of this test process, started when first asked for."""
    if every_store_on_postgresql.asked_for():
        yield every_store_on_postgresql.the_server()
        return
    server = TestServer()
    yield server
    server.close()


@pytest.fixture(scope="session", autouse=True)
def everything_on_postgresql(request: pytest.FixtureRequest) -> None:
    """INSTAR_TEST_DATABASE=postgresql: whole clouds of the tests, too."""
    if every_store_on_postgresql.asked_for():
        os.environ[SERVER] = request.getfixturevalue("postgresql_server").server.url.rpartition("/")[0]


@pytest.fixture(scope="session", autouse=True)
def everything_on_rabbitmq() -> Iterator[None]:
    """INSTAR_TEST_BUS=rabbitmq: the clouds of the tests have their bus there."""
    if not rabbitmq_server.asked_for():
        yield
        return
    broker = rabbitmq_server.TestBroker()
    try:
        broker.start()
        os.environ.update(broker.environment)
        yield
    finally:
        broker.close()


@pytest.fixture(autouse=True)
def nothing_left_on_rabbitmq() -> Iterator[None]:
    yield
    if rabbitmq_server.asked_for():
        rabbitmq_server.forget_all()


@pytest.fixture
def postgresql_url(postgresql_server: TestServer) -> Iterator[str]:
    """A database with the newest schema and nothing in it."""
    url = postgresql_server.database()
    yield url
    postgresql_server.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Makes stores, not open yet, of one database with the newest schema and nothing in it. On both databases."""
    if request.param == "sqlite":
        return lambda: instar.store.sqlite.SqliteStore(tmp_path / "instar.db", durable=False)
    url = request.getfixturevalue("postgresql_url")
    return lambda: PostgresqlStore(url, PATIENT)


@pytest.fixture
async def store(new_store: Callable[[], Store]) -> AsyncIterator[Store]:
    """An open store with nothing in it. On both databases."""
    opened = new_store()
    await opened.open()
    yield opened
    await opened.close()
