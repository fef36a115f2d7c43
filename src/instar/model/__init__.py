"""The records that cross boundaries, and the states with their transition table."""
