"""The wire: MessagePack-RPC in, batches of requests; results in, replies.

A `Connection` is one peer: bytes that arrive become requests in the open `Batch` of their `Route` (a model, or a list
of features), values going straight into the batch's `Columns`. server/batcher.py runs each batch once a loop turn and
calls `reply`, which writes every request's rows into its connection's output. The `Router` is what connections share.

Everything runs in the thread of the event loop, with the GIL held. The files:

    wire_batch.pxi        routes and batches, and the replies to a batch
    wire_decode.pxi       request columns, from MessagePack into Columns
    wire_encode.pxi       result arrays, from NumPy into MessagePack
    wire_connection.pxi   one connection: messages in, replies out
    wire_methods.pxi      the methods that a message can call
    wire_options.pxi      the options of a request
    wire_limits.pxi       access, timeouts of connections, and admission of requests
    wire_newest.pxi       newest-first admission under overload
    wire_counts.pxi       counts of errors, for metrics and logs
    wire_codec.pxi        the codec without a connection, for tests
"""

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

from shorttail._native.columns cimport KIND_F64, KIND_I64, KIND_STR, KIND_VEC, Columns, column_t
from shorttail._native.route cimport Route
from shorttail._native.wire_c cimport *
from shorttail._native.columns import (
    empty_column, finish_error, string_too_long, too_many_rows, unknown_column, wrong_type,
)
from shorttail.config import LIMITS
from shorttail.errors import (
    DeadlineExceeded, Internal, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, ShorttailError,
    Unauthenticated,
)

cnp.import_array()

cdef Py_ssize_t STRING_BYTES = LIMITS.string_bytes
cdef Py_ssize_t REQUEST_ROWS = LIMITS.rows_per_request
cdef Py_ssize_t BATCH_ROWS = LIMITS.batch_rows
cdef Py_ssize_t FEATURE_LIST_BYTES = LIMITS.feature_list_bytes
cdef Py_ssize_t PUSHES_PER_CONNECTION = LIMITS.pushes_per_connection
cdef Py_ssize_t KEPT_BYTES = 1 << 20  # a buffer that a large request made larger than this is not kept

cdef mp_limits MESSAGE
MESSAGE.frame_bytes = LIMITS.frame_bytes
MESSAGE.nesting_depth = LIMITS.nesting_depth
MESSAGE.declared_elements = LIMITS.declared_elements
assert LIMITS.nesting_depth <= MP_MAX_DEPTH

_ELEMENT_NAMES = {
    ELEMENT_BOOL: "bool", ELEMENT_I32: "int32", ELEMENT_I64: "int64", ELEMENT_F32: "float32", ELEMENT_F64: "float64",
    ELEMENT_U8: "uint8",
}

include "wire_decode.pxi"
include "wire_encode.pxi"


cdef int64_t _now_ns() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


include "wire_batch.pxi"


_LIMITS = frozenset((
    "access", "auth", "max_connections", "max_peer_connections", "idle_deadline_s", "frame_deadline_s",
    "write_deadline_s", "auth_deadline_s", "target_ns", "burst_ns",
))


cdef class Router:
    """Router(loop, engine, handlers): what the connections of one worker share.

    loop: for call_soon and call_later. engine: plan_for_model(name, version | None) and plan_for_features(refs).
    handlers: method -> function of the list of params, for the methods that are not batched. `connect` says who runs
    the batches.
    """

    def __init__(self, loop, engine, handlers):
        self.loop = loop
        self.engine = engine
        self.handlers = dict(handlers)
        self.connections = set()
        self.models = {}
        self.features = {}
        self.pending = []
        self.touched = []
        self.run = self.flush
        self.fault = None
        self.forward = None
        self.access = ACCESS_ADMIN
        self.auth = None
        self.peers = {}
        self.errors = {}
        self.traced = []
        self.sweeping = []
        self.idle_deadline_s = self.frame_deadline_s = self.write_deadline_s = self.auth_deadline_s = 1 << 40
        self.target_ns = self.burst_ns = 1e18   # any amount of work is welcome
        self.ended_ns = _now_ns()
        self.shed_ns = self.ended_ns - KEEPS_NS

    def __dealloc__(self):
        free(self.kept)

    def connect(self, run=None, fault=None, forward=None):
        """Say who does the work; None leaves what was said before.

        run: called once in a loop turn that brought work; it takes the batches (`take`), answers them, and calls
        `flush`. fault: told of every exception that nobody foresaw. forward: takes pushes and deletes with their
        columns unread. It is called with connection (None for a notification, of which nobody is told the outcome),
        msgid, method, params as bytes, deadline_ns and, if there is one, traceparent as bytes. It raises, or sees to
        it that the connection's `relay` is called with the outcome later.
        """
        self.run = self.run if run is None else run
        self.fault = self.fault if fault is None else fault
        self.forward = self.forward if forward is None else forward

    def limit(self, **limits):
        """Set limits by their names: access, auth, max_connections, idle_deadline_s, target_ns and so on.

        Raises AttributeError for a name that is no limit.
        """
        for name, value in limits.items():
            if name not in _LIMITS:
                raise AttributeError(f"a router has no limit {name!r}")
            setattr(self, name, value)

    cdef int wake(self) except -1:
        if not self.awake:
            self.awake = True
            if not self.reading:
                _begin_turn(self)
            self.loop.call_soon(self.run)
        return 0

    def take(self):
        """The batches that wait, in the order in which they were opened. They take no more requests.

        Those of a route that is busy stay, and take what comes until it no longer is.
        """
        cdef Batch batch
        _take_kept(self)
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
        """Whether there is time for a request that comes by another way than a connection of ours.

        Raises ResourceExhausted, DeadlineExceeded. deadline_ns: of CLOCK_MONOTONIC; 0: none.
        """
        cdef options_t options
        cdef int why
        _begin_unless_begun(self)
        _no_options(&options, 0, self)
        options.deadline_ns = deadline_ns
        why = _admit(self, route, &options)
        if why == TOO_MUCH:
            self.shed += 1
            raise ResourceExhausted(SHED_MESSAGE)
        if why == TOO_LATE:
            raise DeadlineExceeded(LATE_MESSAGE)

    def resume(self, WireRoute route not None):
        """A route is busy no more: `run` is called for what waited for it."""
        route.busy = False
        self.wake()

    def flush(self):
        """Write what connections owe their peers: one write each. Ends the turn."""
        cdef Connection connection
        touched = self.touched
        self.touched = []
        self.awake = False
        for connection in touched:
            connection.write_out()
        _end_turn(self)

    def sweep(self, int64_t now_s):
        """Cut connections that are past a deadline. Call it a few times a second; each is looked at once a second.

        now_s: seconds of any clock that only goes forward, above 0.
        """
        cdef Py_ssize_t n
        if not self.sweeping and now_s != self.swept_s:
            self.sweeping = list(self.connections)
            self.swept_s = now_s
        for n in range(min(SWEEP_CONNECTIONS, len(self.sweeping))):
            _look_at(self.sweeping.pop(), now_s, self)

    def forget_plans(self):
        """The catalog changed: find every plan anew. Batches that wait run by the plan they were parsed for.

        Nothing else may keep a route and with it a model: neither a connection that is silent nor a spare batch.
        """
        cdef WireRoute route
        cdef Connection connection
        for routes in (self.models, self.features):
            for route in routes.values():
                _count_shed(self, route)
                route.stale = True
                route.spare_batch = None
                if route.open is not None and route.open.n_requests == 0:
                    route.open = None
            routes.clear()
        for connection in self.connections:
            connection.last = None

    def take_errors(self):
        """{(method, model, code): [requests, last msgid or -1, last message]} since this was last asked."""
        cdef WireRoute route
        for routes in (self.models, self.features):
            for route in routes.values():
                _count_shed(self, route)
        errors = self.errors
        self.errors = {}
        return errors

    def take_traced(self):
        """Of these, up to LIMITS.traced_failures that had a traceparent: [(method, model, code, msgid, message, it)]."""
        traced = self.traced
        self.traced = []
        return traced

    cdef WireRoute model_route(self, const uint8_t *name, Py_ssize_t size, int64_t version):
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

    cdef WireRoute features_route(self, const uint8_t *refs, Py_ssize_t size):
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
include "wire_methods.pxi"
include "wire_connection.pxi"
include "wire_codec.pxi"
