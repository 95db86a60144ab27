"""The settings of a server, which the supervisor passes to its workers on their command line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Final, Self

from shorttail.config import DEFAULT_HOST, LIMITS
from shorttail.observe.logs import Format

# The forms of errors of MessagePack-RPC: native/wire_encode.pxi uses their numbers.
ERROR_FORMS: Final = ("map", "string", "list")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of security, limits, CPUs, HTTP and the log. Paths are as the user gave them.

    Settings travel on a command line, so they hold no secret, only the paths of files that do.
    """

    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    uds_mode: int = 0o600
    max_connections: int = LIMITS.connections  # per worker
    max_peer_connections: int = LIMITS.connections  # per worker and address
    idle_deadline_s: int = LIMITS.idle_deadline_s
    frame_deadline_s: int = LIMITS.frame_deadline_s
    write_deadline_s: int = LIMITS.write_deadline_s
    hang_deadline_s: int = LIMITS.hang_deadline_s
    start_timeout_s: float = LIMITS.start_timeout_s
    p99_budget_ms: float = LIMITS.p99_budget_ms
    pin_cpus: bool = False
    commands: bool = True  # clients with an admin token run commands on the store
    bulk: bool = True  # large requests are answered by a process of their own
    rpc_errors: str = "map"  # one of ERROR_FORMS
    busy_poll_us: int | None = None  # None: adaptive, see limits.BusyPoll
    http: bool = True
    http_port: int | None = None  # None: inherited.wanted_port
    trust_network: bool = False  # HTTP asks for no token, on any address
    log: Format = "text"
    log_failed: bool = False  # requests that fail are logged
    slow_ms: float = 0.0  # requests that take longer are logged; 0: none are

    @property
    def authenticates(self) -> bool:
        """Whether a client must authenticate, by a token or a certificate."""
        return self.token_file is not None or self.tls_client_ca is not None

    def rpc_host(self, host: str) -> str:
        """The address of MessagePack-RPC. --trust-network does not open it: it can write."""
        return DEFAULT_HOST if self.trust_network and not self.authenticates else host

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))
