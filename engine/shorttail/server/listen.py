"""The sockets that the server listens on.

They are bound when the server starts, so that addresses are checked and a free port is known, and they listen when a
worker can answer (`start_listening`). Until then connections are refused, and none waits for a model that loads.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final

from shorttail.errors import InvalidArgument, ShorttailError, Unavailable
from shorttail.server import systemd
from shorttail.server.settings import ServerSettings

BACKLOG: Final = 1024
UNIX_PATH_BYTES: Final = 100  # the system takes 107


class Listeners:
    """The bound sockets: a TCP socket, and a Unix socket if `uds` is given. A context manager that closes them.

    If systemd hands sockets over, those are used instead; systemd listens on them already. bind: False only checks the
    addresses. `str()` gives the addresses. Raises InvalidArgument for an address that cannot be used, Unavailable for
    an address that is taken.
    """

    def __init__(
        self, host: str, port: int, uds: str | Path | None, settings: ServerSettings | None = None, *, bind: bool = True
    ):
        settings = settings or ServerSettings()
        self.sockets: list[socket.socket] = []
        self._names: list[str] = []
        self._uds: Path | None = None
        inherited = systemd.inherited_sockets()
        if inherited:
            self._take(inherited, settings)
            return
        family, address = _resolve(host, port, settings)
        if not bind:
            return
        try:
            self.sockets.append(_bind_tcp(family, address, host, port))
            bound = self.sockets[0].getsockname()[1]
            self._names.append(f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}")
            if uds is not None:
                self.sockets.append(_bind_unix(Path(uds), settings.uds_mode))
                self._uds = Path(uds)
                self._names.append(f"unix:{uds}")
        except BaseException:
            self.close()
            raise

    def _take(self, inherited: list[socket.socket], settings: ServerSettings) -> None:
        """Use sockets that systemd listens on. systemd removes the file of a Unix socket."""
        self.sockets += inherited
        for listener in inherited:
            listener.setblocking(False)
            name = listener.getsockname()
            if listener.family == socket.AF_UNIX:
                self._names.append(f"unix:{name}")
            else:
                _check_host(name[0], name[0], settings)
                self._names.append(f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}")

    def __str__(self) -> str:
        first, *more = self._names
        return first + (f" ({', '.join(more)} too)" if more else "")

    def close(self) -> None:
        """Close the supervisor's copies of the sockets; workers close theirs."""
        if self._uds is not None:
            with contextlib.suppress(FileNotFoundError):
                self._uds.unlink()
            self._uds = None
        for listener in self.sockets:
            listener.close()
        self.sockets.clear()

    def __enter__(self) -> Listeners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PrivateSockets:
    """The Unix sockets on which children listen for workers, in a folder that only this user may enter.

    The supervisor binds them, so that workers find them again after a restart of the child that listens. writer: of the
    writer; bulk, bulk_http: of the bulk worker. A context manager: leaving it removes the sockets and the folder.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="shorttail-"))
        if len(os.fsencode(self.folder / "bulk-http")) > UNIX_PATH_BYTES:
            self.folder.rmdir()
            self.folder = Path(tempfile.mkdtemp(prefix="shorttail-", dir="/tmp"))
        self.writer, self.bulk, self.bulk_http = (self._listen(name) for name in ("writer", "bulk", "bulk-http"))

    def _listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.folder / name))
        listener.listen(BACKLOG)
        listener.setblocking(False)
        return listener

    def __enter__(self) -> PrivateSockets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in (self.writer, self.bulk, self.bulk_http):
            listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def start_listening(listener: socket.socket, option: str = "--port") -> None:
    """Let a bound socket take connections, if it does not yet. option: of its port, for the error.

    Raises Unavailable if another process listens on the port.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        if listener.family == socket.AF_UNIX:
            raise Unavailable(f"cannot listen on a unix socket: {error.strerror}") from None
        host, port, *_ = listener.getsockname()
        raise _bind_error(error, host, port, option) from None


def bind_http(host: str, port: int, settings: ServerSettings, *, bind: bool = True) -> tuple[socket.socket | None, str]:
    """A bound TCP socket for HTTP, and its address as text. bind: False only checks. Raises what Listeners raises."""
    family, address = _resolve(host, port, settings, trusts=settings.trust_network)
    if not bind:
        return None, ""
    listener = _bind_tcp(family, address, host, port)
    bound = listener.getsockname()[1]
    return listener, f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"


def _resolve(
    host: str, port: int, settings: ServerSettings, *, trusts: bool = False
) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    if not 0 <= port <= 65535:
        raise InvalidArgument(f"{port} is not a port; ports are 0 to 65535, and 0 takes a free port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise InvalidArgument(f"host {host!r} is not known; use 127.0.0.1, or a name of this machine") from None
    # IPv4 first: "localhost" has addresses of both kinds, and most clients try 127.0.0.1.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, _, _, _, address = found[0]
    if not trusts:
        _check_host(host, str(address[0]), settings)
    return family, address


def _check_host(host: str, address: str, settings: ServerSettings) -> None:
    """Refuse an address that other machines can reach, unless clients must authenticate. Raises InvalidArgument."""
    if settings.authenticates or ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return
    raise InvalidArgument(
        f"host {host} is not a loopback address, and whoever can reach it could read and write the store: "
        f"give --token-file or --tls-client-ca, or serve on 127.0.0.1; --trust-network opens HTTP alone"
    )


def _bind_tcp(family: socket.AddressFamily, address: tuple[object, ...], host: str, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _bind_error(error, host, port) from None
    listener.setblocking(False)
    return listener


def _bind_error(error: OSError, host: str, port: int, option: str = "--port") -> ShorttailError:
    if error.errno == errno.EADDRINUSE:
        return Unavailable(f"port {port} on {host} is in use; stop the other process or choose another with {option}")
    if error.errno == errno.EACCES:
        return InvalidArgument(f"port {port} on {host} is not allowed for this user; choose another with {option}")
    return InvalidArgument(f"cannot listen on {host} port {port}: {error.strerror}")


def _bind_unix(path: Path, mode: int) -> socket.socket:
    """Bind a Unix socket. mode: of its file; users who may write to the file may connect."""
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        path.chmod(mode)  # before it listens, so that nobody can connect with the old mode
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)  # a path that is too long has no errno
        raise InvalidArgument(
            f"cannot listen on unix socket {path}: {reason}; choose another path with --uds"
        ) from None
    listener.setblocking(False)
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that was killed. Raises InvalidArgument, or Unavailable if a server has it."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise InvalidArgument(f"{path} exists and is not a socket; choose another path with --uds")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            if not _is_bound(path):
                path.unlink(missing_ok=True)
                return
        except OSError as error:
            raise InvalidArgument(f"cannot use unix socket {path}: {error.strerror}") from None
    raise Unavailable(f"unix socket {path} is in use; stop the other process or choose another path with --uds")


def _is_bound(path: Path) -> bool:
    """Return whether a process has a Unix socket of that path, which need not listen yet."""
    try:
        return any(line.endswith(f" {path}") for line in Path("/proc/net/unix").read_text().splitlines())
    except OSError:
        return False
