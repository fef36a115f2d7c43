"""Fixtures of the guest image's tests: the image itself, built once for the whole run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from instar.images.guest import GuestImage, build_guest


@pytest.fixture(scope="session")
def package_cache() -> Path:
    """Where downloaded Debian packages stay between test runs: INSTAR_GUEST_PACKAGES, else in the user's cache."""
    default = Path.home() / ".cache/instar/guest-packages"
    folder = Path(os.environ.get("INSTAR_GUEST_PACKAGES") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


@pytest.fixture(scope="session")
def built_image(tmp_path_factory: pytest.TempPathFactory, package_cache: Path) -> GuestImage:
    work_dir = tmp_path_factory.mktemp("guest-image")
    (work_dir / "packages").symlink_to(package_cache)
    return build_guest(work_dir / "tiny.qcow2", work_dir=work_dir, progress=print)
