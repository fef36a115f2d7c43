"""Every setting, typed, with unit and default. `settings_reading.py` reads them.

`instar config show` prints this file's content: each field says what it is for and in what unit it counts.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta


def _setting(description: str, unit: str = "", **limits: Any) -> Meta:
    return Meta(description=description, extra={"unit": unit}, **limits)


class ApiSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: Annotated[str, _setting("address to listen on; loopback unless you know who can reach it")] = "127.0.0.1"
    port: Annotated[int, _setting("port of every API", "TCP port", ge=0, le=65535)] = 8774
    port_shared: Annotated[
        bool, _setting("several API processes of this machine listen on the port; the kernel deals connections out")
    ] = False
    public_url: Annotated[
        str,
        _setting("where clients reach the cloud; empty: at the address and port it listens on", pattern=r"^(https?://[^\s?#]+[^\s?#/])?$"),
    ] = ""
    body_max_bytes: Annotated[int, _setting("largest JSON body accepted", "bytes", ge=1024)] = 1_048_576
    console_base_url: Annotated[
        str,
        _setting("where browsers reach the consoles; empty: as the request was addressed", pattern=r"^(https?://[^\s?#]+)?$"),
    ] = ""
    list_limit_max: Annotated[int, _setting("most records in one answer of a list", "records", ge=1)] = 1000


class StoreSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    durable: Annotated[bool, _setting("fsync at each commit: survives a power cut, not just a crash")] = True


class PostgresqlSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of each process, where `database` is PostgreSQL."""

    connections: Annotated[int, _setting("connections of one process at most", "connections", ge=1)] = 8
    waiting_max: Annotated[int, _setting("statements that may wait for a connection", "statements", ge=1)] = 10_000
    connect_timeout_s: Annotated[float, _setting("connecting may take so long", "seconds", gt=0)] = 3.0
    start_wait_s: Annotated[float, _setting("at the start the database is waited for so long", "seconds", ge=0)] = 30.0
    statement_timeout_s: Annotated[float, _setting("a transaction may take so long", "seconds", gt=0)] = 30.0
    lock_timeout_s: Annotated[float, _setting("waiting for another's row, then begun again", "seconds", gt=0)] = 10.0
    away_wait_s: Annotated[
        float, _setting("a database that is away is waited for so long, then requests are refused", "seconds", ge=0)
    ] = 3.0
    unsure_wait_s: Annotated[
        float, _setting("the same, where it is not known whether a transaction was done", "seconds", ge=0)
    ] = 30.0
    retry_after_s: Annotated[int, _setting("what refused clients are told to wait", "seconds", ge=1)] = 2


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    operations_max: Annotated[int, _setting("operations that one conductor runs at once", "operations", ge=1)] = 256
    step_deadline_s: Annotated[float, _setting("longest a step may take unless it says otherwise", "seconds", gt=0)] = 120
    lease_s: Annotated[float, _setting("a conductor silent for so long has lost its operations", "seconds", gt=0)] = 6
    poll_s: Annotated[float, _setting("how often unowned operations are looked for", "seconds", gt=0)] = 2
    journal_keep_days: Annotated[int, _setting("how long records of deleted instances are kept", "days", ge=0)] = 30


class HostSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    heartbeat_s: Annotated[float, _setting("how often a host reports", "seconds", gt=0)] = 2
    down_after_s: Annotated[float, _setting("a host that is silent for so long is down", "seconds", gt=0)] = 8
    lost_after_s: Annotated[
        float, _setting("operations that need a silent host give up after; its agent may come back", "seconds", gt=0)
    ] = 20
    commands_max: Annotated[int, _setting("commands that one host works on at once", "commands", ge=1)] = 8
    resume_guests_on_boot: Annotated[bool, _setting("start guests that should run after a host restart")] = True
    power_sync_s: Annotated[float, _setting("how often power states are compared besides events", "seconds", gt=0)] = 60
    looks_per_s: Annotated[
        float, _setting("hosts that are looked at for that, all together; more of them wait longer", "hosts/s", gt=0)
    ] = 30
    local_hosts: Annotated[
        int, _setting("hosts with libvirt on this machine, several in namespaces of their own", "hosts", ge=1, le=64)
    ] = 1
    transfer_max_mib_s: Annotated[int, _setting("disks leave a host no faster than; 0: no limit", "MiB/s", ge=0)] = 0
    disk_reserved_gib: Annotated[int, _setting("disk of a host never given to guests", "GiB", ge=0)] = 1
    memory_reserved_mib: Annotated[int, _setting("memory of a host never given to guests", "MiB", ge=0)] = 512


class LifecycleSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    build_hosts_max: Annotated[int, _setting("hosts that a build tries before it gives up", "hosts", ge=1)] = 3
    wait_soft_reboot_seconds: Annotated[float, _setting("a soft reboot goes on as a hard one after", "seconds", gt=0)] = 120
    shutdown_grace_s: Annotated[float, _setting("a guest that stops has so long to shut down", "seconds", ge=0)] = 60
    data_move_max_s: Annotated[float, _setting("copying a disk or migrating a guest may take", "seconds", gt=0)] = 86_400
    shelved_offload_s: Annotated[
        float, _setting("a shelved instance leaves its host after; 0 at once, -1 never", "seconds", ge=-1)
    ] = 0
    resize_confirm_window_s: Annotated[
        float, _setting("a resize or migration is confirmed by itself after; 0 never", "seconds", ge=0)
    ] = 0
    allow_resize_to_same_host: Annotated[bool, _setting("a resize may stay on its host, if that is best")] = True
    reclaim_instance_interval_s: Annotated[
        float, _setting("a deleted instance can be restored for so long; 0: deleted at once", "seconds", ge=0)
    ] = 0
    live_migration_bandwidth_mib_s: Annotated[
        int, _setting("most that a live migration sends; 0 is no limit", "MiB/s", ge=0)
    ] = 0
    live_migration_downtime_ms: Annotated[int, _setting("longest pause that a live migration aims at", "ms", ge=1)] = 500
    timers_s: Annotated[float, _setting("how often what is due by time is looked for", "seconds", gt=0)] = 2
    console_length_max_bytes: Annotated[int, _setting("most console output in one answer", "bytes", ge=1)] = 102_400


class ConsoleSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Screens and serial lines of guests, for browsers and terminals."""

    token_lifetime_s: Annotated[float, _setting("the URL of a console is good for", "seconds", gt=0, le=86_400)] = 600
    connections_max: Annotated[int, _setting("consoles open at once in one process", "connections", ge=0)] = 200
    idle_s: Annotated[float, _setting("a console where nothing moves for so long is closed", "seconds", gt=0)] = 3600
    allowed_origins: Annotated[
        tuple[str, ...], _setting("other sites whose pages may open consoles, as scheme://host[:port]")
    ] = ()
    novnc_dir: Annotated[str, _setting("noVNC's files; empty: where install.sh or Debian put them")] = ""


class SchedulingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    filters: Annotated[tuple[str, ...], _setting("filters in the order they are asked")] = (
        "enabled", "not_tried", "hint_host", "capacity", "image_properties", "availability_zone",
        "aggregate_extra_specs", "server_group_affinity", "server_group_anti_affinity", "different_host", "same_host",
    )
    default_zone: Annotated[str, _setting("zone of servers that ask for none; empty: any")] = ""
    cpu_ratio: Annotated[float, _setting("vcpus given out for each one that a host has", "ratio", gt=0)] = 16.0
    memory_ratio: Annotated[float, _setting("memory given out for each MiB that a host has", "ratio", gt=0)] = 1.0
    disk_ratio: Annotated[float, _setting("disk given out for each GiB that a host has", "ratio", gt=0)] = 1.0
    memory_weight: Annotated[float, _setting("pull of free memory", "weight")] = 1.0
    cpu_weight: Annotated[float, _setting("pull of free vcpus", "weight")] = 1.0
    disk_weight: Annotated[float, _setting("pull of free disk", "weight")] = 1.0
    io_weight: Annotated[float, _setting("pull of operations in flight on the host", "weight")] = -1.0
    affinity_weight: Annotated[float, _setting("pull of members of a soft-affinity group", "weight")] = 1.0
    spread_hosts: Annotated[int, _setting("the best hosts among which one is drawn", "hosts", ge=1)] = 1


class QuotaSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of a project that has none of its own; -1 means no limit."""

    instances: Annotated[int, _setting("servers of a project", "servers", ge=-1)] = 10
    cores: Annotated[int, _setting("vcpus of a project", "vcpus", ge=-1)] = 20
    ram: Annotated[int, _setting("memory of a project", "MiB", ge=-1)] = 51_200
    key_pairs: Annotated[int, _setting("key pairs of a user", "key pairs", ge=-1)] = 100
    metadata_items: Annotated[int, _setting("metadata items of a server", "items", ge=-1)] = 128
    server_groups: Annotated[int, _setting("server groups of a project", "groups", ge=-1)] = 10
    server_group_members: Annotated[int, _setting("servers in a group", "servers", ge=-1)] = 10
    injected_files: Annotated[int, _setting("personality files of a server", "files", ge=-1)] = 5
    injected_file_content_bytes: Annotated[int, _setting("content of a personality file", "bytes", ge=-1)] = 10_240
    injected_file_path_bytes: Annotated[int, _setting("path of a personality file", "bytes", ge=-1)] = 255


class IdentitySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token_lifetime_s: Annotated[int, _setting("a token is good for", "seconds", ge=60)] = 14_400
    token_key_file: Annotated[
        str, _setting("key that signs tokens, the same file for every API; empty: in --dir, or in a postgresql:// database")
    ] = ""
    token_cache_s: Annotated[
        float, _setting("a token is looked up again after; changes of any API are told to all at once", "seconds", ge=0)
    ] = 1.0
    argon2_time_cost: Annotated[int, _setting("passes of the password hash", "passes", ge=1)] = 2
    argon2_memory_kib: Annotated[int, _setting("memory of the password hash", "KiB", ge=8)] = 19_456
    password_max_length: Annotated[int, _setting("longest password", "characters", ge=8)] = 4096
    auth_concurrency_max: Annotated[int, _setting("passwords checked at once", "checks", ge=1)] = 2


class ImageSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    directory: Annotated[
        str, _setting("where image data is; all API, conductor and storage processes share it (NFSv4). Empty: in --dir")
    ] = ""
    reach: Annotated[
        str, _setting("how hosts get at images: file (they see the directory) or http", pattern="^(file|http)$")
    ] = "file"
    reach_url: Annotated[
        str, _setting("where hosts reach the API, for image.reach = http", pattern=r"^(https?://[^\s?#]+[^\s?#/])?$")
    ] = ""
    url_lifetime_s: Annotated[
        float, _setting("a URL that a host is given for an image is good for", "seconds", ge=60)
    ] = 86_400
    sweep_s: Annotated[float, _setting("how often what dead processes left of uploads is removed", "seconds", gt=0)] = 300
    size_max_bytes: Annotated[int, _setting("largest image file", "bytes", ge=1)] = 1 << 40
    virtual_size_max_bytes: Annotated[int, _setting("largest virtual disk of an image", "bytes", ge=1)] = 16 << 40
    inspect_deadline_s: Annotated[float, _setting("qemu-img may take so long to inspect an image", "seconds", gt=0)] = 30
    prefetch_max: Annotated[int, _setting("images that hosts fetch ahead at once, in all", "images", ge=1)] = 4
    prefetch_deadline_s: Annotated[float, _setting("fetching one ahead may take so long", "seconds", gt=0)] = 3600


class NetworkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mtu: Annotated[int, _setting("MTU of new networks", "bytes", ge=1280, le=9216)] = 1450
    ports: Annotated[int, _setting("ports of a project", "ports", ge=-1)] = 500
    networks: Annotated[int, _setting("networks of a project", "networks", ge=-1)] = 100
    subnets: Annotated[int, _setting("subnets of a project", "subnets", ge=-1)] = 100
    security_groups: Annotated[int, _setting("security groups of a project", "groups", ge=-1)] = 10
    security_group_rules: Annotated[int, _setting("rules of a project", "rules", ge=-1)] = 100


class LibvirtSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the libvirt driver; the defaults are right for one host of any size."""

    virt_type: Annotated[
        str, _setting("kvm, qemu, or auto: what really works is found out", pattern="^(auto|kvm|qemu)$")
    ] = "auto"
    threads: Annotated[int, _setting("libvirt calls at the same time", "calls", ge=1)] = 8
    starts_max: Annotated[
        int, _setting("guests started at the same time: a boot takes a whole core without KVM", "guests", ge=1)
    ] = 4
    connect_timeout_s: Annotated[float, _setting("connecting to libvirtd may take so long", "seconds", gt=0)] = 5.0
    call_timeout_s: Annotated[
        float, _setting("calls that only read or change a definition may take so long", "seconds", gt=0)
    ] = 15.0
    start_timeout_s: Annotated[
        float, _setting("starting a guest may take so long; the first of a host probes the emulator", "seconds", gt=0)
    ] = 120.0
    destroy_timeout_s: Annotated[float, _setting("ending a guest may take so long", "seconds", gt=0)] = 60.0
    memory_timeout_s: Annotated[
        float, _setting("saving a guest's memory, or bringing it back, may take so long", "seconds", gt=0)
    ] = 600.0
    unplug_timeout_s: Annotated[
        float, _setting("a running guest has so long to let go of a device", "seconds", gt=0)
    ] = 20.0
    agent_timeout_s: Annotated[
        int, _setting("a guest agent may take so long to answer", "seconds", ge=1)
    ] = 10
    copy_timeout_s: Annotated[
        float, _setting("copying a disk (snapshot, another volume) may take so long", "seconds", gt=0)
    ] = 14_400.0
    transfer_idle_s: Annotated[
        float, _setting("a disk of another host of which nothing comes for so long is given up", "seconds", gt=0)
    ] = 120.0
    acpi_retry_s: Annotated[
        float, _setting("the power button is pressed again after: a guest that still booted had no ears", "seconds", gt=0)
    ] = 10.0
    keepalive_interval_s: Annotated[
        int, _setting("a libvirtd that hangs is given up after interval * count", "seconds", ge=1)
    ] = 5
    keepalive_count: Annotated[int, _setting("see keepalive_interval_s", "questions", ge=1)] = 3
    reconnect_min_s: Annotated[float, _setting("shortest wait before libvirtd is tried again", "seconds", gt=0)] = 0.1
    reconnect_max_s: Annotated[float, _setting("longest wait before libvirtd is tried again", "seconds", gt=0)] = 5.0
    events_waiting_max: Annotated[int, _setting("events of guests that may wait to be looked at", "events", ge=1)] = 10_000
    tb_cache_mib: Annotated[
        int, _setting("translation cache of each guest without KVM; QEMU by itself takes up to 1024", "MiB", ge=1)
    ] = 64
    pcie_root_ports: Annotated[int, _setting("slots kept free for devices plugged into a running guest", "slots", ge=0)] = 8
    cpu_model_qemu: Annotated[
        str, _setting("processor of guests without KVM; the same on every host, so that they can migrate")
    ] = "qemu64"
    console_log_max_bytes: Annotated[int, _setting("a longer console log is cut", "bytes", ge=1)] = 4 << 20
    console_log_keep_bytes: Annotated[
        int, _setting("what is kept of the older half of a console log that is cut", "bytes", ge=0)
    ] = 1 << 20
    console_sweep_s: Annotated[float, _setting("how often console logs are looked at", "seconds", gt=0)] = 30.0
    console_read_max_bytes: Annotated[int, _setting("most of a console log that is read at once", "bytes", ge=1)] = 8 << 20
    image_max_bytes: Annotated[int, _setting("largest image file that a host fetches", "bytes", ge=1)] = 1 << 40
    image_timeout_s: Annotated[float, _setting("fetching an image may take so long", "seconds", gt=0)] = 3600.0
    image_idle_timeout_s: Annotated[
        float, _setting("a download without a byte for so long is given up", "seconds", gt=0)
    ] = 30.0
    image_cache_max_gib: Annotated[
        float, _setting("cached images that the image service does not hold itself; above, unused ones go", "GiB", ge=0)
    ] = 50
    image_cache_keep_s: Annotated[
        float, _setting("an image used within so long stays, even above image_cache_max_gib", "seconds", ge=0)
    ] = 3600
    image_cache_unused_s: Annotated[float, _setting("an image unused for so long is removed", "seconds", ge=0)] = 86_400
    image_cache_sweep_s: Annotated[float, _setting("how often the image cache is looked at", "seconds", gt=0)] = 300
    disk_reserved_mib: Annotated[int, _setting("left free on the file system by image copies", "MiB", ge=0)] = 64
    program_timeout_s: Annotated[float, _setting("qemu-img and genisoimage may take so long", "seconds", gt=0)] = 120.0
    program_cpu_s: Annotated[int, _setting("CPU time that qemu-img and genisoimage may use", "seconds", ge=1)] = 60
    program_memory_mib: Annotated[int, _setting("memory that qemu-img and genisoimage may use", "MiB", ge=1)] = 2048


class VolumeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    volumes: Annotated[int, _setting("volumes of a project", "volumes", ge=-1)] = 10
    snapshots: Annotated[int, _setting("snapshots of a project", "snapshots", ge=-1)] = 10
    gigabytes: Annotated[int, _setting("volumes and snapshots of a project together", "GiB", ge=-1)] = 1000
    per_volume_gigabytes: Annotated[int, _setting("largest volume", "GiB", ge=-1)] = -1
    copies_max: Annotated[int, _setting("volumes that are copied at once", "copies", ge=1)] = 2
    copy_deadline_s: Annotated[float, _setting("longest a copy of a volume may take", "seconds", gt=0)] = 3600
    listen: Annotated[
        str,
        _setting("address where hosts of other machines reach volumes (NBD, TLS); empty: none", pattern="^[0-9A-Fa-f.:]*$"),
    ] = ""
    advertise: Annotated[
        str, _setting("address that such hosts are told; empty: the one that they reach", pattern="^[0-9A-Za-z.:-]*$")
    ] = ""
    port_first: Annotated[int, _setting("first TCP port for volumes attached from afar", "port", ge=1, le=65535)] = 10900
    ports: Annotated[int, _setting("how many such ports", "ports", ge=1, le=10000)] = 1000


class RabbitMqSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the bus, where the setting `bus` names a broker."""

    password_file: Annotated[str, _setting("a file with the password of the user in `bus`; empty: it is in the URL")] = ""
    ca_file: Annotated[str, _setting("amqps: certificates of authorities, PEM; empty: the system's")] = ""
    certificate_file: Annotated[str, _setting("amqps: our own certificate, PEM; empty: none")] = ""
    key_file: Annotated[str, _setting("amqps: the key of certificate_file, PEM")] = ""
    connect_timeout_s: Annotated[float, _setting("connecting may take so long", "seconds", gt=0)] = 5.0
    heartbeat_s: Annotated[
        int, _setting("a connection that is silent for about three times so long is given up", "seconds", ge=1)
    ] = 2
    reconnect_min_s: Annotated[float, _setting("shortest wait before the broker is tried again", "seconds", gt=0)] = 0.1
    reconnect_max_s: Annotated[float, _setting("longest wait before the broker is tried again", "seconds", gt=0)] = 2.0
    prefetch_max: Annotated[
        int, _setting("commands that a process of many hosts takes at once", "commands", ge=1, le=2000)
    ] = 1000
    delivery_limit: Annotated[int, _setting("a command whose consumers died so often is given up", "times", ge=1)] = 10
    queue_unused_s: Annotated[
        int, _setting("the queue of an agent that is gone goes after; longer than any restart takes", "seconds", ge=60)
    ] = 3600
    dead_letters_max: Annotated[int, _setting("commands given up that are kept for admins", "commands", ge=1)] = 1000
    message_max_bytes: Annotated[int, _setting("largest message", "bytes", ge=65536)] = 32 << 20
    notifications_kept: Annotated[
        int, _setting("notifications kept where consumers have no queues; the oldest go; 0: no queue", "messages", ge=0)
    ] = 0


class MetricsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The port of each process for `/metrics` (Prometheus), `/healthz` and `/readyz`."""

    host: Annotated[str, _setting("address to listen on; loopback unless you know who can reach it")] = "127.0.0.1"
    port: Annotated[int, _setting("first port; 0: none", "TCP port", ge=0, le=65535)] = 0
    ports_max: Annotated[
        int, _setting("processes of one machine take the next free port, of so many", "ports", ge=1, le=1000)
    ] = 20
    on_api_port: Annotated[bool, _setting("/metrics on the port of the API as well, for everybody who reaches it")] = False


class TracingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of traces, for an OpenTelemetry collector."""

    endpoint: Annotated[
        str,
        _setting("collector that takes OTLP over HTTP, as http://host:4318; empty: none", pattern=r"^(https?://\S+)?$"),
    ] = ""
    send_every_s: Annotated[float, _setting("how often spans are sent", "seconds", gt=0)] = 2.0
    timeout_s: Annotated[float, _setting("the collector may take so long", "seconds", gt=0)] = 5.0


class SimulatedSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    hosts: Annotated[int, _setting("simulated hosts in this process", "hosts", ge=0)] = 1
    vcpus: Annotated[int, _setting("vcpus of each", "vcpus", ge=1)] = 64
    memory_mib: Annotated[int, _setting("memory of each", "MiB", ge=1)] = 262_144
    disk_gib: Annotated[int, _setting("disk of each", "GiB", ge=1)] = 4096
    spawn_s: Annotated[float, _setting("time that a start of a guest takes", "seconds", ge=0)] = 0
    destroy_s: Annotated[float, _setting("time that ending a guest takes", "seconds", ge=0)] = 0
    shutdown_s: Annotated[float, _setting("time that a guest's own shutdown takes", "seconds", ge=0)] = 0
    image_s: Annotated[float, _setting("time that fetching an image takes", "seconds", ge=0)] = 0
    suspend_s: Annotated[float, _setting("time that saving or loading a guest's memory takes", "seconds", ge=0)] = 0
    snapshot_s: Annotated[float, _setting("time that a snapshot of a disk takes", "seconds", ge=0)] = 0
    move_s: Annotated[float, _setting("time that each half of a cold migration takes", "seconds", ge=0)] = 0
    live_s: Annotated[float, _setting("time that a live migration takes", "seconds", ge=0)] = 0
    attach_s: Annotated[float, _setting("time that plugging or unplugging a device takes", "seconds", ge=0)] = 0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of a cloud. `hypervisor` is libvirt or simulated."""

    database: Annotated[
        str,
        _setting(
            "postgresql://user@host:port/name?sslmode=…; empty: SQLite in the cloud's directory",
            pattern=r"^(postgresql://\S+)?$",
        ),
    ] = ""
    bus: Annotated[
        str, _setting("amqp:// or amqps://user@host:port/vhost; empty: in this process", pattern=r"^(amqps?://\S+)?$")
    ] = ""
    cloud_id: Annotated[
        str,
        _setting(
            "8 hexadecimal digits, the same on all machines of the cloud; empty: made in its directory",
            pattern="^([0-9a-f]{8})?$",
        ),
    ] = ""
    region: Annotated[str, _setting("region name in the service catalog")] = "RegionOne"
    hypervisor: Annotated[str, _setting("libvirt or simulated", pattern="^(libvirt|simulated)$")] = "libvirt"
    log_level: Annotated[str, _setting("debug, info, warning or error", pattern="^(debug|info|warning|error)$")] = "info"
    api: ApiSettings = ApiSettings()
    store: StoreSettings = StoreSettings()
    postgresql: PostgresqlSettings = PostgresqlSettings()
    engine: EngineSettings = EngineSettings()
    host: HostSettings = HostSettings()
    lifecycle: LifecycleSettings = LifecycleSettings()
    console: ConsoleSettings = ConsoleSettings()
    scheduling: SchedulingSettings = SchedulingSettings()
    quota: QuotaSettings = QuotaSettings()
    identity: IdentitySettings = IdentitySettings()
    image: ImageSettings = ImageSettings()
    network: NetworkSettings = NetworkSettings()
    libvirt: LibvirtSettings = LibvirtSettings()
    volume: VolumeSettings = VolumeSettings()
    simulated: SimulatedSettings = SimulatedSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    rabbitmq: RabbitMqSettings = RabbitMqSettings()
