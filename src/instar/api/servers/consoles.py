"""`POST /servers/{id}/remote-consoles`, its older forms as actions, and `GET /os-console-auth-tokens/{token}`.

A URL leads to the console proxy of this process (room `consoles`); the token in it is good for one connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

from instar.api.resource import ApiRoute, Compute, read_body
from instar.api.servers.listing import visible_instance
from instar.errors import ConsoleUnavailable
from instar.http.answer import Answer, json_answer
from instar.http.request import Request
from instar.model.console import ConsoleKind
from instar.model.instance import Instance

CONSOLE_POLICY = "os_compute_api:os-remote-consoles"
CONSOLES_SINCE = 6
TOKENS_SINCE = 31
NOVNC_PAGE = "/console/novnc/vnc.html"
WEBSOCKET_PATH = "/console/websocket"

# protocol → the types that are reached by it; None marks those that no host of ours offers.
TYPES: Mapping[str, Mapping[str, ConsoleKind | None]] = {
    "vnc": {"novnc": ConsoleKind.VNC, "xvpvnc": None},
    "spice": {"spice-html5": None},
    "rdp": {"rdp-html5": None},
    "serial": {"serial": ConsoleKind.SERIAL},
    "mks": {"webmks": None},
}
ConsoleType = Literal["novnc", "xvpvnc", "spice-html5", "rdp-html5", "serial", "webmks"]


class WantedConsole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    protocol: Literal["vnc", "spice", "rdp", "serial", "mks"]
    type: ConsoleType


class RemoteConsole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    remote_console: WantedConsole


class VncConsole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Value of the action `os-getVNCConsole`."""

    type: Literal["novnc", "xvpvnc"]


class SerialConsole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Value of the action `os-getSerialConsole`."""

    type: Literal["serial"]


class SpiceConsole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Value of the action `os-getSPICEConsole`."""

    type: Literal["spice-html5"]


class RdpConsole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Value of the action `os-getRDPConsole`."""

    type: Literal["rdp-html5"]


class RemoteConsoles:
    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def routes(self) -> list[ApiRoute]:
        tokens = "os_compute_api:os-console-auth-tokens"
        return [
            ApiRoute("POST", "/servers/{server_id}/remote-consoles", CONSOLE_POLICY, self.create, since=CONSOLES_SINCE),
            ApiRoute("GET", "/os-console-auth-tokens/{console_token}", tokens, self.show_token, since=TOKENS_SINCE),
        ]

    async def create(self, request: Request) -> Answer:
        wanted = (await read_body(request, RemoteConsole)).remote_console
        instance = await visible_instance(self._compute, request.context, request.params["server_id"])
        url = await console_url(self._compute, request, instance, wanted.protocol, wanted.type)
        return json_answer({"remote_console": {"protocol": wanted.protocol, "type": wanted.type, "url": url}})

    async def show_token(self, request: Request) -> Answer:
        access = await self._compute.lifecycle.consoles.find(request.params["console_token"])
        return json_answer(
            {
                "console": {
                    "instance_uuid": access.instance_id,
                    "host": access.address,
                    "port": access.port,
                    "internal_access_path": None,
                }
            }
        )


async def console_url(compute: Compute, request: Request, instance: Instance, protocol: str, name: str) -> str:
    """Where the console is to be had with a new token. Raises ConsoleUnavailable for what nobody offers, NoRunningGuest."""
    kind = TYPES[protocol].get(name)
    if kind is None:
        known = ", ".join(f"{protocol}/{one}" for protocol, types in TYPES.items() for one, kind in types.items() if kind)
        raise ConsoleUnavailable(f"Unavailable console type {name} of protocol {protocol}: there are {known}.", kind=name)
    try:
        token = await compute.lifecycle.consoles.issue(instance, kind)
    except ConsoleUnavailable as error:
        raise ConsoleUnavailable(kind=name) from error  # by the name that the caller knows
    base = compute.settings.api.console_base_url.rstrip("/") or request.origin
    scheme, host, path, _, _ = urlsplit(base)
    if kind is ConsoleKind.SERIAL:
        return urlunsplit(("wss" if scheme == "https" else "ws", host, f"{path}/", f"token={token}", ""))
    # noVNC puts its `path` behind the address of the page's host.
    websocket = quote(f"{path}{WEBSOCKET_PATH}?token={token}".lstrip("/"), safe="")
    return urlunsplit((scheme, host, path + NOVNC_PAGE, f"autoconnect=true&resize=scale&path={websocket}", ""))
