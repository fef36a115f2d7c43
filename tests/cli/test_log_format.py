"""A line of the log for each operation, and no way to forge one."""

from __future__ import annotations

import json
import subprocess
import sys

from instar.cli.log_format import render_line

STAMP = "2026-01-31T12:00:00.250000Z"


def line(event: str, **fields: object) -> str:
    return render_line(None, "info", {"event": event, "level": "info", "timestamp": STAMP, **fields})


def test_an_operation_is_one_readable_line() -> None:
    said = line("operation.done", action="create", instance="id-1", took_ms=812, request="req-1")
    assert said == "2026-01-31T12:00:00.250Z info    create ok in 812 ms, server id-1, req-1"


def test_a_failed_operation_says_why() -> None:
    said = line("operation.failed", action="create", instance="id-1", took_ms=1, request="req-1", reason="No host")
    assert said.endswith("create FAILED in 1 ms, server id-1, req-1: No host")


def test_a_value_cannot_begin_a_line() -> None:
    said = line("power.not_synced", reason="x\n2026-01-31T12:00:00.250Z error forged\x1b[31m")
    assert "\n" not in said
    assert "\x1b" not in said


def test_json_is_one_object_on_standard_error() -> None:
    script = (
        "import structlog; from instar.cli.log_format import configure_log; configure_log('json', 'info');"
        "structlog.get_logger().debug('hidden'); structlog.get_logger().info('step.done', took_s=0.5)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    event = json.loads(done.stderr)
    assert (event["event"], event["level"], event["took_s"]) == ("step.done", "info", 0.5)


def test_a_traceback_shows_no_values_of_variables() -> None:
    script = (
        "import structlog; from instar.cli.log_format import configure_log; configure_log('console', 'info')\n"
        "def f():\n    password = 'hunter' + '2'\n    raise ValueError('no')\n"
        "try:\n    f()\nexcept ValueError:\n    structlog.get_logger().exception('crashed')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "ValueError: no" in done.stderr
    assert "hunter2" not in done.stderr
