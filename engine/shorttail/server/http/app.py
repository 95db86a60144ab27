"""The HTTP server of a worker: connections, requests, errors as responses. aiohttp implements the protocol."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from shorttail._native.metrics import METHODS, STAGES, UNKNOWN, Recorder
from shorttail.config import LIMITS
from shorttail.errors import (
    InvalidArgument,
    PermissionDenied,
    ShorttailError,
    Unauthenticated,
    Unavailable,
)
from shorttail.observe.logs import RequestLog, Seldom, trace_ids
from shorttail.server.accepting import Entrance, Room, SpareFile
from shorttail.server.errorlog import one_line
from shorttail.server.http.batches import HTTP, PREDICT, HttpBatches
from shorttail.server.http.bodies import Bodies
from shorttail.server.http.bulk import BulkProxy
from shorttail.server.http.connection import Connections, HttpConnection
from shorttail.server.http.json import json_response
from shorttail.server.http.parsed import TooLarge

if TYPE_CHECKING:
    from shorttail.engine import Engine
    from shorttail.observe.memory import MetricsMemory

CLOSING: Final = 8  # connections that are closed for their number and have not ended yet
OTHER: Final = METHODS.index("other")
ENCODE: Final = STAGES.index("encode")
TOTAL: Final = STAGES.index("total")
DEADLINE_MAX_MS: Final = 86_400_000  # a day; no caller waits longer
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


class HttpServer:
    """The HTTP server of one worker. Call `start`, `drain` when new requests should go elsewhere, and `stop`.

    batches: where predictions wait. memory: the counters that /metrics shows. recorder: counts the requests. log: takes
    lines about failed and slow requests. fault: called with every exception that is not a ShorttailError. add_routes:
    adds the routes (server/http/routes.py). access: returns the access level of a bearer token; None: requests need no
    token. bulk: passes on large requests; None: this worker answers them itself. connections: how many there may be,
    with the reserve for probes.
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
        bulk: BulkProxy | None = None,
        connections: int = LIMITS.http_connections + LIMITS.http_reserve,
    ):
        self.engine = engine
        self.memory = memory
        self.recorder = recorder
        self.log = log
        self.fault = fault
        self.access = access
        self._add_routes = add_routes
        self.batches = batches
        self._refused = Seldom()
        self.connections = Connections(self.note_refused, connections)
        self.room = Room(self.connections.all, connections + CLOSING)
        self.bulk = bulk
        self.bodies = Bodies(on_loop=bulk is not None)
        self.received_bytes = self.sent_bytes = 0
        self.in_flight = 0
        self.draining = False
        self._runner: web.AppRunner | None = None

    async def start(
        self, listeners: list[socket.socket], tls: ssl.SSLContext | None, spare: SpareFile
    ) -> list[Entrance]:
        """Accept connections from sockets that listen. The caller closes the entrances before `stop`."""
        app = web.Application()
        self._add_routes(app, self)
        self._runner = runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        manager = runner.server
        assert manager is not None
        loop = asyncio.get_running_loop()
        return [
            Entrance(loop, listener, lambda: HttpConnection(self, manager, loop), tls, spare, self.room)
            for listener in listeners
        ]

    def drain(self) -> None:
        """Report "not ready" from now on, so that load balancers send no more. Requests are still answered."""
        self.draining = True

    async def stop(self, grace_s: float) -> None:
        """Answer the requests in flight for up to grace_s seconds, and close."""
        self.draining = True
        cut_at = asyncio.get_running_loop().time() + grace_s
        while self.in_flight and asyncio.get_running_loop().time() < cut_at:
            await asyncio.sleep(0.01)
        if self._runner is not None:
            await self._runner.cleanup()
        if self.bulk is not None:
            await self.bulk.close()

    # -- a request ---------------------------------------------------------------------------------------------

    def endpoint(
        self, handler: Handler, *, open_to_all: bool = False, in_reserve: bool = False
    ) -> Callable[[web.Request], Any]:
        """Wrap `handler` for aiohttp: check the token, turn errors into responses, count and log the request.

        open_to_all: for probes, which need no token and are not counted. in_reserve: also answered on a connection in
        the reserve, as probes are.
        """

        async def answer(request: web.Request) -> web.StreamResponse:
            token = hash(request.headers.get("Authorization")) if self.access is not None else None
            connection: Any = request.protocol
            call = HttpCall(time.perf_counter_ns(), (token, request.remote or connection))
            connection.begin_request()
            self.in_flight += 1
            is_counted = not open_to_all
            response: web.StreamResponse
            try:
                if connection.in_reserve and not (open_to_all or in_reserve):
                    raise Unavailable("too many HTTP connections are open; connect again later")
                if not open_to_all:
                    self._authorize(request)
                    call.within(_deadline_us(request))
                try:
                    response = await handler(request, call)
                except TooLarge:
                    response, is_counted = await self._in_bulk(request, call), False  # it is counted there
                code, message = "OK", ""
            except Exception as error:
                response, code, message = self._failure(error)
                is_counted = not open_to_all
            finally:
                self.in_flight -= 1
                connection.end_request()
            if self.draining or connection.in_reserve:
                response.force_close()  # so that the client connects to a server that is ready
            self.sent_bytes += response.content_length or 0
            if is_counted:
                self._count(request, call, code, message)
            return response

        return answer

    async def _in_bulk(self, request: web.Request, call: HttpCall) -> web.StreamResponse:
        assert self.bulk is not None  # else nothing is too large
        return await self.bulk.answer(request, call.deadline_ns)

    def _failure(self, error: Exception) -> tuple[web.Response, str, str]:
        """Return (response, code, message) for an exception of a handler."""
        if isinstance(error, web.HTTPException):
            return _error(error.status, error.reason), "INVALID_ARGUMENT", error.reason
        if isinstance(error, ShorttailError):
            status = getattr(error, "http_status", 0) or STATUS.get(error.code, 500)
            return _error(status, error.message), error.code, error.message
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

    def note_refused(self, text: str) -> None:
        """Log now and then that connections are refused."""
        if n := self._refused.count(1):
            self.log.note("warning", text, protocol="http", connections=n)

    def note_garbage(self, error: str) -> None:
        """Log a request that is not HTTP."""
        if self.log.failed:
            code = InvalidArgument.code
            self.log.note("warning", "request failed", protocol="http", code=code, error=error[:500])

    async def body(self, request: web.Request) -> bytes:
        """Read the body of a request. Raises the errors of Bodies.read."""
        return await self.bodies.read(request)

    @property
    def on_loop(self) -> bool:
        """Whether requests that would hold up the event loop raise TooLarge, because the bulk worker takes them."""
        return self.bodies.on_loop

    def encoded(self, call: HttpCall, start_ns: int) -> None:
        """Count the time from start_ns until now as the time to encode a response."""
        self.recorder.stage(self.recorder.slot(PREDICT, call.model), ENCODE, time.perf_counter_ns() - start_ns)

    @property
    def not_ready(self) -> str:
        """The reason why this server is not ready for requests, or "" if it is ready."""
        if self.draining:
            return "stopping"
        return self.engine.store.changed if self.engine.store.is_open else "the store is closed"


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
    if not deadline_ms > 0:
        raise InvalidArgument(f"X-Deadline-Ms {text!r:.40} is not a number of milliseconds above 0")
    return max(1, int(min(deadline_ms, DEADLINE_MAX_MS) * 1000))
