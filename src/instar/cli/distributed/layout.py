"""How many of each process a cloud on this machine has, and which settings it overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from instar.config import Settings
from instar.errors import StartupError
from instar.store.aggregates import DEFAULT_ZONE

SIMULATED_ZONE = "simulated"


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`settings` is a tree as in the TOML file, on top of what the layout itself sets.

    `restarts`: processes that die are started again, as systemd would. `simulated_processes` share the simulated
    hosts. `durable`: what the database has committed survives a power cut."""

    apis: int = 2
    conductors: int = 2
    libvirt_hosts: int = 2
    simulated_hosts: int = 200
    simulated_processes: int = 1
    restarts: bool = True
    durable: bool = True
    settings: Mapping[str, Any] = {}
    log_format: str = "console"

    @property
    def is_mixed(self) -> bool:
        """Guests must be told apart: those of simulated hosts are in a zone of their own."""
        return self.libvirt_hosts > 0 and self.simulated_hosts > 0

    def settings_with(self, **servers: Any) -> Settings:
        """The settings of every process of the cloud. Raises StartupError that names what is wrong."""
        tree: dict[str, Any] = {"hypervisor": "libvirt" if self.libvirt_hosts else "simulated"}
        if self.is_mixed:
            tree["scheduling"] = {"default_zone": DEFAULT_ZONE}
        for more in (servers, self.settings):
            for name, value in more.items():
                tree[name] = {**tree.get(name, {}), **value} if isinstance(value, Mapping) else value
        try:
            return msgspec.convert(tree, Settings, strict=False)
        except msgspec.ValidationError as error:
            raise StartupError(f"A setting is wrong: {error}.") from error
