"""What a diagram shows is what the journal tells: states, durations, failures, undos, and nothing else."""

from __future__ import annotations

import msgspec
import pytest

from instar.lifecycle.diagram import DiagramFormat, diagram
from instar.model.operation import Operation, RecordedError, Step
from instar.model.states import VmState

START = 1_700_000_000_000_000


def operation(**changes: object) -> Operation:
    base = Operation(
        id="op", instance_id="11111111-2222-3333-4444-555555555555", action="create", rule="create", request_id="req-1",
        user_id="u", project_id="p", turn=1, vm_state_before=VmState.BUILDING, arguments=b"", owner="c", epoch=1,
        cancelled_by=None, started_at=START, updated_at=START, finished_at=START + 300_000, result="Success", message=None,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def step(seq: int, name: str, participant: str, **changes: object) -> Step:
    base = Step(
        operation_id="op", seq=seq, name=name, participant=participant, host=None, started_at=START + seq * 1000,
        finished_at=START + seq * 1000 + 800, result="Success", output=None, error=None, traceback=None,
        hypervisor_us=None, task_state="scheduling",
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def failed(message: str) -> dict[str, object]:
    return {"result": "Error", "error": msgspec.msgpack.encode(RecordedError("HypervisorError", message, {}))}


def test_a_create_shows_request_record_steps_and_settling_in_order() -> None:
    steps = [
        step(0, "select hosts", "scheduler"),
        step(1, "start guest", "compute", host="sim-0", hypervisor_us=250_000, task_state="spawning"),
    ]
    text = diagram(operation(), steps)
    expected = [
        "client->api: POST /servers",
        "api->database: check, mark, and record the operation",
        "note over database: vm_state building, task_state scheduling",
        "api-->client: 202, req-1",
        "conductor->scheduler: select hosts",
        "scheduler-->conductor: 0.8 ms",
        "note over database: task_state spawning",
        "conductor->compute: start guest (on sim-0)",
        "compute->hypervisor: start guest",
        "hypervisor-->compute: 250 ms of its own",
        "compute-->conductor: 0.8 ms",
        "note over database: vm_state active, task_state null",
    ]
    places = [text.find(part) for part in expected]
    assert -1 not in places, [part for part, place in zip(expected, places, strict=True) if place < 0]
    assert places == sorted(places)


def test_only_those_who_took_part_are_drawn() -> None:
    text = diagram(operation(), [step(0, "select hosts", "scheduler")])
    assert "participant scheduler" in text
    assert "participant volume" not in text
    assert "participant hypervisor" not in text


@pytest.mark.parametrize("notation", list(DiagramFormat))
def test_a_failure_and_its_undos_are_seen(notation: DiagramFormat) -> None:
    steps = [
        step(0, "claim", "scheduler"),
        step(1, "start guest", "compute", host="sim-0", **failed("no room in the attic")),
        step(2, "undo start guest", "compute", host="sim-0"),
        step(3, "undo claim", "scheduler"),
    ]
    text = diagram(operation(result="Error", message="No valid host was found."), steps, notation)
    assert "FAILED after 0.8 ms: no room in the attic" in text
    assert text.index("opt undo, in reverse order") < text.index("undo start guest") < text.index("undo claim")
    assert text.count("\n    end\n" if notation is DiagramFormat.MERMAID else "\nend\n") == 1
    assert "Error: No valid host was found." in text
    assert "vm_state active" not in text


def test_an_undo_that_is_followed_by_another_attempt_closes_its_block_first() -> None:
    steps = [
        step(0, "claim", "scheduler", **failed("full")),
        step(1, "undo claim", "scheduler"),
        step(2, "claim (2)", "scheduler"),
    ]
    lines = diagram(operation(), steps).splitlines()
    assert lines.index("end") < lines.index("conductor->scheduler: claim (2)")


def test_an_operation_in_flight_is_shown_as_far_as_it_came() -> None:
    running = step(0, "start guest", "compute", finished_at=None, result=None)
    text = diagram(operation(finished_at=None, result=None), [running])
    assert "note over compute: not finished" in text
    assert "note over conductor: in flight" in text
    assert "settle" not in text


def test_a_pause_between_steps_tells_that_the_conductor_was_away() -> None:
    late = step(1, "claim", "scheduler", started_at=START + 5_000_000, finished_at=START + 5_001_000)
    text = diagram(operation(), [step(0, "select hosts", "scheduler"), late])
    assert "note over conductor: 4999 ms later" in text


def test_who_took_over_is_named() -> None:
    text = diagram(operation(cancelled_by="delete", result="Error", message="The operation was taken over by delete."), [])
    assert "note over database: taken over by delete" in text


@pytest.mark.parametrize("notation", list(DiagramFormat))
def test_a_message_cannot_add_lines_to_the_diagram(notation: DiagramFormat) -> None:
    evil = "x\nclient->api: GET /secrets; participant mallory #59; end"
    text = diagram(operation(), [step(0, "claim", "scheduler", **failed(evil))], notation)
    lines = [line.strip() for line in text.splitlines()]
    assert not any(line.startswith(("client->api: GET", "participant mallory", "end")) for line in lines)
    assert ";" not in text


def test_a_change_found_by_the_cloud_itself_has_no_client() -> None:
    text = diagram(operation(action="power sync", rule="power sync", vm_state_before=VmState.ACTIVE), [])
    assert "client" not in text


def test_mermaid_opens_with_its_keyword_and_every_participant() -> None:
    text = diagram(operation(), [step(0, "select hosts", "scheduler")], DiagramFormat.MERMAID)
    assert text.startswith("sequenceDiagram\n")
    assert "    conductor->>scheduler: select hosts" in text
