"""The settings of a cloud that a program makes: what is asked for, what the layout adds, and the file that all read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from instar.cli.distributed.command import settings_tree
from instar.cli.distributed.layout import Layout
from instar.cli.distributed.settings_file import write_settings
from instar.errors import StartupError
from instar.settings_reading import load


def test_the_file_gives_the_same_settings_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    tree = {
        "engine": {"lease_s": 2.5}, "scheduling": {"filters": ["enabled", "capacity"]}, "region": 'a "quoted" name',
        "host": {"resume_guests_on_boot": False},
    }  # fmt: skip
    settings = Layout(settings=tree).settings_with(database="postgresql://u:p@h/d", bus="amqp://u:p@h/")
    path = tmp_path / "instar.toml"
    write_settings(path, settings)
    assert load(path, {}) == settings
    assert settings.scheduling.filters == ("enabled", "capacity")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_guests_that_are_meant_to_run_are_kept_from_simulated_hosts() -> None:
    assert Layout().settings_with().scheduling.default_zone == "nova"
    assert Layout(libvirt_hosts=0).settings_with().scheduling.default_zone == ""
    assert Layout(simulated_hosts=0).settings_with().scheduling.default_zone == ""


def test_options_win_over_variables() -> None:
    variables = {"INSTAR_ENGINE_LEASE_S": "9", "INSTAR_API_LIST_LIMIT_MAX": "7"}
    tree = settings_tree(["engine.lease_s=3", "region=here"], variables)
    settings = Layout(settings=tree).settings_with(api={"port": 1234})
    assert (settings.engine.lease_s, settings.region) == (3, "here")
    assert (settings.api.list_limit_max, settings.api.port) == (7, 1234)


@pytest.mark.parametrize("assignment", ["engine.lease_s", "=3", "engine.=3"])
def test_an_assignment_without_a_name_or_a_value_is_refused(assignment: str) -> None:
    with pytest.raises(StartupError):
        settings_tree([assignment], {})


def test_a_setting_that_is_wrong_is_named() -> None:
    with pytest.raises(StartupError, match="lease_s"):
        Layout(settings={"engine": {"lease_s": "soon"}}).settings_with()
