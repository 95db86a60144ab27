"""The server's side of MessagePack-RPC: turns received bytes into batches of requests, and results into replies.

A `Connection` is one peer. It reads each request into the open `Batch` of the request's `WireRoute` (a model, or a list
of features); the values go straight into the batch's `Columns`. Once per turn of the event loop, server/batcher.py runs
the batches and calls `Batch.reply`, which writes each request's rows into the output buffer of its connection. The
`Router` holds what the connections of a worker share.

Everything runs in the thread of the event loop, with the GIL held. The files:

    wire_batch.pxi        routes and batches, and the replies to a batch
    wire_decode.pxi       request columns, from MessagePack into Columns
    wire_encode.pxi       result arrays, from NumPy into MessagePack
    wire_connection.pxi   one connection: messages in, replies out
    wire_methods.pxi      the methods that a message can call
    wire_options.pxi      the options of a request
    wire_limits.pxi       access, timeouts of connections, and admission of requests
    wire_newest.pxi       newest-first admission under overload
    wire_bulk.pxi         large requests, which another process answers
    wire_counts.pxi       counts of errors, for metrics and logs
    wire_codec.pxi        the codec without a connection, for tests
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport PyObject, Py_DECREF, Py_INCREF
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.math cimport NAN
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memmove, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import msgpack
import numpy as np
cimport numpy as cnp

from shorttail._native.columns cimport (
    AT_LOOKUP, KIND_F64, KIND_I64, KIND_STR, KIND_VEC, TYPE_BOOL, TYPE_INT32, TYPE_TIME, Columns, column_t,
)
from shorttail._native.route cimport Route
from shorttail._native.wire_c cimport *
from shorttail._native.columns import empty_column, too_many_rows, unknown_column
from shorttail.config import LIMITS
from shorttail.define.event_times import as_of_us
from shorttail.errors import (
    DeadlineExceeded, Internal, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, ShorttailError,
    Unauthenticated,
)
from shorttail.protocol import unpack_ext

cnp.import_array()

cdef Py_ssize_t STRING_BYTES = LIMITS.string_bytes
cdef Py_ssize_t REQUEST_ROWS = LIMITS.rows_per_request
cdef Py_ssize_t BATCH_ROWS = LIMITS.batch_rows
cdef size_t REPLY_BYTES = LIMITS.reply_bytes
cdef Py_ssize_t FEATURE_LIST_BYTES = LIMITS.feature_list_bytes
cdef Py_ssize_t PUSHES_PER_CONNECTION = LIMITS.pushes_per_connection
cdef Py_ssize_t SPARE_BUFFER_BYTES = 1 << 20  # a buffer that grew above this is freed instead of reused

cdef double DROP_REST_S = 0.0005

cdef mp_limits MESSAGE
MESSAGE.frame_bytes = LIMITS.frame_bytes
MESSAGE.nesting_depth = LIMITS.nesting_depth
MESSAGE.declared_elements = LIMITS.declared_elements
assert LIMITS.nesting_depth <= MP_MAX_DEPTH

include "wire_decode.pxi"
include "wire_encode.pxi"


cdef int64_t _now_ns() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


include "wire_batch.pxi"


_LIMITS = frozenset((
    "access", "auth", "max_connections", "max_peer_connections", "idle_deadline_s", "frame_deadline_s",
    "write_deadline_s", "auth_deadline_s", "target_ns", "burst_ns", "error_form",
))


cdef class Router:
    """Router(loop, engine, handlers): what the connections of one worker share: plans, open batches, limits, counters.

    loop: an object with call_soon and call_later of asyncio. engine: has plan_for_model(name, version | None) and
    plan_for_features(references). handlers: method name -> function that takes the list of params and returns the
    result, for methods that are not batched. `connect` sets the function that runs the batches.
    """

    def __init__(self, loop, engine, handlers):
        self.loop = loop
        self.engine = engine
        self.handlers = dict(handlers)
        self.connections = set()
        self.models = {}
        self.features = {}
        self.pending = []
        self.to_write = []
        self.run = self.flush
        self.fault = None
        self.forward = None
        self.bulk = None
        self.access = ACCESS_ADMIN
        self.auth = None
        self.suspects = {}
        self.peers = {}
        self.errors = {}
        self.traced = []
        self.sweeping = []
        self.idle_deadline_s = self.frame_deadline_s = self.write_deadline_s = self.auth_deadline_s = 1 << 40
        self.target_ns = self.burst_ns = 1e18   # no limit
        self.ended_ns = _now_ns()
        self.overloaded_ns = self.ended_ns - NEWEST_FIRST_NS

    def __dealloc__(self):
        free(self.deferred)

    def connect(self, run=None, fault=None, forward=None, bulk=None):
        """Set the functions that do the work. An argument that is None leaves the function that was set before.

        run: called once in each loop turn that has work. It takes the batches (`take`), answers them and calls `flush`.
        fault: called with every exception that is not a ShorttailError. forward: forwards a push, delete or command,
        not decoded, to the writer. It is called with connection (None for a notification, which has no reply), msgid,
        method, params as bytes, deadline_ns and, if the request has one, traceparent as bytes. It raises a
        ShorttailError, or calls the connection's `relay` with the outcome later. bulk: forwards a request that is too
        large for the event loop. It is called with connection (None for a notification), msgid, the whole message as a
        bytes-like object, and deadline_ns. It raises a ShorttailError, or calls `relay_reply` or `relay` later.
        """
        self.run = self.run if run is None else run
        self.fault = self.fault if fault is None else fault
        self.forward = self.forward if forward is None else forward
        self.bulk = self.bulk if bulk is None else bulk

    def limit(self, **limits):
        """Set limits and other settings by name: access, auth, max_connections, idle_deadline_s and so on (_LIMITS).

        Raises AttributeError for a name that is not a limit.
        """
        for name, value in limits.items():
            if name not in _LIMITS:
                raise AttributeError(f"a router has no limit {name!r}")
            setattr(self, name, value)

    cpdef int wake(self) except -1:
        """Schedule `run` for this turn of the event loop, if it is not scheduled yet."""
        if not self.run_scheduled:
            self.run_scheduled = True
            if not self.reading:
                _begin_turn(self)
            self.loop.call_soon(self.run)
        return 0

    def take(self):
        """Take the batches that wait, in the order in which they were opened. No request is added to them afterwards.

        A batch of a busy route stays, and more requests are added to it until `resume`.
        """
        cdef Batch batch
        _admit_deferred(self)
        taken, waiting = [], self.pending
        self.pending = []
        for batch in waiting:
            if batch.route.busy:
                self.pending.append(batch)
                continue
            if batch.route.open is batch:
                batch.route.open = None
            taken.append(batch)
        return taken

    def admit(self, WireRoute route not None, int64_t deadline_ns=0):
        """Admit a request that came by another protocol than MessagePack-RPC, or raise.

        deadline_ns: of CLOCK_MONOTONIC; 0: no deadline. Raises ResourceExhausted under overload, and DeadlineExceeded
        if the deadline has passed.
        """
        cdef options_t options
        cdef int why
        _ensure_turn_begun(self)
        _default_options(&options, 0, self)
        options.deadline_ns = deadline_ns
        why = _admit(self, route, &options)
        if why == OVERLOADED:
            self.shed += 1
            raise ResourceExhausted(OVERLOADED_MESSAGE)
        if why == EXPIRED:
            raise DeadlineExceeded(EXPIRED_MESSAGE)

    def resume(self, WireRoute route not None):
        """End the busy state of a route, and schedule `run` for the batch that waited for it."""
        route.busy = False
        self.wake()

    def flush(self):
        """Write the replies, with one write per connection, and end the turn."""
        cdef Connection connection
        to_write = self.to_write
        self.to_write = []
        self.run_scheduled = False
        for connection in to_write:
            connection.write_out()
        _end_turn(self)

    def sweep(self, int64_t now_s):
        """Close connections that are past a timeout. Call it about ten times per second.

        Each call checks up to SWEEP_CONNECTIONS connections; each connection is checked once per second. now_s: whole
        seconds of a monotonic clock, above 0.
        """
        cdef Py_ssize_t n
        if not self.sweeping and now_s != self.swept_s:
            self.sweeping = list(self.connections)
            self.swept_s = now_s
        for n in range(min(SWEEP_CONNECTIONS, len(self.sweeping))):
            _check_timeouts(self.sweeping.pop(), now_s, self)
        if not self.dropping:
            self.drop_on()

    def drop_on(self):
        """Give back a part of the memory of large messages, and what is left in later turns of the loop."""
        self.dropping = mapped_drop_on()
        if self.dropping:
            self.loop.call_later(DROP_REST_S, self.drop_on)

    def forget_plans(self):
        """Forget all routes, because the catalog changed. Batches that wait still run by the plans they were read for.

        A route keeps its model in memory, so every other reference to a route ends here: spare batches, empty open
        batches, and the last route of each connection, which may be idle for hours.
        """
        cdef WireRoute route
        cdef Connection connection
        for routes in (self.models, self.features):
            for route in routes.values():
                _count_shed(self, route)
                while route is not None:
                    route.stale = True
                    route.spare_batch = None
                    if route.open is not None and route.open.n_requests == 0:
                        route.open = None
                    route = route.suspects
            routes.clear()
        for connection in self.connections:
            connection.last_route = None

    def take_errors(self):
        """Return the errors since the last call: {(method, model, code): [requests, msgid, message]}.

        The msgid (-1: none) and the message are those of the last request.
        """
        cdef WireRoute route
        for routes in (self.models, self.features):
            for route in routes.values():
                _count_shed(self, route)
        errors = self.errors
        self.errors = {}
        return errors

    def take_traced(self):
        """Return the errors since the last call that had a traceparent, at most LIMITS.traced_failures.

        Each is (method, model, code, msgid, message, traceparent as bytes).
        """
        traced = self.traced
        self.traced = []
        return traced

    cdef WireRoute model_route(self, const uint8_t *name, Py_ssize_t size, int64_t version):
        """Return the route of a model, and make it at the first request. version: -1 for the current version."""
        cdef WireRoute route
        name_bytes = PyBytes_FromStringAndSize(<const char *>name, size)
        key = name_bytes if version < 0 else (name_bytes, version)
        route = self.models.get(key)
        if route is None:
            plan = self.engine.plan_for_model(name_bytes.decode("utf-8", "replace"), None if version < 0 else version)
            route = WireRoute(plan, name_bytes, version)
            if version < 0 and plan.split is not None:
                route.split = plan.split
                route.canary = self.model_route(name, size, plan.split.version)
            self.models[key] = route
        return route

    cdef bint has_features_route(self, const uint8_t *refs, Py_ssize_t size) except -1:
        """Whether a list of features has a route. refs: the encoded array."""
        return size <= FEATURE_LIST_BYTES and PyBytes_FromStringAndSize(<const char *>refs, size) in self.features

    cdef WireRoute features_route(self, const uint8_t *refs, Py_ssize_t size):
        """Return the route of a list of features, and make it at the first request. refs: the encoded array."""
        cdef WireRoute route
        if size > FEATURE_LIST_BYTES:
            raise InvalidArgument(f"a list of features of {size} bytes; at most {FEATURE_LIST_BYTES} are taken")
        key = PyBytes_FromStringAndSize(<const char *>refs, size)
        route = self.features.get(key)
        if route is None:
            names = _as_python(refs)
            if not all([isinstance(name, str) for name in names]):
                raise InvalidArgument("features must be an array of references, each a string 'view:feature'")
            route = WireRoute(self.engine.plan_for_features(tuple(names)), key, -1)
            if len(self.features) >= LIMITS.feature_plans_cached:
                self.features.clear()
            self.features[key] = route
        return route


include "wire_options.pxi"
include "wire_limits.pxi"
include "wire_newest.pxi"
include "wire_counts.pxi"
include "wire_bulk.pxi"
include "wire_methods.pxi"
include "wire_connection.pxi"
include "wire_codec.pxi"
