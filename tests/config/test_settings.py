"""Settings: defaults, one TOML file, variables on top, and refusals that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.config import Settings
from instar.errors import StartupError
from instar.settings_reading import describe, environment_of, load


def written(directory: Path, text: str) -> Path:
    path = directory / "instar.toml"
    path.write_text(text)
    return path


def test_without_a_file_and_variables_everything_is_as_by_default() -> None:
    assert load(None, {}) == Settings()


def test_settings_travel_to_another_process_as_variables() -> None:
    variables = {
        "INSTAR_STORE_DURABLE": "false", "INSTAR_SCHEDULING_FILTERS": "enabled, capacity", "INSTAR_HOST_HEARTBEAT_S": "0.5",
        "INSTAR_QUOTA_INSTANCES": "-1", "INSTAR_LOG_LEVEL": "debug",
    }  # fmt: skip
    settings = load(None, variables)
    assert environment_of(settings).keys() == variables.keys()
    assert load(None, environment_of(settings)) == settings
    assert environment_of(Settings()) == {}


def test_file_and_then_variables_override_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, 'hypervisor = "simulated"\n[engine]\nlease_s = 3\n[scheduling]\nfilters = ["enabled"]\n')
    settings = load(path, {"INSTAR_ENGINE_LEASE_S": "1.5", "INSTAR_API_PORT": "0", "UNRELATED": "x"})
    assert (settings.hypervisor, settings.engine.lease_s, settings.api.port) == ("simulated", 1.5, 0)
    assert settings.scheduling.filters == ("enabled",)
    assert settings.engine.poll_s == Settings().engine.poll_s


@pytest.mark.parametrize(
    ("name", "text", "read", "value"),
    [
        ("INSTAR_STORE_DURABLE", "false", lambda s: s.store.durable, False),
        ("INSTAR_STORE_DURABLE", "1", lambda s: s.store.durable, True),
        ("INSTAR_LOG_LEVEL", "debug", lambda s: s.log_level, "debug"),
        ("INSTAR_SCHEDULING_FILTERS", "enabled, capacity", lambda s: s.scheduling.filters, ("enabled", "capacity")),
        ("INSTAR_LIBVIRT_IMAGE_CACHE_MAX_GIB", "7.5", lambda s: s.libvirt.image_cache_max_gib, 7.5),
        ("INSTAR_QUOTA_INSTANCES", "-1", lambda s: s.quota.instances, -1),
    ],
)
def test_variables_are_read_as_the_type_of_their_setting(name: str, text: str, read, value: object) -> None:  # type: ignore[no-untyped-def]
    assert read(load(None, {name: text})) == value


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[engine]\nlease_s = 0\n", "engine.lease_s"),
        ("[engine]\nlease_s = 'soon'\n", "engine.lease_s"),
        ("[engine]\nleese_s = 1\n", "leese_s"),
        ("[engin]\nlease_s = 1\n", "engin"),
        ("[api]\nport = 70000\n", "api.port"),
        ('hypervisor = "vmware"\n', "hypervisor"),
        ("[quota]\ninstances = -2\n", "quota.instances"),
        ("engine = 3\n", "engine"),
    ],
)
def test_wrong_setting_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(StartupError, match=named):
        load(written(tmp_path, text), {})


def test_wrong_variable_is_refused() -> None:
    with pytest.raises(StartupError, match=r"api\.port"):
        load(None, {"INSTAR_API_PORT": "http"})


def test_file_that_is_no_toml_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="not valid TOML"):
        load(written(tmp_path, "lease_s == 1"), {})
    (tmp_path / "instar.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match="not valid TOML"):
        load(tmp_path / "instar.toml", {})
    with pytest.raises(StartupError, match="cannot be read: No such file"):
        load(tmp_path / "other.toml", {})
    with pytest.raises(StartupError, match="cannot be read: Is a directory"):
        load(tmp_path, {})


def test_every_setting_says_what_it_is_for_and_numbers_have_a_unit() -> None:
    infos = list(describe(Settings()))
    assert len({info.name for info in infos}) == len(infos) > 50
    for info in infos:
        assert info.description, info.name
        assert info.value == info.default, info.name
        if isinstance(info.value, int | float) and not isinstance(info.value, bool):
            assert info.unit, f"{info.name} counts in what?"


def test_every_default_keeps_its_own_limits() -> None:
    variables = {
        "INSTAR_" + info.name.replace(".", "_").upper(): (
            ",".join(info.value) if isinstance(info.value, tuple) else str(info.value)
        )
        for info in describe(Settings())
    }
    assert load(None, variables) == Settings()


def test_a_section_given_as_a_value_and_overridden_by_a_variable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="engine"):
        load(written(tmp_path, "engine = 3\n"), {"INSTAR_ENGINE_LEASE_S": "1"})
