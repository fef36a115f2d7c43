-- What the Compute API counts under a limit: a row to hold while counting, so that two requests cannot both be the last.

CREATE TABLE counting_locks (
    owner TEXT PRIMARY KEY,           -- what is counted for: key_pairs:<user id>
    taken_at BIGINT NOT NULL
);
