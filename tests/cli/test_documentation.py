"""Pages that are written from the code are up to date, and links between pages lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_table_of_transitions_is_what_the_code_says() -> None:
    checked = subprocess.run([sys.executable, ROOT / "docs" / "transition_table.py", "--check"], check=False)
    assert checked.returncode == 0, "run: python docs/transition_table.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_every_host_package_has_its_reason() -> None:
    lines = (ROOT / "packaging" / "host-packages.txt").read_text().splitlines()
    named = [line for line in lines if line and not line.startswith("#")]
    assert len(named) > 10
    assert all(len(line.split(maxsplit=1)) == 2 for line in named)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-demo.txt", "requirements-dev.txt"])
def test_lock_files_are_pinned_with_hashes_and_name_no_index(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"https?://|file:/|--index-url|--find-links|--extra-index|--trusted-host", text)
    pins = re.findall(r"^[a-z0-9].*$", text, flags=re.MULTILINE)
    assert pins and all(re.match(r"[a-z0-9._-]+==[^\s]+ \\$", pin) for pin in pins)
    assert text.count("--hash=sha256:") >= len(pins)
