"""Options of `shorttail serve` about security, limits and CPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import click

from shorttail.config import LIMITS


class Mode(click.types.StringParamType):
    """The mode of a file, in octal."""

    name = "octal"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            mode = value if isinstance(value, int) else int(value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            self.fail(f"{value!r} is no file mode; write it as in chmod, such as 660", param, ctx)
        return mode


# Named as the fields of server.settings.Settings.
OPTIONS: Final = [
    click.option("--token-file", metavar="FILE", help="Ask for a token: lines `serve TOKEN` and `admin TOKEN`."),
    click.option("--tls-cert", metavar="PEM", help="Serve TCP over TLS with this certificate (and its chain)."),
    click.option("--tls-key", metavar="PEM", help="The certificate's private key, if it is in another file."),
    click.option("--tls-client-ca", metavar="PEM", help="Take only clients that show a certificate of this CA."),
    click.option("--uds-mode", type=Mode(), default="600", show_default=True, help="File mode of the Unix socket."),
    click.option(
        "--max-connections", type=click.IntRange(1), default=LIMITS.connections, show_default=True, help="Of a worker."
    ),
    click.option(
        "--max-peer-connections",
        type=click.IntRange(1),
        default=LIMITS.connections,
        show_default=True,
        help="Of a worker, from one address.",
    ),
    click.option(
        "--idle-deadline-s",
        type=click.IntRange(1),
        default=LIMITS.idle_deadline_s,
        show_default=True,
        help="Close a connection that was silent for so long.",
    ),
    click.option(
        "--frame-deadline-s",
        type=click.IntRange(1),
        default=LIMITS.frame_deadline_s,
        show_default=True,
        help="Cut one whose message is not whole after so long.",
    ),
    click.option(
        "--write-deadline-s",
        type=click.IntRange(1),
        default=LIMITS.write_deadline_s,
        show_default=True,
        help="Cut one that has not read its answers for so long.",
    ),
    click.option(
        "--hang-deadline-s",
        type=click.IntRange(1),
        default=LIMITS.hang_deadline_s,
        show_default=True,
        help="Kill and replace a worker that stood still for so long.",
    ),
    click.option(
        "--p99-budget-ms",
        type=click.FloatRange(0.1),
        default=LIMITS.p99_budget_ms,
        show_default=True,
        help="What an accepted request may take when there are too many.",
    ),
    click.option("--pin-cpus", is_flag=True, help="Give each worker a CPU of its own to run on."),
    click.option(
        "--busy-poll-us",
        type=click.IntRange(0),
        help="Look for requests for so long before sleeping; takes a CPU a worker. 0: sleep at once."
        "  [default: 100 while most requests come within that]",
    ),
    click.option("--http/--no-http", default=True, help="Serve HTTP: probes, metrics, inference.  [default: http]"),
    click.option(
        "--http-port",
        type=click.IntRange(0, 65535),
        help="TCP port of HTTP; 0 takes a free one.  [default: 7712; 0 with --port 0]",
    ),
    click.option(
        "--log",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Form of all lines on stderr.",
    ),
    click.option("--log-failed", is_flag=True, help="Log requests that fail."),
    click.option(
        "--slow-ms",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="Log requests that take longer; 0 logs none.",
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
    "p99_budget_ms",
    "pin_cpus",
    "busy_poll_us",
    "http",
    "http_port",
    "log",
    "log_failed",
    "slow_ms",
]


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options, and gives the command their values as `settings`."""

    @functools.wraps(command)
    def with_settings(**values: Any) -> Any:
        from shorttail.server.settings import ServerSettings

        chosen = {name: values.pop(name) for name in NAMES}
        return command(settings=ServerSettings(**chosen), **values)

    decorated: Callable[..., Any] = with_settings
    for option in reversed(OPTIONS):
        decorated = option(decorated)
    return decorated
