from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from shorttail._native.columns cimport Columns
from shorttail._native.route cimport Route, Split
from shorttail._native.wire_c cimport array_part, mp_out, mp_scan, mp_value


cdef enum:
    WANTS_STATUSES = 1
    AS_TENSORS = 2
    SILENT = 4          # a notification: nobody reads the answer

cdef struct request_t:
    PyObject *connection    # owned; NULL once answered, and for notifications
    uint32_t msgid
    int flags
    int64_t deadline_ns     # CLOCK_MONOTONIC; 0 = none
    Py_ssize_t first        # its rows in the batch
    Py_ssize_t rows

cdef struct options_t:
    int flags
    int priority            # 0: shed first, 1, 2: shed last
    int64_t arrived_ns      # what deadlines count from
    int64_t deadline_ns
    int64_t version         # -1 = the current one
    const uint8_t *trace    # traceparent, in the message; NULL = none that could be valid
    uint32_t trace_bytes

cdef struct kept_t:         # a request that waits until all that came are read
    PyObject *connection    # owned, as is the next
    PyObject *data          # bytes that the message lies in
    const uint8_t *message
    const uint8_t *last_param
    Py_ssize_t size
    uint32_t nth            # of its connection in this turn


cdef class ColumnNames:
    cdef tuple names            # bytes, as they come on the wire
    cdef int n
    cdef bint matches(self, int c, const mp_value *name) noexcept
    cdef int find(self, int guess, const mp_value *name) noexcept


cdef class WireRoute(Route):
    """A route of the server: its open batch, what its batches cost, the constant bytes of its replies."""
    cdef readonly bint stale        # the catalog changed since: find the plan anew
    cdef bytes key                  # the bytes on the wire that lead here: a model name, or an array of references
    cdef bint features
    cdef int64_t asked              # the version asked for; -1 = the current one
    cdef int64_t version
    cdef WireRoute canary           # answers the requests that `split` takes; None: there is none
    cdef Split split
    cdef readonly bint busy         # its next batch waits until this is False again
    cdef Batch open                 # takes requests; None until one comes
    cdef Batch spare_batch          # kept for its memory
    cdef double shape_batch_ns, shape_row_ns    # what a batch and each of its rows should cost
    cdef double scale               # times which it has cost lately; 0: not known
    cdef readonly double batch_cost_ns, row_cost_ns     # the two, scaled
    cdef readonly double admitted_ns    # as the router's, of a route whose batches run outside the loop
    cdef public bint apart          # its batches run outside the loop
    cdef double running_ns          # of that, what is running
    cdef int64_t ended_ns           # when its last batch ended
    cdef readonly double cut_ns     # as the router's; of its queue outside the loop, if it has one
    cdef bint full                  # requests came to it beyond its budget, since the last of its batches ended
    cdef int64_t shed               # requests refused for want of time, not yet among the router's errors
    cdef bint measured              # a batch has run
    cdef ColumnNames names
    cdef Encoder encoder            # made at the first result, with what follows
    cdef list pieces                # bytes before each output, and after the last
    cdef list view_pieces           # encoded names of the views
    cdef bytes defaults             # 1 where a feature has a default
    cdef bint leads_from(self, bint features, const uint8_t *key, Py_ssize_t size, int64_t version) noexcept
    cdef int describe(self, list output_names) except -1


cdef class Batch:
    """Requests that will run together."""
    cdef readonly WireRoute route
    cdef readonly Columns columns
    cdef request_t *request
    cdef readonly Py_ssize_t n_requests
    cdef readonly Py_ssize_t waiting    # of them, those that `wanted` found an answer is owed to
    cdef Py_ssize_t capacity
    cdef readonly int64_t opened_ns     # when its first request was read, on CLOCK_MONOTONIC
    cdef readonly dict traces       # place of a request in the batch -> (msgid, traceparent); None: no request has one
    cdef bint keep                  # once answered it is not used again: somebody still reads its columns
    cdef Router router              # of what is counted below; None while that is nothing
    cdef bint apart                 # runs outside the loop, and so takes none of the turn's time
    cdef Py_ssize_t waiting_rows, waiting_bytes
    cdef double cost_ns             # what it was admitted at
    cdef readonly int64_t started_ns    # when `wanted` was asked
    cdef int add(self, Connection connection, uint32_t msgid, const options_t *options, Py_ssize_t rows) except -1
    cdef int forget(self, request_t *request) except -1
    cdef int recycle(self) except -1
    cdef int put_reply(self, mp_out *out, request_t *request, Encoder encoder, const uint8_t *statuses,
                       Py_ssize_t n_statuses, int64_t version) except -1


cdef class Encoder:
    """The arrays of one result, ready to be cut into replies."""
    cdef array_part *parts          # whole arrays; dims[0] and data are set for each request
    cdef int n
    cdef list names                 # of the outputs
    cdef list kept                  # copies made of arrays that cannot travel as they are
    cdef int load(self, list outputs, Py_ssize_t n_rows) except -1
    cdef int put(self, mp_out *out, int k, Py_ssize_t first, Py_ssize_t rows, bint as_tensor,
                 const uint8_t *missing) except -1


cdef class Router:
    """What the connections of one worker share."""
    cdef readonly object engine, loop
    cdef public object run          # called once in a loop turn that brought work
    cdef public object fault        # told of every exception that nobody foresaw
    cdef public object forward      # hands a push or delete to the writer; None: there is none
    cdef readonly dict handlers
    cdef readonly set connections
    cdef dict models                # name bytes, or (name bytes, version) -> Route
    cdef dict features              # bytes of the array of references -> Route
    cdef list pending               # batches with requests
    cdef list touched               # connections with replies to write
    cdef bint awake                 # `run` is scheduled
    cdef bint reading               # bytes have come: the turn has begun
    # Access: what a new connection may do, and who turns a token into more (server/security.py).
    cdef public int access
    cdef public object auth
    # Connections.
    cdef public Py_ssize_t max_connections, max_peer_connections    # 0: any number
    cdef public int64_t idle_deadline_s, frame_deadline_s, write_deadline_s, auth_deadline_s
    cdef readonly dict peers        # address -> connections, while a limit is set
    cdef readonly Py_ssize_t cut, refused   # connections past a deadline, and beyond a limit
    cdef readonly Py_ssize_t accepted, in_flight    # connections so far; requests that wait for their answer
    cdef readonly int64_t received_bytes, sent_bytes
    cdef dict errors                # (method, model, code) -> [requests, last msgid, last message]
    cdef list traced                # of those, with a traceparent: (method, model, code, msgid, message, traceparent)
    cdef list sweeping              # connections that the sweep under way has yet to look at
    cdef int64_t swept_s
    # Admission: wire_guard.pxi.
    cdef public double target_ns, burst_ns  # work of a turn: in an overload at the least, and at the most
    cdef readonly double cut_ns         # what is taken off burst_ns now
    cdef readonly double admitted_ns
    cdef readonly Py_ssize_t shed   # requests refused for it
    cdef readonly bint sheds        # the last turn refused some
    cdef Py_ssize_t shed_before
    cdef bint full                  # requests came beyond this turn's budget
    cdef readonly Py_ssize_t waiting_rows, waiting_bytes
    cdef readonly int64_t last_turn_ns
    cdef int64_t turn_ns, ended_ns, arrived_ns
    # Newest first: wire_newest.pxi.
    cdef readonly bint keeps        # this turn's requests, until all are read
    cdef int64_t shed_ns            # when a turn that refused some ended
    cdef kept_t *kept
    cdef Py_ssize_t n_kept, kept_capacity
    cdef readonly Py_ssize_t kept_bytes     # that they keep in memory
    cdef uint32_t first_kept
    cdef int wake(self) except -1
    cdef WireRoute model_route(self, const uint8_t *name, Py_ssize_t size, int64_t version)
    cdef WireRoute features_route(self, const uint8_t *refs, Py_ssize_t size)


cdef class Connection:
    """One peer. The protocol is in the methods below; asyncio's are in wire.pyx."""
    cdef Router router
    cdef object transport
    cdef mp_out out                 # replies that wait for the end of this turn
    cdef mp_out held                # the beginning of a message whose end has not arrived
    cdef mp_scan scan               # how far it has been checked
    cdef WireRoute last                 # where the last request went
    cdef WireRoute asked                # where the one that is being read goes; None: not known yet
    cdef readonly Py_ssize_t in_flight
    cdef Py_ssize_t forwarded       # of them, what the writer has
    cdef readonly bint paused       # the peer does not read its replies
    cdef bint touched
    cdef int state
    cdef bint parked                # reads no more: it is to move to another worker
    cdef bint secure                # over TLS, which has no half-closed connections
    cdef readonly int access
    cdef Py_ssize_t strange         # requests before it may do anything
    cdef bint heard, owes           # since the last sweep: bytes came; written and perhaps not sent
    cdef int64_t sent, mark         # bytes written so far; and when they were all owed at mark_s
    cdef int64_t heard_s, held_s, mark_s, made_s
    cdef object peer
    cdef Py_ssize_t scan_bytes      # of the message that is handled
    cdef const uint8_t *message_at  # where it begins
    cdef const uint8_t *last_param
    cdef bytes data                 # what it lies in; None: in `held`, where it cannot be kept
    cdef uint32_t n_kept            # requests that wait until all of this turn are read
    cdef bytes carried              # what its last worker had read of a message
    cdef int hold(self, const uint8_t *data, size_t size) except -1
    cdef int drop_buffer(self, mp_out *buffer) except -1
    cdef int count_peer(self) except -1
    cdef int check_access(self, const mp_value *method) except -1
    cdef int authenticate(self, const uint8_t *params, uint32_t msgid, int flags) except -1
    cdef int refuse_cheaply(self, WireRoute route, int why, uint32_t msgid, int flags) except -1
    cdef int drop_held(self, size_t size) except -1
    cdef size_t take(self, const uint8_t *data, size_t size) except? 0
    cdef int refuse(self, str code, str reason) except -1
    cdef int message(self, const uint8_t *p) except -1
    cdef int call(self, const mp_value *method, const uint8_t *params, uint32_t msgid, int flags) except -1
    cdef int predict(self, const uint8_t *p, uint32_t n, uint32_t msgid, int flags) except -1
    cdef int get_online_features(self, const uint8_t *p, uint32_t n, uint32_t msgid, int flags) except -1
    cdef int enqueue(self, WireRoute route, const uint8_t *columns, uint32_t msgid, const options_t *options) except -1
    cdef int hand_on(self, str method, const uint8_t *params, uint32_t msgid, int flags) except -1
    cdef int handle(self, str method, const uint8_t *params, uint32_t msgid, int flags) except -1
    cdef int touch(self) except -1
    cdef int put_error(self, int64_t msgid, str code, str message) except -1
    cdef int write_out(self) except -1
    cdef int maybe_end(self) except -1
