"""The sockets that clients and operators connect to: bound here, or handed over by systemd."""

import os
import socket
import ssl
from typing import Any, Final

from edge.config.settings import TlsConfig
from edge.config.values import Address
from edge.errors import Unusable

_FIRST_PASSED_DESCRIPTOR: Final = 3  # sd_listen_fds(3)


def passed_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd hands over (sd_listen_fds(3)): no connection is lost at a restart."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    sockets = [socket.socket(fileno=_FIRST_PASSED_DESCRIPTOR + index) for index in range(count)]
    for sock in sockets:
        sock.setblocking(False)
    return sockets


def bind(address: Address) -> socket.socket:
    """Return a socket bound to an address; a unix socket that a killed process left is replaced. Raises `OSError`."""
    at: Any
    if address.path is not None:
        if address.path.is_socket():
            address.path.unlink()
        sock, at = socket.socket(socket.AF_UNIX), str(address.path)
    else:
        family, kind, protocol, _, at = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(at)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{address}: {error.strerror}") from None
    sock.setblocking(False)
    return sock


def name_of(sock: socket.socket) -> str:
    """Return the address of a socket, as it is written in `server.listen`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return str(Address(name[0], name[1]))


def listener_tls(tls: TlsConfig) -> ssl.SSLContext:
    """Return the TLS settings towards clients; raises `Unusable` when its files cannot be used."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, tls)
    return context


def load_certificate(context: ssl.SSLContext, tls: TlsConfig) -> None:
    """Let a context show a certificate; raises `Unusable`, and may have half of it then."""
    try:
        context.load_cert_chain(tls.certificate, tls.private_key)
    except (OSError, ssl.SSLError) as error:
        raise Unusable(f"server.tls: the certificate and key cannot be used ({error})") from None
