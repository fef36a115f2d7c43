"""When an agent shuts its hosts, what opens them again, and which commands a session refuses. Time is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from instar.agent.admission import Admission
from instar.config import HostSettings
from instar.errors import HostNotReady

DOWN_AFTER_S = 8.0
LEASE_S = 4.8


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock, path: Path | None = None) -> Admission:
    made = Admission(["a", "b"], path, down_after_s=DOWN_AFTER_S, clock=clock)
    made.open()
    return made


def test_host_whose_reports_are_answered_stays_open_and_one_whose_are_not_is_shut_before_it_may_be_down() -> None:
    clock = Clock()
    one = admission(clock)
    for _ in range(10):
        number = one.ask()
        clock.now += 2
        one.answered(number)
        one.check("a", 0)
    asked_at, number = clock.now, one.ask()
    one.answered(number)
    clock.now = asked_at + LEASE_S - 0.01
    one.check("b", one.session_of("b"))
    clock.now = asked_at + LEASE_S + 0.01
    assert clock.now < asked_at + DOWN_AFTER_S
    for host in ("a", "b"):
        with pytest.raises(HostNotReady):
            one.check(host, 0)


def test_the_lease_runs_from_the_question_not_from_its_answer() -> None:
    clock = Clock()
    one = admission(clock)
    number = one.ask()
    clock.now += 4
    one.answered(number)
    clock.now += 1
    assert one.is_shut("a")


def test_a_late_answer_does_not_open_what_was_shut() -> None:
    clock = Clock()
    one = admission(clock)
    one.answered(one.ask())
    number = one.ask()
    clock.now += 60
    one.answered(number)
    assert one.is_shut("a")


def test_only_an_admission_to_the_session_of_now_opens_and_commands_of_the_one_before_are_refused() -> None:
    clock = Clock()
    one = admission(clock)
    before = one.session_of("a")
    one.check("a", before)
    one.answered(one.ask())
    clock.now += 60
    assert one.is_shut("a")
    with pytest.raises(HostNotReady):
        one.admit("a", before)
    one.admit("a", one.session_of("a"))
    one.check("a", one.session_of("a"))
    assert one.is_shut("b")
    with pytest.raises(HostNotReady):
        one.check("a", before)


def test_control_plane_that_never_answers_shuts_nobody_out() -> None:
    clock = Clock()
    one = admission(clock)
    for _ in range(100):
        one.ask()
        clock.now += 60
    one.check("a", 0)


def test_agent_that_was_answered_before_its_restart_begins_shut_and_a_new_one_does_not(tmp_path: Path) -> None:
    clock = Clock()
    first = admission(clock, tmp_path / "shut")
    assert not first.is_shut("a")
    first.answered(first.ask())
    again = admission(clock, tmp_path / "shut")
    assert again.is_shut("a")
    assert again.session_of("a") != first.session_of("a")
    again.admit("a", again.session_of("a"))
    again.check("a", again.session_of("a"))


def test_heartbeats_are_frequent_enough_for_the_lease() -> None:
    """One answer of three may be lost."""
    settings = HostSettings()
    assert settings.heartbeat_s * 2 < settings.down_after_s * LEASE_S / DOWN_AFTER_S
