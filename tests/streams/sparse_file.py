"""Real files with holes."""

from __future__ import annotations

import random
from pathlib import Path

MIB = 1 << 20


def make_sparse(path: Path, size: int, pieces: list[tuple[int, int]], *, seed: int = 7) -> None:
    """A file of `size` bytes with random bytes in the pieces (offset, length), holes elsewhere."""
    chance = random.Random(seed)
    with path.open("wb") as opened:
        opened.truncate(size)
        for offset, length in pieces:
            opened.seek(offset)
            opened.write(chance.randbytes(max(0, min(length, size - offset))))


def same(a: Path, b: Path) -> bool:
    with a.open("rb") as left, b.open("rb") as right:
        while True:
            one, other = left.read(MIB), right.read(MIB)
            if one != other:
                return False
            if not one:
                return True


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
