# Routes and batches. Requests of one route are collected in a batch; the batch writes their replies.


cdef class WireRoute:
    def __init__(self, plan, bytes key, int64_t asked_version):
        Route.__init__(self, plan)
        self.key = key
        self.asked_version = asked_version
        self.features = plan.kind == "features"
        self.version = plan.version
        self.row_values = plan.row_values
        self.row_work = plan.row_work
        self.form = ReplyForm(plan)
        _init_cost(self)
        self.spare_batch = Batch(self, plan.new_columns())
        self.names = ColumnNames(self.spare_batch.columns)

    cdef WireRoute suspects_route(self):
        """Return the route that batches the requests of suspects, and make it at the first one."""
        if self.suspects is None:
            self.suspects = WireRoute(self.plan, self.key, self.asked_version)
            self.suspects.for_suspects = True
        return self.suspects

    def learn(self, double rows, double batch_ns, bint full=False):
        """Update the cost estimate with a batch of so many rows. full: requests were refused because of the budget."""
        self.full = full
        _learn(self, rows, batch_ns)

    def estimate_bad(self, bad):
        """Set the estimate of the share of bad requests, and return it."""
        self.bad = bad
        return bad

    def of_suspects(self):
        """As suspects_route, for requests that came by another protocol."""
        return self.suspects_route()

    cdef bint matches_request(self, bint features, const uint8_t *key, Py_ssize_t size, int64_t version) noexcept:
        """Whether a request goes to this route. key: encoded name or references; version: -1 for the current one."""
        if self.stale or self.features != features or PyBytes_GET_SIZE(self.key) != size:
            return False
        if memcmp(PyBytes_AS_STRING(self.key), key, size) != 0:
            return False
        if version == self.asked_version:
            return True
        return self.asked_version < 0 and version == self.version and self.canary is None


cdef class ReplyForm:
    def __init__(self, plan):
        self.features = plan.kind == "features"
        self.view_pieces = [msgpack.packb(name) for name in plan.lookup_names]
        self.types = plan.feature_types
        self.defaults = bytes(plan.has_default)

    cdef int make_template(self, list output_names) except -1:
        """Encode the part of a reply that is the same for every request: the reply's template.

        All replies by a plan are equal but for the arrays, the version and the row counts. The template is the list
        `pieces`, with one item more than there are output arrays. A reply is pieces[0], array 0, pieces[1], array 1 and
        so on, pieces[n], and then what put_reply adds: the version for a model, the statuses for features.

            model      {"outputs": {name: array, ...}, "version": v}, and "statuses": {view: array, ...} if asked for
            features   {"feature_names": [...], "types": [...], "values": [array, ...], "has_default": [...],
                        "statuses": [array, ...]}

        For a model, each array is preceded by its name; for features, pieces between arrays are empty, because the
        names come first. So a reply costs one copy of bytes per output, and makes no Python object. It is called at the
        first result, because only a result has the names of the outputs, and again if the outputs change.
        """
        packer = msgpack.Packer()
        if self.features:
            opening = packer.pack("feature_names") + packer.pack(output_names)
            opening += packer.pack("types") + packer.pack(list(self.types))
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
        self.form = route.form
        self.columns = columns

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.n_requests):
            if self.request[i].connection is not NULL:
                Py_DECREF(<object>self.request[i].connection)
        free(self.request)

    cdef int add(self, Connection connection, uint32_t msgid, const options_t *options, Py_ssize_t rows) except -1:
        """Add a request; its rows are the last `rows` rows of `columns`."""
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
            self.traces[self.n_requests] = (msgid, _traceparent(options))
        self.n_requests += 1
        return 0

    cdef int release(self, request_t *request) except -1:
        """Give up the connection of a request that was answered, or whose peer has gone."""
        if request.connection is not NULL:
            (<Connection>request.connection).in_flight -= 1
            (<Connection>request.connection).router.in_flight -= 1
            Py_DECREF(<object>request.connection)
            request.connection = NULL
        request.flags = 0
        return 0

    cdef int recycle(self) except -1:
        """Empty the batch and make it its route's spare batch, unless a column is larger than SPARE_BUFFER_BYTES."""
        cdef Columns columns = self.columns
        cdef column_t *col
        cdef int c
        _count_out(self)
        self.n_requests = 0
        self.traces = None
        self.form = self.route.form
        if self.keep:
            return 0
        columns.reset()
        for c in range(columns.n_columns):
            col = &columns.col[c]
            if col.data_cap > SPARE_BUFFER_BYTES:
                return 0
            if col.row_cap * 8 * (col.width if col.kind == KIND_VEC else 1) > SPARE_BUFFER_BYTES:
                return 0
        if self.route.spare_batch is None and not self.route.stale:
            self.route.spare_batch = self
        return 0

    def drop_expired(self):
        """Answer requests that are past their deadline, drop those of closed connections; return how many remain.

        The time of the call is the start of the batch (`started_ns`). If none remain, the batch is empty afterwards.
        """
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
                self.release(entry)
            elif entry.deadline_ns and entry.deadline_ns <= now_ns:
                connection.put_error(entry.msgid, "DEADLINE_EXCEEDED", "the deadline passed while the request waited")
                _count_unanswered(self, i, "DEADLINE_EXCEEDED", "the deadline passed while the request waited")
                self.release(entry)
            else:
                remain += 1
        self.waiting = remain
        if remain == 0:
            self.recycle()
        return remain

    protocol = 0    # index into metrics.PROTOCOLS
    inputs = None   # its requests bring columns, and never the model's input tensors

    @property
    def n_rows(self):
        return self.columns.n_rows

    def requests(self):
        """Return (number, first row, rows) of each request that has no answer yet, in order of their rows."""
        cdef Py_ssize_t i
        cdef request_t *entry
        found = []
        for i in range(self.n_requests):
            entry = &self.request[i]
            if entry.connection is not NULL or entry.flags & SILENT:
                found.append((i, entry.first, entry.rows))
        return found

    def refuse(self, Py_ssize_t number, str code, str message):
        """Answer one request with an error. Returns its sender."""
        cdef request_t *entry = &self.request[number]
        cdef Connection connection
        sender = None
        if entry.connection is not NULL:
            connection = <Connection>entry.connection
            sender = connection.sender
            connection.put_error(entry.msgid, code, message)
            _count_unanswered(self, number, code, message)
        self.release(entry)
        self.waiting -= 1
        return sender

    def leave_loop(self):
        """Run this batch in a thread: the route's next batch waits until it has run.

        Call it between `drop_expired` and `reply`. The cost of the batch moves from the event loop's queue to the
        route's own queue.
        """
        self.route.busy = self.route.threaded = True
        _leave_loop(self)

    def took(self, int64_t run_ns):
        """Set how long the batch has run, if it waited between its runs: its cost is learned from that."""
        self.started_ns = _now_ns() - run_ns

    def stay_in_loop(self):
        """Run this batch in the event loop; the route's next requests count as work of the loop."""
        self.route.threaded = False

    def answer_by(self, plan):
        """The results come from another plan than the route's: the catalog changed after the requests were read."""
        self.form = ReplyForm(plan)

    def keep_columns(self):
        """Do not reuse the columns after the reply: a shadow still reads them."""
        self.keep = True

    def count(self, Router router not None, Py_ssize_t rows, Py_ssize_t size):
        """Count a request that came by another protocol than MessagePack-RPC, and schedule `run`.

        rows: of the request. size: its bytes on the wire, for LIMITS.waiting_bytes; 0 if they are counted elsewhere.
        """
        _count_in(router, self, rows, size)
        router.wake()

    def start(self):
        """Note when the batch starts, for requests that were counted by `count`."""
        self.started_ns = _now_ns()

    def end(self, bint ran):
        """Uncount the requests that `count` has counted. ran: the batch was answered, so its time updates the cost."""
        if ran:
            _learn_cost(self)
        _count_out(self)

    def fail(self, str code, str message):
        """Answer each request that has no answer yet with this error."""
        cdef Py_ssize_t i
        cdef request_t *entry
        for i in range(self.n_requests):
            entry = &self.request[i]
            if entry.connection is not NULL:
                (<Connection>entry.connection).put_error(entry.msgid, code, message)
                _count_unanswered(self, i, code, message)
                self.release(entry)
        self.recycle()

    def reply_to(self, numbers, result):
        """Answer these requests with their rows of a pipeline.BatchResult. `reply` has to follow for the others."""
        cdef cnp.ndarray statuses = self.check_result(result)
        cdef Py_ssize_t number
        cdef int64_t version = result.version
        for number in numbers:
            self.answer(number, <const uint8_t *>cnp.PyArray_DATA(statuses), cnp.PyArray_DIM(statuses, 0), version)

    def reply(self, result):
        """Answer each request that has no answer yet with its rows of a pipeline.BatchResult.

        Raises Internal if an output's first dimension or the statuses' shape is not that of the batch. Requests that
        have no answer then still have to be answered by `fail`.
        """
        cdef cnp.ndarray statuses = self.check_result(result)
        cdef const uint8_t *codes = <const uint8_t *>cnp.PyArray_DATA(statuses)
        cdef Py_ssize_t i, n_statuses = cnp.PyArray_DIM(statuses, 0)
        cdef int64_t version = result.version
        for i in range(self.n_requests):
            self.answer(i, codes, n_statuses, version)
        _learn_cost(self)
        self.recycle()

    cdef cnp.ndarray check_result(self, result):
        """Give the outputs of a result to the encoder, and return its statuses. Raises Internal for a wrong shape."""
        cdef Py_ssize_t n_statuses, n_rows = self.columns.n_rows
        cdef ReplyForm form = self.form
        cdef cnp.ndarray statuses
        cdef list outputs = result.outputs
        if form.encoder is None or not form.encoder.set_arrays(outputs, n_rows):
            form.make_template([name for name, _ in outputs])
            form.encoder.set_arrays(outputs, n_rows)
        statuses = result.feature_statuses if form.features else result.view_statuses
        n_statuses = form.encoder.n if form.features else len(form.view_pieces)
        if (cnp.PyArray_NDIM(statuses) != 2 or cnp.PyArray_DIM(statuses, 0) != n_statuses
                or cnp.PyArray_DIM(statuses, 1) != n_rows or cnp.PyArray_TYPE(statuses) != cnp.NPY_UINT8
                or form.features and PyBytes_GET_SIZE(form.defaults) != n_statuses):
            raise Internal("the statuses of a result must be uint8 [views or features, rows of the batch]")
        return statuses if cnp.PyArray_IS_C_CONTIGUOUS(statuses) else np.ascontiguousarray(statuses)

    cdef int answer(self, Py_ssize_t number, const uint8_t *statuses, Py_ssize_t n_statuses,
                    int64_t version) except -1:
        """Write the reply to a request, unless it has its answer. A request that cannot be encoded fails alone.

        statuses: uint8 [n_statuses, rows of the batch].
        """
        cdef request_t *entry = &self.request[number]
        cdef Connection connection
        cdef size_t mark
        if entry.connection is NULL:
            entry.flags = 0
            return 0
        connection = <Connection>entry.connection
        if connection.state != GONE:
            mark = connection.out.size
            try:
                self.put_reply(&connection.out, entry, statuses, n_statuses, version)
                connection.schedule_write()
            except ResourceExhausted as error:
                connection.out.size = mark
                self.refuse(number, error.code, error.message)
                return 0
            except Exception as error:
                connection.out.size = mark
                if connection.router.fault is not None:
                    connection.router.fault(error)
                self.refuse(number, "INTERNAL", f"the answer cannot be encoded: {type(error).__name__}")
                return 0
        self.release(entry)
        return 0

    cdef int put_reply(self, mp_out *out, request_t *request, const uint8_t *statuses, Py_ssize_t n_statuses,
                       int64_t version) except -1:
        """Write the reply [1, msgid, nil, result] to a request. statuses: uint8 [n_statuses, rows of the batch]."""
        cdef ReplyForm form = self.form
        cdef Encoder encoder = form.encoder
        cdef bint as_tensor = request.flags & AS_TENSORS
        cdef bint with_views = not form.features and request.flags & WANTS_STATUSES
        cdef Py_ssize_t stride = self.columns.n_rows
        cdef const uint8_t *missing
        cdef int k
        encoder.stop_at = out.size + REPLY_BYTES
        if n_statuses:
            statuses += request.first
        _reserve(out, 16)
        mp_put_byte(out, 0x94)
        mp_put_byte(out, 1)
        mp_put_int(out, request.msgid)
        mp_put_byte(out, 0xC0)
        mp_put_byte(out, 0x85 if form.features else 0x83 if with_views else 0x82)
        for k in range(encoder.n):
            _put_bytes(out, <bytes>form.pieces[k])
            missing = NULL
            if form.features and not PyBytes_AS_STRING(form.defaults)[k]:
                missing = statuses + k * stride
            encoder.put_rows(out, k, request.first, request.rows, as_tensor, missing)
        _put_bytes(out, <bytes>form.pieces[encoder.n])
        if not form.features:
            _reserve(out, 32)
            mp_put_int(out, version)
            if with_views:
                _put_bytes(out, msgpack.packb("statuses") + msgpack.Packer().pack_map_header(n_statuses))
        if form.features or with_views:
            for k in range(n_statuses):
                if with_views:
                    _put_bytes(out, <bytes>form.view_pieces[k])
                _put_statuses(out, statuses + k * stride, request.rows, as_tensor)
        return 0
