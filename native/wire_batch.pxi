# The server's routes and batches: what requests gather in, and what answers them.


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
            opening += packer.pack("types") + packer.pack(list(self.plan.feature_types))
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
        self.route.busy = self.route.threaded = True
        _leave_loop(self)

    def stay_in_loop(self):
        """It runs in the loop, and the route's next ones are admitted as such."""
        self.route.threaded = False

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
        mp_put_byte(out, 0x85 if route.features else 0x83 if with_views else 0x82)
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
