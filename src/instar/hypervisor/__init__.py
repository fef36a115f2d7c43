"""What runs guests: the contract and its implementations."""
