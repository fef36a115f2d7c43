-- Networks, subnets, ports with their addresses, security groups. Times: microseconds since the epoch. Flags are 0 or 1.
-- `revision` grows with each change; that of a network also when its subnets change. Lists are JSON.

CREATE TABLE networks (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL,
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    shared INTEGER NOT NULL,
    admin_state_up INTEGER NOT NULL,
    mtu INTEGER NOT NULL,
    port_security INTEGER NOT NULL,
    nat INTEGER NOT NULL,                  -- 1: the host is its router
    tags TEXT NOT NULL,
    revision BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL
);
CREATE INDEX networks_by_project ON networks (project_id);

CREATE TABLE subnets (
    id TEXT PRIMARY KEY,
    network_id TEXT NOT NULL REFERENCES networks (id),
    project_id TEXT NOT NULL,
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    cidr TEXT NOT NULL,
    gateway_ip TEXT,
    dhcp_enabled INTEGER NOT NULL,
    dhcp_ip TEXT,
    dns_nameservers TEXT NOT NULL,
    host_routes TEXT NOT NULL,
    allocation_pools TEXT NOT NULL,
    tags TEXT NOT NULL,
    revision BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL
);
CREATE INDEX subnets_by_network ON subnets (network_id);
CREATE INDEX subnets_by_project ON subnets (project_id);

CREATE TABLE ports (
    id TEXT PRIMARY KEY,
    network_id TEXT NOT NULL REFERENCES networks (id),
    project_id TEXT NOT NULL,
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    mac_address TEXT NOT NULL,
    admin_state_up INTEGER NOT NULL,
    device_id TEXT NOT NULL,
    device_owner TEXT NOT NULL,
    host TEXT NOT NULL,                    -- empty: not bound
    dns_name TEXT NOT NULL,
    port_security INTEGER NOT NULL,
    fixed_ips TEXT NOT NULL,               -- in the order asked; port_addresses makes them unique
    security_groups TEXT NOT NULL,         -- in the order asked; port_security_groups finds the members
    allowed_pairs TEXT NOT NULL,
    made_by_us INTEGER NOT NULL,           -- 1: deleted with its instance
    position INTEGER,                      -- which NIC of its instance it is; null: no instance has it
    nic_tag TEXT,
    tags TEXT NOT NULL,
    revision BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    UNIQUE (network_id, mac_address),
    UNIQUE (device_id, position)
);
CREATE INDEX ports_by_project ON ports (project_id);

CREATE TABLE port_addresses (
    subnet_id TEXT NOT NULL REFERENCES subnets (id),
    ip_address TEXT NOT NULL,
    port_id TEXT NOT NULL REFERENCES ports (id) ON DELETE CASCADE,
    PRIMARY KEY (subnet_id, ip_address)    -- an address is never given out twice
);
CREATE INDEX port_addresses_by_port ON port_addresses (port_id);

CREATE TABLE security_groups (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL,
    name TEXT NOT NULL,
    description TEXT NOT NULL,
    default_of TEXT UNIQUE,                -- the project whose default group it is, else null
    tags TEXT NOT NULL,
    revision BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL
);
CREATE INDEX security_groups_by_project ON security_groups (project_id, name);

CREATE TABLE security_group_rules (
    id TEXT PRIMARY KEY,
    group_id TEXT NOT NULL REFERENCES security_groups (id) ON DELETE CASCADE,
    project_id TEXT NOT NULL,
    direction TEXT NOT NULL,               -- ingress, egress
    ethertype TEXT NOT NULL,               -- IPv4, IPv6
    protocol TEXT,
    port_min INTEGER,
    port_max INTEGER,
    remote_ip_prefix TEXT,
    remote_group_id TEXT REFERENCES security_groups (id) ON DELETE CASCADE,
    description TEXT NOT NULL,
    identity TEXT NOT NULL,                -- what the rule says, as one text: no group has a rule twice
    revision BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    UNIQUE (group_id, identity)
);
CREATE INDEX security_group_rules_by_remote ON security_group_rules (remote_group_id);
CREATE INDEX security_group_rules_by_project ON security_group_rules (project_id);

CREATE TABLE port_security_groups (
    group_id TEXT NOT NULL REFERENCES security_groups (id),
    port_id TEXT NOT NULL REFERENCES ports (id) ON DELETE CASCADE,
    PRIMARY KEY (group_id, port_id)
);
CREATE INDEX port_security_groups_by_port ON port_security_groups (port_id);

CREATE TABLE network_quotas (
    project_id TEXT NOT NULL,
    resource TEXT NOT NULL,
    hard_limit BIGINT NOT NULL,            -- -1: no limit
    PRIMARY KEY (project_id, resource)
);
