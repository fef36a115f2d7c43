"""Private servers of a distributed cloud on one machine, each in a folder of its own: the database, the message broker."""
