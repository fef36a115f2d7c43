"""One file per operation, each readable from top to bottom as its sequence diagram: check, mark, steps with undo.

How to add an operation is in docs/adding-an-operation.md. `OPERATIONS` is what conductors run, `door.py` what the API asks.
"""
