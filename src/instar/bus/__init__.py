"""Messages between processes: the contract and its implementations."""
