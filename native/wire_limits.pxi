# Limits of a worker: access, admission of requests, and timeouts of connections.

cdef enum:  # the access of a connection, with the numbers of server/security.py
    ACCESS_NONE = 0     # auth and ping only, in messages of at most LIMITS.stranger_frame_bytes
    ACCESS_SERVE = 1    # all methods that read
    ACCESS_ADMIN = 2    # push and delete too

cdef mp_limits STRANGER     # limits of a connection that must authenticate and has not
STRANGER.frame_bytes = LIMITS.stranger_frame_bytes
STRANGER.nesting_depth = LIMITS.nesting_depth
STRANGER.declared_elements = 64

cdef Py_ssize_t STRANGER_REQUESTS = LIMITS.stranger_requests
cdef Py_ssize_t CONNECTION_REQUESTS = LIMITS.requests_per_connection
cdef Py_ssize_t WAITING_ROWS = LIMITS.waiting_rows
cdef Py_ssize_t WAITING_BYTES = LIMITS.waiting_bytes
cdef Py_ssize_t SWEEP_CONNECTIONS = 512     # checked by one call of Router.sweep, so that a call is short
# If a turn begins less than this after the last one ended, its requests arrived while the last turn ran.
cdef int64_t BACK_TO_BACK_NS = 50_000

# What follows the msgid in the reply to a request that admission refuses, by Router.error_form. Encoded once: to refuse
# a request has to cost far less than to answer it.
cdef str OVERLOADED_MESSAGE = "the server is overloaded; send it again later"
cdef tuple OVERLOADED_REPLIES = tuple([
    _packed_error("RESOURCE_EXHAUSTED", OVERLOADED_MESSAGE, form) + b"\xC0" for form in range(3)])
cdef str EXPIRED_MESSAGE = "the deadline passed before the request was read"
cdef tuple EXPIRED_REPLIES = tuple([
    _packed_error("DEADLINE_EXCEEDED", EXPIRED_MESSAGE, form) + b"\xC0" for form in range(3)])

# Rough cost of a batch and of a row apart from the model: the turn of the event loop, lookups, replies.
cdef double BATCH_OVERHEAD_NS = 50_000
cdef double ROW_OVERHEAD_NS = 1_000
# The budget of a turn is at least this many times the fixed cost of a batch. In shorter turns, the fixed cost would
# take most of the time.
cdef double LEAST_BATCHES = 8
# ns that the budget grows for each ns without a full turn. With 0.2, a load of up to 1.2 times the capacity has mostly
# long turns, because they fill slowly; a larger overload has short turns.
cdef double REGAIN_RATE = 0.2
# How much of the weight of earlier batches a batch leaves, and how many batches have to be known: _learn_ratio.
cdef double SAMPLE_KEPT = 0.9
cdef double LEAST_SAMPLES = 4.0
cdef double LEAST_SPREAD = 0.04     # variance of the rows of batches / square of their mean
cdef double RATIO_RATE = 0.1        # how far the ratio moves with a batch: towards the line, and without a line
cdef double RATIO_DOUBT = 0.02
cdef double LEAST_ROW_NS = 50.0
cdef int SLOPE_ROWS = 256   # the expected cost of a row is the slope of the model's time from 1 row to this many

cdef enum:  # the decision of _admit
    ADMITTED = 0
    OVERLOADED = 1  # refused: there is no time for it
    EXPIRED = 2     # refused: its deadline has passed


# -- admission ---------------------------------------------------------------------------------------------------
#
# Admission keeps the queue short under overload, as CoDel does ("controlled delay", Nichols and Jacobson, ACM Queue
# 2012) in the form for servers of "Fail at Scale" (Maurer, ACM Queue 2015): the queue may be long as long as it drains
# now and then, which is a burst; a queue that does not drain is an overload, and then the queue may only be short.
#
# Where the queue is. While a turn of the event loop runs, requests wait in the receive buffers of the sockets, and the
# Where the queue is. While a turn of the event loop runs, requests wait in the receive buffers of the sockets, and the
# next turn reads all of them. So a request waits for the rest of one turn and then for its own turn, and an overload
# shows as turns that become longer. Admission therefore limits the work of a turn. Each request adds its estimated cost
# to `admitted_ns` (rows times cost per row, plus the fixed cost of a batch for the first request of a batch). A request
# that comes when `admitted_ns` has reached the budget of the turn is refused as it is read, before its columns are
# decoded.
#
# The budget moves between two levels, which server/limits.py derives from the P99 budget (50 ms unless it is set):
#
#     burst_ns   25 ms   The budget while no turn is full. A burst is served whole, and so are clients that wait for
#                        their answers before they send more.
#     target_ns   2 ms   The budget under a lasting overload. A longer queue would serve no more requests per second,
#                        and would make each of them later.
#
# A turn is full if a request comes after its budget is used up. Each full turn halves the budget, down to target_ns:
# from 25 ms in four turns. Each ns without a full turn gives back REGAIN_RATE ns: from 2 ms to 25 ms in 115 ms. Under
# overload nearly all turns are full, and below capacity few are.
#
# Requests of priority 0 may use half of the budget, so they alone cannot fill a turn; requests of priority 2 may use
# twice the budget. A request whose deadline would pass before its turn is refused too: the time is better spent on
# another.
#
# A model that runs in a thread, outside the loop, has a queue of its own: the batch that collects while another runs.
# Its cost counts in its route and not in the turn. The same two levels bound it.


cdef int _ensure_turn_begun(Router router) except -1:
    """Begin a turn, unless `run` is scheduled: then the turn has begun."""
    return 0 if router.run_scheduled else _begin_turn(router)


cdef int _begin_turn(Router router) except -1:
    """Begin a turn, at its first bytes. Sets when the oldest of them may have arrived, and whether to defer requests.

    The arrival time is now, or the begin of the last turn if that ended just now: deadlines count from it.
    """
    cdef int64_t now_ns = _now_ns()
    router.turn_ns = now_ns
    router.arrived_ns = now_ns
    router.newest_first = now_ns - router.overloaded_ns < NEWEST_FIRST_NS
    if now_ns - router.ended_ns < BACK_TO_BACK_NS:
        router.arrived_ns -= router.last_turn_ns
    return 0


cdef int _end_turn(Router router) except -1:
    """End a turn: set the budget of the next, and note whether this one refused requests."""
    cdef int64_t now_ns = _now_ns()
    router.budget_cut_ns = _next_budget_cut(router, router.budget_cut_ns, router.full, now_ns - router.ended_ns)
    router.full = False
    router.overloaded = router.shed != router.shed_before
    router.shed_before = router.shed
    if router.overloaded:
        router.overloaded_ns = now_ns
    router.last_turn_ns = now_ns - router.turn_ns
    router.ended_ns = now_ns
    router.reading = False
    return 0


cdef double _next_budget_cut(Router router, double budget_cut_ns, bint full, int64_t passed_ns) noexcept:
    """Return by how many ns the next budget is below burst_ns.

    budget_cut_ns: the current cut; full: requests exceeded the budget; passed_ns: time since the last turn (or batch,
    for a queue outside the loop) ended.
    """
    if full:
        return router.burst_ns - max(router.target_ns, 0.5 * (router.burst_ns - budget_cut_ns))
    return max(0.0, budget_cut_ns - REGAIN_RATE * passed_ns)


cdef int _admit(Router router, WireRoute route, const options_t *options) noexcept:
    """Decide whether a request is admitted: ADMITTED, OVERLOADED or EXPIRED.

    The first request of an empty queue is always admitted, so that a cost estimate, however wrong, cannot refuse every
    request for ever.
    """
    cdef double ahead_ns = router.admitted_ns
    cdef double queued_ns = ahead_ns
    cdef double budget_cut_ns = max(router.budget_cut_ns, route.budget_cut_ns)
    cdef double budget_ns
    if options.deadline_ns and options.deadline_ns <= router.turn_ns:
        return EXPIRED
    if router.waiting_rows >= WAITING_ROWS or router.waiting_bytes >= WAITING_BYTES:
        return OVERLOADED
    if route.threaded:
        ahead_ns = route.admitted_ns
        # The queue is the batch that collects, without its fixed cost, which does not depend on how many share it.
        queued_ns = ahead_ns - route.running_ns - route.batch_cost_ns
        budget_cut_ns = route.budget_cut_ns
    if queued_ns <= 0.0:
        return ADMITTED
    budget_ns = min(router.burst_ns, max(router.burst_ns - budget_cut_ns, LEAST_BATCHES * route.batch_cost_ns))
    if queued_ns >= budget_ns:
        route.full = True   # also if its batches run in the loop: small batches do
        if not route.threaded:
            router.full = True
    if options.priority == 0:
        budget_ns *= 0.5
    elif options.priority == 2:
        budget_ns *= 2.0
    if queued_ns >= budget_ns:
        return OVERLOADED
    if options.deadline_ns and router.turn_ns + <int64_t>ahead_ns >= options.deadline_ns:
        return OVERLOADED
    return ADMITTED


cdef int _count_in(Router router, Batch batch, Py_ssize_t rows, Py_ssize_t size) except -1:
    """Count a request that was added to a batch: its rows, its bytes (size) and its estimated cost."""
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
    """Move the cost of a batch from the event loop's queue to its route's, because it will run in a thread."""
    if batch.router is None:
        return 0
    if not batch.threaded:
        batch.threaded = True
        batch.router.admitted_ns = max(0.0, batch.router.admitted_ns - batch.cost_ns)
        batch.route.admitted_ns += batch.cost_ns
    batch.route.running_ns = batch.cost_ns
    return 0


cdef int _count_out(Batch batch) except -1:
    """Uncount a batch that has ended, and set the next budget of its route."""
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
    route.budget_cut_ns = _next_budget_cut(router, route.budget_cut_ns, route.full, now_ns - route.ended_ns)
    route.ended_ns = now_ns
    route.full = False
    if router.waiting_rows == 0:
        router.admitted_ns = route.admitted_ns = 0.0    # drop rounding errors
    batch.waiting_rows = batch.waiting_bytes = 0
    batch.cost_ns = 0.0
    batch.threaded = False
    batch.router = None
    return 0


cdef int _init_cost(WireRoute route) except -1:
    """Set the expected cost of a batch and of a row, from the times that the model's warm-up measured.

    The estimate for a batch of n rows is scale * (expected_batch_ns + n * expected_row_ns). _learn_cost adjusts the
    scale and the ratio of the two terms to what batches really take. A fixed cost is needed: one row takes nearly as
    long as ten, so from a batch of one row alone, 1000 rows would seem to cost 1000 times as much, and would be
    refused. Of a model whose requests have runs of their own, each row is expected to cost a whole run.

    Without a runner (a fake plan in tests), the expected cost of a batch is 0 and that of a row 1 ns.
    """
    runner = route.plan.runner
    route.expected_row_ns = 1.0
    if runner is not None or route.features:
        one_us = runner.cost_us(1) if runner is not None else 0.0
        row_us = max(0.0, runner.cost_us(SLOPE_ROWS) - one_us) / (SLOPE_ROWS - 1) if runner is not None else 0.0
        if runner is not None and runner.by_request:
            row_us = one_us
        route.expected_batch_ns = BATCH_OVERHEAD_NS + 1e3 * max(0.0, one_us - row_us)
        route.expected_row_ns = ROW_OVERHEAD_NS + 1e3 * row_us
        _scale_cost(route, 1.0)
    return 0


cdef int _scale_cost(WireRoute route, double scale) except -1:
    """Set the scale, and the two costs times it, which admission reads for each request."""
    route.scale = scale
    route.batch_cost_ns = scale * route.expected_batch_ns
    route.row_cost_ns = scale * route.expected_row_ns
    return 0


cdef int _learn_cost(Batch batch) except -1:
    """Update the cost estimate of a route with the time that a batch has taken."""
    if batch.started_ns == 0 or batch.waiting_rows == 0:
        return 0
    return _learn(batch.route, batch.waiting_rows, <double>(_now_ns() - batch.started_ns))


cdef int _learn(WireRoute route, double rows, double batch_ns) except -1:
    """Update the cost estimate of a route with a batch: a moving average of measured / expected.

    A lower sample has the weight 0.5. A higher one has 0.125, and counts as at most twice the average: a single batch
    that the machine held up says little, and too high an estimate refuses requests for nothing. A route
    without an estimate takes its second sample as it is; its first batch pays for caches and memory that later batches
    find ready.
    """
    cdef double expected_ns = route.expected_batch_ns + rows * route.expected_row_ns
    cdef double sample = batch_ns / expected_ns
    if sample < route.scale:
        _scale_cost(route, route.scale + 0.5 * (sample - route.scale))
    elif route.scale:
        sample = min(sample, 2 * route.scale)
        _scale_cost(route, route.scale + 0.125 * (sample - route.scale))
    elif route.measured:
        _scale_cost(route, sample)
    route.measured = True
    if route.scale and route.expected_batch_ns:
        _learn_ratio(route, rows, sample * expected_ns)
    return 0


cdef int _learn_ratio(WireRoute route, double rows, double batch_ns) except -1:
    """Move the ratio of a row's cost to the fixed cost towards the line through the batches of late (least squares).

    batch_ns: what a batch of so many rows took. If all batches have the same size, they say nothing about the ratio.
    Where this size comes from requests being refused, the cost may be a fixed one that more rows would share, so the
    ratio falls slowly: then a few more requests are admitted, and batches of other sizes show what a row costs.
    """
    cdef double mean_rows, mean_ns, variance, slope, rate, row_ns
    route.n_samples = SAMPLE_KEPT * route.n_samples + 1.0
    route.rows_sum = SAMPLE_KEPT * route.rows_sum + rows
    route.rows_squares = SAMPLE_KEPT * route.rows_squares + rows * rows
    route.ns_sum = SAMPLE_KEPT * route.ns_sum + batch_ns
    route.ns_rows = SAMPLE_KEPT * route.ns_rows + batch_ns * rows
    if route.n_samples < LEAST_SAMPLES:
        return 0
    mean_rows = route.rows_sum / route.n_samples
    mean_ns = route.ns_sum / route.n_samples
    variance = route.rows_squares / route.n_samples - mean_rows * mean_rows
    if variance > LEAST_SPREAD * mean_rows * mean_rows:
        slope = (route.ns_rows / route.n_samples - mean_rows * mean_ns) / variance
        slope = min(max(slope, 0.0), mean_ns / mean_rows)   # neither a row nor a batch costs less than nothing
        rate = RATIO_RATE
    elif route.full:
        slope, rate = 0.0, RATIO_DOUBT
    else:
        return 0
    row_ns = route.expected_row_ns + rate * (slope / route.scale - route.expected_row_ns)
    row_ns = max(row_ns, LEAST_ROW_NS)
    # The estimate of a batch of mean size stays.
    route.expected_batch_ns = max(1.0, route.expected_batch_ns + mean_rows * (route.expected_row_ns - row_ns))
    route.expected_row_ns = row_ns
    return _scale_cost(route, route.scale)


# -- timeouts of connections ---------------------------------------------------------------------------------------


cdef int _check_timeouts(Connection connection, int64_t now_s, Router router) except -1:
    """Close a connection that is past a timeout. Whole seconds are enough: these timeouts protect memory, not latency.

    write_deadline_s: all output that was unsent at some moment (unsent_mark) has to be sent within it, so a peer that
    reads a byte now and then is closed. frame_deadline_s: from the first byte of a message to its last.
    auth_deadline_s: from connecting to the right token. idle_deadline_s: without a byte received, and with nothing in
    flight or unsent.
    """
    cdef int64_t owed
    if connection.state == GONE:
        return 0
    if connection.maybe_unsent:
        owed = connection.transport.get_write_buffer_size()
        if owed == 0:
            connection.maybe_unsent = False
            connection.unsent_mark = 0
        elif connection.unsent_mark == 0 or connection.sent - owed >= connection.unsent_mark:
            # All output up to the mark was sent, so the peer reads. Set the mark to what is unsent now.
            connection.unsent_mark = connection.sent
            connection.unsent_mark_s = now_s
        elif now_s - connection.unsent_mark_s > router.write_deadline_s:
            return _abort_timed_out(connection, router)
    if connection.partial.size == 0:
        connection.partial_s = 0
    elif connection.partial_s == 0:
        connection.partial_s = now_s
    elif connection.paused:
        connection.partial_s = now_s    # a paused connection is not read, so its message cannot continue
    elif now_s - connection.partial_s > router.frame_deadline_s:
        return _abort_timed_out(connection, router)
    if connection.received:
        connection.received = False
        connection.received_s = now_s
    elif connection.received_s == 0:
        connection.received_s = now_s
    if connection.access == ACCESS_NONE:
        if connection.connected_s == 0:
            connection.connected_s = now_s
        elif now_s - connection.connected_s > router.auth_deadline_s:
            return _abort_timed_out(connection, router)
    if (connection.in_flight == 0 and not connection.maybe_unsent
            and now_s - connection.received_s > router.idle_deadline_s):
        router.timed_out += 1
        connection.finish()
    return 0


cdef int _abort_timed_out(Connection connection, Router router) except -1:
    """Close a connection at once and count it."""
    router.timed_out += 1
    connection.abort()
    return 0
