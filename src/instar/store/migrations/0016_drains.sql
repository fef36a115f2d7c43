-- Hosts that are being emptied, and what became of each instance that was on them.

CREATE TABLE drains (
    host TEXT PRIMARY KEY,
    mode TEXT NOT NULL,               -- auto, live, cold
    concurrency INTEGER NOT NULL,
    status TEXT NOT NULL,             -- running, aborting, done, aborted
    started_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL
);

CREATE TABLE drain_moves (
    host TEXT NOT NULL,
    instance_id TEXT NOT NULL,
    how TEXT NOT NULL,                -- live, cold, offload; empty: nothing can be done
    status TEXT NOT NULL,             -- moving, again, moved, left
    attempts INTEGER NOT NULL,
    reason TEXT NOT NULL,             -- why it was left, or why the last attempt failed
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (host, instance_id)
);
