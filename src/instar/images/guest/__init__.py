"""Builds a small bootable guest image from Debian packages: `instar image build-guest`, the image `tiny`.

The guest grows its root disk, reads the config drive, gets its addresses by DHCP on every NIC, runs an ssh server and
says what it does on its serial console, in lines that programs can read:

    INSTAR-BOOT count=<n> uuid=<instance uuid or -> hostname=<name>
    INSTAR-NET <nic> address=<ip>/<prefix> mac=<mac>
    INSTAR-READY count=<n> uptime_s=<s>
    INSTAR-USER-DATA exit=<status>
"""

from instar.images.guest.build import GuestImage, build_guest, recipe_fingerprint
from instar.images.guest.failures import CommandFailed, GuestBuildFailed, PackageContentMissing, ProgramsMissing
from instar.images.guest.host_programs import HOST_PACKAGES

__all__ = [
    "HOST_PACKAGES",
    "CommandFailed",
    "GuestBuildFailed",
    "GuestImage",
    "PackageContentMissing",
    "ProgramsMissing",
    "build_guest",
    "recipe_fingerprint",
]
