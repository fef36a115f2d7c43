"""Simulated hosts: thousands in one process, with set latencies and faults, that survive a crash of the process."""

from instar.hypervisor.simulated.driver import SimulatedHypervisor
from instar.hypervisor.simulated.faults import HostFaults
from instar.hypervisor.simulated.world import SimulatedWorld

__all__ = ["HostFaults", "SimulatedHypervisor", "SimulatedWorld"]
