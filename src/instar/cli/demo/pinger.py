"""Pings an address fifty times in a second and prints when each answer came: `python -m instar.cli.demo.pinger ADDRESS`.

The demo runs it inside hosts, to see how long nobody answers while a guest moves. It ends with its standard input.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import time

EVERY_S = 0.02
ECHO, REPLY = 8, 0


def checksum(data: bytes) -> int:
    """Of an ICMP message (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo_request(identifier: int, number: int) -> bytes:
    head = struct.pack("!BBHHH", ECHO, 0, 0, identifier, number)
    return struct.pack("!BBHHH", ECHO, 0, checksum(head), identifier, number)


def is_reply(packet: bytes, identifier: int) -> bool:
    """Whether an IPv4 packet is the answer to one of our requests."""
    start = (packet[0] & 0x0F) * 4
    message = packet[start : start + 8]
    return len(message) == 8 and message[0] == REPLY and struct.unpack("!H", message[4:6])[0] == identifier


def main(address: str) -> None:
    identifier, number = os.getpid() & 0xFFFF, 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pings:
        sent_at = 0.0
        while True:
            if (now := time.monotonic()) - sent_at >= EVERY_S:
                sent_at, number = now, (number + 1) & 0xFFFF
                with contextlib.suppress(OSError):  # no way there: a guest that is not here yet, or not any more
                    pings.sendto(echo_request(identifier, number), (address, 0))
            ready = select.select([pings, sys.stdin], [], [], EVERY_S)[0]
            if sys.stdin in ready:
                return
            if pings in ready and is_reply(pings.recv(2048), identifier):
                print(f"{time.monotonic():.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
