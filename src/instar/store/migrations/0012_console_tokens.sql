-- Tokens by which a console is reached: one connection each, for a short time. Times: microseconds since the epoch.

CREATE TABLE console_tokens (
    token_hash TEXT PRIMARY KEY,      -- SHA-256 of the token, which is never kept
    instance_id TEXT NOT NULL,
    kind TEXT NOT NULL,               -- vnc, serial
    host TEXT NOT NULL,               -- where the instance was; elsewhere the token is void
    address TEXT NOT NULL,            -- where that host takes streams
    port INTEGER NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL
);
CREATE INDEX console_tokens_by_instance ON console_tokens (instance_id, created_at);
CREATE INDEX console_tokens_by_expiry ON console_tokens (expires_at);
