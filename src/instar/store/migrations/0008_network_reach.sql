-- Networks reach over hosts: each has a number for its tunnels, and `reach` grows when the hosts that have ports of it
-- change. `next_host`: where the port's guest is on its way to while it runs on `host`; empty: nowhere.

ALTER TABLE networks ADD COLUMN vni INTEGER NOT NULL DEFAULT 0;
ALTER TABLE networks ADD COLUMN reach BIGINT NOT NULL DEFAULT 0;
UPDATE networks SET vni = (SELECT COUNT(*) FROM networks other WHERE other.id <= networks.id);
CREATE UNIQUE INDEX networks_by_vni ON networks (vni) WHERE vni > 0;

ALTER TABLE ports ADD COLUMN next_host TEXT NOT NULL DEFAULT '';
CREATE INDEX ports_by_host ON ports (network_id, host);
CREATE INDEX ports_by_next_host ON ports (network_id, next_host) WHERE next_host <> '';
