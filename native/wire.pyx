"""The wire: MessagePack-RPC in, batches of requests; results in, replies.

A `Connection` is one peer: bytes that arrive become requests in the open `Batch` of their `Route` (a model, or a list
of features), values going straight into the batch's `Columns`. server/batcher.py runs each batch once a loop turn and
calls `reply`, which writes every request's rows into its connection's output. The `Router` is what connections share.

Everything runs in the loop's thread with the GIL held. wire_decode.pxi reads columns, wire_encode.pxi writes arrays,
wire_connection.pxi is the protocol, wire_options.pxi its options, wire_guard.pxi its limits, wire_newest.pxi what it
admits in an overload; wire_codec.pxi is for tests.
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

from shorttail._native.columns cimport (
    KIND_F64, KIND_I64, KIND_STR, KIND_VEC, TYPE_BOOL, TYPE_INT32, TYPE_TIME, Columns, column_t,
)
from shorttail._native.route cimport Route
from shorttail._native.wire_c cimport *
from shorttail._native.columns import empty_column, too_many_rows, unknown_column
from shorttail.config import LIMITS
from shorttail.errors import (
    DeadlineExceeded, Internal, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, ShorttailError,
    Unauthenticated,
)
from shorttail.protocol import unpack_ext

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

include "wire_decode.pxi"
include "wire_encode.pxi"


cdef int64_t _now_ns() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef class WireRoute:
    def __init__(self, plan, bytes key, int64_t asked):
        Route.__init__(self, plan)
        self.key = key
        self.asked = asked
        self.features = plan.kind == "features"
        self.version = plan.version
        self.view_pieces = [msgpack.packb(name) for name in plan.view_names]
        self.defaults = bytes(plan.has_default)
        _shape_cost(self)
        self.spare_batch = Batch(self, plan.new_columns())
        self.names = ColumnNames(self.spare_batch.columns)

    cdef bint leads_from(self, bint features, const uint8_t *key, Py_ssize_t size, int64_t version) noexcept:
        if self.stale or self.features != features or PyBytes_GET_SIZE(self.key) != size:
            return False
        if memcmp(PyBytes_AS_STRING(self.key), key, size) != 0:
            return False
        return version == self.asked or (self.asked < 0 and version == self.version and self.canary is None)

    cdef int describe(self, list output_names) except -1:
        """Make the constant bytes of replies. Done at the first result: only that knows the outputs' names."""
        packer = msgpack.Packer()
        if self.features:
            opening = packer.pack("feature_names") + packer.pack(output_names)
            opening += packer.pack("values") + packer.pack_array_header(len(output_names))
            pieces = [b""] * len(output_names)
            closing = packer.pack("has_default") + packer.pack([bool(has) for has in self.defaults])
            closing += packer.pack("statuses") + packer.pack_array_header(len(output_names))
        else:
            opening = packer.pack("outputs") + packer.pack_map_header(len(output_names))
            pieces = [packer.pack(name) for name in output_names]
            closing = packer.pack("version")
        pieces.append(closing)
        pieces[0] = opening + pieces[0]
        self.pieces = pieces
        self.encoder = Encoder(output_names)
        return 0


cdef class Batch:
    def __cinit__(self, WireRoute route, Columns columns):
        self.route = route
        self.columns = columns

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.n_requests):
            if self.request[i].connection is not NULL:
                Py_DECREF(<object>self.request[i].connection)
        free(self.request)

    cdef int add(self, Connection connection, uint32_t msgid, const options_t *options, Py_ssize_t rows) except -1:
        """Enter a request whose rows are the last of `columns`."""
        cdef request_t *entry
        cdef void *grown
        if self.n_requests == self.capacity:
            grown = realloc(self.request, (2 * self.capacity + 16) * sizeof(request_t))
            if grown is NULL:
                raise MemoryError
            self.request = <request_t *>grown
            self.capacity = 2 * self.capacity + 16
        entry = &self.request[self.n_requests]
        entry.msgid = msgid
        entry.flags = options.flags
        entry.deadline_ns = options.deadline_ns
        entry.first = self.columns.n_rows - rows
        entry.rows = rows
        entry.connection = NULL
        if not options.flags & SILENT:
            entry.connection = <PyObject *>connection
            Py_INCREF(connection)
            connection.in_flight += 1
            connection.router.in_flight += 1
        if options.trace is not NULL:
            if self.traces is None:
                self.traces = {}
            self.traces[self.n_requests] = (msgid, _trace(options))
        self.n_requests += 1
        return 0

    cdef int forget(self, request_t *request) except -1:
        """A request has its answer, or nobody waits for one."""
        if request.connection is not NULL:
            (<Connection>request.connection).in_flight -= 1
            (<Connection>request.connection).router.in_flight -= 1
            Py_DECREF(<object>request.connection)
            request.connection = NULL
        request.flags = 0
        return 0

    cdef int recycle(self) except -1:
        """Empty, and back to the route for the next batch, unless some large request left it large."""
        cdef Columns columns = self.columns
        cdef column_t *col
        cdef int c
        _count_out(self)
        self.n_requests = 0
        self.traces = None
        if self.keep:
            return 0
        columns.reset()
        for c in range(columns.n_columns):
            col = &columns.col[c]
            if col.data_cap > KEPT_BYTES or col.row_cap * 8 * (col.width if col.kind == KIND_VEC else 1) > KEPT_BYTES:
                return 0
        if self.route.spare_batch is None and not self.route.stale:
            self.route.spare_batch = self
        return 0

    def wanted(self):
        """Answer what is past its deadline, forget what has no reader left. Returns how many requests remain."""
        cdef Py_ssize_t i, remain = 0
        cdef int64_t now_ns = _now_ns()
        cdef request_t *entry
        cdef Connection connection
        self.started_ns = now_ns
        for i in range(self.n_requests):
            entry = &self.request[i]
            if entry.connection is NULL:
                remain += (entry.flags & SILENT) != 0
                continue
            connection = <Connection>entry.connection
            if connection.state == GONE:
                self.forget(entry)
            elif entry.deadline_ns and entry.deadline_ns <= now_ns:
                connection.put_error(entry.msgid, "DEADLINE_EXCEEDED", "the deadline passed while the request waited")
                _count_unanswered(self, i, "DEADLINE_EXCEEDED", "the deadline passed while the request waited")
                self.forget(entry)
            else:
                remain += 1
        self.waiting = remain
        if remain == 0:
            self.recycle()
        return remain

    protocol = 0    # its place in metrics.PROTOCOLS
    inputs = None   # the columns are all that its requests bring

    @property
    def n_rows(self):
        return self.columns.n_rows

    def leave_loop(self):
        """It runs outside the loop, and its route's next batch waits for it. Called between `wanted` and `reply`."""
        self.route.busy = self.route.apart = True
        _leave_loop(self)

    def stay_in_loop(self):
        """It runs in the loop, and the route's next ones are admitted as such."""
        self.route.apart = False

    def keep_columns(self):
        """Somebody still reads its columns once it is answered: they are not used for another batch."""
        self.keep = True

    def count(self, Router router not None, Py_ssize_t rows, Py_ssize_t size):
        """Rows that came by another way than a connection of the router's: they wait, and `run` is called for them."""
        _count_in(router, self, rows, size)
        router.wake()

    def start(self):
        """As `wanted`, for rows that were counted."""
        self.started_ns = _now_ns()

    def end(self, bint ran):
        """What was counted waits no more. ran: and has cost what a batch costs."""
        if ran:
            _learn_cost(self)
        _count_out(self)

    def fail(self, str code, str message):
        """Answer every request that has no answer yet with this error."""
        cdef Py_ssize_t i
        cdef request_t *entry
        for i in range(self.n_requests):
            entry = &self.request[i]
            if entry.connection is not NULL:
                (<Connection>entry.connection).put_error(entry.msgid, code, message)
                _count_unanswered(self, i, code, message)
                self.forget(entry)
        self.recycle()

    def reply(self, result):
        """Answer every request with its rows of a pipeline.BatchResult. Raises Internal for arrays of a wrong shape.

        When it raises, requests that have no answer yet still wait for `fail`.
        """
        cdef Py_ssize_t i, n_statuses, n_rows = self.columns.n_rows
        cdef cnp.ndarray statuses
        cdef Encoder encoder = self.route.encoder
        cdef list outputs = result.outputs
        cdef request_t *entry
        cdef Connection connection
        cdef size_t mark
        cdef int64_t version = result.version
        if encoder is None or not encoder.load(outputs, n_rows):
            self.route.describe([name for name, _ in outputs])
            encoder = self.route.encoder
            encoder.load(outputs, n_rows)
        statuses = result.feature_statuses if self.route.features else result.view_statuses
        n_statuses = encoder.n if self.route.features else len(self.route.view_pieces)
        if (cnp.PyArray_NDIM(statuses) != 2 or cnp.PyArray_DIM(statuses, 0) != n_statuses
                or cnp.PyArray_DIM(statuses, 1) != n_rows or cnp.PyArray_TYPE(statuses) != cnp.NPY_UINT8
                or self.route.features and PyBytes_GET_SIZE(self.route.defaults) != n_statuses):
            raise Internal("statuses of another shape than the batch")
        if not cnp.PyArray_IS_C_CONTIGUOUS(statuses):
            statuses = np.ascontiguousarray(statuses)
        for i in range(self.n_requests):
            entry = &self.request[i]
            if entry.connection is NULL:
                continue
            connection = <Connection>entry.connection
            if connection.state != GONE:
                mark = connection.out.size
                try:
                    self.put_reply(&connection.out, entry, encoder,
                                   <const uint8_t *>cnp.PyArray_DATA(statuses), n_statuses, version)
                except BaseException:
                    connection.out.size = mark
                    raise
                connection.touch()
            self.forget(entry)
        _learn_cost(self)
        self.recycle()

    cdef int put_reply(self, mp_out *out, request_t *request, Encoder encoder, const uint8_t *statuses,
                       Py_ssize_t n_statuses, int64_t version) except -1:
        cdef WireRoute route = self.route
        cdef bint as_tensor = request.flags & AS_TENSORS
        cdef bint with_views = not route.features and request.flags & WANTS_STATUSES
        cdef Py_ssize_t stride = self.columns.n_rows
        cdef const uint8_t *missing
        cdef int k
        if n_statuses:
            statuses += request.first
        _need(out, 16)
        mp_put_byte(out, 0x94)
        mp_put_byte(out, 1)
        mp_put_int(out, request.msgid)
        mp_put_byte(out, 0xC0)
        mp_put_byte(out, 0x84 if route.features else 0x83 if with_views else 0x82)
        for k in range(encoder.n):
            _put_bytes(out, <bytes>route.pieces[k])
            missing = NULL
            if route.features and not PyBytes_AS_STRING(route.defaults)[k]:
                missing = statuses + k * stride
            encoder.put(out, k, request.first, request.rows, as_tensor, missing)
        _put_bytes(out, <bytes>route.pieces[encoder.n])
        if not route.features:
            _need(out, 32)
            mp_put_int(out, version)
            if with_views:
                _put_bytes(out, msgpack.packb("statuses") + msgpack.Packer().pack_map_header(n_statuses))
        if route.features or with_views:
            for k in range(n_statuses):
                if with_views:
                    _put_bytes(out, <bytes>route.view_pieces[k])
                _put_statuses(out, statuses + k * stride, request.rows, as_tensor)
        return 0


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
include "wire_guard.pxi"
include "wire_newest.pxi"
include "wire_counts.pxi"
include "wire_connection.pxi"
include "wire_codec.pxi"
