"""The port of the server: taken before anything slow starts, so that a mistake is told at once."""

from __future__ import annotations

import errno
import os
import socket

from nonet.config.schema import ServerConfig
from nonet.errors import ConfigError

_BACKLOG = 2048
_UNREAD_MS = 300_000  # a connection whose client takes nothing of what waits for it, or is gone, ends after that


def listen(server: ServerConfig) -> list[socket.socket]:
    """Listening sockets for the host's addresses, all on one port. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(server.host or None, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        remedy = "is not known here; use an address of this machine, or 0.0.0.0 for all"
        raise ConfigError("host", server.host, remedy) from error
    sockets: list[socket.socket] = []
    failed: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            sockets.append(_bound(socket.socket(family, kind, protocol), address))
        except OSError as error:
            failed = failed or error
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                break
        else:
            if server.port == 0:
                break  # the system chose it for this address; on another one it may be taken
    else:
        failed = None if sockets else failed
    if failed is not None and not (server.port == 0 and sockets):
        for each in sockets:
            each.close()
        raise _refusal(server, failed) from failed
    return sockets


def url(server: ServerConfig, sockets: list[socket.socket]) -> str:
    """Where clients find the server."""
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"http://{host}:{sockets[0].getsockname()[1]}"


def _bound(made: socket.socket, address: tuple[object, ...]) -> socket.socket:
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)  # accepted sockets inherit it
        made.bind(address)
        made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made


def _refusal(server: ServerConfig, error: OSError) -> ConfigError:
    match error.errno:
        case errno.EADDRINUSE:
            return ConfigError("port", server.port, f"is in use on {server.host}; choose another, or 0 for a free one")
        case errno.EACCES | errno.EPERM:
            return ConfigError("port", server.port, "you have no permission to listen on it; use one from 1024 on")
        case errno.EADDRNOTAVAIL:
            return ConfigError("host", server.host, "is no address of this machine; 0.0.0.0 is every one of it")
    return ConfigError("host", server.host, f"cannot listen: {os.strerror(error.errno or 0)}; use another address")
