"""What a host tells of itself, again and again."""

from __future__ import annotations

import msgspec

from instar.model.guest import GuestEvent, HostInventory

HOST_REPORTS = "hosts.report"
HOST_REPORTS_TOGETHER = "hosts.reports"  # of many hosts in one event: only for who may speak of every host


class HostReport(msgspec.Struct, frozen=True, tag=True):
    """A heartbeat. `boot_id` changes when the machine restarted, `agent_id` when its agent did. The sender's clock is
    not in it: whoever receives it looks at their own. `inventory` None: the hypervisor could not be asked."""

    host: str
    boot_id: str
    agent_id: str
    hypervisor_ok: bool
    inventory: HostInventory | None
    version: int = 1
    session: int = 0  # of the host, see HostCommand; 0: it has none
    shut: bool = False  # it was cut off, and does nothing before it is admitted again
    ask: int = 0  # a conductor answers this number on HOSTS_HEARD + `answer_to`; 0: no answer is wanted
    answer_to: str = ""  # the first of the agent's hosts
    agent_version: str = ""
    protocol: int = 1


class HostReports(msgspec.Struct, frozen=True):
    """Of hosts that one agent serves, at the same time."""

    reports: tuple[HostReport, ...]


class HostEvent(msgspec.Struct, frozen=True):
    """A guest's event with the host that saw it."""

    host: str
    event: GuestEvent
