"""The journal of one operation in memory: what was recorded, and the statements that record more."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, get_type_hints

import msgspec

from instar.clock import now_us
from instar.errors import InstarError, revive
from instar.model.operation import RecordedError, Step
from instar.model.states import TaskState
from instar.store.contract import Statement
from instar.store.operations import step_finish

T = TypeVar("T")

TRACEBACK_MAX_CHARACTERS = 8_000
_encode = msgspec.msgpack.Encoder(enc_hook=str).encode


class Journal:
    """Steps by name. A name that comes again in one run gets a number: `guest`, `guest (2)`."""

    def __init__(self, operation_id: str, steps: list[Step]) -> None:
        self._operation_id = operation_id
        self._steps = {step.name: step for step in steps}
        self._seen: dict[str, int] = {}
        self._next_seq = max((step.seq for step in steps), default=-1) + 1
        self.last_name: str | None = None

    def unique(self, name: str) -> str:
        count = self._seen[name] = self._seen.get(name, 0) + 1
        return name if count == 1 else f"{name} ({count})"

    def get(self, name: str) -> Step | None:
        return self._steps.get(name)

    def start(self, name: str, participant: str, host: str | None, task: TaskState | None) -> Step:
        step = Step(
            operation_id=self._operation_id, seq=self._next_seq, name=name, participant=participant, host=host,
            started_at=now_us(), finished_at=None, result=None, output=None, error=None, traceback=None,
            hypervisor_us=None, task_state=task.value if task else None,
        )  # fmt: skip
        self._steps[name] = step
        self._next_seq += 1
        self.last_name = name
        return step

    def forget(self, name: str) -> None:
        """The start of this step was not committed."""
        step = self._steps.get(name)
        if step is not None and step.seq == self._next_seq - 1 and step.result is None and self.last_name == name:
            del self._steps[name]
            self._next_seq -= 1

    def succeed(self, name: str, output: object, hypervisor_us: int) -> Statement:
        return self._finish(name, result="Success", output=_encode(output), hypervisor_us=hypervisor_us)

    def fail(self, name: str, error: InstarError, trace: str, hypervisor_us: int) -> Statement:
        recorded = RecordedError(type(error).__name__, error.message, error.facts)
        return self._finish(
            name,
            result="Error",
            error=_encode(recorded),
            traceback=trace[-TRACEBACK_MAX_CHARACTERS:],
            hypervisor_us=hypervisor_us,
        )

    def _finish(self, name: str, **changes: Any) -> Statement:
        step = msgspec.structs.replace(self._steps[name], finished_at=now_us(), **changes)
        self._steps[name] = step
        return step_finish(step)

    @staticmethod
    def error_of(step: Step) -> InstarError:
        recorded = msgspec.msgpack.decode(step.error or b"", type=RecordedError)
        return revive(recorded.code, recorded.message, recorded.facts)


def decode_output(step: Step, call: Callable[..., Awaitable[T]]) -> T:
    """What the step returned, as the type that the call promises."""
    result: T = _decoder(getattr(call, "__func__", call)).decode(step.output or b"\xc0")
    return result


@functools.cache
def _decoder(function: Callable[..., Any]) -> msgspec.msgpack.Decoder[Any]:
    # None is msgpack's nil; a call without an annotation is taken to return nothing of interest.
    return msgspec.msgpack.Decoder(get_type_hints(function).get("return", Any))
