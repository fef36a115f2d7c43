"""Ways to the console of a guest: a token for whoever may have one, and the console itself for whoever brings the token.

`issue` is called by the Compute API, `open` by the console proxy of any API process. Nothing of the instance is changed, so
there is no operation; where the guest is not there any more the token is void.
"""

from __future__ import annotations

import secrets

from instar.bus.contract import Bus
from instar.clock import now_us
from instar.config import ConsoleSettings
from instar.engine.hosts import HostClient
from instar.errors import NoRunningGuest, NotFound, OperationError, Unavailable, WrongState
from instar.model.console import ConsoleKind, ConsoleOffer
from instar.model.instance import Instance
from instar.model.states import VmState
from instar.model.stream import StreamAddress
from instar.store.console_tokens import ConsoleAccess, console_token_fetch, console_token_insert, console_token_take
from instar.store.contract import Store

TOKEN_BYTES = 32
TOKEN_MAX_LENGTH = 200
HOST_DEADLINE_S = 15.0
RETRY_S = 5


class Consoles:
    def __init__(self, store: Store, bus: Bus, settings: ConsoleSettings) -> None:
        self._store = store
        self._bus = bus
        self._settings = settings

    async def issue(self, instance: Instance, kind: ConsoleKind) -> str:
        """A token for one connection to a console. Raises NoRunningGuest, ConsoleUnavailable, WrongState, Unavailable."""
        if instance.vm_state is VmState.BUILDING:
            raise WrongState(action="get_console", id=instance.id, attribute="vm_state", state=instance.vm_state.value)
        if instance.host is None:
            raise NoRunningGuest(id=instance.id)
        offer = await self._ask(instance.id, instance.host, kind, None)
        token = secrets.token_urlsafe(TOKEN_BYTES)
        access = ConsoleAccess(
            instance_id=instance.id,
            kind=kind.value,
            host=instance.host,
            address=offer.address.address,
            port=offer.address.port,
            expires_at=now_us() + int(self._settings.token_lifetime_s * 1_000_000),
        )
        await console_token_insert(self._store, token, access)
        return token

    async def find(self, token: str) -> ConsoleAccess:
        """What a token is good for; it stays good. Raises NotFound."""
        return _known(await console_token_fetch(self._store, token) if len(token) <= TOKEN_MAX_LENGTH else None)

    async def open(self, token: str, to: StreamAddress) -> tuple[ConsoleAccess, ConsoleOffer]:
        """Uses the token up: the host now lets `to` in, for a moment. Raises NotFound, NoRunningGuest, Unavailable."""
        access = _known(await console_token_take(self._store, token) if len(token) <= TOKEN_MAX_LENGTH else None)
        return access, await self._ask(access.instance_id, access.host, ConsoleKind(access.kind), to)

    async def _ask(self, instance_id: str, host: str, kind: ConsoleKind, to: StreamAddress | None) -> ConsoleOffer:
        hosts = HostClient(self._bus, instance_id=instance_id, deadline_s=HOST_DEADLINE_S)
        try:
            return await hosts.open_console(host, kind, to)
        except OperationError as error:  # names the host, which is not for users
            raise Unavailable(retry_after_s=RETRY_S) from error


def _known(access: ConsoleAccess | None) -> ConsoleAccess:
    if access is None:
        # The token is left out: what failed today may be somebody's good one, mistyped.
        raise NotFound("The console token is not known: it has been used, it has expired, or the guest has stopped.")
    return access
