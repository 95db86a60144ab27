cimport numpy as cnp
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from shorttail._native.columns cimport Columns
from shorttail._native.route cimport Route, Split
from shorttail._native.wire_c cimport array_part, mp_out, mp_scan, mp_value


# Flags of a request.
cdef enum:
    WANTS_STATUSES = 1
    AS_TENSORS = 2
    SILENT = 4          # a notification: the peer expects no reply

cdef struct request_t:
    PyObject *connection    # a strong reference; NULL once answered, and for notifications
    uint32_t msgid
    int flags
    int64_t deadline_ns     # CLOCK_MONOTONIC; 0: no deadline
    Py_ssize_t first        # its first row in the batch
    Py_ssize_t rows

cdef struct options_t:
    int flags
    int priority            # 0: refused first, 1: the default, 2: refused last
    int64_t arrived_ns      # deadlines count from here
    int64_t deadline_ns     # CLOCK_MONOTONIC; 0: no deadline
    int64_t version         # of the model; -1: the current version
    int64_t as_of_us        # the moment at which event times are judged; -1: when the request runs
    const uint8_t *trace    # the traceparent, inside the message; NULL: none, or its length is not valid
    uint32_t trace_bytes

cdef struct deferred_t:     # a request that waits until all requests of the turn are read (wire_newest.pxi)
    PyObject *connection    # a strong reference
    PyObject *data          # a strong reference to the bytes that hold the message
    const uint8_t *message
    const uint8_t *last_param
    Py_ssize_t size         # bytes of the message
    uint32_t nth            # index among the deferred requests of its connection


cdef class ColumnNames:
    """The column names of a route, as UTF-8, to find the columns of a request."""
    cdef tuple names            # bytes, as they come on the wire
    cdef int n
    cdef Py_ssize_t uncommon_left   # values that Python may still convert for this request
    cdef bint matches(self, int c, const mp_value *name) noexcept
    cdef int find(self, int guess, const mp_value *name) noexcept


cdef class WireRoute(Route):
    """WireRoute(plan, key, asked_version): a Route of the server, for one model version or one list of features.

    Adds to a Route the open batch, the cost estimate that admission uses, and the constant bytes of replies.
    """
    cdef readonly bint stale        # the catalog changed: the next request must find its plan again
    cdef bytes key                  # how requests name the route: a model name, or an encoded array of references
    cdef bint features              # get_online_features, not predict
    cdef Py_ssize_t row_values, row_work    # of the Plan
    cdef int64_t asked_version      # the version in the request; -1: the current version
    cdef int64_t version
    cdef WireRoute canary           # answers the requests that `split` takes; None: no canary
    cdef Split split
    cdef WireRoute suspects         # batches the requests of Router.suspects; None until there is one
    cdef readonly bint for_suspects     # it is the `suspects` of another route
    cdef readonly object bad          # the BadShare of its requests (models/request_runs.py); None: no run has failed
    cdef readonly bint busy         # a batch runs in a thread; the next batch waits until it has run
    cdef Batch open                 # takes requests; None until a request comes
    cdef Batch spare_batch          # an empty batch, kept so that its memory is reused
    cdef public bint threaded       # its batches run in a thread, outside the event loop
    # Admission: wire_limits.pxi. Costs are in ns of CPU time.
    cdef double expected_batch_ns, expected_row_ns      # cost of a batch and of a row, up to the factor `scale`
    cdef double n_samples, rows_sum, rows_squares, ns_sum, ns_rows  # of batches lately, each weighted by its age
    cdef double scale               # measured cost / expected cost, a moving average; 0: not measured yet
    cdef readonly double batch_cost_ns, row_cost_ns     # expected cost times scale
    cdef readonly double admitted_ns    # cost of its requests that wait or run, if they run in a thread
    cdef double running_ns          # the part of admitted_ns that runs now
    cdef int64_t ended_ns           # when its last batch ended
    cdef readonly double budget_cut_ns  # as Router.budget_cut_ns, for this route's queue alone
    cdef bint full                  # a request exceeded the budget since its last batch ended
    cdef int64_t shed               # requests refused because of overload, not yet in Router.errors
    cdef bint measured              # a batch has run
    cdef ColumnNames names
    cdef ReplyForm form
    cdef WireRoute suspects_route(self)
    cdef bint matches_request(self, bint features, const uint8_t *key, Py_ssize_t size, int64_t version) noexcept


cdef class ReplyForm:
    """ReplyForm(plan): what all replies by a plan have in common. make_template completes it at the first result."""
    cdef bint features              # get_online_features, not predict
    cdef Encoder encoder
    cdef list pieces                # constant bytes: before each output array, and after the last
    cdef list view_pieces           # encoded names of the views
    cdef bytes defaults             # 1 where a feature has a default
    cdef tuple types                # names of the features' types
    cdef int make_template(self, list output_names) except -1


cdef class Batch:
    """Batch(route, columns): requests of one route that run together."""
    cdef readonly WireRoute route
    cdef ReplyForm form             # that of the route, or of the plan that answers in place of the route's
    cdef readonly Columns columns
    cdef request_t *request
    cdef readonly Py_ssize_t n_requests
    cdef readonly Py_ssize_t waiting    # requests that `drop_expired` left: they will be answered
    cdef Py_ssize_t capacity
    cdef readonly int64_t opened_ns     # when the turn of its first request began, CLOCK_MONOTONIC
    cdef readonly int64_t started_ns    # when `drop_expired` or `start` was called, CLOCK_MONOTONIC
    cdef readonly dict traces       # index of a request in the batch -> (msgid, traceparent); None: no request has one
    cdef bint keep                  # a shadow still reads its columns: do not reuse the batch
    # What admission has counted for this batch; router is None while nothing is counted.
    cdef Router router
    cdef bint threaded              # runs in a thread, so its cost is the route's and not the turn's
    cdef Py_ssize_t waiting_rows, waiting_bytes
    cdef double cost_ns             # the estimated cost with which its requests were admitted
    cdef int add(self, Connection connection, uint32_t msgid, const options_t *options, Py_ssize_t rows) except -1
    cdef int release(self, request_t *request) except -1
    cdef int recycle(self) except -1
    cdef cnp.ndarray check_result(self, result)
    cdef int put_reply(self, mp_out *out, request_t *request, const uint8_t *statuses, Py_ssize_t n_statuses,
                       int64_t version) except -1
    cdef int answer(self, Py_ssize_t number, const uint8_t *statuses, Py_ssize_t n_statuses,
                    int64_t version) except -1


cdef class Encoder:
    """Encoder(names): the output arrays of one result, ready to be encoded row range by row range."""
    cdef array_part *parts          # whole arrays; dims[0] and data are set again for each request
    cdef int n
    cdef list names                 # of the outputs
    cdef size_t stop_at             # an output buffer of this size means that the reply is too long
    cdef list copies                # copies of arrays that were not contiguous or had a type that is not sent
    cdef int set_arrays(self, list outputs, Py_ssize_t n_rows) except -1
    cdef int put_rows(self, mp_out *out, int k, Py_ssize_t first, Py_ssize_t rows, bint as_tensor,
                      const uint8_t *missing) except -1


cdef class Router:
    """What the connections of one worker share: plans, open batches, limits, counters."""
    cdef readonly object engine, loop
    cdef public object run          # scheduled at most once per loop turn, when there is work
    cdef public object fault        # called with every exception that is not a ShorttailError
    cdef public object forward      # forwards a push or delete to the writer; None: no writer
    cdef public object bulk         # forwards a large request to the bulk worker; None: all are read here
    cdef readonly dict handlers
    cdef public dict suspects       # sender -> until when, in ns of CLOCK_MONOTONIC: server/senders.py
    cdef readonly set connections
    cdef dict models                # name bytes, or (name bytes, version) -> WireRoute
    cdef dict features              # bytes of the array of references -> WireRoute
    cdef list pending               # batches with requests
    cdef list to_write              # connections with replies to write
    cdef bint run_scheduled         # `run` will be called in this loop turn
    cdef bint reading               # in Connection.data_received: the turn has begun
    # Access: what a new connection may do, and the function that checks a token (server/security.py).
    cdef public int access
    cdef public object auth
    cdef public int error_form      # of the errors in replies: wire_encode.pxi
    # Connections.
    cdef public Py_ssize_t max_connections, max_peer_connections    # 0: no limit
    cdef public int64_t idle_deadline_s, frame_deadline_s, write_deadline_s, auth_deadline_s
    cdef readonly dict peers        # address -> open connections, while a limit of connections is set
    cdef readonly Py_ssize_t timed_out, refused     # connections closed by a timeout; connections beyond a limit
    cdef readonly Py_ssize_t accepted, in_flight    # connections so far; requests that wait for their answer
    cdef readonly int64_t received_bytes, sent_bytes
    cdef dict errors                # (method, model, code) -> [requests, last msgid, last message]
    cdef list traced                # errors with a traceparent: (method, model, code, msgid, message, traceparent)
    cdef list sweeping              # connections that the current sweep has not checked yet
    cdef int64_t swept_s            # when the current sweep began
    cdef bint dropping              # `drop_on` will be called
    # Admission: wire_limits.pxi.
    cdef public double target_ns, burst_ns  # budget of a turn, in ns of work: under overload, and otherwise
    cdef readonly double budget_cut_ns  # the budget of this turn is burst_ns - budget_cut_ns
    cdef readonly double admitted_ns    # estimated cost of the requests that wait or run in the event loop
    cdef readonly Py_ssize_t shed   # requests refused because of overload
    cdef readonly bint overloaded   # the last turn refused requests
    cdef Py_ssize_t shed_before     # `shed` at the end of the last turn
    cdef bint full                  # a request of this turn exceeded the budget
    cdef readonly Py_ssize_t waiting_rows, waiting_bytes
    cdef readonly int64_t last_turn_ns  # how long the last turn took
    cdef int64_t turn_ns, ended_ns, arrived_ns  # begin of this turn; end of the last; earliest arrival in this turn
    # Newest-first admission: wire_newest.pxi.
    cdef readonly bint newest_first     # this turn defers its requests until all are read
    cdef int64_t overloaded_ns      # when the last turn that refused requests ended
    cdef deferred_t *deferred
    cdef Py_ssize_t n_deferred, deferred_capacity
    cdef readonly Py_ssize_t deferred_bytes     # received bytes that the deferred requests keep in memory
    cdef uint32_t rotation          # which connection comes first among requests of the same age
    cpdef int wake(self) except -1
    cdef WireRoute model_route(self, const uint8_t *name, Py_ssize_t size, int64_t version)
    cdef bint has_features_route(self, const uint8_t *refs, Py_ssize_t size) except -1
    cdef WireRoute features_route(self, const uint8_t *refs, Py_ssize_t size)


cdef class Connection:
    """One peer: the protocol state of a connection (wire_connection.pxi)."""
    cdef Router router
    cdef object transport
    cdef mp_out out                 # replies, until the end of this turn
    cdef mp_out partial             # the beginning of a message that has not arrived in full
    cdef mp_scan scan               # how far `partial`, or the data, has been checked
    cdef size_t scanned             # bytes of `partial` that the scanner has seen
    cdef bint resting               # is not read for a moment, because its message is large
    cdef WireRoute last_route       # of the last request: the next one often has the same
    cdef WireRoute route            # of the request that is being read; None: not known yet
    cdef readonly Py_ssize_t in_flight
    cdef Py_ssize_t forwarded       # the part of in_flight that the writer has
    cdef readonly bint paused       # the peer does not read its replies, so its requests are not read
    cdef bint has_output            # is in Router.to_write
    cdef int state
    cdef bint parked                # is not read any more, because it moves to another worker
    cdef bint secure                # over TLS, which has no half-closed connections
    cdef readonly int access
    cdef Py_ssize_t requests_before_auth
    cdef readonly object sender     # (token's digest or None, address or an object of its own): who is blamed
    cdef object peer                # the address under which it is counted in Router.peers
    # Timeouts; times are in seconds of the clock of Router.sweep, 0: not set.
    cdef bint received              # bytes came since the last sweep
    cdef bint maybe_unsent          # output was written, and the transport may not have sent all of it
    cdef int64_t sent               # bytes written so far
    cdef int64_t unsent_mark        # `sent` at unsent_mark_s: all of it has to leave within the write timeout
    cdef int64_t received_s, partial_s, unsent_mark_s, connected_s
    # The message that is being read.
    cdef Py_ssize_t scan_bytes      # its length
    cdef Py_ssize_t scan_elements   # array items and map pairs that it declares
    cdef const uint8_t *message_at  # its first byte
    cdef const uint8_t *last_param
    cdef bytes data                 # the bytes that hold it; None: it is in `partial`, so it cannot be deferred
    cdef uint32_t n_deferred        # its requests that wait until all requests of this turn are read
    cdef bytes carried              # what its last worker had received of a message
    cdef TakenMessage taken         # the buffer that was `partial`, while the messages in it are handled
    cdef list relayed               # replies of the bulk worker, less what was written of them
    cdef int keep_partial(self, const uint8_t *data, size_t size) except -1
    cdef int count_peer(self) except -1
    cdef int handle_partial(self) except -1
    cdef int drop_from_partial(self, size_t size) except -1
    cdef size_t handle_messages(self, const uint8_t *data, size_t size) except? 0
    cdef int refuse(self, str code, str reason) except -1
    cdef int handle_message(self, const uint8_t *p) except -1
    cdef int schedule_write(self) except -1
    cdef int put_error(self, int64_t msgid, str code, str message) except -1
    cdef int write_out(self) except -1
    cdef int maybe_end(self) except -1
    cdef int leave_partial(self, size_t size) except -1
    cdef bint end_forwarded(self) except -1
    cdef int count_sent(self, Py_ssize_t size) except -1


cdef class TakenMessage:
    """Owns a buffer that begins with a message. Its buffer protocol shows the message."""
    cdef mp_out buffer
    cdef Py_ssize_t size


cdef class BulkReply:
    """Collects the bytes of one reply of the bulk worker. Its buffer protocol shows them."""
    cdef mp_out buffer
    cdef mp_scan scan
    cdef readonly bint whole        # the reply has arrived in full
