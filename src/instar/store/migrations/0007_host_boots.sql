-- Which start of its machine a host was last seen in: another one means that its guests have to be started again.

CREATE TABLE host_boots (
    host TEXT PRIMARY KEY,
    boot_id TEXT NOT NULL
);
