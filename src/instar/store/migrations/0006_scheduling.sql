-- What the group rule at a claim needs to read in SQL: how many members of a group one host may have (anti-affinity).

ALTER TABLE server_groups ADD COLUMN max_per_host INTEGER NOT NULL DEFAULT 1;
