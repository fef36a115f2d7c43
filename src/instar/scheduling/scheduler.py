"""The scheduler: candidates for an instance, and the claims that make a candidate its host. Called by operations' steps."""

from __future__ import annotations

from instar.config import Settings
from instar.errors import OperationError
from instar.model.instance import Flavor
from instar.scheduling.filters import filters_by_name
from instar.scheduling.host_table import HostTable
from instar.scheduling.request import Circumstances, SchedulingRequest, Selection, amounts_of, hinted_instances
from instar.scheduling.selection import Admission, no_valid_host, select
from instar.store.aggregates import DEFAULT_ZONE
from instar.store.claims import (
    claim_release,
    claim_release_instance,
    claim_release_others,
    claim_take,
    claim_take_anyway,
    claims_of_instance,
)
from instar.store.contract import Duplicate, Result, Statement, Store
from instar.store.server_groups import hosts_of_instances, server_group_hosts

HINTED_MAX = 100  # instances that hints may name

__all__ = ["GroupRuleBroken", "HostFull", "Scheduler", "SchedulingRequest", "Selection"]


class HostFull(OperationError):
    """The claim found no room (or a host that an admin had just disabled): try the next candidate."""

    template = "Host {host} has no room left."


class GroupRuleBroken(HostFull):
    """Another member of the instance's server group was quicker, and now its policy forbids this host."""

    template = "Host {host} is forbidden by the policy of the server group."


class ClaimStands(Duplicate):
    """The claim was made before: the transaction that it was in changed nothing."""

    template = "The claim was made already."


class Scheduler:
    """Candidates come from the host table's memory; claims are decided by the database alone. Raises StartupError when
    the settings name an unknown filter."""

    participant = "scheduler"

    def __init__(self, store: Store, host_table: HostTable, settings: Settings) -> None:
        self._store = store
        self._table = host_table
        self._settings = settings
        self._filters = filters_by_name(settings.scheduling.filters)

    async def candidates(self, request: SchedulingRequest) -> Selection:
        """Up to `build_hosts_max` hosts, best first. Raises NoValidHost, which says for each filter how many it refused."""
        selection = await self._select(request)
        if not selection.hosts:
            # Never say no because of what we only remembered, nor while a new host waits to be written.
            await self._table.persist_new()
            await self._table.refresh()
            selection = await self._select(request)
        if not selection.hosts:
            raise no_valid_host(selection)
        return selection

    async def claim(self, claim_id: str, instance_id: str, host: str, flavor: Flavor) -> None:
        """The instance holds the flavor's amounts of the host. Doing it twice does it once. Raises HostFull."""
        try:
            await self._store.write(*self.claim_statements(claim_id, instance_id, host, flavor))
        except ClaimStands:
            return
        amounts = amounts_of(flavor)
        self._table.note_claim(host, (amounts["vcpus"], amounts["memory_mib"], amounts["disk_gib"]))

    async def claim_anyway(self, claim_id: str, instance_id: str, host: str, flavor: Flavor) -> str:
        """The claim by which an instance that runs on the host holds its amounts: one that stands, else a new one of this
        id, whether there is room or not."""
        standing = await claims_of_instance(self._store, instance_id, host)
        if standing:
            return standing[0]
        amounts = amounts_of(flavor)
        try:
            await self._store.write(*claim_take_anyway(claim_id, instance_id, host, amounts, taken=ClaimStands()))
        except ClaimStands:
            return claim_id
        self._table.note_claim(host, (amounts["vcpus"], amounts["memory_mib"], amounts["disk_gib"]))
        return claim_id

    async def release(self, claim_id: str, *_: object) -> None:
        """Give a claim back, if it stands. Takes the arguments of `claim`, whose undo it is."""
        self._note_released(await self._store.write(*self.release_statements(claim_id)))

    async def release_instance(self, instance_id: str) -> None:
        """Give back all that the instance holds."""
        self._note_released(await self._store.write(*claim_release_instance(instance_id)))

    async def release_others(self, instance_id: str, keep_claim_id: str) -> None:
        """Give back all that the instance holds besides this claim."""
        self._note_released(await self._store.write(*claim_release_others(instance_id, keep_claim_id)))

    def is_up(self, host: str) -> bool:
        """The host reports, and no admin said that it is down."""
        return self._table.is_up(host)

    def is_forced_down(self, host: str) -> bool:
        """An admin said so, who knows better than reports."""
        return self._table.is_forced_down(host)

    def is_silent(self, host: str) -> bool:
        """It was heard before, and nothing more for so long that operations give it up."""
        return self._table.is_silent(host)

    def fell_silent(self, host: str, waited_s: float) -> bool:
        """An admin said that the host is down, or nothing was heard of it for so long that it is; `waited_s` counts where
        nothing was heard ever."""
        return self._table.fell_silent(host, waited_s)

    def address_of(self, host: str) -> str:
        """The address at which other hosts reach it."""
        known = self._table.get(host)
        return known.inventory.host_ip if known and known.inventory else ""

    def zone_of(self, host: str) -> str:
        """The availability zone that a host is in now."""
        known = self._table.get(host)
        return known.zone if known else DEFAULT_ZONE

    def claim_statements(self, claim_id: str, instance_id: str, host: str, flavor: Flavor) -> tuple[Statement, ...]:
        """A claim for another transaction, which raises HostFull, or ClaimStands (then nothing of it was written)."""
        return claim_take(
            claim_id, instance_id, host, amounts_of(flavor),
            taken=ClaimStands(), full=HostFull(host=host), refused=GroupRuleBroken(host=host),
        )  # fmt: skip

    def release_statements(self, claim_id: str) -> tuple[Statement, ...]:
        """A release for another transaction; the table's memory follows with its next refresh."""
        return claim_release(claim_id)

    def release_instance_statements(self, instance_id: str) -> tuple[Statement, ...]:
        return claim_release_instance(instance_id)

    async def _select(self, request: SchedulingRequest) -> Selection:
        circumstances = await self._circumstances(request)
        admission = Admission(self._filters, request, circumstances)
        return select(
            self._table.ranking,
            admission,
            circumstances,
            count=self._settings.lifecycle.build_hosts_max,
            spread=self._settings.scheduling.spread_hosts,
        )

    async def _circumstances(self, request: SchedulingRequest) -> Circumstances:
        """One query for the group, one for instances in hints; none for a request without them."""
        group = None
        if request.group_id:
            group = await server_group_hosts(self._store, request.group_id, besides=request.instance_id)
        hinted = {*hinted_instances(request, "different_host"), *hinted_instances(request, "same_host")}
        hosts: dict[str, str] = {}
        if hinted:
            some = sorted(hinted)[:HINTED_MAX]
            hosts = dict(await hosts_of_instances(self._store, some, project_id=request.project_id))
        down_after_s = self._settings.host.down_after_s
        return Circumstances(self._table.now(), down_after_s, group, hosts)

    def _note_released(self, results: list[Result]) -> None:
        for row in results[-1].rows:
            self._table.note_claim(row["host"], (row["vcpus"], row["memory_mib"], row["disk_gib"]), count=-1)
