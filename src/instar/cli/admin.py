"""`instar admin`: every command of the operator, from wherever it is."""

from __future__ import annotations

from instar.cli.bus_admin import admin_bus_user, admin_dead_letters
from instar.cli.show import admin

for command in (admin_dead_letters, admin_bus_user):
    admin.add_command(command)

__all__ = ["admin"]
