"""The limits and timeouts of the libvirt driver are a section of the program's settings: `[libvirt]`."""

from __future__ import annotations

from instar.config import LibvirtSettings

__all__ = ["LibvirtSettings"]
