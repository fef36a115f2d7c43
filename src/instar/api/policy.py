"""Who may do what in the Compute API: one table, a rule for each route and each action.

`reader` looks, `member` changes what belongs to the project, `admin` sees hosts and other projects. A record of another
project is never forbidden but not found; that is the handlers' matter. tests/api walks this table as every role.
"""

from __future__ import annotations

from instar.http.policy import ADMIN, MEMBER, OPEN, READER, Policy, Rule

_RULES: dict[str, dict[Rule, tuple[str, ...]]] = {
    "versions": {OPEN: ("show",)},
    "servers": {
        READER: ("index", "detail", "show"),
        MEMBER: (
            "create", "update", "delete", "reboot", "start", "stop", "create_image", "resize", "confirm_resize",
            "revert_resize", "rebuild",
        ),
    },
    "server-metadata": {READER: ("index", "show"), MEMBER: ("create", "update", "update_all", "delete")},
    "os-server-tags": {READER: ("index", "show"), MEMBER: ("update", "update_all", "delete", "delete_all")},
    "os-instance-actions": {READER: ("list", "show")},
    "os-lock-server": {MEMBER: ("lock", "unlock")},
    "os-pause-server": {MEMBER: ("pause", "unpause")},
    "os-suspend-server": {MEMBER: ("suspend", "resume")},
    "os-shelve": {MEMBER: ("shelve", "unshelve"), ADMIN: ("shelve_offload", "unshelve_to_host")},
    "os-migrate-server": {ADMIN: ("migrate", "migrate_live")},
    "os-deferred-delete": {MEMBER: ("force", "restore")},
    "os-admin-actions": {ADMIN: ("reset_state",)},
    "ips": {READER: ("index", "show")},
    "os-attach-interfaces": {READER: ("list", "show"), MEMBER: ("create", "delete")},
    "os-security-groups": {READER: ("list",), MEMBER: ("add", "remove")},
    "os-server-password": {READER: ("show",), MEMBER: ("clear",)},
    "os-volumes-attachments": {READER: ("index", "show"), MEMBER: ("create", "update", "delete"), ADMIN: ("swap",)},
    "server:topology": {READER: ("index",)},
    "servers:migrations": {ADMIN: ("index", "show", "force_complete", "delete")},
    "os-flavor-manage": {ADMIN: ("create", "update", "delete")},
    "os-flavor-extra-specs": {READER: ("index", "show"), ADMIN: ("create", "update", "delete")},
    "os-keypairs": {READER: ("index", "show"), MEMBER: ("create", "delete")},
    "os-quota-sets": {READER: ("show", "defaults", "detail"), ADMIN: ("update", "delete")},
    "os-quota-class-sets": {ADMIN: ("show", "update")},
    "os-services": {ADMIN: ("list", "update", "delete")},
    "os-availability-zone": {READER: ("list",), ADMIN: ("detail",)},
    "os-hypervisors": {
        ADMIN: ("list", "list-detail", "show", "statistics", "uptime", "search", "servers"),
    },
    "os-aggregates": {
        ADMIN: (
            "index", "create", "show", "update", "delete", "action", "add_host", "remove_host", "set_metadata",
        ),
    },
    "os-server-groups": {READER: ("index", "show"), MEMBER: ("create", "delete")},
    "os-simple-tenant-usage": {READER: ("show",), ADMIN: ("list",)},
    "os-server-external-events": {ADMIN: ("create",)},
    "os-migrations": {ADMIN: ("index",)},
}  # fmt: skip

# Rules of one word; `servers:action` only lets a request in, the action's own rule decides.
_PLAIN = {
    "servers:action": READER, "os-create-backup": MEMBER, "os-evacuate": ADMIN, "os-rescue": MEMBER,
    "os-unrescue": MEMBER, "os-admin-password": MEMBER, "os-console-output": MEMBER, "os-remote-consoles": MEMBER,
    "os-console-auth-tokens": ADMIN, "os-server-diagnostics": ADMIN, "flavors": READER,
    "os-flavor-access": ADMIN, "os-flavor-access:action": ADMIN, "limits": READER, "extensions": READER,
}  # fmt: skip

PREFIX = "os_compute_api:"
COMPUTE_POLICY = Policy(
    {
        f"{PREFIX}{resource}:{name}": rule
        for resource, rules in _RULES.items()
        for rule, names in rules.items()
        for name in names
    }
    | {PREFIX + name: rule for name, rule in _PLAIN.items()}
    | {"compute:aggregates:images": ADMIN}
)
