-- Images, their labels (searchable copies of what `document` holds) and the projects they are shared with.
-- Times: microseconds since the epoch. A deleted image keeps its row, so that its id is never given out again.

CREATE TABLE images (
    id TEXT PRIMARY KEY,
    name TEXT,
    status TEXT NOT NULL,             -- queued, saving, active, deactivated, deleted
    owner TEXT,
    visibility TEXT NOT NULL,         -- private, shared, community, public
    container_format TEXT,
    disk_format TEXT,
    min_disk_gib BIGINT NOT NULL,
    min_ram_mib BIGINT NOT NULL,
    protected INTEGER NOT NULL,       -- 0 or 1
    hidden INTEGER NOT NULL,          -- 0 or 1
    size_bytes BIGINT,                -- from here to sha512: known once the data is stored
    virtual_size_bytes BIGINT,
    md5 TEXT,
    sha256 TEXT,                      -- the name of the data's file; images with the same data share it
    sha512 TEXT,
    upload_id TEXT,                   -- of the upload in flight, while status is saving
    document BLOB NOT NULL,           -- JSON: custom properties and tags
    revision BIGINT NOT NULL,         -- grows with each change
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    deleted_at BIGINT
);
CREATE INDEX images_by_creation ON images (deleted_at, created_at, id);
CREATE INDEX images_by_owner ON images (owner, deleted_at);
CREATE INDEX images_by_name ON images (name, deleted_at);
CREATE INDEX images_by_data ON images (sha256);

CREATE TABLE image_properties (
    image_id TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (image_id, name)
);
CREATE INDEX image_properties_by_name ON image_properties (name, image_id);

CREATE TABLE image_tags (
    image_id TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    tag TEXT NOT NULL,
    PRIMARY KEY (image_id, tag)
);
CREATE INDEX image_tags_by_tag ON image_tags (tag, image_id);

CREATE TABLE image_members (
    image_id TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    project_id TEXT NOT NULL,
    status TEXT NOT NULL,             -- pending, accepted, rejected
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (image_id, project_id)
);
CREATE INDEX image_members_by_project ON image_members (project_id, status);
