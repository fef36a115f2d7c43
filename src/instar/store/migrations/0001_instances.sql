-- Instances, their operations and journals, the hosts and what is claimed on them. Times: microseconds since the epoch.

CREATE TABLE instances (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    name TEXT NOT NULL,
    hostname TEXT NOT NULL,
    vm_state TEXT NOT NULL,
    task_state TEXT,
    power_state INTEGER NOT NULL,
    host TEXT,
    availability_zone TEXT,
    flavor_id TEXT NOT NULL,
    image_id TEXT,
    key_name TEXT,
    group_id TEXT,
    addresses TEXT NOT NULL,          -- space-separated, for the ip filter
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    launched_at BIGINT,
    terminated_at BIGINT,
    deleted INTEGER NOT NULL,         -- 0 or 1
    locked_by TEXT,
    reservation_id TEXT NOT NULL,
    vcpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_gib INTEGER NOT NULL,
    epoch BIGINT NOT NULL,            -- grows whenever a conductor starts or takes over an operation
    turn BIGINT NOT NULL,             -- grows with each accepted operation
    revision BIGINT NOT NULL,         -- grows with each change of spec
    spec BLOB NOT NULL,
    facts BLOB NOT NULL
);
CREATE INDEX instances_by_project ON instances (project_id, deleted, created_at, id);
CREATE INDEX instances_by_creation ON instances (deleted, created_at, id);
CREATE INDEX instances_by_host ON instances (host, deleted);
CREATE INDEX instances_by_update ON instances (updated_at);
CREATE INDEX instances_by_group ON instances (group_id, deleted);

CREATE TABLE operations (
    id TEXT PRIMARY KEY,
    instance_id TEXT NOT NULL,
    action TEXT NOT NULL,
    rule TEXT NOT NULL,
    request_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    project_id TEXT NOT NULL,
    turn BIGINT NOT NULL,
    vm_state_before TEXT NOT NULL,
    arguments BLOB NOT NULL,
    owner TEXT,
    epoch BIGINT NOT NULL,
    cancelled_by TEXT,
    started_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    finished_at BIGINT,
    result TEXT,
    message TEXT
);
CREATE INDEX operations_by_instance ON operations (instance_id, turn);
CREATE INDEX operations_unfinished ON operations (owner) WHERE finished_at IS NULL;

CREATE TABLE steps (
    operation_id TEXT NOT NULL REFERENCES operations (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    name TEXT NOT NULL,
    participant TEXT NOT NULL,
    host TEXT,
    started_at BIGINT NOT NULL,
    finished_at BIGINT,
    result TEXT,
    output BLOB,
    error BLOB,
    traceback TEXT,
    hypervisor_us BIGINT,
    task_state TEXT,
    PRIMARY KEY (operation_id, seq)
);

CREATE TABLE notifications (
    id TEXT PRIMARY KEY,
    body BLOB NOT NULL
);

CREATE TABLE conductors (
    id TEXT PRIMARY KEY,
    beat BIGINT NOT NULL,
    started_at BIGINT NOT NULL
);

CREATE TABLE hosts (
    name TEXT PRIMARY KEY,
    service_id TEXT NOT NULL,         -- of the compute service, as the API shows it
    hypervisor_id TEXT NOT NULL,
    inventory BLOB NOT NULL,          -- msgpack of HostInventory
    vcpus_capacity INTEGER NOT NULL,  -- after reserve and allocation ratio
    memory_capacity_mib INTEGER NOT NULL,
    disk_capacity_gib INTEGER NOT NULL,
    vcpus_claimed INTEGER NOT NULL,
    memory_claimed_mib INTEGER NOT NULL,
    disk_claimed_gib INTEGER NOT NULL,
    instances_claimed INTEGER NOT NULL,
    disabled INTEGER NOT NULL,
    disabled_reason TEXT,
    forced_down INTEGER NOT NULL,
    created_at BIGINT NOT NULL,
    reported_at BIGINT NOT NULL
);

CREATE TABLE claims (
    id TEXT PRIMARY KEY,              -- made by the operation that claims, so that claiming twice is claiming once
    instance_id TEXT NOT NULL,
    host TEXT NOT NULL REFERENCES hosts (name),
    vcpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_gib INTEGER NOT NULL
);
CREATE INDEX claims_by_instance ON claims (instance_id);
CREATE INDEX claims_by_host ON claims (host);

CREATE TABLE project_usage (
    project_id TEXT PRIMARY KEY,
    instances INTEGER NOT NULL,
    cores INTEGER NOT NULL,
    ram_mib INTEGER NOT NULL
);

CREATE TABLE server_groups (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    name TEXT NOT NULL,
    policy TEXT NOT NULL,             -- affinity, anti-affinity, soft-affinity, soft-anti-affinity
    rules BLOB NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE aggregates (
    id INTEGER PRIMARY KEY,
    uuid TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL UNIQUE,
    availability_zone TEXT,
    metadata BLOB NOT NULL,           -- msgpack of a map of strings
    created_at BIGINT NOT NULL,
    updated_at BIGINT
);

CREATE TABLE aggregate_hosts (
    aggregate_id INTEGER NOT NULL REFERENCES aggregates (id) ON DELETE CASCADE,
    host TEXT NOT NULL,
    PRIMARY KEY (aggregate_id, host)
);

CREATE TABLE flavors (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    is_public INTEGER NOT NULL,
    disabled INTEGER NOT NULL,
    vcpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    root_gib INTEGER NOT NULL,
    document BLOB NOT NULL,           -- msgpack of Flavor
    created_at BIGINT NOT NULL
);

CREATE TABLE flavor_access (
    flavor_id TEXT NOT NULL REFERENCES flavors (id) ON DELETE CASCADE,
    project_id TEXT NOT NULL,
    PRIMARY KEY (flavor_id, project_id)
);

CREATE TABLE key_pairs (
    user_id TEXT NOT NULL,
    name TEXT NOT NULL,
    type TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    public_key TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    id TEXT NOT NULL UNIQUE,
    PRIMARY KEY (user_id, name)
);

CREATE TABLE quota_limits (
    project_id TEXT NOT NULL,
    user_id TEXT NOT NULL,            -- empty: the whole project; project 'default': the class default
    resource TEXT NOT NULL,
    hard_limit INTEGER NOT NULL,
    PRIMARY KEY (project_id, user_id, resource)
);

CREATE TABLE cloud_facts (
    name TEXT PRIMARY KEY,            -- made once for this cloud, such as its id
    value TEXT NOT NULL
);
