"""Resolves the address of a load test: a shorttail server by TCP or Unix socket, or any HTTP server."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from shorttail import protocol
from shorttail.client.calls import reason
from shorttail.errors import InvalidArgument, Unavailable

CONNECT_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server. text: the address as the user wrote it. protocol: "msgpack" or "http". sockaddr: the bytes of a C
    sockaddr. host_header, path: for HTTP requests.
    """

    text: str
    protocol: str
    sockaddr: bytes
    host_header: str = ""
    path: str = ""


def find(text: str) -> Target:
    """Resolve an address and connect to it once. Raises InvalidArgument; Unavailable if the connection fails."""
    if text.startswith("https://"):
        raise InvalidArgument(f"{text}: bench does not support TLS; use the server's plain HTTP port")
    if text.startswith("http://"):
        parts = urlsplit(text)
        try:
            host, port = parts.hostname or "", parts.port or 80
        except ValueError:
            host, port = "", 0
        if not host:
            raise InvalidArgument(f"'{text}' is not understood; write http://HOST:PORT/PATH")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return Target(text, "http", connectable(text, host, port), parts.netloc, path)
    address = protocol.parse_address(text)
    if address.path is None:
        return Target(text, "msgpack", connectable(text, address.host, address.port))
    encoded = address.path.encode()
    if len(encoded) > 107:
        raise InvalidArgument(f"{text}: the path is longer than the 107 bytes that a Unix socket allows")
    try_address(text, socket.AF_UNIX, address.path)
    return Target(text, "msgpack", struct.pack("=H", socket.AF_UNIX) + encoded + b"\0")


def connectable(text: str, host: str, port: int) -> bytes:
    """Return the sockaddr of the first address of a host that accepts a connection. Raises Unavailable."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Unavailable(f"no server at {text}: cannot resolve '{host}': {reason(error)}") from None
    last: Unavailable | None = None
    for family, _, _, _, address in found:
        try:
            try_address(text, family, address)
            return pack_address(family, address)
        except Unavailable as error:
            last = error
    raise last or Unavailable(f"no server at {text}: '{host}' has no address")


def try_address(text: str, family: int, address: str | tuple[object, ...]) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.settimeout(CONNECT_TIMEOUT_S)
        try:
            trial.connect(address)
        except OSError as error:
            remedy = "" if text.startswith("http") else "; start one with `shorttail serve --store STORE`"
            raise Unavailable(f"no server at {text}: {reason(error)}{remedy}") from None


def pack_address(family: int, address: tuple[object, ...]) -> bytes:
    host, port = str(address[0]), int(str(address[1]))
    head = struct.pack("=H", family) + struct.pack(">H", port)
    if family == socket.AF_INET:
        return head + socket.inet_pton(family, host) + bytes(8)
    scope = int(str(address[3])) if len(address) > 3 else 0
    return head + bytes(4) + socket.inet_pton(family, host.partition("%")[0]) + struct.pack("=I", scope)
