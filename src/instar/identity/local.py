"""Identity in this process: the contract that the HTTP room asks for every request, on the records of the store.

A token says who and where; whether that still holds (enabled, roles, not revoked) is looked up, and remembered for a
moment by `token_cache`. A change is told to every API process over the bus before it is answered, and they forget: so a
role that is taken away is gone with the next request, whichever process it comes to. Where the word is lost (the bus is
away) that takes until the setting identity.token_cache_s is over.

All API processes must sign and verify with one key. A cloud in one directory has it in a file there; a distributed one has
it in the database (`store/cloud_keys.py` says why so), or in the file of the setting identity.token_key_file, which the
operator puts on every machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from instar.bus.contract import Bus, Message, Subscription
from instar.config import Settings
from instar.errors import NotFound, Unauthorized
from instar.identity.contract import Authenticated
from instar.identity.passwords import GuessLimiter, PasswordHasher
from instar.identity.roles import with_implied
from instar.identity.token_cache import TokenCache
from instar.identity.tokens import Claims, TokenSigner, load_key
from instar.store.cloud_keys import cloud_key
from instar.store.contract import Store
from instar.store.identity import (
    APPLICATION_CREDENTIALS,
    DOMAINS,
    PROJECTS,
    ROLES,
    USERS,
    ApplicationCredential,
    Domain,
    IdentityRecords,
    Project,
    Role,
    User,
)

log = structlog.get_logger()

TOKEN_KEY_FILE = "token.key"  # noqa: S105 - a file name
TOKEN_KEY = "tokens"  # noqa: S105 - the name of a row
CHANGED_TOPIC = "identity.changed"
TELL_MAX_S = 1.0
ROLES_MAX = 1000


class Standing(msgspec.Struct, frozen=True):
    """What a token's claims mean now. `roles` have the implied ones; they are empty without a scope."""

    claims: Claims
    user: User
    user_domain: Domain
    roles: tuple[Role, ...] = ()
    project: Project | None = None
    project_domain: Domain | None = None
    domain: Domain | None = None
    application_credential: ApplicationCredential | None = None


class LocalIdentity:
    """`state_dir` holds the token key, unless the settings say otherwise. `bus` reaches the other API processes; None:
    there are none. `base_url` is the cloud's address in the catalog; empty: as the client used it."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        state_dir: Path,
        *,
        bus: Bus | None = None,
        base_url: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self._store = store
        self._bus = bus
        self._hearing: Subscription | None = None
        self.base_url = base_url
        self.clock = clock
        self.passwords = PasswordHasher(settings.identity)
        self.guesses = GuessLimiter()
        self._cache = TokenCache(settings.identity.token_cache_s, clock)
        self._looking: dict[tuple[str, int], asyncio.Task[Authenticated]] = {}
        self.records = IdentityRecords(store, self._changed)
        named = settings.identity.token_key_file
        self._key_path = Path(named) if named else state_dir / TOKEN_KEY_FILE
        self._key_in_database = bool(settings.database) and not named
        self._signer: TokenSigner | None = None

    async def start(self) -> None:
        """Loads or makes the token key. Raises StartupError. The store and the bus must be open."""
        if self._key_in_database:
            key = await cloud_key(self._store, TOKEN_KEY)
        else:
            key = await asyncio.to_thread(load_key, self._key_path)
        self._signer = TokenSigner(key)
        if self._bus is not None:
            self._hearing = await self._bus.subscribe(CHANGED_TOPIC, self._on_changed)
        await self.passwords.warm()

    async def close(self) -> None:
        if self._hearing is not None:
            await self._hearing.cancel()
        self.passwords.close()

    # --- changes ----------------------------------------------------------------------------------------------------

    async def _changed(self) -> None:
        """Records were written here: this process and all others look up every token again."""
        self._cache.forget()
        if self._bus is None:
            return
        try:
            async with asyncio.timeout(TELL_MAX_S):
                await self._bus.publish(CHANGED_TOPIC, Message("IdentityChanged", b""))
        except Exception as error:  # the change stands: it must not fail for a bus that is away
            log.warning("identity.change_not_told", error=repr(error), seen_within_s=self.settings.identity.token_cache_s)

    async def _on_changed(self, _message: Message) -> None:
        self._cache.forget()

    # --- the contract -----------------------------------------------------------------------------------------------

    async def authenticate_token(self, token: str) -> Authenticated:
        who = self._cache.get(token)
        if who is not None:
            return who
        # Many requests of one client come at once: one of them looks the token up for all.
        key = (token, self._cache.generation)
        looking = self._looking.get(key)
        if looking is None:
            looking = self._looking[key] = asyncio.create_task(self._look_up(*key))
            looking.add_done_callback(lambda done: self._looked_up(key, done))
        return await asyncio.shield(looking)

    def _looked_up(self, key: tuple[str, int], done: asyncio.Task[Authenticated]) -> None:
        self._looking.pop(key, None)
        if not done.cancelled():
            done.exception()  # told to those who wait; all of them may have gone

    async def _look_up(self, token: str, generation: int) -> Authenticated:
        standing = await self.verify(token)
        project, domain = standing.project, standing.project_domain
        who = Authenticated(
            user_id=standing.user.id,
            user_name=standing.user.name,
            user_domain_id=standing.user.domain_id,
            project_id=project.id if project else "",
            project_name=project.name if project else "",
            project_domain_id=domain.id if domain else "",
            roles=frozenset(role.name for role in standing.roles),
            expires_at=standing.claims.exp,
            domain_id=standing.domain.id if standing.domain else "",
            is_system=standing.claims.system,
        )
        self._cache.put(token, who, generation)
        return who

    async def project_exists(self, project_id: str) -> bool:
        return bool(await self.records.list(PROJECTS, {"id": project_id}, limit=1))

    # --- tokens -----------------------------------------------------------------------------------------------------

    @property
    def signer(self) -> TokenSigner:
        assert self._signer is not None, "start() comes first"
        return self._signer

    async def verify(self, token: str) -> Standing:
        """What a token means now. Raises Unauthorized like `authenticate_token`, and remembers nothing."""
        claims = self.signer.verify(token)
        if self.clock() >= claims.exp or await self.records.token_is_revoked(claims.jti):
            raise Unauthorized()
        return await self.stand(claims)

    async def revoke(self, claims: Claims) -> None:
        """Refuses a token from now on."""
        await self.records.token_revoke(claims.jti, claims.exp * 1_000_000, int(self.clock() * 1_000_000))

    async def stand(self, claims: Claims) -> Standing:
        """What claims mean now. Raises Unauthorized when user, project or domain is disabled or gone, when one has a
        newer epoch than the claims, when the user has no role in the scope, or the application credential is gone."""
        try:
            user, user_domain = await self._user(claims)
            standing = Standing(claims, user, user_domain)
            if claims.project:
                standing = await self._in_project(standing)
            elif claims.domain:
                domain = await self._enabled_domain(claims.domain)
                roles = await self._roles(user.id, "domain", domain.id)
                standing = msgspec.structs.replace(standing, domain=domain, roles=roles)
            elif claims.system:
                standing = msgspec.structs.replace(standing, roles=await self._roles(user.id, "system", "all"))
        except NotFound as error:
            raise Unauthorized() from error
        if (claims.project or claims.domain or claims.system) and not standing.roles:
            raise Unauthorized()
        return standing

    async def _user(self, claims: Claims) -> tuple[User, Domain]:
        user = await self.records.fetch(USERS, claims.sub)
        if not user.enabled or user.token_epoch != claims.epoch:
            raise Unauthorized()
        return user, await self._enabled_domain(user.domain_id)

    async def _enabled_domain(self, domain_id: str) -> Domain:
        domain = await self.records.fetch(DOMAINS, domain_id)
        if not domain.enabled:
            raise Unauthorized()
        return domain

    async def _in_project(self, standing: Standing) -> Standing:
        claims = standing.claims
        project = await self.records.fetch(PROJECTS, claims.project)
        if not project.enabled or project.token_epoch != claims.project_epoch:
            raise Unauthorized()
        domain = await self._enabled_domain(project.domain_id)
        roles = await self._roles(claims.sub, "project", project.id)
        credential = None
        if claims.application_credential:
            credential = await self.records.fetch(APPLICATION_CREDENTIALS, claims.application_credential)
            if credential.expires_at is not None and credential.expires_at <= self.clock() * 1_000_000:
                raise Unauthorized()
            # Only what was given to it, and only as long as the user has it himself.
            given = set(msgspec.json.decode(credential.role_ids, type=list[str]))
            held = {role.name for role in roles}
            names = with_implied(role.name for role in roles if role.id in given)
            roles = tuple(role for role in await self._all_roles() if role.name in names & held)
        return msgspec.structs.replace(
            standing, project=project, project_domain=domain, roles=roles, application_credential=credential
        )

    async def _roles(self, user_id: str, target_type: str, target_id: str) -> tuple[Role, ...]:
        held = await self.records.roles_held(user_id, target_type, target_id)
        if not held:
            return ()
        names = with_implied(role.name for role in held)
        return tuple(role for role in await self._all_roles() if role.name in names)

    async def _all_roles(self) -> list[Role]:
        return await self.records.list(ROLES, {}, limit=ROLES_MAX)
