"""The guest image that a machine keeps between the starts of its clouds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from instar.cli import guest_image

WEEK_S = 7 * 86_400


async def test_an_image_by_another_recipe_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine kept the image that an earlier version had built: guests had no agent, though the recipe has one by now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built: list[Path] = []

    def build(output: Path, *, work_dir: Path, progress: Callable[[str], None]) -> None:
        output.write_bytes(b"image")
        built.append(output)

    monkeypatch.setattr(guest_image, "build_guest", build)  # seconds, and nothing of it matters here
    first = await guest_image.ensure_built(print)
    assert first.exists() and await guest_image.ensure_built(print) == first and built == [first]
    monkeypatch.setattr(guest_image, "recipe_fingerprint", lambda: "another")
    second = await guest_image.ensure_built(print)
    assert second != first and first.exists() and built == [first, second]
    os.utime(first, (time.time() - 2 * WEEK_S,) * 2)
    monkeypatch.setattr(guest_image, "recipe_fingerprint", lambda: "a third")
    third = await guest_image.ensure_built(print)
    assert set(third.parent.glob("*.qcow2")) == {second, third}
