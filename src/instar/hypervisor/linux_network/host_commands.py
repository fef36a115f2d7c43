"""Runs ip, nft and the like, each with a deadline. Arguments and input are built from validated values only."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Coroutine
from typing import Any

import structlog

from instar.errors import HypervisorError

log = structlog.get_logger(__name__)

COMMAND_MAX_S = 20.0


async def run(*argv: str, stdin: str | None = None, timeout_s: float = COMMAND_MAX_S) -> bytes:
    """The standard output of a command. Raises HypervisorError (it failed, is not installed, or took too long); what it
    said on standard error goes to the log, not to users."""
    # In a thread, not as a subprocess of the event loop: under uvloop, commands that ran side by side were now and then
    # killed by SIGPIPE before they had read their input.
    return await asyncio.to_thread(_run, argv, (stdin or "").encode(), timeout_s)


def _run(argv: tuple[str, ...], given: bytes, timeout_s: float) -> bytes:
    program = argv[0]
    began = time.monotonic()
    try:
        ended = subprocess.run(argv, input=given, capture_output=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise HypervisorError(reason=f"the program {program} is not installed on the host") from None
    except subprocess.TimeoutExpired:
        raise HypervisorError(reason=f"the host's {program} did not finish within {timeout_s:g} seconds") from None
    if ended.returncode != 0:
        text = ended.stderr.decode(errors="replace")[:2000]
        log.warning("host_command.failed", argv=argv, code=ended.returncode, errors=text)
        raise HypervisorError(reason=f"the host's {program} refused a change of the networking")
    log.debug("host_command.done", argv=argv, took_s=round(time.monotonic() - began, 4))
    return ended.stdout


async def ip_batch(lines: list[str], *, namespace: str | None = None, force: bool = False) -> None:
    """Several `ip` commands in one process. `force` goes on after a failed line and reports none."""
    if not lines:
        return
    argv = ["ip", *(["-n", namespace] if namespace else []), *(["-force"] if force else []), "-batch", "-"]
    try:
        await run(*argv, stdin="\n".join(lines) + "\n")
    except HypervisorError:
        if not force:
            raise


async def fdb_batch(lines: list[str], *, force: bool = False) -> None:
    """Several `bridge` commands in one process. `force` goes on after a failed line and reports none."""
    if not lines:
        return
    try:
        await run("bridge", *(["-force"] if force else []), "-batch", "-", stdin="\n".join(lines) + "\n")
    except HypervisorError:
        if not force:
            raise


async def nft_load(text: str, *, namespace: str | None = None) -> None:
    """Load a ruleset in one transaction: all of it or nothing."""
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    await run(*inside, "nft", "-f", "-", stdin=text)


async def run_both(one: Coroutine[Any, Any, object], other: Coroutine[Any, Any, object]) -> None:
    """Both at the same time; returns when both have ended, and raises what the first of them raised."""
    for outcome in await asyncio.gather(one, other, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
