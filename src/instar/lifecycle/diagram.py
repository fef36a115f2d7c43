"""The sequence diagram of what really happened: an operation and its journal, as text for websequencediagrams or Mermaid.

Called by the operator's API for `instar server diagram`, and by the demo. Pure functions: nothing is read here, and nothing
is drawn that the journal does not tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec

from instar.clock import iso_us
from instar.model.operation import Operation, RecordedError, Step
from instar.model.states import TRANSITIONS, Action

# The lifelines of LIFECYCLE.md, from left to right; only those that took part are drawn.
PARTICIPANTS = (
    "client", "api", "database", "conductor", "scheduler", "image", "network", "volume", "compute", "hypervisor",
)  # fmt: skip
UNDO = "undo "
PAUSE_WORTH_TELLING_US = 1_000_000  # between two steps: the conductor was away, or had no room
MESSAGE_MAX_CHARACTERS = 200
_LABELS = str.maketrans({"\n": " ", "\r": " ", ";": ",", "#": " "})  # what either notation would take for syntax


class DiagramFormat(StrEnum):
    TEXT = "text"
    MERMAID = "mermaid"


class Kind(StrEnum):
    CALL = "call"
    ANSWER = "answer"
    FAILURE = "failure"
    NOTE = "note"
    BLOCK = "block"
    END = "end"


class Line(NamedTuple):
    """One line of a diagram, before it has a notation. A note is over `source`."""

    kind: Kind
    source: str = ""
    target: str = ""
    text: str = ""


def diagram(operation: Operation, steps: Sequence[Step], notation: DiagramFormat = DiagramFormat.TEXT) -> str:
    """The diagram of an operation with its steps in the journal's order; of one in flight, as far as it has come."""
    lines = list(lines_of(operation, steps))
    drawn = [name for name in PARTICIPANTS if any(name in (line.source, line.target) for line in lines)]
    write = _mermaid if notation is DiagramFormat.MERMAID else _text
    return "\n".join(write(_title(operation), drawn, lines)) + "\n"


def lines_of(operation: Operation, steps: Sequence[Step]) -> Iterator[Line]:
    """The story, line by line, in no notation yet."""
    yield from _acceptance(operation)
    task = _first_task(operation)
    before, unwinding = operation.started_at, False
    for step in steps:
        if step.name.startswith(UNDO) is not unwinding:
            unwinding = not unwinding
            yield Line(Kind.BLOCK, text="undo, in reverse order") if unwinding else Line(Kind.END)
        if step.started_at - before > PAUSE_WORTH_TELLING_US:
            yield Line(Kind.NOTE, "conductor", text=f"{_ms(step.started_at - before)} later")
        if step.task_state is not None and step.task_state != task and not unwinding:
            task = step.task_state
            yield Line(Kind.NOTE, "database", text=f"task_state {task}")
        yield from _step(step)
        before = step.finished_at or step.started_at
    if unwinding:
        yield Line(Kind.END)
    yield from _ending(operation)


def _first_task(operation: Operation) -> str | None:
    transition = TRANSITIONS.get(operation.rule)
    return transition.task.value if transition and transition.task else None


def _acceptance(operation: Operation) -> Iterator[Line]:
    """What the API did before it answered; an operation without a rule is one that the cloud recorded by itself."""
    transition = TRANSITIONS.get(operation.rule)
    if transition is None:
        yield Line(Kind.CALL, "conductor", "database", f"{operation.action}: {operation.message or 'no message'}")
        return
    task = _first_task(operation)
    if operation.action == Action.CREATE:
        request, status = "POST /servers", "202"
    elif operation.action == Action.DELETE:
        request, status = f"DELETE /servers/{operation.instance_id}", "204"
    else:
        request, status = f"POST /servers/{operation.instance_id}/action {operation.rule}", "202"
    yield Line(Kind.CALL, "client", "api", request)
    yield Line(Kind.CALL, "api", "database", "check, mark, and record the operation: one transaction")
    marked = f"vm_state {operation.vm_state_before}, task_state {task}" if task else f"vm_state {operation.vm_state_before}"
    yield Line(Kind.NOTE, "database", text=marked)
    yield Line(Kind.ANSWER, "api", "client", f"{status}, {operation.request_id}")
    if task:
        yield Line(Kind.CALL, "api", "conductor", f"{operation.action} was accepted")


def _step(step: Step) -> Iterator[Line]:
    target = step.participant if step.participant in PARTICIPANTS else "conductor"
    name = f"{step.name} (on {step.host})" if step.host else step.name
    yield Line(Kind.CALL, "conductor", target, name)
    if step.hypervisor_us:
        yield Line(Kind.CALL, target, "hypervisor", step.name)
        yield Line(Kind.ANSWER, "hypervisor", target, f"{_ms(step.hypervisor_us)} of its own")
    if step.finished_at is None:
        yield Line(Kind.NOTE, target, text="not finished")
        return
    took = _ms(step.finished_at - step.started_at)
    if step.result == "Error":
        yield Line(Kind.FAILURE, target, "conductor", f"FAILED after {took}: {_error_message(step)}")
    elif target != "conductor":
        yield Line(Kind.ANSWER, target, "conductor", took)
    else:
        yield Line(Kind.NOTE, "conductor", text=f"{step.name}: {took}")


def _ending(operation: Operation) -> Iterator[Line]:
    if operation.cancelled_by:
        yield Line(Kind.NOTE, "database", text=f"taken over by {operation.cancelled_by}")
    if operation.finished_at is None:
        yield Line(Kind.NOTE, "conductor", text="in flight")
        return
    if operation.result == "Error":
        yield Line(Kind.CALL, "conductor", "database", "put back, record the fault and the end: one transaction")
        yield Line(Kind.NOTE, "database", text=f"Error: {operation.message or 'no message'}")
        return
    transition = TRANSITIONS.get(operation.rule)
    if transition is None or transition.task is None:
        return
    state = (transition.ends or operation.vm_state_before).value
    yield Line(Kind.CALL, "conductor", "database", "settle: state, record and notification in one transaction")
    yield Line(Kind.NOTE, "database", text=f"vm_state {state}, task_state null")


def _title(operation: Operation) -> str:
    if operation.finished_at is None:
        outcome = "in flight"
    else:
        outcome = f"{operation.result} after {_ms(operation.finished_at - operation.started_at)}"
    return f"{operation.action} of {operation.instance_id} at {iso_us(operation.started_at)}: {outcome}"


def _error_message(step: Step) -> str:
    if not step.error:
        return "no message"
    try:
        return msgspec.msgpack.decode(step.error, type=RecordedError).message
    except msgspec.MsgspecError:
        return "unreadable"


def _ms(duration_us: int) -> str:
    return f"{duration_us / 1000:.1f} ms" if duration_us < 100_000 else f"{duration_us / 1000:.0f} ms"


def _label(text: str) -> str:
    """One line that neither notation takes for syntax; messages may hold what users wrote."""
    text = text.translate(_LABELS)
    return text if len(text) <= MESSAGE_MAX_CHARACTERS else text[: MESSAGE_MAX_CHARACTERS - 1] + "…"


def _text(title: str, participants: list[str], lines: Sequence[Line]) -> Iterator[str]:
    """websequencediagrams."""
    yield f"title {_label(title)}"
    yield ""
    yield from (f"participant {name}" for name in participants)
    yield ""
    indent = ""
    for kind, source, target, text in lines:
        label = _label(text)
        if kind is Kind.BLOCK:
            yield f"opt {label}"
            indent = "    "
        elif kind is Kind.END:
            indent = ""
            yield "end"
        elif kind is Kind.NOTE:
            yield f"{indent}note over {source}: {label}"
        else:
            arrow = "->" if kind is Kind.CALL else "-->"
            yield f"{indent}{source}{arrow}{target}: {label}"


def _mermaid(title: str, participants: list[str], lines: Sequence[Line]) -> Iterator[str]:
    yield "sequenceDiagram"
    yield f"    title {_label(title)}"
    yield from (f"    participant {name}" for name in participants)
    indent = "    "
    for kind, source, target, text in lines:
        label = _label(text)
        if kind is Kind.BLOCK:
            yield f"    opt {label}"
            indent = "        "
        elif kind is Kind.END:
            indent = "    "
            yield "    end"
        elif kind is Kind.NOTE:
            yield f"{indent}Note over {source}: {label}"
        else:
            arrow = {Kind.CALL: "->>", Kind.ANSWER: "-->>", Kind.FAILURE: "--x"}[kind]
            yield f"{indent}{source}{arrow}{target}: {label}"
