"""Programs out of unpacked Debian packages: how to run them here, and which libraries they need.

Both are left to the packages' own dynamic loader, pointed at the packages' own libraries, so that nothing of the host's
libraries gets into the image and nothing has to be installed on the host.
"""

from __future__ import annotations

import re
from pathlib import Path

from instar.images.guest.failures import PackageContentMissing
from instar.images.guest.host_programs import run
from instar.images.guest.packages import find_one

LOADER_NAME = "ld-linux-x86-64.so.2"
LOADER_PATH_IN_GUEST = f"lib64/{LOADER_NAME}"  # fixed by the ABI: it is written into every program


class Loader:
    """The dynamic loader of an unpacked package tree."""

    def __init__(self, tree: Path) -> None:
        """Raises PackageContentMissing."""
        self._tree = tree
        self.path = find_one(tree, f"**/{LOADER_NAME}")
        places = [tree / prefix / "x86_64-linux-gnu" for prefix in ("lib", "usr/lib")]
        self._library_path = ":".join(str(place) for place in places if place.is_dir())

    def command(self, program: Path, *, name: str | None = None) -> list[str | Path]:
        """The command that runs `program` on this host, under the name `name`; arguments are to be appended."""
        options: list[str | Path] = ["--inhibit-cache", "--library-path", self._library_path]
        return [self.path, *options, "--argv0", name or program.name, program]

    def libraries(self, program: Path) -> dict[str, Path]:
        """Files of all libraries that `program` needs, by the name it asks for. Raises PackageContentMissing."""
        answer = run([self.path, "--inhibit-cache", "--library-path", self._library_path, "--list", program])
        if missing := re.search(r"(\S+) => not found", answer):
            raise PackageContentMissing(what=f"library {missing[1]}")
        found = {name: Path(path) for name, path in re.findall(r"^\s*(\S+) => (/\S+) \(", answer, flags=re.MULTILINE)}
        for name, path in found.items():
            if not path.is_relative_to(self._tree):
                raise PackageContentMissing(what=f"library {name}")
        return found
