# Newest-first admission under overload ("adaptive LIFO" of "Fail at Scale", Maurer, ACM Queue 2015), fair to all
# connections.
#
# Without it, requests are admitted in the order in which they are read: one socket after another, and each socket from
# its oldest byte on. Under overload this is wrong in two ways. The budget of a turn goes to the connections that are
# read first, and the others are refused again and again. And within a connection it goes to the requests that have
# waited longest, for the whole of the last turn, although no admitted request needs to wait that long: the requests
# that are not admitted are refused at once, so there is no backlog to work off.
#
# So for NEWEST_FIRST_NS (100 ms) after a turn that refused requests, a turn first defers its requests until everything
# that has arrived is read, and then admits them from the newest to the oldest until the budget is used up. In normal
# load requests stay in their order, and none is deferred.
#
# The arrival time of a request is not known, but all of them arrived while the last turn ran. The deferred requests of
# a connection are taken to have arrived evenly in that time: of n requests, the last has age 0, and the one k places
# before it has age k / n. Ages are put in AGES (1024) steps and sorted by a counting sort. So each connection gets the
# same share of its requests admitted, whether it sent 10 or 1000.

cdef enum:
    AGES = 1024     # steps from the newest to the oldest request of a turn

cdef Py_ssize_t DEFERRED_BYTES_MAX = LIMITS.kept_bytes
cdef int64_t NEWEST_FIRST_NS = 100_000_000
# 2^32 divided by the golden ratio: multiples of it, modulo any number of requests, are spread evenly.
cdef uint32_t ROTATION_STEP = 2_654_435_761


cdef bint _may_defer(Connection connection) noexcept:
    """Whether the request that is being read is deferred.

    Above DEFERRED_BYTES_MAX (16 MiB) of received bytes, the further requests of the turn are admitted or refused as
    they are read. A message in Connection.partial is not deferred either, because that buffer changes; Connection.data
    is None then, and also while deferred requests are handled.
    """
    cdef Router router = connection.router
    return router.newest_first and connection.data is not None and router.deferred_bytes < DEFERRED_BYTES_MAX


cdef int _defer(Connection connection) except -1:
    """Defer the request that is being read: note where its message is, and keep the bytes that hold it."""
    cdef Router router = connection.router
    cdef deferred_t *deferred
    cdef void *grown
    if router.n_deferred == router.deferred_capacity:
        grown = realloc(router.deferred, (2 * router.deferred_capacity + 256) * sizeof(deferred_t))
        if grown is NULL:
            raise MemoryError
        router.deferred = <deferred_t *>grown
        router.deferred_capacity = 2 * router.deferred_capacity + 256
    deferred = &router.deferred[router.n_deferred]
    if router.n_deferred == 0 or router.deferred[router.n_deferred - 1].data != <PyObject *>connection.data:
        router.deferred_bytes += PyBytes_GET_SIZE(connection.data)
    deferred.connection = <PyObject *>connection
    deferred.data = <PyObject *>connection.data
    Py_INCREF(connection)
    Py_INCREF(connection.data)
    deferred.message = connection.message_at
    deferred.last_param = connection.last_param
    deferred.size = connection.scan_bytes
    deferred.nth = connection.n_deferred
    connection.n_deferred += 1
    router.n_deferred += 1
    return router.wake()


cdef int _admit_deferred(Router router) except -1:
    """Handle the deferred requests, the newest first.

    Among requests of the same age, each turn begins with another connection: else connections with one request each,
    which all have age 0, would always be admitted in the same order.
    """
    cdef Py_ssize_t i, at, n = router.n_deferred
    cdef Py_ssize_t[AGES + 1] starts
    cdef Py_ssize_t *order
    cdef deferred_t *deferred
    cdef Connection connection
    cdef int age
    if n == 0:
        return 0
    order = <Py_ssize_t *>malloc(n * sizeof(Py_ssize_t))
    if order is NULL:
        raise MemoryError
    memset(starts, 0, sizeof(starts))
    for i in range(n):
        starts[_age(&router.deferred[i]) + 1] += 1
    for age in range(AGES):
        starts[age + 1] += starts[age]
    router.rotation += ROTATION_STEP
    for i in range(n):
        at = (i + router.rotation) % n
        age = _age(&router.deferred[at])
        order[starts[age]] = at
        starts[age] += 1
    try:
        for i in range(n):
            deferred = &router.deferred[order[i]]
            connection = <Connection>deferred.connection
            if connection.state != GONE:
                connection.last_param = deferred.last_param
                connection.scan_bytes = deferred.size
                connection.scan_elements = 0    # large requests are never deferred
                connection.handle_message(deferred.message)
    finally:
        free(order)
        _release_deferred(router)
    return 0


cdef int _age(const deferred_t *deferred) noexcept:
    """Return the age of a request as a step from 0, the newest, to AGES - 1."""
    cdef int64_t n = (<Connection>deferred.connection).n_deferred
    return <int>((n - 1 - deferred.nth) * AGES // n)


cdef int _release_deferred(Router router) except -1:
    """Drop the references of all deferred requests, and close the connections that waited for them to end."""
    cdef Py_ssize_t i, n = router.n_deferred
    cdef Connection connection
    router.n_deferred = router.deferred_bytes = 0
    for i in range(n):
        connection = <Connection>router.deferred[i].connection
        connection.n_deferred = 0
        if connection.state != OPEN:
            connection.maybe_end()
        Py_DECREF(connection)
        Py_DECREF(<object>router.deferred[i].data)
    return 0
