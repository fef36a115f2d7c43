"""Arithmetic of IPv4 addresses: pools, what is free in them, and networks that do not clash. Nothing here asks anybody.

Addresses are whole numbers inside, text at the edges.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import socket
import struct
from collections import deque
from collections.abc import Container, Iterable, Sequence
from ipaddress import IPv4Network

from instar.errors import StartupError

Run = tuple[int, int]  # first and last, both included

CLOUD_RANGE = IPv4Network("10.0.0.0/8")
CLOUD_PREFIX = 24


def number(address: str) -> int:
    """Raises OSError for what is no dotted quad."""
    value: int = struct.unpack("!I", socket.inet_aton(address))[0]
    return value


def text(value: int) -> str:
    return socket.inet_ntoa(struct.pack("!I", value))


def free_runs(pools: Iterable[tuple[str, str]], used: Iterable[int]) -> list[Run]:
    """What is left of the pools, as runs in ascending order."""
    taken = sorted(set(used))
    runs: list[Run] = []
    index = 0
    for first, last in sorted((number(one), number(other)) for one, other in pools):
        start = first
        while index < len(taken) and taken[index] < first:
            index += 1
        while index < len(taken) and taken[index] <= last:
            if taken[index] > start:
                runs.append((start, taken[index] - 1))
            start = taken[index] + 1
            index += 1
        if start <= last:
            runs.append((start, last))
    return runs


class FreeAddresses:
    """The addresses of a subnet that this process believes to be free, handed out in turn.

    A hint, never the truth: another process may have taken one, and the database refuses it then. Each process begins
    at another place, so that two of them rarely want the same. An address that was given back comes again only after
    all the others: what neighbours remember of its last owner is forgotten by then."""

    def __init__(self, runs: Sequence[Run], start: float | None = None) -> None:
        """`start`, 0 to 1: where to begin; random when None."""
        self._runs: deque[Run] = deque(runs)
        total = sum(last - first + 1 for first, last in runs)
        skip = int(total * (random.random() if start is None else start))  # noqa: S311 - spreads load, hides nothing
        while skip and self._runs:
            first, last = self._runs.popleft()
            size = last - first + 1
            if skip >= size:
                self._runs.append((first, last))
                skip -= size
            else:
                self._runs.append((first, first + skip - 1))
                self._runs.appendleft((first + skip, last))
                skip = 0

    def take(self, not_these: Container[int]) -> int | None:
        """The next address that is not among `not_these`; None when there is none left."""
        while self._runs:
            first, last = self._runs.popleft()
            if first < last:
                self._runs.appendleft((first + 1, last))
            if first not in not_these:
                return first
        return None


def collapsed(addresses: Iterable[str]) -> tuple[str, ...]:
    """The smallest list of CIDRs that holds exactly these addresses, in ascending order."""
    numbers = sorted({number(address) for address in addresses})
    cidrs: list[str] = []
    index = 0
    while index < len(numbers):
        end = index
        while end + 1 < len(numbers) and numbers[end + 1] == numbers[end] + 1:
            end += 1
        cidrs += _cidrs_of_run(numbers[index], numbers[end])
        index = end + 1
    return tuple(cidrs)


def _cidrs_of_run(first: int, last: int) -> list[str]:
    cidrs = []
    while first <= last:
        bits = min((first & -first).bit_length() - 1 if first else 32, (last - first + 1).bit_length() - 1)
        cidrs.append(f"{text(first)}/{32 - bits}")
        first += 1 << bits
    return cidrs


def new_mac() -> str:
    """A locally used MAC with the prefix that the field's clouds have."""
    tail = secrets.token_bytes(3)
    return f"fa:16:3e:{tail[0]:02x}:{tail[1]:02x}:{tail[2]:02x}"


def pick_free_cidr(taken: Iterable[str], *, seed: str) -> str:
    """A /24 of 10.0.0.0/8 that overlaps none of `taken` (CIDRs; others than IPv4 do not matter).

    The same seed and the same `taken` give the same answer; another seed starts elsewhere, so that two clouds on one
    machine rarely meet. Raises StartupError when nothing is free."""
    blocks = 1 << (CLOUD_PREFIX - CLOUD_RANGE.prefixlen)
    base, size = int(CLOUD_RANGE.network_address), 1 << (32 - CLOUD_PREFIX)
    occupied = sorted(
        (int(net.network_address), int(net.broadcast_address))
        for net in (IPv4Network(cidr, strict=False) for cidr in taken if ":" not in cidr)
        if net.prefixlen > 0  # a default route claims nothing
    )
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") % blocks
    for step in range(blocks):
        first = base + ((start + step) % blocks) * size
        if not any(low <= first + size - 1 and high >= first for low, high in occupied):
            return f"{text(first)}/{CLOUD_PREFIX}"
    raise StartupError("No /24 of 10.0.0.0/8 is free on this machine: give the network of the cloud by hand.")
