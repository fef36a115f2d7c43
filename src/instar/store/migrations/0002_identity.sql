-- Who may use the cloud. Ids are hexadecimal UUIDs without dashes (`default` for the first domain).
-- Times: microseconds since the epoch. `enabled` and `unrestricted` are 0 or 1.

CREATE TABLE identity_domains (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    description TEXT NOT NULL,
    enabled INTEGER NOT NULL
);

CREATE TABLE identity_projects (
    id TEXT PRIMARY KEY,
    domain_id TEXT NOT NULL REFERENCES identity_domains (id),
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    enabled INTEGER NOT NULL,
    tags TEXT NOT NULL,                    -- JSON list
    token_epoch INTEGER NOT NULL,          -- tokens of an older epoch are refused
    UNIQUE (domain_id, name)
);

CREATE TABLE identity_users (
    id TEXT PRIMARY KEY,
    domain_id TEXT NOT NULL REFERENCES identity_domains (id),
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    email TEXT,
    enabled INTEGER NOT NULL,
    default_project_id TEXT,
    password_hash TEXT,                    -- argon2id; null: cannot log in by password
    token_epoch INTEGER NOT NULL,          -- tokens of an older epoch are refused
    UNIQUE (domain_id, name)
);

CREATE TABLE identity_groups (
    id TEXT PRIMARY KEY,
    domain_id TEXT NOT NULL REFERENCES identity_domains (id),
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    UNIQUE (domain_id, name)
);

CREATE TABLE identity_group_members (
    group_id TEXT NOT NULL REFERENCES identity_groups (id) ON DELETE CASCADE,
    user_id TEXT NOT NULL REFERENCES identity_users (id) ON DELETE CASCADE,
    PRIMARY KEY (group_id, user_id)
);
CREATE INDEX identity_group_members_by_user ON identity_group_members (user_id);

CREATE TABLE identity_roles (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    description TEXT NOT NULL
);

CREATE TABLE identity_assignments (
    actor_type TEXT NOT NULL,              -- user, group
    actor_id TEXT NOT NULL,
    target_type TEXT NOT NULL,             -- project, domain, system
    target_id TEXT NOT NULL,               -- `all` for system
    role_id TEXT NOT NULL REFERENCES identity_roles (id) ON DELETE CASCADE,
    PRIMARY KEY (actor_type, actor_id, target_type, target_id, role_id)
);
CREATE INDEX identity_assignments_by_target ON identity_assignments (target_type, target_id);

CREATE TABLE identity_application_credentials (
    id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES identity_users (id) ON DELETE CASCADE,
    project_id TEXT NOT NULL REFERENCES identity_projects (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    secret_hash TEXT NOT NULL,
    role_ids TEXT NOT NULL,                -- JSON list
    expires_at BIGINT,
    unrestricted INTEGER NOT NULL,
    UNIQUE (user_id, name)
);

CREATE TABLE identity_revocations (
    token_id TEXT PRIMARY KEY,
    expires_at BIGINT NOT NULL             -- afterwards the token is refused by itself
);
