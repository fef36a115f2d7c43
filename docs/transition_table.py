"""Writes the table of transitions into docs/operations.md from the code; `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from instar.model.states import TRANSITIONS, TaskState, Transition, VmState

PAGE = Path(__file__).with_name("operations.md")
BEGIN, END = "<!-- transitions: written by docs/transition_table.py -->", "<!-- end of transitions -->"


def table() -> str:
    heads = ("rule", "from vm_state", "while task_state", "first task_state", "ends", "fails")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for rule, one in TRANSITIONS.items():
        cells = (
            str(rule), _vm_states(one), _task_states(one), f"`{one.task.value}`" if one.task else "–",
            one.ends.value if one.ends else "as it began", one.fails.value if one.fails else "as it began",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _vm_states(one: Transition) -> str:
    if not one.vm_states:
        return "–"
    missing = sorted(state.value for state in VmState if state not in one.vm_states)
    if len(missing) <= 1:
        return f"any but {missing[0]}" if missing else "any"
    return ", ".join(state.value for state in VmState if state in one.vm_states)


def _task_states(one: Transition) -> str:
    if len(one.task_states) > len(TaskState):
        return "any"
    named = ", ".join(f"`{state.value}`" for state in TaskState if state in one.task_states)
    return f"null, {named}" if named else "null"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    fresh = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        return 0 if fresh == page else 1
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
