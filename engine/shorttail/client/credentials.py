"""TLS of a client: its context, and the handshake of a connection."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from shorttail.define.inputs import read_input
from shorttail.errors import InvalidArgument
from shorttail.protocol import Address

TLS = ssl.SSLContext | str | Path | bool | None


def client_context(tls: TLS) -> ssl.SSLContext | None:
    """Return the TLS context of a client, or None for a client without TLS.

    tls: an ssl.SSLContext, for example with a client certificate; the path of a CA certificate in PEM form; True for
    the CAs that this machine trusts; None or False for no TLS. Raises InvalidArgument.
    """
    if tls is None or tls is False:
        return None
    if isinstance(tls, ssl.SSLContext):
        return tls
    try:
        context = ssl.create_default_context() if tls is True else _trusting(read_input(tls).decode("ascii", "ignore"))
    except OSError as error:
        reason = "no certificates in PEM form" if isinstance(error, ssl.SSLError) else (error.strerror or "").lower()
        raise InvalidArgument(f"tls={tls!r}: {reason}; give the path of a CA certificate") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _trusting(certificates: str) -> ssl.SSLContext:
    """Return a context that trusts only these certificates. Raises ssl.SSLError if there is none."""
    if not certificates.strip():
        raise ssl.SSLError  # without certificates, ssl would trust those of the system
    return ssl.create_default_context(cadata=certificates)


def secured(
    connection: socket.socket, context: ssl.SSLContext | None, address: Address, timeout_s: float
) -> socket.socket:
    """Return the connection, over TLS if there is a context and the address is not a Unix socket.

    Raises OSError; then the connection is closed.
    """
    if context is None or address.path is not None:
        return connection
    try:
        connection.settimeout(timeout_s)
        return context.wrap_socket(connection, server_hostname=address.host)
    except BaseException:
        connection.close()
        raise
