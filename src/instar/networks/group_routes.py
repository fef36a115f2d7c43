"""Security groups and their rules in the Network API."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_network
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from instar.clock import now_us
from instar.http.answer import Answer, empty_answer, json_answer
from instar.http.context import RequestContext
from instar.http.request import Request
from instar.http.routing import Route
from instar.networks import schemas
from instar.networks.failures import (
    ChangedMeanwhile,
    InvalidInput,
    SecurityGroupCannotRemoveDefault,
    SecurityGroupCannotUpdateDefault,
    SecurityGroupDefaultAlreadyExists,
    SecurityGroupInUse,
    SecurityGroupNotFound,
    SecurityGroupRuleExists,
    SecurityGroupRuleNotFound,
)
from instar.networks.listing import Kind, chosen_fields, list_answer
from instar.networks.local import LocalNetworks
from instar.networks.ownership import decided_again, given, one_or_many, project_of, room_for, visible
from instar.networks.security_groups import DEFAULT, new_group, new_rule
from instar.networks.views import View, group_view, rule_view, with_rules
from instar.store import networks as sql
from instar.store.contract import Statement
from instar.store.network_records import (
    SECURITY_GROUP_RULES,
    SECURITY_GROUPS,
    SecurityGroupRecord,
    SecurityGroupRuleRecord,
)
from instar.store.security_groups import group_delete, group_insert, group_rules, groups_naming, rule_delete, rule_insert

PROTOCOLS = frozenset({
    "ah", "dccp", "egp", "esp", "gre", "icmp", "icmpv6", "igmp", "ipip", "ipv6-encap", "ipv6-frag", "ipv6-icmp",
    "ipv6-nonxt", "ipv6-opts", "ipv6-route", "ospf", "pgm", "rsvp", "sctp", "tcp", "udp", "udplite", "vrrp",
})  # fmt: skip
WITH_PORTS = frozenset({"tcp", "udp", "sctp", "dccp", "udplite", "6", "17", "132", "33", "136"})
ICMP = frozenset({"icmp", "icmpv6", "ipv6-icmp", "1", "58"})
GROUP_KIND = Kind("security_groups", group_view(SecurityGroupRecord("", "", "", "", None, 0, 0)))
RULE_KIND = Kind(
    "security_group_rules",
    rule_view(SecurityGroupRuleRecord("", "", "", "", "", None, None, None, None, None, "", "", 0, 0)),
)


class GroupRoutes:
    def __init__(self, networks: LocalNetworks, limit_max: int) -> None:
        self._networks = networks
        self._store = networks.store
        self._limit_max = limit_max

    def routes(self) -> list[Route]:
        groups, rules = "/v2.0/security-groups", "/v2.0/security-group-rules"
        return [
            Route("GET", groups, "network:security_groups:list", self.group_list),
            Route("POST", groups, "network:security_groups:create", self.group_create),
            Route("GET", f"{groups}/{{id}}", "network:security_groups:show", self.group_show),
            Route("PUT", f"{groups}/{{id}}", "network:security_groups:update", self.group_update),
            Route("DELETE", f"{groups}/{{id}}", "network:security_groups:delete", self.group_delete),
            Route("GET", rules, "network:security_group_rules:list", self.rule_list),
            Route("POST", rules, "network:security_group_rules:create", self.rule_create),
            Route("GET", f"{rules}/{{id}}", "network:security_group_rules:show", self.rule_show),
            Route("DELETE", f"{rules}/{{id}}", "network:security_group_rules:delete", self.rule_delete),
        ]

    # --- groups -------------------------------------------------------------------------------------------------------

    async def group_list(self, request: Request) -> Answer:
        await self._networks.default_group(request.context.project_id)
        return await list_answer(
            request, self._store, SECURITY_GROUPS, GROUP_KIND, group_view, limit_max=self._limit_max,
            decorate=self._with_rules,
        )  # fmt: skip

    async def _with_rules(self, views: list[View]) -> list[View]:
        rules = await group_rules(self._store, [view["id"] for view in views])
        return [with_rules(view, rules.get(view["id"], [])) for view in views]

    async def _view(self, group: SecurityGroupRecord) -> View:
        return (await self._with_rules([group_view(group)]))[0]

    async def group_show(self, request: Request) -> Answer:
        group = await self._group(request.params["id"], request.context)
        return json_answer({"security_group": chosen_fields(request, await self._view(group))})

    async def _group(self, group_id: str, context: RequestContext) -> SecurityGroupRecord:
        return await visible(self._store, SECURITY_GROUPS, group_id, context, SecurityGroupNotFound)

    async def group_create(self, request: Request) -> Answer:
        body = await schemas.read(request, schemas.NewGroupBody)
        wanted, is_list = one_or_many(body.security_group, body.security_groups, "security_group")
        context = request.context
        made = []
        for one in wanted:
            _check_stateful(one.stateful)
            if one.name == DEFAULT:
                raise SecurityGroupDefaultAlreadyExists()
            project_id = project_of(context, one.project_id, one.tenant_id, "create_security_group")
            made.append(new_group(project_id, one.name or "", one.description or ""))
        counts = Counter(group.project_id for group, _ in made)
        for project_id in counts:
            await self._networks.default_group(project_id)

        async def attempt() -> None:
            settings = self._networks.settings
            limits = await room_for(self._store, "security_group", settings.security_groups, dict(counts))
            statements: list[Statement] = sql.quota_locks("security_group", limits)
            for group, rules in made:
                condition = sql.quota_condition("security_group", limits[group.project_id])
                statements += group_insert(group, rules, error=ChangedMeanwhile(), **condition)
            await self._store.write(*statements)

        await decided_again(attempt, "Project", context.project_id)
        views = [with_rules(group_view(group), rules) for group, rules in made]
        return json_answer({"security_groups": views} if is_list else {"security_group": views[0]}, 201)

    async def group_update(self, request: Request) -> Answer:
        changes = (await schemas.read(request, schemas.ChangedGroupBody)).security_group
        _check_stateful(changes.stateful)
        group_id = request.params["id"]

        async def attempt() -> SecurityGroupRecord:
            group = await self._group(group_id, request.context)
            if group.default_of is not None and changes.name not in (UNSET, group.name):
                raise SecurityGroupCannotUpdateDefault()
            if group.default_of is None and changes.name == DEFAULT:
                raise SecurityGroupDefaultAlreadyExists()
            columns: dict[str, Any] = given(name=changes.name)
            if changes.description is not UNSET:
                columns["description"] = changes.description or ""
            updated = replace(group, updated_at=now_us(), **columns)
            await self._store.write(SECURITY_GROUPS.update(updated))
            return replace(updated, revision=group.revision + 1)

        group = await decided_again(attempt, "Security group", group_id)
        return json_answer({"security_group": await self._view(group)})

    async def group_delete(self, request: Request) -> Answer:
        group = await self._group(request.params["id"], request.context)
        if group.default_of is not None:
            raise SecurityGroupCannotRemoveDefault()
        others = await groups_naming(self._store, group.id) - {group.id}
        refresh, in_use = self._networks.refresh, SecurityGroupInUse(id=group.id)
        await self._store.write(group_delete(group.id, in_use=in_use), *refresh.noting(rules=others))
        refresh.rules_changed(others, noted=True)
        return empty_answer()

    # --- rules --------------------------------------------------------------------------------------------------------

    async def rule_list(self, request: Request) -> Answer:
        await self._networks.default_group(request.context.project_id)
        return await list_answer(
            request, self._store, SECURITY_GROUP_RULES, RULE_KIND, rule_view, limit_max=self._limit_max
        )

    async def rule_show(self, request: Request) -> Answer:
        return json_answer({"security_group_rule": chosen_fields(request, rule_view(await self._rule(request)))})

    async def _rule(self, request: Request) -> SecurityGroupRuleRecord:
        return await visible(
            self._store, SECURITY_GROUP_RULES, request.params["id"], request.context, SecurityGroupRuleNotFound
        )

    async def rule_create(self, request: Request) -> Answer:
        body = await schemas.read(request, schemas.NewRuleBody)
        wanted, is_list = one_or_many(body.security_group_rule, body.security_group_rules, "security_group_rule")
        rules = [await self._new_rule(one, request.context) for one in wanted]
        counts = dict(Counter(rule.project_id for rule in rules))
        refresh, changed = self._networks.refresh, {rule.group_id for rule in rules}

        async def attempt() -> None:
            for group_id in changed:
                await self._group(group_id, request.context)
            settings = self._networks.settings
            limits = await room_for(self._store, "security_group_rule", settings.security_group_rules, counts)
            await self._store.write(*sql.quota_locks("security_group_rule", limits), *(rule_insert(
                rule, sql.quota_condition("security_group_rule", limits[rule.project_id]), error=ChangedMeanwhile(),
                duplicate=SecurityGroupRuleExists(),
            ) for rule in rules), *refresh.noting(rules=changed))  # fmt: skip

        await decided_again(attempt, "Security group", wanted[0].security_group_id)
        refresh.rules_changed(changed, noted=True)
        views = [rule_view(rule) for rule in rules]
        return json_answer({"security_group_rules": views} if is_list else {"security_group_rule": views[0]}, 201)

    async def _new_rule(self, wanted: schemas.NewRule, context: RequestContext) -> SecurityGroupRuleRecord:
        project_of(context, wanted.project_id, wanted.tenant_id, "create_security_group_rule")
        group = await self._group(wanted.security_group_id, context)
        if wanted.remote_group_id is not None:
            await self._group(wanted.remote_group_id, context)
            if wanted.remote_ip_prefix is not None:
                raise InvalidInput(
                    reason="only one of remote_ip_prefix and remote_group_id can be given", path=_at("remote_group_id")
                )
        ethertype = _one_of(wanted.ethertype or "IPv4", ("IPv4", "IPv6"), "ethertype")
        protocol = _protocol(wanted.protocol)
        _check_ports(protocol, wanted.port_range_min, wanted.port_range_max)
        return new_rule(
            group, _one_of(wanted.direction, ("ingress", "egress"), "direction"), ethertype, protocol=protocol,
            port_min=wanted.port_range_min, port_max=wanted.port_range_max,
            remote_ip_prefix=_prefix(wanted.remote_ip_prefix, ethertype), remote_group_id=wanted.remote_group_id,
            description=wanted.description or "",
        )  # fmt: skip

    async def rule_delete(self, request: Request) -> Answer:
        rule = await self._rule(request)
        refresh = self._networks.refresh
        await self._store.write(rule_delete(rule.id), *refresh.noting(rules=[rule.group_id]))
        refresh.rules_changed({rule.group_id}, noted=True)
        return empty_answer()


def _at(name: str) -> str:
    return f"$.security_group_rule.{name}"


def _check_stateful(stateful: bool | None) -> None:
    if stateful is False:
        raise InvalidInput(reason="this cloud's security groups are stateful", path="$.security_group.stateful")


def _one_of(text: str, allowed: tuple[str, ...], name: str) -> str:
    """In the spelling of `allowed`."""
    for word in allowed:
        if word.lower() == text.lower():
            return word
    raise InvalidInput(reason=f"{text[:40]!r} is not one of {', '.join(allowed)}", path=_at(name))


def _protocol(given: str | int | None) -> str | None:
    """None for any. Raises InvalidInput for a protocol that no host can filter."""
    text = "" if given is None else str(given).lower()
    if text in ("", "any"):
        return None
    if text in PROTOCOLS or (text.isascii() and text.isdigit() and len(text) <= 3 and int(text) <= 255):
        return text
    raise InvalidInput(reason=f"{text[:40]!r} is not a protocol (a name such as tcp, or 0 to 255)", path=_at("protocol"))


def _check_ports(protocol: str | None, low: int | None, high: int | None) -> None:
    """Ports of a protocol that has some; type and code of ICMP."""
    if low is None and high is None:
        return
    if protocol in ICMP:
        if low is None:
            raise InvalidInput(reason="ICMP code without a type", path=_at("port_range_min"))
        if not (0 <= low <= 255 and 0 <= (high or 0) <= 255):
            raise InvalidInput(reason="type and code of ICMP are 0 to 255", path=_at("port_range_min"))
        return
    if protocol not in WITH_PORTS:
        raise InvalidInput(reason="ports need a protocol that has them, such as tcp", path=_at("protocol"))
    if low is None or high is None or not 0 <= low <= high <= 65535:
        raise InvalidInput(
            reason="port_range_min and port_range_max must be given, 0 to 65535, in this order", path=_at("port_range_min")
        )


def _prefix(given: str | None, ethertype: str) -> str | None:
    """A CIDR of the rule's family; None for everybody."""
    if given is None or not given:
        return None
    try:
        network = ip_network(given, strict=False)
    except ValueError as error:
        raise InvalidInput(reason=f"{given[:64]!r} is not a valid CIDR", path=_at("remote_ip_prefix")) from error
    if network.version != (4 if ethertype == "IPv4" else 6):
        raise InvalidInput(reason=f"{given} does not fit the ethertype {ethertype}", path=_at("remote_ip_prefix"))
    return str(network)
