"""One host of a test: a LinuxNetwork in the network namespace that this program is started in. Started by `two_hosts`.

Arguments: state directory, cloud id, underlay address. It reads calls from its standard input and answers on its
standard output, one JSON line each."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import traceback
from pathlib import Path

import msgspec
import structlog

from instar.hypervisor.linux_network import LinuxNetwork
from instar.model.network import PortDefinition

# What one process of a machine must not see of another's: mounted anew, in a mount namespace of our own.
OWN_DIRECTORIES = ("/run/netns", "/run/instar-net")


class Call(msgspec.Struct):
    name: str
    instance_id: str = ""
    ports: tuple[PortDefinition, ...] = ()


def _mount_own_directories() -> None:
    for directory in OWN_DIRECTORIES:
        Path(directory).mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", directory], check=True)


async def _serve(folder: Path, cloud_id: str, address: str) -> None:
    def made() -> LinuxNetwork:
        return LinuxNetwork(state_dir=folder, cloud_id=cloud_id, underlay_address=address)

    host = made()
    await host.open()
    _say("ready")
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        call = msgspec.json.decode(line, type=Call)
        try:
            if call.name == "ensure_ports":
                _say(await host.ensure_ports(call.instance_id, call.ports))
            elif call.name == "ensure_no_ports":
                _say(await host.ensure_no_ports(call.instance_id))
            elif call.name == "open":
                host = made()  # as a new process does: it knows what the records tell
                _say(await host.open())
            elif call.name == "census":
                _say(await host.census())
            else:
                _say(await host.remove_everything())
        except Exception as error:
            traceback.print_exc()
            _say(["failed", repr(error)])


def _say(answer: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    _mount_own_directories()
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
