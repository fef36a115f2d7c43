"""Each filter, row by row: what it lets through, and what it says of what it refuses."""

# ruff: noqa: E501 - a row of the table is a line

from __future__ import annotations

from typing import Any

import pytest

from instar.config import HostSettings, SchedulingSettings
from instar.errors import StartupError
from instar.scheduling.extra_specs import satisfies
from instar.scheduling.filters import FILTERS, Rule, filters_by_name
from instar.scheduling.host_view import HostView, capacity_of
from instar.scheduling.request import Circumstances, SchedulingRequest
from instar.store.server_groups import GroupHosts

from .clouds import flavor, inventory, request

NOW = Circumstances(now=1000.0, down_after_s=8.0)


def host(
    name: str = "h1", *, has: dict[str, Any] | None = None, claimed: tuple[int, int, int] = (0, 0, 0), **values: Any
) -> HostView:
    """A host that reported a second ago, with 4 vcpus (64 to claim), 8192 MiB and 100 GiB."""
    view = HostView(name)
    view.inventory = inventory(name, **(has or {}))
    view.set_amounts(capacity_of(view.inventory, HostSettings(), SchedulingSettings()), claimed)
    view.heard_at, view.hypervisor_ok, view.boot_id = 999.0, True, "b"
    for attribute, value in values.items():
        setattr(view, attribute, value)
    return view


def group(policy: str, members: dict[str, int], most: int = 1) -> Circumstances:
    return Circumstances(1000.0, 8.0, GroupHosts(policy, most, members))


SSD = {"aggregate_instance_extra_specs:disk": "s== ssd"}
HINTED = Circumstances(1000.0, 8.0, None, {"i1": "h1", "i2": "h2"})
ARM = {"hw_architecture": "aarch64"}

ROWS: list[tuple[str, SchedulingRequest, Circumstances, HostView, str | None]] = [
    ("enabled", request(), NOW, host(), None),
    ("enabled", request(), NOW, host(heard_at=992.0), None),
    ("enabled", request(), NOW, host(heard_at=991.0), "silent for 9 seconds"),
    ("enabled", request(), NOW, host(heard_at=None, boot_id=""), "has not reported yet"),
    ("enabled", request(), NOW, host(hypervisor_ok=False), "its hypervisor is not available"),
    ("enabled", request(), NOW, host(disabled=True), "disabled"),
    ("enabled", request(), NOW, host(disabled=True, disabled_reason="broken fan"), "disabled: broken fan"),
    ("enabled", request(), NOW, host(forced_down=True), "forced down"),
    ("not_tried", request(exclude_hosts=("h2",)), NOW, host(), None),
    ("not_tried", request(exclude_hosts=("h1",)), NOW, host(), "was tried before"),
    ("hint_host", request(requested_host="h1"), NOW, host(), None),
    ("hint_host", request(requested_host="h1.example"), NOW, host(), None),
    ("hint_host", request(requested_host="h2"), NOW, host(), "host h2 was asked for"),
    ("capacity", request(), NOW, host(), None),
    ("capacity", request(), NOW, host(claimed=(63, 7168, 90)), None),
    ("capacity", request(), NOW, host(claimed=(64, 0, 0)), "1 vcpus wanted, 0 left"),
    ("capacity", request(), NOW, host(claimed=(0, 8000, 95)), "1024 MiB of memory wanted, 192 left; 10 GiB of disk wanted, 5 left"),
    ("capacity", request(flavor(root_gib=0)), NOW, host(claimed=(0, 0, 120)), None),
    ("capacity", request(flavor(root_gib=99, swap_mib=1025)), NOW, host(), "101 GiB of disk wanted, 100 left"),
    ("capacity", request(flavor(vcpus=5)), NOW, host(), "5 vcpus and 1024 MiB of memory wanted, it has 4 vcpus and 8704 MiB of memory in all"),
    ("image_properties", request(image_properties={"hw_architecture": "AMD64"}), NOW, host(), None),
    ("image_properties", request(image_properties=ARM), NOW, host(), "the image is for aarch64, the host is x86_64"),
    ("image_properties", request(image_properties=ARM), NOW, host(has={"cpu_arch": "aarch64"}), None),
    ("image_properties", request(image_properties={"img_hv_type": "qemu"}), NOW, host(), None),
    ("image_properties", request(image_properties={"hypervisor_type": "xen"}), NOW, host(), "the image is for hypervisor xen, the host has QEMU"),
    ("image_properties", request(image_properties={"hw_vm_mode": "hvm"}), NOW, host(), None),
    ("image_properties", request(image_properties={"vm_mode": "xen"}), NOW, host(), "the image is for vm mode xen, the host has hvm"),
    ("availability_zone", request(availability_zone="nova"), NOW, host(), None),
    ("availability_zone", request(availability_zone="east"), NOW, host(zone="east"), None),
    ("availability_zone", request(availability_zone="east"), NOW, host(), "is in zone nova, east was asked for"),
    ("aggregate_extra_specs", request(flavor(extra_specs=SSD)), NOW, host(metadata={"disk": ("hdd", "ssd")}), None),
    ("aggregate_extra_specs", request(flavor(extra_specs=SSD)), NOW, host(metadata={"disk": ("hdd",)}), "its aggregates say hdd for disk, the flavor asks for s== ssd"),
    ("aggregate_extra_specs", request(flavor(extra_specs=SSD)), NOW, host(), "its aggregates say nothing for disk, the flavor asks for s== ssd"),
    ("server_group_affinity", request(), group("affinity", {"h1": 2}), host(), None),
    ("server_group_affinity", request(), group("affinity", {"h2": 1}), host(), "the group's members are on h2"),
    ("server_group_anti_affinity", request(), group("anti-affinity", {"h2": 1}), host(), None),
    ("server_group_anti_affinity", request(), group("anti-affinity", {"h1": 1}), host(), "has 1 of the group's members"),
    ("server_group_anti_affinity", request(), group("anti-affinity", {"h1": 1}, 2), host(), None),
    ("different_host", request(hints={"different_host": ["i2"]}), HINTED, host(), None),
    ("different_host", request(hints={"different_host": "i1"}), HINTED, host(), "has an instance that different_host names"),
    ("same_host", request(hints={"same_host": ["i1", "i2"]}), HINTED, host(), None),
    ("same_host", request(hints={"same_host": ["i2"]}), HINTED, host(), "has no instance that same_host names"),
    ("same_host", request(hints={"same_host": ["unknown"]}), HINTED, host(), "has no instance that same_host names"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wanted", "circumstances", "view", "refusal"), ROWS)
def test_filter_row(
    name: str, wanted: SchedulingRequest, circumstances: Circumstances, view: HostView, refusal: str | None
) -> None:
    rule = FILTERS[name](wanted, circumstances)
    assert rule is not None
    assert rule.passes(view) is (refusal is None)
    if refusal is not None:
        assert rule.why(view) == refusal


def test_every_filter_is_in_the_rows_and_in_the_default_settings() -> None:
    assert {row[0] for row in ROWS} == set(FILTERS) == set(SchedulingSettings().filters)


@pytest.mark.parametrize("name", sorted(set(FILTERS) - {"enabled", "capacity"}))
def test_a_filter_that_has_nothing_to_say_costs_nothing(name: str) -> None:
    assert FILTERS[name](request(), NOW) is None


@pytest.mark.parametrize(
    ("value", "wanted", "satisfied"),
    [
        ("ssd", "ssd", True), ("ssd", "hdd", False), ("4", "= 3", True), ("4", "= 5", False), ("4", "== 4.0", True),
        ("4", ">= 5", False), ("4", "<= 5", True), ("4", "!= 4", False), ("x", ">= 5", False), ("4", ">= x", False),
        ("ssd", "s== ssd", True), ("ssd", "s!= ssd", False), ("b", "s> a", True), ("b", "s<= a", False),
        ("avx,sse", "<in> avx", True), ("sse", "<in> avx", False), ("avx sse", "<all-in> avx sse", True),
        ("avx", "<all-in> avx sse", False), ("b", "<or> a <or> b", True), ("c", "<or> a <or> b", False), ("", "", True),
    ],
)  # fmt: skip
def test_extra_spec_operators(value: str, wanted: str, satisfied: bool) -> None:
    assert satisfies(value, wanted) is satisfied


def only_small(_request: SchedulingRequest, _circumstances: Circumstances) -> Rule:
    """A filter from elsewhere."""
    return Rule(lambda view: view.capacity.vcpus < 10, lambda _view: "is not small")


def test_a_filter_from_elsewhere_is_named_by_module_and_function() -> None:
    ((name, filter_),) = filters_by_name([f"{__name__}:only_small"])
    assert name.endswith(":only_small")
    rule = filter_(request(), NOW)
    assert rule is not None
    assert not rule.passes(host())


@pytest.mark.parametrize("name", ["capasity", "no.such.module:filter", "instar.scheduling.filters:nothing"])
def test_an_unknown_filter_is_named_at_the_start(name: str) -> None:
    with pytest.raises(StartupError, match=name):
        filters_by_name(["enabled", name])
