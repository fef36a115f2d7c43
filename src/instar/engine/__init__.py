"""How an operation runs: journal, replay, undo, ownership, recovery, notifications."""
