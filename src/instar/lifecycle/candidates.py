"""What the operations that try one candidate host after another have in common: when it is worth going on, and what is said
when no host is left. Used by build, unshelve, evacuate and live migration.
"""

from __future__ import annotations

from collections.abc import Sequence

from instar.errors import HOST_AWAY, DiskFull, HypervisorError, InstarError, NoValidHost, StepFailed
from instar.scheduling.scheduler import HostFull

# What may be better on another host. An image that is gone or a network without addresses is no better anywhere.
WORTH_ANOTHER_HOST = (HostFull, *HOST_AWAY, HypervisorError, DiskFull, StepFailed)


class Refusals:
    """Why the hosts that were tried said no."""

    def __init__(self) -> None:
        self._errors: list[tuple[str, InstarError]] = []

    def add(self, host: str, error: InstarError) -> None:
        self._errors.append((host, error))

    def no_valid_host(self, also: Sequence[str] = ()) -> NoValidHost:
        """The error when none is left. `also` are details of hosts that were not even tried, a line for each."""
        tried = "; ".join(error.user_message for _, error in self._errors)
        lines = [f"{host}: {error.message}" for host, error in self._errors]
        return NoValidHost(reason=f"Tried {len(self._errors)}: {tried}", details=[*lines, *also])
