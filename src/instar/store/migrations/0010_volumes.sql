-- Volumes, their types, snapshots and attachments. Times: microseconds since the epoch. What is deleted leaves no row.

CREATE TABLE volume_types (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    description TEXT,
    public INTEGER NOT NULL,          -- 0 or 1: whether projects see it that were not given access
    extra_specs BLOB NOT NULL,        -- JSON
    created_at BIGINT NOT NULL,
    updated_at BIGINT
);

CREATE TABLE volume_type_access (
    type_id TEXT NOT NULL REFERENCES volume_types (id) ON DELETE CASCADE,
    project_id TEXT NOT NULL,
    PRIMARY KEY (type_id, project_id)
);

CREATE TABLE volumes (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    name TEXT,
    description TEXT,
    status TEXT NOT NULL,
    status_before TEXT NOT NULL,      -- what status becomes again after extending, uploading, reverting
    size_gib BIGINT NOT NULL,
    type_id TEXT NOT NULL REFERENCES volume_types (id),
    availability_zone TEXT NOT NULL,
    bootable INTEGER NOT NULL,        -- 0 or 1
    multiattach INTEGER NOT NULL,     -- 0 or 1
    read_only INTEGER NOT NULL,       -- 0 or 1
    image_id TEXT,                    -- what it was made of: one of these three, or none
    snapshot_id TEXT,
    source_volume_id TEXT,
    export TEXT NOT NULL,             -- the unguessable name under which its data is served
    document BLOB NOT NULL,           -- JSON: metadata, image metadata
    work BLOB,                        -- JSON: what the service has yet to do with it; done again after a crash
    created_at BIGINT NOT NULL,
    updated_at BIGINT
);
CREATE INDEX volumes_by_project ON volumes (project_id, created_at, id);
CREATE INDEX volumes_by_creation ON volumes (created_at, id);
CREATE INDEX volumes_by_type ON volumes (type_id);

CREATE TABLE volume_snapshots (
    id TEXT PRIMARY KEY,
    volume_id TEXT NOT NULL REFERENCES volumes (id),
    project_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    name TEXT,
    description TEXT,
    status TEXT NOT NULL,
    size_gib BIGINT NOT NULL,
    document BLOB NOT NULL,           -- JSON: metadata; the volume's image metadata and whether it was bootable
    work BLOB,
    created_at BIGINT NOT NULL,
    updated_at BIGINT
);
CREATE INDEX volume_snapshots_by_project ON volume_snapshots (project_id, created_at, id);
CREATE INDEX volume_snapshots_by_volume ON volume_snapshots (volume_id);

CREATE TABLE volume_attachments (
    id TEXT PRIMARY KEY,
    volume_id TEXT NOT NULL REFERENCES volumes (id),
    instance_id TEXT NOT NULL,        -- empty: of no server
    status TEXT NOT NULL,             -- reserved, attaching, attached, detaching
    host TEXT NOT NULL,               -- empty until it is connected
    device TEXT NOT NULL,
    read_only INTEGER NOT NULL,       -- 0 or 1
    created_at BIGINT NOT NULL,
    attached_at BIGINT
);
CREATE INDEX volume_attachments_by_volume ON volume_attachments (volume_id);
CREATE INDEX volume_attachments_by_instance ON volume_attachments (instance_id);

CREATE TABLE volume_quotas (
    project_id TEXT NOT NULL,         -- `default`: of every project without limits of its own
    resource TEXT NOT NULL,
    hard_limit BIGINT NOT NULL,
    PRIMARY KEY (project_id, resource)
);
