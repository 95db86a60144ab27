# What keeps a worker calm: access, deadlines of connections, and admission of requests.

cdef enum:  # what a connection may do; server/security.py knows the same numbers
    ACCESS_NONE = 0     # auth and ping, in small frames
    ACCESS_SERVE = 1    # everything that reads
    ACCESS_ADMIN = 2    # push and delete too

cdef mp_limits STRANGER     # of a connection that has not shown a token
STRANGER.frame_bytes = LIMITS.stranger_frame_bytes
STRANGER.nesting_depth = LIMITS.nesting_depth
STRANGER.declared_elements = 64

cdef Py_ssize_t STRANGER_REQUESTS = LIMITS.stranger_requests
cdef Py_ssize_t CONNECTION_REQUESTS = LIMITS.requests_per_connection
cdef Py_ssize_t WAITING_ROWS = LIMITS.waiting_rows
cdef Py_ssize_t WAITING_BYTES = LIMITS.waiting_bytes
cdef Py_ssize_t SWEEP_CONNECTIONS = 512     # looked at in one call, so that no sweep is long
# Two turns with less between them than this were one busy spell: the second found its requests in the socket buffers.
cdef int64_t BACK_TO_BACK_NS = 50_000

# The end of a response to a request that is shed, made once: a rejection has to cost far less than the service.
cdef bytes SHED = msgpack.packb(
    {"code": "RESOURCE_EXHAUSTED", "message": "the server is overloaded; send it again later"}
) + msgpack.packb(None)


# -- admission ---------------------------------------------------------------------------------------------------
#
# Where the queue is: while a turn of the loop runs, requests wait in the sockets' receive buffers, and the next turn
# takes all of them. So a request waits for the turn before its own and then for its own, and an overload shows as
# turns that grow. Admission therefore bounds the work of a turn: what it admits is counted at what its rows have cost
# so far, and past the budget requests are refused as they are parsed. The budget is controlled as in "Fail at Scale"
# (Maurer, ACM Queue 2015): long while the queue has been empty within the last interval, so that a burst is served
# whole; short once it has not, which is a standing queue.


cdef int _begin_turn(Router router) except -1:
    """Bytes came, and nothing waits yet: when did the oldest of them arrive, and how much may this turn take?"""
    cdef int64_t now_ns = _now_ns()
    router.turn_ns = now_ns
    router.arrived_ns = now_ns
    if now_ns - router.ended_ns < BACK_TO_BACK_NS:
        router.arrived_ns -= router.last_turn_ns
    else:
        router.calm_ns = now_ns     # the loop had nothing to do
    router.standing = now_ns - router.calm_ns > router.interval_ns
    router.budget_ns = router.target_ns if router.standing else router.burst_ns
    return 0


cdef int _end_turn(Router router) except -1:
    cdef int64_t now_ns = _now_ns()
    router.last_turn_ns = now_ns - router.turn_ns
    router.ended_ns = now_ns
    # A turn that shed was short because it shed: it says nothing of the queue.
    if router.last_turn_ns <= router.target_ns and router.shed == router.shed_before:
        router.calm_ns = now_ns
    router.shed_before = router.shed
    return 0


cdef bint _is_admitted(Router router, Route route, int priority) noexcept:
    """The first request of a turn always is: an estimate, however wrong, must not lock everybody out."""
    # What runs outside the loop has a queue of its own, and takes no time from the others.
    cdef double admitted_ns = route.admitted_ns if route.apart else router.admitted_ns
    cdef double budget_ns = router.burst_ns if route.apart else router.budget_ns
    if router.waiting_rows >= WAITING_ROWS or router.waiting_bytes >= WAITING_BYTES:
        return False
    if priority == 0:
        budget_ns *= 0.5
    elif priority == 2:
        budget_ns *= 2.0
    return admitted_ns < budget_ns or admitted_ns == 0.0


cdef int _count_in(Router router, Batch batch, Py_ssize_t rows, Py_ssize_t size) except -1:
    """A request has entered a batch."""
    cdef double cost_ns = rows * batch.route.row_cost_ns
    batch.router = router
    batch.waiting_rows += rows
    batch.waiting_bytes += size
    router.waiting_rows += rows
    router.waiting_bytes += size
    if batch.cost_ns == 0.0:
        batch.apart = batch.route.apart
    batch.cost_ns += cost_ns
    if batch.apart:
        batch.route.admitted_ns += cost_ns
    else:
        router.admitted_ns += cost_ns
    return 0


cdef int _leave_loop(Batch batch) except -1:
    """The batch turns out to run outside the loop: what it was admitted at counts for its route alone."""
    if batch.router is not None and not batch.apart:
        batch.apart = True
        batch.router.admitted_ns = max(0.0, batch.router.admitted_ns - batch.cost_ns)
        batch.route.admitted_ns += batch.cost_ns
    return 0


cdef int _count_out(Batch batch) except -1:
    """A batch is done: what it held waits no more, and what it took is learnt."""
    cdef Router router = batch.router
    cdef double sample_ns
    cdef Route route = batch.route
    if router is None:
        return 0
    router.waiting_rows -= batch.waiting_rows
    router.waiting_bytes -= batch.waiting_bytes
    if batch.apart:
        route.admitted_ns = max(0.0, route.admitted_ns - batch.cost_ns)
    else:
        router.admitted_ns = max(0.0, router.admitted_ns - batch.cost_ns)
    if router.waiting_rows == 0:
        router.admitted_ns = route.admitted_ns = 0.0    # no rounding errors are carried on
    if batch.started_ns and batch.waiting_rows:
        sample_ns = <double>(_now_ns() - batch.started_ns) / batch.waiting_rows
        if sample_ns < route.row_cost_ns:
            route.row_cost_ns += 0.5 * (sample_ns - route.row_cost_ns)
        elif route.row_cost_ns:
            # Up slowly: one batch that the machine held up says little, and too high an estimate sheds for nothing.
            route.row_cost_ns += 0.125 * (min(sample_ns, 2 * route.row_cost_ns) - route.row_cost_ns)
        elif route.measured:
            route.row_cost_ns = sample_ns
        route.measured = True       # the first batch of a route pays for much that the next does not
    batch.waiting_rows = batch.waiting_bytes = 0
    batch.cost_ns = 0.0
    batch.started_ns = 0
    batch.apart = False
    batch.router = None
    return 0


# -- deadlines of connections --------------------------------------------------------------------------------------


cdef int _look_at(Connection connection, int64_t now_s, Router router) except -1:
    """Cut a connection that is past a deadline. Seconds are enough: these deadlines keep memory, not latency."""
    cdef int64_t owed
    if connection.state == GONE:
        return 0
    if connection.owes:
        owed = connection.transport.get_write_buffer_size()
        if owed == 0:
            connection.owes = False
            connection.mark = 0
        elif connection.mark == 0 or connection.sent - owed >= connection.mark:
            # All that was owed when the mark was set has left: the peer reads. Set it again at what is owed now.
            connection.mark = connection.sent
            connection.mark_s = now_s
        elif now_s - connection.mark_s > router.write_deadline_s:
            return _cut(connection, router)
    if connection.held.size == 0:
        connection.held_s = 0
    elif connection.held_s == 0:
        connection.held_s = now_s
    elif connection.paused:
        connection.held_s = now_s   # it is not read now, so it cannot go on
    elif now_s - connection.held_s > router.frame_deadline_s:
        return _cut(connection, router)
    if connection.heard:
        connection.heard = False
        connection.heard_s = now_s
    elif connection.heard_s == 0:
        connection.heard_s = now_s
    if connection.access == ACCESS_NONE:
        if connection.made_s == 0:
            connection.made_s = now_s
        elif now_s - connection.made_s > router.auth_deadline_s:
            return _cut(connection, router)
    if (connection.in_flight == 0 and not connection.owes
            and now_s - connection.heard_s > router.idle_deadline_s):
        router.cut += 1
        connection.finish()
    return 0


cdef int _cut(Connection connection, Router router) except -1:
    router.cut += 1
    connection.abort()
    return 0
