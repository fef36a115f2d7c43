"""Opens one stream to a peer: connection, handshake, and a look at who answered. Blocks; runs in the stream's thread."""

from __future__ import annotations

import hashlib
import socket
import ssl

from instar.errors import StreamBroken, StreamRefused
from instar.model.stream import StreamAddress
from instar.streams.cut import Cut
from instar.streams.identity import StreamIdentity, fingerprint, normalized
from instar.streams.wire import (
    HANDSHAKE_MAX_S,
    PROTOCOL,
    Accepted,
    Alive,
    Hello,
    OpenFile,
    OpenSocket,
    Refused,
    WireError,
    prepare,
    receive,
    send,
)


def dial(
    identity: StreamIdentity, peer: StreamAddress, name: str, cut: Cut, *, wait_s: float = HANDSHAKE_MAX_S
) -> ssl.SSLSocket:
    """A connection to the peer, after its greeting; each wait for it ends after `wait_s`. Raises StreamRefused (one of
    us is not who the other was told of), and WireError where trying again may help."""
    try:
        pinned, certificate = fingerprint(peer.certificate), normalized(peer.certificate)
    except ValueError as error:
        raise StreamRefused(what=name, host=peer.host, reason="there is no valid certificate of it") from error
    context = identity.client_context(certificate)
    plain = socket.socket(socket.AF_INET6 if ":" in peer.address else socket.AF_INET, socket.SOCK_STREAM)
    secure: ssl.SSLSocket | None = None
    try:
        cut.own(plain)
        plain.settimeout(wait_s)
        plain.connect((peer.address, peer.port))
        prepare(plain)
        secure = context.wrap_socket(plain, do_handshake_on_connect=False)
        cut.own(secure)
        secure.do_handshake()
        if hashlib.sha256(secure.getpeercert(binary_form=True) or b"").digest() != pinned:
            raise StreamRefused(what=name, host=peer.host, reason="it showed another certificate")
        hello = receive(secure)  # TLS 1.3: what the server thinks of our certificate comes only now
        if not isinstance(hello, Hello) or hello.protocol != PROTOCOL:
            raise StreamRefused(what=name, host=peer.host, reason="it speaks another version")
        return secure
    except BaseException as error:
        (secure or plain).close()
        cause = error.__cause__ if isinstance(error, WireError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise StreamRefused(what=name, host=peer.host, reason="it showed another certificate") from error
        if isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or ""):
            raise StreamRefused(what=name, host=peer.host, reason="it does not know our certificate") from error
        if isinstance(error, OSError):
            raise WireError.of(error) from error
        raise


def ask(secure: ssl.SSLSocket, peer: StreamAddress, request: OpenFile | OpenSocket) -> Accepted:
    """The server's yes. Raises StreamRefused, StreamBroken (it has it, but cannot open it), WireError."""
    send(secure, request)
    while isinstance(answer := receive(secure), Alive):
        pass
    if isinstance(answer, Accepted):
        return answer
    if isinstance(answer, Refused):
        raise refusal(answer, peer, request.name)
    raise WireError("the answer makes no sense")


def refusal(refused: Refused, peer: StreamAddress, name: str) -> StreamBroken:
    if refused.reason == "not granted":
        return StreamRefused(what=name, host=peer.host, reason="it is not granted")
    if refused.reason == "changed":
        return StreamBroken(what=name, host=peer.host, reason="it changed while it was sent")
    return StreamBroken(what=name, host=peer.host, reason="it cannot be opened there")
