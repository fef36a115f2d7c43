"""Bridges, DHCP and packet filters on a Linux host: `LinuxNetwork` is the HostNetwork of the libvirt driver.

See docs/decisions/0004-host-networking.md for how a network is built and why."""

from instar.hypervisor.linux_network.network import LinuxNetwork

__all__ = ["LinuxNetwork"]
