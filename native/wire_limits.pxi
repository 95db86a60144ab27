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

# The end of a response to a request that is refused, made once: a rejection has to cost far less than the service.
cdef str SHED_MESSAGE = "the server is overloaded; send it again later"
cdef bytes SHED = msgpack.packb({"code": "RESOURCE_EXHAUSTED", "message": SHED_MESSAGE}) + msgpack.packb(None)
cdef str LATE_MESSAGE = "the deadline passed before the request was read"
cdef bytes LATE = msgpack.packb({"code": "DEADLINE_EXCEEDED", "message": LATE_MESSAGE}) + msgpack.packb(None)

# Of a batch besides its model: the turn that it needs, and the lookups and answers of a row, roughly.
cdef double BATCH_NS = 50_000
cdef double ROW_NS = 1_000
# However short turns are to be, one takes as much as this many times what its batch costs in any case: shorter ones
# would spend their time on that.
cdef double LEAST_BATCHES = 8
# ns of work that the budget gains for each ns without a full turn. So an overload by less than this share has long turns,
# which it takes a while to fill, and a larger one short ones.
cdef double REGAIN = 0.2
cdef int SHAPE_ROWS = 256   # a model is about as much dearer by the row as from one row to so many

cdef enum:
    ADMITTED = 0
    TOO_MUCH = 1    # there is no time for it
    TOO_LATE = 2    # its deadline has passed


# -- admission ---------------------------------------------------------------------------------------------------
#
# Where the queue is: while a turn of the loop runs, requests wait in the sockets' receive buffers, and the next turn
# takes all of them. So a request waits for the turn before its own and then for its own, and an overload shows as
# turns that grow. Admission therefore bounds the work of a turn: what it admits is counted at what its rows have cost
# so far, and past the budget requests are refused as they are parsed. The budget moves between two levels, those of the
# adaptive queue timeout of "Fail at Scale" (Maurer, ACM Queue 2015). As long as nothing had to be refused it is long: a
# burst, or clients that wait for their answers before they go on, are served whole. A turn that is full shows that more
# comes than can be served, and that waiting longer would help nobody: the next may take half as much, down to the short
# level. What passes without a full turn lengthens it again: in an overload nearly all turns are full, below capacity few.


cdef int _begin_unless_begun(Router router) except -1:
    return 0 if router.awake else _begin_turn(router)


cdef int _begin_turn(Router router) except -1:
    """Bytes came, and nothing waits yet: when did the oldest of them arrive, and how much may this turn take?"""
    cdef int64_t now_ns = _now_ns()
    router.turn_ns = now_ns
    router.arrived_ns = now_ns
    router.keeps = now_ns - router.shed_ns < KEEPS_NS
    if now_ns - router.ended_ns < BACK_TO_BACK_NS:
        router.arrived_ns -= router.last_turn_ns
    return 0


cdef int _end_turn(Router router) except -1:
    cdef int64_t now_ns = _now_ns()
    router.cut_ns = _next_cut(router, router.cut_ns, router.full, now_ns - router.ended_ns)
    router.full = False
    router.sheds = router.shed != router.shed_before
    router.shed_before = router.shed
    if router.sheds:
        router.shed_ns = now_ns
    router.last_turn_ns = now_ns - router.turn_ns
    router.ended_ns = now_ns
    router.reading = False
    return 0


cdef double _next_cut(Router router, double cut_ns, bint full, int64_t passed_ns) noexcept:
    """What is taken off the budget, of a turn or of a queue outside the loop, after one that took passed_ns."""
    if full:
        return router.burst_ns - max(router.target_ns, 0.5 * (router.burst_ns - cut_ns))
    return max(0.0, cut_ns - REGAIN * passed_ns)


cdef int _admit(Router router, WireRoute route, const options_t *options) noexcept:
    """The first request always is: an estimate, however wrong, must not lock everybody out.

    What runs outside the loop has a queue of its own, and takes no time from the others: the batch that gathers while
    another runs. Its budget is of the same two levels.
    """
    cdef double ahead_ns = router.admitted_ns
    cdef double queued_ns = ahead_ns
    cdef double cut_ns = max(router.cut_ns, route.cut_ns)
    cdef double budget_ns
    if options.deadline_ns and options.deadline_ns <= router.turn_ns:
        return TOO_LATE
    if router.waiting_rows >= WAITING_ROWS or router.waiting_bytes >= WAITING_BYTES:
        return TOO_MUCH
    if route.threaded:
        ahead_ns = route.admitted_ns
        # Rows alone: what the next batch costs in any case is no reason to let fewer share it.
        queued_ns = ahead_ns - route.running_ns - route.batch_cost_ns
        cut_ns = route.cut_ns
    if queued_ns <= 0.0:
        return ADMITTED
    budget_ns = min(router.burst_ns, max(router.burst_ns - cut_ns, LEAST_BATCHES * route.batch_cost_ns))
    if queued_ns >= budget_ns:
        route.full = True   # wherever its batches run: small ones do in the loop
        if not route.threaded:
            router.full = True
    if options.priority == 0:
        budget_ns *= 0.5
    elif options.priority == 2:
        budget_ns *= 2.0
    if queued_ns >= budget_ns:
        return TOO_MUCH
    # It would be given up on before its turn came: the time is better spent on another.
    if options.deadline_ns and router.turn_ns + <int64_t>ahead_ns >= options.deadline_ns:
        return TOO_MUCH
    return ADMITTED


cdef int _count_in(Router router, Batch batch, Py_ssize_t rows, Py_ssize_t size) except -1:
    """A request has entered a batch."""
    cdef double cost_ns = rows * batch.route.row_cost_ns
    if batch.waiting_rows == 0:
        cost_ns += batch.route.batch_cost_ns
    batch.router = router
    batch.waiting_rows += rows
    batch.waiting_bytes += size
    router.waiting_rows += rows
    router.waiting_bytes += size
    if batch.cost_ns == 0.0:
        batch.threaded = batch.route.threaded
    batch.cost_ns += cost_ns
    if batch.threaded:
        batch.route.admitted_ns += cost_ns
    else:
        router.admitted_ns += cost_ns
    return 0


cdef int _leave_loop(Batch batch) except -1:
    """The batch turns out to run outside the loop: what it was admitted at counts for its route alone."""
    if batch.router is None:
        return 0
    if not batch.threaded:
        batch.threaded = True
        batch.router.admitted_ns = max(0.0, batch.router.admitted_ns - batch.cost_ns)
        batch.route.admitted_ns += batch.cost_ns
    batch.route.running_ns = batch.cost_ns
    return 0


cdef int _count_out(Batch batch) except -1:
    """A batch is done: what it held waits no more."""
    cdef Router router = batch.router
    cdef WireRoute route = batch.route
    cdef int64_t now_ns
    if router is None:
        return 0
    router.waiting_rows -= batch.waiting_rows
    router.waiting_bytes -= batch.waiting_bytes
    if batch.threaded:
        route.admitted_ns = max(0.0, route.admitted_ns - batch.cost_ns)
        route.running_ns = 0.0
    else:
        router.admitted_ns = max(0.0, router.admitted_ns - batch.cost_ns)
    now_ns = _now_ns()
    route.cut_ns = _next_cut(router, route.cut_ns, route.full, now_ns - route.ended_ns)
    route.ended_ns = now_ns
    route.full = False
    if router.waiting_rows == 0:
        router.admitted_ns = route.admitted_ns = 0.0    # no rounding errors are carried on
    batch.waiting_rows = batch.waiting_bytes = 0
    batch.cost_ns = 0.0
    batch.threaded = False
    batch.router = None
    return 0


cdef int _shape_cost(WireRoute route) except -1:
    """What a batch and a row should cost, as the model's warm-up says: one row takes nearly as long as some more do.

    Without it a batch of one row would be taken for the price of each row, and many rows would seem to be too much.
    """
    runner = route.plan.runner
    route.shape_row_ns = 1.0
    if runner is not None or route.features:
        one_us = runner.cost_us(1) if runner is not None else 0.0
        row_us = max(0.0, runner.cost_us(SHAPE_ROWS) - one_us) / (SHAPE_ROWS - 1) if runner is not None else 0.0
        route.shape_batch_ns = BATCH_NS + 1e3 * max(0.0, one_us - row_us)
        route.shape_row_ns = ROW_NS + 1e3 * row_us
        _scale_cost(route, 1.0)
    return 0


cdef int _scale_cost(WireRoute route, double scale) except -1:
    route.scale = scale
    route.batch_cost_ns = scale * route.shape_batch_ns
    route.row_cost_ns = scale * route.shape_row_ns
    return 0


cdef int _learn_cost(Batch batch) except -1:
    """The batch has run: how much more than it should have did it cost?"""
    cdef WireRoute route = batch.route
    cdef double sample
    if batch.started_ns == 0 or batch.waiting_rows == 0:
        return 0
    sample = <double>(_now_ns() - batch.started_ns) / (route.shape_batch_ns + batch.waiting_rows * route.shape_row_ns)
    if sample < route.scale:
        _scale_cost(route, route.scale + 0.5 * (sample - route.scale))
    elif route.scale:
        # Up slowly: one batch that the machine held up says little, and too high an estimate sheds for nothing.
        _scale_cost(route, route.scale + 0.125 * (min(sample, 2 * route.scale) - route.scale))
    elif route.measured:
        _scale_cost(route, sample)
    route.measured = True       # the first batch of a route pays for much that the next does not
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
