"""changePassword: updating_password → active, through the guest's agent.

The password is kept only until the operation ends, in its arguments; no journal, fault or log has it.
"""

from __future__ import annotations

import msgspec

from instar.engine.run import Run
from instar.lifecycle.cloud import Cloud
from instar.lifecycle.definition import host_of
from instar.model.states import VmState

USER_PROPERTY, DEFAULT_USER = "os_admin_user", "root"


class PasswordArguments(msgspec.Struct, frozen=True):
    password: str

    def __repr__(self) -> str:
        return "PasswordArguments(…)"


async def change_password(run: Run, cloud: Cloud) -> None:
    """Raises GuestAgentMissing where the guest runs no agent that can."""
    run.has_secrets = True
    arguments = msgspec.msgpack.decode(run.operation.arguments, type=PasswordArguments)
    spec = run.instance.spec
    user = spec.image.properties.get(USER_PROPERTY, DEFAULT_USER) if spec.image else DEFAULT_USER
    await run.step("set password", run.hosts.set_password, host_of(run.instance), user, arguments.password)
    await run.settle(VmState.ACTIVE)
