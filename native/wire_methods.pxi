# The methods of MessagePack-RPC. predict and get_online_features are added to the open batch of their route, push,
# delete and command are forwarded to the writer, and all other methods are answered at once by a Python function.


cdef int _dispatch(Connection connection, const mp_value *method, const uint8_t *params, uint32_t msgid,
                   int flags) except -1:
    """Call the method of a request. Raises a ShorttailError, which is the reply."""
    cdef mp_value v
    cdef const uint8_t *p = mp_read(params, &v)
    if v.kind != MP_ARRAY:
        raise InvalidArgument(f"params of {_short_text(method)!r} must be an array")
    if connection.access < ACCESS_ADMIN:
        _check_access(connection, method)
    if _is(method, b"predict", 7):
        if not _is_large(connection) and _may_defer(connection):
            return _defer(connection)
        return _predict(connection, p, v.size, msgid, flags)
    if _is(method, b"get_online_features", 19):
        if not _is_large(connection) and _may_defer(connection):
            return _defer(connection)
        return _get_online_features(connection, p, v.size, msgid, flags)
    if connection.router.forward is not None and _needs_admin(method):
        return _forward(connection, _text(method), params, msgid, flags)
    if connection.scan_bytes > CALL_BYTES:
        raise InvalidArgument(f"a message of {connection.scan_bytes} bytes calls {_short_text(method)!r}; "
                              f"at most {CALL_BYTES} are taken")
    if connection.router.auth is not None and _is(method, b"auth", 4):
        return _authenticate(connection, params, msgid, flags)
    return _run_handler(connection, _text(method), params, msgid, flags)


cdef bint _needs_admin(const mp_value *method) noexcept:
    """Whether a method needs the admin token: those that the writer answers."""
    return _is(method, b"push", 4) or _is(method, b"delete", 6) or _is(method, b"command", 7)


cdef int _check_access(Connection connection, const mp_value *method) except -1:
    """Raise Unauthenticated or PermissionDenied if the connection's access does not allow the method."""
    if connection.access == ACCESS_NONE:
        connection.requests_before_auth += 1
        if connection.requests_before_auth > STRANGER_REQUESTS:
            connection.state = REFUSED
            raise Unauthenticated(f"{STRANGER_REQUESTS} requests without the right token; connect again")
        if not (_is(method, b"auth", 4) or _is(method, b"ping", 4)):
            raise Unauthenticated("this server requires a token: call `auth` with it first")
    elif _needs_admin(method):
        raise PermissionDenied(f"{_text(method)} needs the admin token; this connection has shown the serve token")
    return 0


cdef int _authenticate(Connection connection, const uint8_t *params, uint32_t msgid, int flags) except -1:
    """Check the token of `auth` and reply true. Raises Unauthenticated."""
    given = _as_python(params)
    cdef int access = connection.router.auth(given)
    connection.access = max(connection.access, access)
    connection.sender = (hash(given[0]), connection.sender[1])
    if flags & SILENT:
        return 0
    _reserve(&connection.out, 16)
    mp_put_raw(&connection.out, <const uint8_t *>b"\x94\x01", 2)
    mp_put_int(&connection.out, msgid)
    mp_put_raw(&connection.out, <const uint8_t *>b"\xC0\xC3", 2)
    return connection.schedule_write()


cdef int _refuse_cheaply(Connection connection, WireRoute route, int why, uint32_t msgid, int flags) except -1:
    """Reply that admission refused a request. It is cheap: no exception, and the error is encoded already."""
    if why == OVERLOADED:
        connection.router.shed += 1
        route.shed += 1
    else:
        _count_errors(connection.router, _method_of(route), route.plan.model, "DEADLINE_EXCEEDED", 1, msgid,
                      EXPIRED_MESSAGE)
    if flags & SILENT:
        return 0
    _reserve(&connection.out, 16)
    mp_put_raw(&connection.out, <const uint8_t *>b"\x94\x01", 2)
    mp_put_int(&connection.out, msgid)
    replies = OVERLOADED_REPLIES if why == OVERLOADED else EXPIRED_REPLIES
    _put_bytes(&connection.out, <bytes>replies[connection.router.error_form])
    return connection.schedule_write()


cdef int _options_of(Connection connection, int takes, options_t *options) except -1:
    """Read the options of the message that is being read, which are its last param."""
    cdef Py_ssize_t size = connection.message_at + connection.scan_bytes - connection.last_param
    if size > CALL_BYTES:
        raise InvalidArgument(f"options of {size} bytes; at most {CALL_BYTES} are taken")
    return _read_options(connection.last_param, takes, options)


cdef int _predict(Connection connection, const uint8_t *p, uint32_t n, uint32_t msgid, int flags) except -1:
    """Add a predict request to the batch of its model. p: the first of n params."""
    cdef mp_value model, columns
    cdef options_t options
    cdef WireRoute route
    cdef const uint8_t *map_at = p
    _default_options(&options, flags, connection.router)
    model.kind = columns.kind = MP_NIL
    if 2 <= n <= 3:
        map_at = mp_read(p, &model)
        if model.kind == MP_STR:
            mp_read(map_at, &columns)
    if columns.kind != MP_MAP:
        raise InvalidArgument("predict takes [model, {column: value or array}, {option: value}?]")
    if n == 3:
        _options_of(connection, PREDICT_OPTIONS, &options)
    if _is_large(connection):
        return _forward_bulk(connection, msgid, &options)
    route = connection.last_route
    if route is None or not route.matches_request(False, model.body, model.size, options.version):
        route = connection.last_route = connection.router.model_route(model.body, model.size, options.version)
    connection.route = route
    return _enqueue(connection, route, map_at, msgid, &options)


cdef int _get_online_features(Connection connection, const uint8_t *p, uint32_t n, uint32_t msgid, int flags) except -1:
    """Add a get_online_features request to the batch of its list of features. p: the first of n params."""
    cdef mp_value refs, columns
    cdef options_t options
    cdef const uint8_t *map_at = p
    _default_options(&options, flags, connection.router)
    refs.kind = columns.kind = MP_NIL
    if 2 <= n <= 3:
        mp_read(p, &refs)
        if refs.kind == MP_ARRAY and _is_large(connection):
            if n == 3:
                _options_of(connection, FEATURES_OPTIONS, &options)
            return _forward_bulk(connection, msgid, &options)
        if refs.kind == MP_ARRAY:
            map_at = mp_skip(p)
            mp_read(map_at, &columns)
    if columns.kind != MP_MAP:
        raise InvalidArgument("get_online_features takes [[feature reference], {key column: value or array}, "
                              "{option: value}?]")
    if n == 3:
        _options_of(connection, FEATURES_OPTIONS, &options)
    if connection.last_route is None or not connection.last_route.matches_request(True, p, map_at - p, -1):
        if (connection.router.bulk is not None and refs.size > LOOP_REFERENCES
                and not connection.router.has_features_route(p, map_at - p)):
            return _forward_bulk(connection, msgid, &options)
        connection.last_route = connection.router.features_route(p, map_at - p)
    return _enqueue(connection, connection.last_route, map_at, msgid, &options)


cdef int _enqueue(Connection connection, WireRoute route, const uint8_t *columns, uint32_t msgid,
                  const options_t *options) except -1:
    """Admit a request and read its columns into the open batch of its route, or of the route's canary."""
    cdef Batch batch = route.open
    cdef Py_ssize_t rows
    cdef int why = _admit(connection.router, route, options)
    if why != ADMITTED:
        if options.trace is not NULL:
            _note_refused(connection.router, route, why, msgid, options)
        return _refuse_cheaply(connection, route, why, msgid, options.flags)
    if connection.in_flight >= CONNECTION_REQUESTS:
        raise ResourceExhausted(f"{connection.in_flight} requests of this connection are in flight; "
                                f"wait for their answers, then send it again")
    if batch is None:
        batch = route.spare_batch
        route.spare_batch = None
        if batch is None:
            batch = Batch(route, route.plan.new_columns())
        route.open = batch
    route.names.uncommon_left = LOOP_UNCOMMON_VALUES if connection.router.bulk is not None else ANY_VALUES
    try:
        rows = _read_columns(batch.columns, route.names, columns)
    except _TooLong:
        return _forward_bulk(connection, msgid, options)
    if route.features and rows * route.row_values > REPLY_VALUES:
        batch.columns.drop_last(rows)
        raise ResourceExhausted(f"{rows} rows of {route.row_values} values; at most {REPLY_VALUES} values are answered "
                                f"at once: send it in parts")
    if rows * route.row_work > LOOP_VALUES and connection.router.bulk is not None:
        batch.columns.drop_last(rows)
        return _forward_bulk(connection, msgid, options)
    if route.canary is not None and rows and route.split.takes(batch.columns, batch.columns.n_rows - rows):
        batch.columns.drop_last(rows)
        return _enqueue(connection, route.canary, columns, msgid, options)
    if len(connection.router.suspects) and not route.features and not route.for_suspects and _is_suspect(connection):
        batch.columns.drop_last(rows)
        return _enqueue(connection, route.suspects_route(), columns, msgid, options)
    if options.as_of_us >= 0:
        batch.columns.judge_at(options.as_of_us, rows)
    batch.add(connection, msgid, options, rows)
    _count_in(connection.router, batch, rows, connection.scan_bytes)
    if batch.n_requests == 1:
        batch.opened_ns = connection.router.turn_ns
        connection.router.pending.append(batch)
        connection.router.wake()
    if batch.columns.n_rows >= BATCH_ROWS:
        route.open = None
    return 0


cdef bint _is_suspect(Connection connection) except -1:
    """Whether the sender of a request has sent several bad rows lately."""
    until_ns = connection.router.suspects.get(connection.sender)
    return until_ns is not None and <int64_t>until_ns > connection.router.turn_ns


cdef int _forward(Connection connection, str method, const uint8_t *params, uint32_t msgid, int flags) except -1:
    """Forward a push, delete or command to the writer, not decoded. `Connection.relay` brings the reply."""
    cdef mp_value v, view, columns
    cdef options_t options
    cdef const uint8_t *map_at
    cdef const uint8_t *p = mp_read(params, &v)
    cdef uint32_t n = v.size
    _default_options(&options, flags, connection.router)
    columns.kind = MP_NIL
    if 2 <= n <= 3:
        map_at = mp_read(p, &view)
        if view.kind == MP_STR:
            mp_read(map_at, &columns)
    if columns.kind != MP_MAP:
        raise InvalidArgument(f"{method} takes " + ("[step, {name: value}]" if method == "command" else
                                                    "[view, {column: value or array}, {option: value}?]"))
    if n == 3:
        _options_of(connection, PUSH_OPTIONS if method == "push" else DELETE_OPTIONS, &options)
    if connection.forwarded >= PUSHES_PER_CONNECTION:
        raise ResourceExhausted(f"{connection.forwarded} requests of this connection wait to be written; "
                                f"wait for their answers, then send it again")
    silent = bool(flags & SILENT)
    data = _rest_of(connection, params)     # params are the last item of the message
    if options.trace is NULL:
        connection.router.forward(None if silent else connection, msgid, method, data, options.deadline_ns)
    else:
        connection.router.forward(None if silent else connection, msgid, method, data, options.deadline_ns,
                                  _traceparent(&options))
    if not silent:
        connection.in_flight += 1
        connection.router.in_flight += 1
        connection.forwarded += 1
    return 0


cdef int _run_handler(Connection connection, str method, const uint8_t *params, uint32_t msgid, int flags) except -1:
    """Answer a method that is not batched by its Python function, which takes and returns any MessagePack values."""
    handler = connection.router.handlers.get(method)
    if handler is None:
        writes = ["push", "delete", "command"] if connection.router.forward is not None else []
        known = ", ".join(["predict", "get_online_features", *writes, *connection.router.handlers])
        raise NotFound(f"unknown method {method!r}; methods: {known}")
    result = msgpack.packb(handler(_as_python(params)))
    if flags & SILENT:
        return 0
    _reserve(&connection.out, 16)
    mp_put_byte(&connection.out, 0x94)
    mp_put_byte(&connection.out, 1)
    mp_put_int(&connection.out, msgid)
    mp_put_byte(&connection.out, 0xC0)
    _put_bytes(&connection.out, result)
    return connection.schedule_write()
