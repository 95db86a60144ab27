"""The HTTP server of a worker: connections, requests, errors as responses. aiohttp implements the protocol."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from shorttail._native.metrics import METHODS, STAGES, UNKNOWN, Recorder
from shorttail.config import LIMITS
from shorttail.errors import (
    DeadlineExceeded,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    ShorttailError,
    Unauthenticated,
)
from shorttail.observe.logs import RequestLog, trace_ids
from shorttail.server.errorlog import one_line
from shorttail.server.http.batches import HTTP, PREDICT, HttpBatches
from shorttail.server.http.json import json_response

if TYPE_CHECKING:
    from shorttail.engine import Engine
    from shorttail.observe.memory import MetricsMemory

Parsed = TypeVar("Parsed")

OTHER: Final = METHODS.index("other")
ENCODE: Final = STAGES.index("encode")
TOTAL: Final = STAGES.index("total")
BACKLOG: Final = 1024
STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


@dataclass(slots=True)
class HttpCall:
    """One request, as metrics and the log see it.

    start_ns, deadline_ns: of time.perf_counter_ns; a deadline of 0 is none. method: index into metrics.METHODS. model:
    its name, once it is known that the model exists. id: the request id that the caller gave. rows: rows answered.
    sender: the hash of the token (None without tokens) and the address, as server/senders.py knows the caller.
    """

    start_ns: int
    sender: tuple[int | None, str | None] = (None, None)
    deadline_ns: int = 0
    method: int = OTHER
    model: str = ""
    id: str = ""
    rows: int = 0

    def predicts(self, model: str = "") -> None:
        """Note that the request is a prediction, and its model once it is known that the model exists."""
        self.method, self.model = PREDICT, model

    def note_id(self, identifier: str) -> None:
        """Note the request id that the caller gave, for the log."""
        self.id = identifier

    def note_rows(self, rows: int) -> None:
        """Note how many rows were answered, for the log."""
        self.rows = rows

    def within(self, timeout_us: int) -> None:
        """Set a deadline, in microseconds after the start. Of several deadlines the earliest holds; 0 sets none."""
        if timeout_us:
            deadline_ns = self.start_ns + timeout_us * 1000
            self.deadline_ns = min(self.deadline_ns or deadline_ns, deadline_ns)


Handler = Callable[[web.Request, HttpCall], Awaitable[web.Response]]
Access = Callable[[str], int]  # token -> access level; 0: none


class HttpConnection(web.RequestHandler):  # type: ignore[misc,unused-ignore]
    """A connection of aiohttp that is counted and limited.

    aiohttp itself waits without limit for the first request, and takes any number of connections.
    """

    __slots__ = ("_first_request_timer", "_has_asked", "_owner")

    def __init__(self, owner: HttpServer, manager: web.Server, loop: asyncio.AbstractEventLoop):
        super().__init__(manager, loop=loop, access_log=None, keepalive_timeout=LIMITS.http_idle_s)  # type: ignore[arg-type,unused-ignore]
        self._owner = owner
        self._first_request_timer: asyncio.TimerHandle | None = None
        self._has_asked = False  # a request has arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._owner.connections.add(self)
        self._owner.connections_total += 1
        if len(self._owner.connections) > LIMITS.http_connections:
            self._cut()
        else:
            self._first_request_timer = asyncio.get_running_loop().call_later(LIMITS.http_header_s, self._cut_if_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._owner.connections.discard(self)
        if self._first_request_timer is not None:
            self._first_request_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._owner.received_bytes += len(data)
        super().data_received(data)

    def log_exception(self, *args: Any, exc_info: Any = None, **more: Any) -> None:
        """Log an error outside of the handlers in one line: a request that is not HTTP, or a fault of ours.

        aiohttp itself would write a traceback for each line of garbage that a stranger sends.
        """
        if isinstance(exc_info, HttpProcessingError):
            self._owner.note_garbage(" ".join(exc_info.message.split()))
        elif isinstance(exc_info, Exception):
            self._owner.fault(exc_info)

    def first_request_arrived(self) -> None:
        """End the wait for the first request, because it has arrived."""
        self._has_asked = True

    def _cut_if_silent(self) -> None:
        if not self._has_asked:
            self._cut()

    def _cut(self) -> None:
        transport = self.transport
        if transport is not None:
            transport.abort()  # type: ignore[attr-defined,unused-ignore]


class HttpServer:
    """The HTTP server of one worker. Call `start`, `drain` when new requests should go elsewhere, and `stop`.

    batches: where predictions wait. memory: the counters that /metrics shows. recorder: counts the requests. log: takes
    lines about failed and slow requests. fault: called with every exception that is not a ShorttailError. add_routes:
    adds the routes (server/http/routes.py). access: returns the access level of a bearer token; None: requests need no
    token.
    """

    def __init__(
        self,
        engine: Engine,
        batches: HttpBatches,
        memory: MetricsMemory,
        recorder: Recorder,
        log: RequestLog,
        fault: Callable[[Exception], None],
        add_routes: Callable[[web.Application, HttpServer], None],
        access: Access | None = None,
    ):
        self.engine = engine
        self.memory = memory
        self.recorder = recorder
        self.log = log
        self.fault = fault
        self.access = access
        self._add_routes = add_routes
        self.batches = batches
        self.connections: set[HttpConnection] = set()
        self.connections_total = self.received_bytes = self.sent_bytes = 0
        self.in_flight = self.body_bytes = 0
        self.draining = False
        self._servers: list[asyncio.AbstractServer] = []
        self._runner: web.AppRunner | None = None

    async def start(self, listeners: list[socket.socket], tls: ssl.SSLContext | None = None) -> None:
        """Listen on bound sockets."""
        app = web.Application(client_max_size=LIMITS.frame_bytes)
        self._add_routes(app, self)
        self._runner = runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        manager = runner.server
        assert manager is not None
        loop = asyncio.get_running_loop()
        for listener in listeners:
            server = await loop.create_server(
                lambda: HttpConnection(self, manager, loop), sock=listener, backlog=BACKLOG, ssl=tls
            )
            self._servers.append(server)

    def drain(self) -> None:
        """Report "not ready" from now on, so that load balancers send no more. Requests are still answered."""
        self.draining = True

    async def stop(self, grace_s: float) -> None:
        """Take no new connections, answer the requests in flight for up to grace_s seconds, and close."""
        self.draining = True
        for server in self._servers:
            server.close()
        cut_at = asyncio.get_running_loop().time() + grace_s
        while self.in_flight and asyncio.get_running_loop().time() < cut_at:
            await asyncio.sleep(0.01)
        if self._runner is not None:
            await self._runner.cleanup()

    # -- a request ---------------------------------------------------------------------------------------------

    def endpoint(self, handler: Handler, *, open_to_all: bool = False) -> Callable[[web.Request], Any]:
        """Wrap `handler` for aiohttp: check the token, turn errors into responses, count and log the request.

        open_to_all: for probes, which need no token and are not counted.
        """

        async def answer(request: web.Request) -> web.Response:
            token = hash(request.headers.get("Authorization")) if self.access is not None else None
            call = HttpCall(time.perf_counter_ns(), (token, request.remote))
            request.protocol.first_request_arrived()  # type: ignore[attr-defined]
            self.in_flight += 1
            try:
                if not open_to_all:
                    self._authorize(request)
                    call.within(_deadline_us(request))
                response, code, message = await handler(request, call), "OK", ""
            except Exception as error:
                response, code, message = self._failure(error)
            finally:
                self.in_flight -= 1
            if self.draining:
                response.force_close()  # so that the client connects to a server that is ready
            self.sent_bytes += response.content_length or 0
            if not open_to_all:
                self._count(request, call, code, message)
            return response

        return answer

    def _failure(self, error: Exception) -> tuple[web.Response, str, str]:
        """Return (response, code, message) for an exception of a handler."""
        status = 0
        if isinstance(error, web.HTTPRequestEntityTooLarge):
            status = 413
            error = ResourceExhausted(f"a body of more than {LIMITS.frame_bytes} bytes; send it in parts")
        elif isinstance(error, web.HTTPException):
            return _error(error.status, error.reason), "INVALID_ARGUMENT", error.reason
        if isinstance(error, ShorttailError):
            return _error(status or STATUS.get(error.code, 500), error.message), error.code, error.message
        self.fault(error)
        return _error(500, one_line(error)), "INTERNAL", one_line(error)

    def _authorize(self, request: web.Request) -> None:
        """Raise Unauthenticated without a bearer token, and PermissionDenied for an unknown one."""
        if self.access is None:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("send a token: Authorization: Bearer TOKEN")
        if not self.access(token.strip()):
            raise PermissionDenied("this token is not known here")

    def _count(self, request: web.Request, call: HttpCall, code: str, message: str) -> None:
        """Count a request that was answered, and log it if it failed or was slow."""
        model = call.model if call.model or call.method == OTHER else UNKNOWN
        slot = self.recorder.slot(call.method, model)
        self.recorder.requests(slot, HTTP, code)
        taken_ns = time.perf_counter_ns() - call.start_ns
        if call.method == PREDICT and code == "OK":
            self.recorder.stage(slot, TOTAL, taken_ns)
        slow = self.log.slow_ns and taken_ns > self.log.slow_ns
        if not (slow if code == "OK" else self.log.failed):
            return
        self.log.note(
            "error" if code == "INTERNAL" else "warning",
            "request failed" if code != "OK" else "slow request",
            protocol="http",
            route=request.path[:200],
            model=call.model,
            code=code,
            error=message[:500],
            duration_ms=round(taken_ns / 1e6, 3),
            rows=call.rows or None,
            request_id=(call.id or request.headers.get("X-Request-Id", ""))[:128],
            **trace_ids(request.headers.get("traceparent")),
        )

    def note_garbage(self, error: str) -> None:
        """Log a request that is not HTTP."""
        if self.log.failed:
            code = InvalidArgument.code
            self.log.note("warning", "request failed", protocol="http", code=code, error=error[:500])

    async def body(self, request: web.Request) -> bytes:
        """Read the body of a request.

        Raises ResourceExhausted if the bodies that are being read exceed LIMITS.http_body_bytes, DeadlineExceeded after
        LIMITS.http_read_s, and InvalidArgument if the connection ends.
        """
        length = request.content_length
        # The size of a body without a length, or of a compressed body, is not known: reserve the largest size.
        known = length is not None and "Content-Encoding" not in request.headers
        reserved = min(length, LIMITS.frame_bytes) if known and length is not None else LIMITS.frame_bytes
        if self.body_bytes + reserved > LIMITS.http_body_bytes:
            raise ResourceExhausted("too many bytes of HTTP requests are in flight; send it again later")
        self.body_bytes += reserved
        try:
            async with asyncio.timeout(LIMITS.http_read_s):
                return await request.read()
        except TimeoutError:
            raise DeadlineExceeded(f"the body did not arrive within {LIMITS.http_read_s:g} s") from None
        except ConnectionError:
            raise InvalidArgument("the connection ended within the body") from None
        finally:
            self.body_bytes -= reserved

    async def parse(self, function: Callable[..., Parsed], body: bytes, *args: Any) -> Parsed:
        """Return function(body, *args): a function of plain values, whose last argument finds a model."""
        return function(body, *args)

    def encoded(self, call: HttpCall, start_ns: int) -> None:
        """Count the time from start_ns until now as the time to encode a response."""
        self.recorder.stage(self.recorder.slot(PREDICT, call.model), ENCODE, time.perf_counter_ns() - start_ns)

    @property
    def not_ready(self) -> str:
        """The reason why this server is not ready for requests, or "" if it is ready."""
        if self.draining:
            return "stopping"
        return "" if self.engine.store.is_open else "the store is closed"


def _error(status: int, message: str) -> web.Response:
    """Make an error response, with the headers that HTTP asks for with some statuses."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}.get(status)
    return json_response({"error": message}, status=status, headers=headers)


def _deadline_us(request: web.Request) -> int:
    """Return the header X-Deadline-Ms in microseconds, or 0 without it. Raises InvalidArgument."""
    text = request.headers.get("X-Deadline-Ms")
    if text is None:
        return 0
    try:
        deadline_ms = float(text)
    except ValueError:
        deadline_ms = math.nan
    if not 0 < deadline_ms <= 86_400_000:
        raise InvalidArgument(f"X-Deadline-Ms {text!r:.40} is not a number of milliseconds above 0")
    return max(1, int(deadline_ms * 1000))
