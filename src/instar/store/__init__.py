"""The database: the contract, its schema, and every SQL statement."""
