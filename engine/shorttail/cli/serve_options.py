"""The options of `shorttail serve` for security, limits, CPUs, HTTP and the log."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import click

from shorttail.cli.options import Seconds
from shorttail.config import LIMITS


class Mode(click.types.StringParamType):
    """A file mode, written in octal."""

    name = "octal"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            mode = value if isinstance(value, int) else int(value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            self.fail(f"{value!r} is not a file mode; write it as for chmod, such as 660", param, ctx)
        return mode


# The options have the names of the fields of server.settings.ServerSettings.
OPTIONS: Final = [
    click.option(
        "--token-file",
        metavar="FILE",
        help="Require a token from clients; FILE has lines `serve TOKEN` and `admin TOKEN`.",
    ),
    click.option("--tls-cert", metavar="PEM", help="Use TLS for TCP, with the certificate (and chain) in this file."),
    click.option("--tls-key", metavar="PEM", help="File of the certificate's private key, if it is another file."),
    click.option(
        "--tls-client-ca", metavar="PEM", help="Accept only clients with a certificate that this CA has signed."
    ),
    click.option("--uds-mode", type=Mode(), default="600", show_default=True, help="File mode of the Unix socket."),
    click.option(
        "--max-connections",
        type=click.IntRange(1),
        default=LIMITS.connections,
        show_default=True,
        help="Maximum connections of a worker.",
    ),
    click.option(
        "--max-peer-connections",
        type=click.IntRange(1),
        default=LIMITS.connections,
        show_default=True,
        help="Maximum connections of a worker from the same address.",
    ),
    click.option(
        "--idle-deadline-s",
        type=click.IntRange(1),
        default=LIMITS.idle_deadline_s,
        show_default=True,
        help="Close a connection after this many seconds without data.",
    ),
    click.option(
        "--frame-deadline-s",
        type=click.IntRange(1),
        default=LIMITS.frame_deadline_s,
        show_default=True,
        help="Close a connection if a message is incomplete for this many seconds.",
    ),
    click.option(
        "--write-deadline-s",
        type=click.IntRange(1),
        default=LIMITS.write_deadline_s,
        show_default=True,
        help="Close a connection whose client has not read its answers for this many seconds.",
    ),
    click.option(
        "--hang-deadline-s",
        type=click.IntRange(1),
        default=LIMITS.hang_deadline_s,
        show_default=True,
        help="Kill and replace a worker whose event loop is blocked for this many seconds.",
    ),
    click.option(
        "--start-timeout",
        "start_timeout_s",
        type=Seconds(),
        metavar="TIME",
        default=f"{LIMITS.start_timeout_s:g}s",
        show_default=True,
        help="Kill a worker that is not ready in this time, such as 5m. The model that it was loading is not loaded"
        " again; the other models serve.",
    ),
    click.option(
        "--p99-budget-ms",
        type=click.FloatRange(0.1),
        default=LIMITS.p99_budget_ms,
        show_default=True,
        help="P99 latency goal in ms for accepted requests under overload; the server refuses the others.",
    ),
    click.option(
        "--commands/--no-commands",
        default=True,
        show_default=True,
        help="Let clients with an admin token run commands on the store: apply, models, views and others (--server).",
    ),
    click.option(
        "--bulk/--no-bulk",
        default=True,
        show_default=True,
        help="Answer large requests in a process of their own, which starts at the first one; otherwise refuse them.",
    ),
    click.option("--pin-cpus", is_flag=True, help="Pin each worker to a CPU of its own."),
    click.option(
        "--busy-poll-us",
        type=click.IntRange(0),
        show_default="100, while most requests arrive within that time",
        help="Poll for requests for this many microseconds before sleeping, which uses a whole CPU for each worker;"
        " 0: sleep at once.",
    ),
    click.option(
        "--rpc-errors",
        type=click.Choice(["map", "string", "list"]),
        default="map",
        show_default=True,
        help="Form of the errors of MessagePack-RPC, for clients that cannot read a map there: a string (Go's net/rpc"
        " codecs, Neovim), or a list of a number and a string (pynvim, Neovim).",
    ),
    click.option(
        "--http/--no-http", default=True, show_default=True, help="Serve HTTP: health probes, metrics, inference."
    ),
    click.option(
        "--http-port",
        type=click.IntRange(0, 65535),
        show_default="7712; with --port 0 a free port",
        envvar="SHORTTAIL_HTTP_PORT",
        show_envvar=True,
        help="TCP port for HTTP; 0 takes a free port.",
    ),
    click.option(
        "--trust-network",
        is_flag=True,
        envvar="SHORTTAIL_TRUST_NETWORK",
        show_envvar=True,
        help="Answer HTTP without a token on any --host, to whoever can reach it: predictions, metadata and metrics."
        " MessagePack-RPC, which can write, still needs a token, or serves 127.0.0.1.",
    ),
    click.option(
        "--log",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Format of the lines on stderr.",
    ),
    click.option("--log-failed", is_flag=True, help="Log each request that fails."),
    click.option(
        "--slow-ms",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="Log each request that takes longer than this many ms; 0 logs none.",
    ),
]
NAMES: Final = [
    "token_file",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "uds_mode",
    "max_connections",
    "max_peer_connections",
    "idle_deadline_s",
    "frame_deadline_s",
    "write_deadline_s",
    "hang_deadline_s",
    "start_timeout_s",
    "p99_budget_ms",
    "commands",
    "bulk",
    "pin_cpus",
    "busy_poll_us",
    "rpc_errors",
    "http",
    "http_port",
    "trust_network",
    "log",
    "log_failed",
    "slow_ms",
]


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which gets their values as a single argument `settings`."""

    @functools.wraps(command)
    def with_settings(**values: Any) -> Any:
        from shorttail.server.settings import ServerSettings

        chosen = {name: values.pop(name) for name in NAMES}
        return command(settings=ServerSettings(**chosen), **values)

    decorated: Callable[..., Any] = with_settings
    for option in reversed(OPTIONS):
        decorated = option(decorated)
    return decorated
