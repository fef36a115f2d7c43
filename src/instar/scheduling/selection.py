"""One walk over the hosts in their order: filters ask, refusals are counted, the best that pass are the candidates."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from instar.errors import NoValidHost
from instar.scheduling.filters import Filter, Rule
from instar.scheduling.host_view import HostView
from instar.scheduling.ranking import Ranking
from instar.scheduling.request import Circumstances, SchedulingRequest, Selection

DETAILS_MAX = 100  # lines of `host: filter: reason` that are kept of one selection


class Admission:
    """Sifts hosts through all filters that have something to say of the request; the first that refuses is counted."""

    def __init__(
        self, filters: Sequence[tuple[str, Filter]], request: SchedulingRequest, circumstances: Circumstances
    ) -> None:
        self._rules: list[tuple[str, Rule]] = []
        for name, filter_ in filters:
            rule = filter_(request, circumstances)
            if rule is not None:
                self._rules.append((name, rule))
        self.refusals: Counter[str] = Counter()
        self.details: list[str] = []

    def sift(self, hosts: list[HostView]) -> list[HostView]:
        """Those that every filter lets through, in their order."""
        for name, rule in self._rules:
            passes = rule.passes
            left = rule.sift(hosts) if rule.sift else [host for host in hosts if passes(host)]
            if len(left) < len(hosts):
                self._count(name, rule, hosts, len(hosts) - len(left))
            hosts = left
        return hosts

    def _count(self, name: str, rule: Rule, hosts: list[HostView], refused: int) -> None:
        self.refusals[name] += refused
        wanted = min(refused, DETAILS_MAX - len(self.details))
        said = (f"{host.name}: {name}: {rule.why(host)}" for host in hosts if not rule.passes(host))
        self.details += islice(said, wanted)


def select(
    ranking: Ranking, admission: Admission, circumstances: Circumstances, *, count: int, spread: int
) -> Selection:
    """The best `count` hosts that all filters let through; the first `spread` of them in an order that chance gives."""
    hosts = ranking.best(max(count, spread), admission.sift, ranking.bonus(circumstances.group))
    if spread > 1:
        drawn = hosts[:spread]
        random.shuffle(drawn)
        hosts = drawn + hosts[spread:]
    return Selection(tuple(hosts[:count]), dict(admission.refusals), tuple(admission.details))


def no_valid_host(selection: Selection) -> NoValidHost:
    """The error for a selection without candidates: for each filter how many hosts it refused."""
    counts = (f"{name}: {count} host{'' if count == 1 else 's'} refused" for name, count in selection.refusals.items())
    reason = "; ".join(counts) + "." if selection.refusals else "No host has reported yet."
    details = list(selection.details)
    more = sum(selection.refusals.values()) - len(details)
    if more > 0:
        details.append(f"… and {more} more")
    return NoValidHost(reason=reason, refusals=selection.refusals, details=details)
