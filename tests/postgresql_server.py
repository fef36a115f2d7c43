"""A private PostgreSQL for tests: started once, a database of its own for each test. See the fixtures in conftest.py."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from instar.cli.servers.postgresql import PrivatePostgresql
from instar.config import PostgresqlSettings
from instar.store.postgresql import PostgresqlStore

SERVER = "INSTAR_TEST_DATABASE_SERVER"  # postgresql://user:password@host:port, for the processes of a test
TEMPLATE = "migrated"
# A server that is slow because the machine is busy is not away.
PATIENT = PostgresqlSettings(connect_timeout_s=30, away_wait_s=60, unsure_wait_s=60, statement_timeout_s=90)
AFTER_US = 'read -r _; kill -INT "$(head -n 1 "$1")" && sleep 1; rm -rf "$2"'


class TestServer:
    """`database()` makes a database with the newest schema; it takes 30 ms."""

    __test__ = False

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="instar-pg-"))  # the tests' own folders are closed to `postgres`
        self.server = PrivatePostgresql(self._directory / "server", durable=False)
        # Where this process is killed, its end of the pipe closes, and the server goes too.
        pid_file = self._directory / "server" / "data" / "postmaster.pid"
        self._watch = subprocess.Popen(
            ["sh", "-c", AFTER_US, "sh", str(pid_file), str(self._directory)],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            self._directory.chmod(0o711)
            self.server.start()
            self.server.sql(f"CREATE DATABASE {TEMPLATE}")
            with ThreadPoolExecutor(1) as thread:  # the test that asks first may have an event loop already
                thread.submit(asyncio.run, _migrate(self.server.url_of(TEMPLATE))).result()
        except BaseException:
            self.close()
            raise

    def empty_database(self) -> str:
        """URL of a database without tables."""
        return self._create("template0")

    def database(self) -> str:
        """URL of a database with the newest schema."""
        return self._create(TEMPLATE)

    def _create(self, template: str) -> str:
        name = f"t{uuid.uuid4().hex[:12]}"
        self.server.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.server.url_of(name)

    def drop(self, url: str) -> None:
        self.server.start()
        self.server.sql(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def close(self) -> None:
        self.server.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
        assert self._watch.stdin is not None
        self._watch.stdin.close()
        self._watch.wait(10)


async def _migrate(url: str) -> None:
    store = PostgresqlStore(url, PATIENT)
    await store.open()
    await store.close()
