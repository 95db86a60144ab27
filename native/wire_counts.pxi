# Counts of errors by method, model and code, which server/telemetry.py reads. Requests that were answered are counted
# per batch, in server/batcher.py.

cdef Py_ssize_t TRACED_FAILURES = LIMITS.traced_failures


cdef int _count_errors(Router router, str method, str model, str code, int64_t n, int64_t msgid, str message) except -1:
    """Add n errors of one kind. The message and the msgid (-1: none) of the last one are kept for the log."""
    key = (method, model, code)
    entry = router.errors.get(key)
    if entry is None:
        entry = router.errors[key] = [0, None, None]
    (<list>entry)[0] = (<list>entry)[0] + n
    (<list>entry)[1] = msgid
    (<list>entry)[2] = message
    return 0


cdef int _note_traced(Router router, str method, str model, str code, int64_t msgid, str message,
                      bytes trace) except -1:
    """Keep a failed request that has a traceparent for a log line of its own, up to TRACED_FAILURES requests."""
    if trace is not None and len(router.traced) < TRACED_FAILURES:
        router.traced.append((method, model, code, msgid, message, trace))
    return 0


cdef int _note_refused(Router router, WireRoute route, int why, uint32_t msgid, const options_t *options) except -1:
    """Keep a request that admission refused for a log line of its own. why: OVERLOADED or EXPIRED."""
    if len(router.traced) >= TRACED_FAILURES:
        return 0
    code, message = "RESOURCE_EXHAUSTED", OVERLOADED_MESSAGE
    if why == EXPIRED:
        code, message = "DEADLINE_EXCEEDED", EXPIRED_MESSAGE
    return _note_traced(router, _method_of(route), route.plan.model, code, msgid, message, _traceparent(options))


cdef int _count_unanswered(Batch batch, Py_ssize_t i, str code, str message) except -1:
    """Count the error that request i of a batch gets instead of its answer."""
    cdef request_t *entry = &batch.request[i]
    cdef Router router = (<Connection>entry.connection).router
    cdef str method = _method_of(batch.route)
    cdef str model = batch.route.plan.model
    _count_errors(router, method, model, code, 1, entry.msgid, message)
    if batch.traces is not None and i in batch.traces:
        _note_traced(router, method, model, code, entry.msgid, message, batch.traces.pop(i)[1])
    return 0


cdef str _method_of(WireRoute route):
    return "get_online_features" if route.features else "predict"


cdef int _count_shed(Router router, WireRoute route) except -1:
    """Move the requests that a route has refused because of overload to the errors.

    They are counted in the route first, because a refusal has to be cheap: no dict and no Python object.
    """
    while route is not None:
        if route.shed:
            _count_errors(router, _method_of(route), route.plan.model, "RESOURCE_EXHAUSTED", route.shed, -1,
                          "the server is overloaded")
            route.shed = 0
        if route.suspects is not None:
            _count_shed(router, route.suspects)
        route = route.canary
    return 0


cdef int _count_failed(Connection connection, const mp_value *method, const uint8_t *params, str code, uint32_t msgid,
                       str message) except -1:
    """Count a request that failed while it was read. The model is "unknown" unless a model of that name exists."""
    cdef str name = "other"
    cdef str model = ""
    if method.kind == MP_STR:
        if _is(method, b"predict", 7):
            name = "predict"
            model = "unknown" if connection.route is None else connection.route.plan.model
        elif _is(method, b"get_online_features", 19):
            name = "get_online_features"
        elif _is(method, b"push", 4):
            name = "push"
        elif _is(method, b"delete", 6):
            name = "delete"
    _count_errors(connection.router, name, model, code, 1, msgid, message)
    trace = _traceparent_in(params) if connection.scan_elements <= LOOP_ELEMENTS else None
    return _note_traced(connection.router, name, model, code, msgid, message, trace)
