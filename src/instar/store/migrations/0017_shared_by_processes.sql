-- What the processes of one cloud must agree on, and what one of them leaves for another to do.

CREATE TABLE cloud_keys (
    name TEXT PRIMARY KEY,            -- tokens, image_urls
    key_hex TEXT NOT NULL,            -- 32 bytes
    made_at BIGINT NOT NULL
);

-- Security groups, instances and networks whose packet filters hosts are still to be told of.
CREATE TABLE filter_changes (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,               -- rules, members (subject: security group), instances, late (instance), networks
    subject TEXT NOT NULL
);
CREATE INDEX filter_changes_by_kind ON filter_changes (kind);
