-- Moves of instances between hosts and sizes (migrations, as the API calls them), and how far an operation is.

CREATE TABLE moves (
    id INTEGER PRIMARY KEY,
    uuid TEXT NOT NULL UNIQUE,
    instance_id TEXT NOT NULL,
    operation_id TEXT NOT NULL,
    type TEXT NOT NULL,               -- resize, migration, live-migration, evacuation
    status TEXT NOT NULL,
    source_host TEXT NOT NULL,
    dest_host TEXT,
    old_flavor_id TEXT NOT NULL,
    new_flavor_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    project_id TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    progress BLOB NOT NULL            -- msgpack of MigrationProgress
);
CREATE INDEX moves_by_instance ON moves (instance_id, created_at);
CREATE INDEX moves_by_time ON moves (updated_at);

ALTER TABLE instances ADD COLUMN progress INTEGER NOT NULL DEFAULT 0;  -- percent, while an operation moves data
CREATE INDEX instances_by_state ON instances (vm_state, updated_at) WHERE deleted = 0;
