# In an overload, the newest requests of a turn are admitted first, of all connections alike.
#
# The sockets are read one after another, and each from its oldest byte on. If requests were admitted as they are read, the
# budget of a turn would go to the connections that happen to be read first, and the others would be refused again and
# again; and of each it would go to what has waited for the whole of the turn before. What is older than that and was not
# admitted is not late but refused, so the newest can wait for less. For a while after something had to be refused, requests
# are therefore kept until everything that has come is read. When each of them came is not known, but all came while the
# turn before ran: those of a connection are taken to have come evenly in that time.

cdef enum:
    AGES = 1024     # in so many steps

cdef Py_ssize_t KEPT_LIMIT_BYTES = LIMITS.kept_bytes
cdef int64_t KEEPS_NS = 100_000_000
cdef uint32_t STEP = 2_654_435_761     # of the golden ratio: any number of connections is gone round evenly


cdef bint _may_keep(Connection connection) noexcept:
    """Beyond so many bytes in a turn, what else comes is admitted or refused as it is read."""
    cdef Router router = connection.router
    return router.keeps and connection.data is not None and router.kept_bytes < KEPT_LIMIT_BYTES


cdef int _keep(Connection connection) except -1:
    """The request that is being read is to wait until all are."""
    cdef Router router = connection.router
    cdef kept_t *kept
    cdef void *grown
    if router.n_kept == router.kept_capacity:
        grown = realloc(router.kept, (2 * router.kept_capacity + 256) * sizeof(kept_t))
        if grown is NULL:
            raise MemoryError
        router.kept = <kept_t *>grown
        router.kept_capacity = 2 * router.kept_capacity + 256
    kept = &router.kept[router.n_kept]
    if router.n_kept == 0 or router.kept[router.n_kept - 1].data != <PyObject *>connection.data:
        router.kept_bytes += PyBytes_GET_SIZE(connection.data)
    kept.connection = <PyObject *>connection
    kept.data = <PyObject *>connection.data
    Py_INCREF(connection)
    Py_INCREF(connection.data)
    kept.message = connection.message_at
    kept.last_param = connection.last_param
    kept.size = connection.scan_bytes
    kept.nth = connection.n_kept
    connection.n_kept += 1
    router.n_kept += 1
    return router.wake()


cdef int _take_kept(Router router) except -1:
    """Read them now, the newest first; those of the same age begin with another connection each turn."""
    cdef Py_ssize_t i, at, n = router.n_kept
    cdef Py_ssize_t[AGES + 1] starts
    cdef Py_ssize_t *order
    cdef kept_t *kept
    cdef Connection connection
    cdef int age
    if n == 0:
        return 0
    order = <Py_ssize_t *>malloc(n * sizeof(Py_ssize_t))
    if order is NULL:
        raise MemoryError
    memset(starts, 0, sizeof(starts))
    for i in range(n):
        starts[_age(&router.kept[i]) + 1] += 1
    for age in range(AGES):
        starts[age + 1] += starts[age]
    router.first_kept += STEP
    for i in range(n):
        at = (i + router.first_kept) % n
        age = _age(&router.kept[at])
        order[starts[age]] = at
        starts[age] += 1
    try:
        for i in range(n):
            kept = &router.kept[order[i]]
            connection = <Connection>kept.connection
            if connection.state != GONE:
                connection.last_param = kept.last_param
                connection.scan_bytes = kept.size
                connection.message(kept.message)
    finally:
        free(order)
        _drop_kept(router)
    return 0


cdef int _age(const kept_t *kept) noexcept:
    cdef int64_t n = (<Connection>kept.connection).n_kept
    return <int>((n - 1 - kept.nth) * AGES // n)


cdef int _drop_kept(Router router) except -1:
    cdef Py_ssize_t i, n = router.n_kept
    cdef Connection connection
    router.n_kept = router.kept_bytes = 0
    for i in range(n):
        connection = <Connection>router.kept[i].connection
        connection.n_kept = 0
        if connection.state != OPEN:
            connection.maybe_end()
        Py_DECREF(connection)
        Py_DECREF(<object>router.kept[i].data)
    return 0
