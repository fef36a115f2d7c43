"""What can go wrong while the guest image is built. Raised by every file of this room, shown by the command line."""

from __future__ import annotations

from instar.errors import InstarError


class GuestBuildFailed(InstarError):
    """The guest image was not built; the message says why and what to do about it."""


class CommandFailed(GuestBuildFailed):
    """A host program failed. Facts: `program`, `exit_code` (None: out of time), `last_lines` of its output."""

    template = "{program} failed (exit code {exit_code}): {last_lines}"


class ProgramsMissing(GuestBuildFailed):
    """The host lacks programs that the builder calls. Facts: `programs`, and `packages` that bring them, as text."""

    template = "The guest image builder needs {programs}; install them with: apt-get install {packages}"


class PackageContentMissing(GuestBuildFailed):
    """The Debian packages lack a file that the image needs: a release that the builder does not know. Fact: `what`."""

    template = "No {what} in the downloaded Debian packages; does this Debian release still have it?"
