"""One file per operation, each readable from top to bottom."""
