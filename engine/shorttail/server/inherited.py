"""The resources that the supervisor makes once and every worker inherits: shared counters, and the HTTP socket."""

from __future__ import annotations

import importlib.util
import os
import socket
from types import TracebackType
from typing import Final

from shorttail.config import DEFAULT_HTTP_PORT
from shorttail.errors import InvalidArgument, ShorttailError
from shorttail.observe import logs
from shorttail.observe.memory import SUPERVISOR, WORD, MetricsMemory
from shorttail.server.listen import bind_http
from shorttail.server.settings import ServerSettings

PACKAGES: Final = ("aiohttp", "orjson", "prometheus_client")  # of the extra `http`
# Environment variables by which Vertex AI and SageMaker name the HTTP port.
PORT_VARIABLES: Final = ("AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT")


class Inherited:
    """The memory for counters, and the bound HTTP socket. A context manager: leaving it closes the socket.

    port: the port of MessagePack-RPC. bind: False only checks the address. Raises InvalidArgument, or Unavailable if
    the port is taken.
    """

    def __init__(self, settings: ServerSettings, host: str, port: int, workers: int, *, bind: bool = True):
        self.listener: socket.socket | None = None
        self._name = ""
        self._trusts = settings.trust_network
        http_port = wanted_port(settings, port)
        if http_port is not None:
            try:
                self.listener, self._name = bind_http(host, http_port, settings, bind=bind)
            except ShorttailError as error:
                raise type(error)(error.message.replace("--port", "--http-port")) from None
        self.memory = MetricsMemory.create(workers)
        self._recorder = self.memory.claim(SUPERVISOR)

    def __str__(self) -> str:
        text = f" · http on {self._name}" if self._name else ""
        return f"{text}, which asks for no token (--trust-network)" if text and self._trusts else text

    def count(self, word: str, n: int = 1) -> None:
        """Add to a counter of the supervisor, a word of observe.memory.HEADER."""
        self._recorder.add(WORD[word], n)

    def show(self, word: str, value: int) -> None:
        """Set a gauge of the supervisor, a word of observe.memory.HEADER."""
        self._recorder.put(WORD[word], value)

    def close(self) -> None:
        """Close the supervisor's copy of the socket; workers close theirs."""
        if self.listener is not None:
            self.listener.close()

    def __enter__(self) -> Inherited:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def wanted_port(settings: ServerSettings, port: int) -> int | None:
    """The port for HTTP: the option's, else the platform's, else 7712 (a free port if `port` is 0). None: no HTTP.

    Raises InvalidArgument if HTTP was asked for and its packages are not installed.
    """
    if not settings.http:
        if settings.trust_network:
            raise InvalidArgument("--trust-network opens HTTP, and --no-http turns it off: leave one of them out")
        return None
    asked = settings.http_port
    for name in PORT_VARIABLES:
        if asked is None and os.environ.get(name):
            text = os.environ[name]
            if not (text.isascii() and text.isdigit()):
                raise InvalidArgument(f"the environment's {name} is {text!r:.40}, which is not a port")
            asked = int(text)
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        lacks = f"HTTP needs {', '.join(missing)}: pip install 'shorttail[http]'"
        if asked is not None:
            raise InvalidArgument(f"{lacks}; or serve without it: --no-http")
        logs.log_now(settings.log, "info", f"note: no probes, no metrics: {lacks}; --no-http leaves this line out")
        return None
    if asked is not None:
        return asked
    return DEFAULT_HTTP_PORT if port else 0
