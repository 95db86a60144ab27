# The protocol: what a peer may say, and what it hears.

cdef enum:
    OPEN = 0
    ENDING = 1      # no new requests; closed when what is in flight is answered
    REFUSED = 2     # as ENDING, after a message that cannot be understood
    LINGERING = 3   # told so; what it still sends is dropped until it closes
    GONE = 4

cdef int64_t MSGID_MAX = (1 << 32) - 1
# Closing at once, with input unread, would reset the connection and could destroy the error that was just sent.
cdef double LINGER_S = 1.0

NOT_RPC = "not a MessagePack-RPC message: expected [0, msgid, method, [params]] or [2, method, [params]]"


cdef tuple _scan_error(int found):
    if found == MP_NOT_MSGPACK:
        return "INVALID_ARGUMENT", "not MessagePack: a byte 0xc1, which it does not use"
    if found == MP_TOO_LONG:
        return "RESOURCE_EXHAUSTED", f"a message of more than {LIMITS.frame_bytes} bytes; send it in parts"
    if found == MP_TOO_DEEP:
        return "RESOURCE_EXHAUSTED", f"a message nested more than {LIMITS.nesting_depth} deep"
    return "RESOURCE_EXHAUSTED", f"a message of more than {LIMITS.declared_elements} elements; send it in parts"


cdef tuple _stranger_error(int found):
    if found == MP_TOO_LONG or found == MP_TOO_MANY:
        return "UNAUTHENTICATED", f"a message of more than {LIMITS.stranger_frame_bytes} bytes or 64 elements before `auth`"
    return _scan_error(found)


cdef class Connection:
    """Connection(router, secure=False): an asyncio protocol for one peer. secure: the transport is TLS."""

    def __cinit__(self, Router router, bint secure=False):
        self.router = router
        self.secure = secure
        self.access = router.access
        mp_scan_reset(&self.scan)

    def __dealloc__(self):
        free(self.out.data)
        free(self.held.data)

    # -- asyncio's side ----------------------------------------------------------------------------------------

    def connection_made(self, transport):
        self.transport = transport
        transport.set_write_buffer_limits(high=LIMITS.output_high_water_bytes, low=LIMITS.output_low_water_bytes)
        self.router.connections.add(self)
        self.router.accepted += 1
        if self.router.max_connections or self.router.max_peer_connections:
            self.count_peer()
        if self.carried is not None:
            carried, self.carried = self.carried, None
            self.data_received(carried)

    def connection_lost(self, error):
        self.state = GONE
        self.transport = None
        # A peer that never reads has its memory given back here, not when the last reference goes.
        self.drop_buffer(&self.out)
        self.drop_buffer(&self.held)
        self.router.connections.discard(self)
        if self.peer is not None:
            self.router.peers[self.peer] -= 1
            if self.router.peers[self.peer] == 0:
                del self.router.peers[self.peer]

    cdef int drop_buffer(self, mp_out *buffer) except -1:
        free(buffer.data)
        memset(buffer, 0, sizeof(mp_out))
        return 0

    cdef int count_peer(self) except -1:
        """Refuse this connection if it is one too many, in all or from its address."""
        cdef Router router = self.router
        address = self.transport.get_extra_info("peername")
        if isinstance(address, tuple):  # of a Unix socket it is text, and its peers are all on this machine
            self.peer = address[0]
            router.peers[self.peer] = router.peers.get(self.peer, 0) + 1
            if router.max_peer_connections and router.peers[self.peer] > router.max_peer_connections:
                router.refused += 1
                return self.refuse("RESOURCE_EXHAUSTED", f"more than {router.max_peer_connections} connections from one address; close some")
        if router.max_connections and len(router.connections) > router.max_connections:
            router.refused += 1
            return self.refuse("RESOURCE_EXHAUSTED", f"more than {router.max_connections} connections; come back later")
        return 0

    def data_received(self, bytes data not None):
        cdef const uint8_t *p = <const uint8_t *>PyBytes_AS_STRING(data)
        cdef size_t size = PyBytes_GET_SIZE(data)
        cdef size_t taken
        cdef bint joined
        self.heard = True
        self.router.received_bytes += size
        _begin_unless_begun(self.router)
        self.router.reading = True
        joined = self.router.keeps and 0 < self.held.size <= size
        if joined:
            data = PyBytes_FromStringAndSize(<const char *>self.held.data, self.held.size) + data
            p = <const uint8_t *>PyBytes_AS_STRING(data)
            size = PyBytes_GET_SIZE(data)
            self.held.size = 0
        if self.held.size == 0:
            self.data = data
            taken = self.take(p, size)
            self.data = None
            if taken < size:
                if taken or not joined:
                    self.held_s = 0
                self.hold(p + taken, size - taken)
        elif self.state == OPEN:
            self.hold(p, size)
            self.drop_held(self.take(self.held.data, self.held.size))
        self.router.reading = False

    def eof_received(self):
        """The peer sends no more. True keeps the connection until what it is owed is written."""
        if self.state < LINGERING:
            self.state = ENDING
            return not self.secure and bool(self.in_flight or self.touched or self.n_kept)
        return False

    def carry(self, bytes held not None, int access):
        """Go on where another worker left off. held: what it had read of a message. Call it before connection_made."""
        self.carried = held or None
        self.access = access

    def fileno(self):
        """The socket's file descriptor. Raises OSError when the connection is gone."""
        if self.transport is None:
            raise OSError("the connection is gone")
        return self.transport.get_extra_info("socket").fileno()

    @property
    def stays(self):
        """Whether it can never move to another worker: over TLS, or ending."""
        return self.state != OPEN or self.secure

    def park(self, Py_ssize_t most):
        """Read no more, unless this connection has to end here: over TLS, ending, or in a message of over `most` bytes.

        Returns whether it is parked.
        """
        if self.state != OPEN or self.secure or self.transport is None or self.held.size > <size_t>most:
            return False
        if not self.parked:
            self.parked = True
            self.transport.pause_reading()
        return True

    def quiet(self, Py_ssize_t most):
        """What has been read of a message, if nothing else is under way and it is at most so many bytes; else None."""
        if (self.state != OPEN or self.in_flight or self.n_kept or self.touched or self.out.size or self.secure
                or self.held.size > <size_t>most or self.transport is None
                or self.transport.get_write_buffer_size()):
            return None
        return PyBytes_FromStringAndSize(<const char *>self.held.data, self.held.size)

    def pause_writing(self):
        self.paused = True
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self):
        self.paused = False
        if not self.parked and not self.transport.is_closing():
            self.transport.resume_reading()

    def finish(self):
        """Take no more requests; close when those in flight are answered."""
        if self.state == OPEN:
            self.state = ENDING
        self.maybe_end()

    def abort(self):
        """Close now, whatever is owed."""
        if self.transport is not None:
            self.transport.abort()

    # -- bytes in ----------------------------------------------------------------------------------------------

    cdef int hold(self, const uint8_t *data, size_t size) except -1:
        # Grows with what has arrived, never with what a header announces.
        _need(&self.held, size)
        mp_put_raw(&self.held, data, size)
        return 0

    cdef int drop_held(self, size_t size) except -1:
        if size:
            self.held_s = 0     # what is left is of another message, whose time begins anew
        self.held.size -= size
        if self.held.size:
            memmove(self.held.data, self.held.data + size, self.held.size)
        elif self.held.capacity > <size_t>KEPT_BYTES:
            free(self.held.data)
            memset(&self.held, 0, sizeof(mp_out))
        return 0

    cdef size_t take(self, const uint8_t *data, size_t size) except? 0:
        """Handle the whole messages at the start of `data`; returns their bytes. No message is scanned twice."""
        cdef size_t start = 0
        cdef size_t length
        cdef int found
        while start < size and self.state == OPEN:
            found = mp_scan_on(&self.scan, data + start, size - start, &MESSAGE if self.access else &STRANGER)
            if found == MP_MORE:
                return start
            if found != MP_WHOLE:
                code, reason = _scan_error(found) if self.access else _stranger_error(found)
                self.refuse(code, reason)
                break
            length = self.scan.position
            self.scan_bytes = length
            self.last_param = data + start + self.scan.at_depth_2
            mp_scan_reset(&self.scan)
            self.message(data + start)
            start += length
        return size

    cdef int refuse(self, str code, str reason) except -1:
        """The peer does not speak the protocol, or where its next message starts is lost: say so, and close."""
        self.put_error(-1, code, reason)
        self.state = REFUSED
        return 0

    cdef int message(self, const uint8_t *p) except -1:
        """One message that the scanner has passed: answered, in a batch, or refused."""
        cdef mp_value v, method
        cdef uint32_t msgid = 0
        cdef uint32_t n
        cdef int flags = 0
        self.message_at = p
        p = mp_read(p, &v)
        n = v.size if v.kind == MP_ARRAY else 0
        if n:
            p = mp_read(p, &v)
        if n == 4 and v.kind == MP_INT and v.number.i == 0:
            p = mp_read(p, &v)
            if v.kind != MP_INT or v.number.i < 0 or v.number.i > MSGID_MAX:
                return self.refuse("INVALID_ARGUMENT", "msgid must be a whole number from 0 to 4294967295")
            msgid = <uint32_t>v.number.i
        elif n == 3 and v.kind == MP_INT and v.number.i == 2:
            flags = SILENT
        else:
            return self.refuse("INVALID_ARGUMENT", NOT_RPC)
        self.asked = None
        method.kind = MP_NIL
        try:
            p = mp_read(p, &method)
            if method.kind != MP_STR:
                raise InvalidArgument("method must be a string")
            self.call(&method, p, msgid, flags)
        except ShorttailError as error:
            _count_failed(self, &method, p, error.code, msgid, error.message)
            if not flags & SILENT:
                self.put_error(msgid, error.code, error.message)
        except Exception as error:
            if self.router.fault is not None:
                self.router.fault(error)
            _count_failed(self, &method, p, "INTERNAL", msgid, type(error).__name__)
            if not flags & SILENT:
                self.put_error(msgid, "INTERNAL", f"{type(error).__name__} while reading the request")
        return 0

    cdef int call(self, const mp_value *method, const uint8_t *params, uint32_t msgid, int flags) except -1:
        cdef mp_value v
        cdef const uint8_t *p = mp_read(params, &v)
        if v.kind != MP_ARRAY:
            raise InvalidArgument(f"params of {_text(method)!r} must be an array")
        if self.access < ACCESS_ADMIN:
            self.check_access(method)
        if self.router.auth is not None and _is(method, b"auth", 4):
            return self.authenticate(params, msgid, flags)
        if _is(method, b"predict", 7):
            if _may_keep(self):
                return _keep(self)
            return self.predict(p, v.size, msgid, flags)
        if _is(method, b"get_online_features", 19):
            if _may_keep(self):
                return _keep(self)
            return self.get_online_features(p, v.size, msgid, flags)
        if self.router.forward is not None and (_is(method, b"push", 4) or _is(method, b"delete", 6)):
            return self.hand_on(_text(method), params, msgid, flags)
        return self.handle(_text(method), params, msgid, flags)

    cdef int check_access(self, const mp_value *method) except -1:
        if self.access == ACCESS_NONE:
            self.strange += 1
            if self.strange > STRANGER_REQUESTS:
                self.state = REFUSED
                raise Unauthenticated(f"{STRANGER_REQUESTS} requests came before the right token; connect again")
            if not (_is(method, b"auth", 4) or _is(method, b"ping", 4)):
                raise Unauthenticated("this server wants a token: call `auth` with it first")
        elif _is(method, b"push", 4) or _is(method, b"delete", 6):
            raise PermissionDenied(f"{_text(method)} needs the admin token; this connection has shown the serve token")
        return 0

    cdef int authenticate(self, const uint8_t *params, uint32_t msgid, int flags) except -1:
        cdef int access = self.router.auth(_as_python(params))
        self.access = max(self.access, access)
        if flags & SILENT:
            return 0
        _need(&self.out, 16)
        mp_put_raw(&self.out, <const uint8_t *>b"\x94\x01", 2)
        mp_put_int(&self.out, msgid)
        mp_put_raw(&self.out, <const uint8_t *>b"\xC0\xC3", 2)
        return self.touch()

    cdef int refuse_cheaply(self, WireRoute route, int why, uint32_t msgid, int flags) except -1:
        """Refuse a request for want of time: no exception, nothing is packed."""
        if why == TOO_MUCH:
            self.router.shed += 1
            route.shed += 1
        else:
            _count_errors(self.router, _method_of(route), route.plan.model, "DEADLINE_EXCEEDED", 1, msgid, LATE_MESSAGE)
        if flags & SILENT:
            return 0
        _need(&self.out, 16)
        mp_put_raw(&self.out, <const uint8_t *>b"\x94\x01", 2)
        mp_put_int(&self.out, msgid)
        _put_bytes(&self.out, SHED if why == TOO_MUCH else LATE)
        return self.touch()

    cdef int predict(self, const uint8_t *p, uint32_t n, uint32_t msgid, int flags) except -1:
        cdef mp_value model, columns
        cdef options_t options
        cdef const uint8_t *map_at = p
        _no_options(&options, flags, self.router)
        model.kind = columns.kind = MP_NIL
        if 2 <= n <= 3:
            map_at = mp_read(p, &model)
            if model.kind == MP_STR:
                mp_read(map_at, &columns)
        if columns.kind != MP_MAP:
            raise InvalidArgument("predict takes [model, {column: value or array}, {option: value}?]")
        if n == 3:
            _read_options(self.last_param, PREDICT_OPTIONS, &options)
        if self.last is None or not self.last.leads_from(False, model.body, model.size, options.version):
            self.last = self.router.model_route(model.body, model.size, options.version)
        self.asked = self.last
        return self.enqueue(self.last, map_at, msgid, &options)

    cdef int get_online_features(self, const uint8_t *p, uint32_t n, uint32_t msgid, int flags) except -1:
        cdef mp_value refs, columns
        cdef options_t options
        cdef const uint8_t *map_at = p
        _no_options(&options, flags, self.router)
        refs.kind = columns.kind = MP_NIL
        if 2 <= n <= 3:
            mp_read(p, &refs)
            if refs.kind == MP_ARRAY:
                map_at = mp_skip(p)
                mp_read(map_at, &columns)
        if columns.kind != MP_MAP:
            raise InvalidArgument("get_online_features takes [[feature reference], {key column: value or array}, {option: value}?]")
        if n == 3:
            _read_options(self.last_param, FEATURES_OPTIONS, &options)
        if self.last is None or not self.last.leads_from(True, p, map_at - p, -1):
            self.last = self.router.features_route(p, map_at - p)
        return self.enqueue(self.last, map_at, msgid, &options)

    cdef int enqueue(self, WireRoute route, const uint8_t *columns, uint32_t msgid, const options_t *options) except -1:
        """Read the columns into the route's open batch."""
        cdef Batch batch = route.open
        cdef Py_ssize_t rows
        cdef int why = _admit(self.router, route, options)
        if why != ADMITTED:
            if options.trace is not NULL:
                _note_refused(self.router, route, why, msgid, options)
            return self.refuse_cheaply(route, why, msgid, options.flags)
        if self.in_flight >= CONNECTION_REQUESTS:
            raise ResourceExhausted(f"{self.in_flight} requests of this connection are in flight; "
                                    f"wait for their answers, then send it again")
        if batch is None:
            batch = route.spare_batch
            route.spare_batch = None
            if batch is None:
                batch = Batch(route, route.plan.new_columns())
            route.open = batch
        rows = _read_columns(batch.columns, route.names, columns)
        if route.canary is not None and rows and route.split.takes(batch.columns, batch.columns.n_rows - rows):
            batch.columns.drop_last(rows)
            return self.enqueue(route.canary, columns, msgid, options)
        batch.add(self, msgid, options, rows)
        _count_in(self.router, batch, rows, self.scan_bytes)
        if batch.n_requests == 1:
            batch.opened_ns = self.router.turn_ns
            self.router.pending.append(batch)
            self.router.wake()
        if batch.columns.n_rows >= BATCH_ROWS:
            route.open = None
        return 0

    cdef int hand_on(self, str method, const uint8_t *params, uint32_t msgid, int flags) except -1:
        """A push or delete: to the writer with its columns unread. The answer comes by relay()."""
        cdef mp_value v, view, columns
        cdef options_t options
        cdef const uint8_t *map_at
        cdef const uint8_t *p = mp_read(params, &v)
        cdef uint32_t n = v.size
        _no_options(&options, flags, self.router)
        columns.kind = MP_NIL
        if 2 <= n <= 3:
            map_at = mp_read(p, &view)
            if view.kind == MP_STR:
                mp_read(map_at, &columns)
        if columns.kind != MP_MAP:
            raise InvalidArgument(f"{method} takes [view, {{column: value or array}}, {{option: value}}?]")
        if n == 3:
            _read_options(self.last_param, WRITE_OPTIONS, &options)
        if self.forwarded >= PUSHES_PER_CONNECTION:
            raise ResourceExhausted(f"{self.forwarded} requests of this connection wait to be written; "
                                    f"wait for their answers, then send it again")
        silent = bool(flags & SILENT)
        data = PyBytes_FromStringAndSize(<const char *>params, mp_skip(params) - params)
        if options.trace is NULL:
            self.router.forward(None if silent else self, msgid, method, data, options.deadline_ns)
        else:
            self.router.forward(None if silent else self, msgid, method, data, options.deadline_ns, _trace(&options))
        if not silent:
            self.in_flight += 1
            self.router.in_flight += 1
            self.forwarded += 1
        return 0

    def relay(self, uint32_t msgid, bytes outcome not None):
        """Answer what was handed on. outcome: the MessagePack of its error and then of its result."""
        self.in_flight -= 1
        self.router.in_flight -= 1
        self.forwarded -= 1
        if self.state == GONE:
            return
        _need(&self.out, 16)
        mp_put_byte(&self.out, 0x94)
        mp_put_byte(&self.out, 1)
        mp_put_int(&self.out, msgid)
        _put_bytes(&self.out, outcome)
        self.touch()

    cdef int handle(self, str method, const uint8_t *params, uint32_t msgid, int flags) except -1:
        """A method that is not batched: any MessagePack in, any out."""
        handler = self.router.handlers.get(method)
        if handler is None:
            writes = ["push", "delete"] if self.router.forward is not None else []
            known = ", ".join(["predict", "get_online_features", *writes, *self.router.handlers])
            raise NotFound(f"unknown method {method!r}; methods: {known}")
        result = msgpack.packb(handler(_as_python(params)))
        if flags & SILENT:
            return 0
        _need(&self.out, 16)
        mp_put_byte(&self.out, 0x94)
        mp_put_byte(&self.out, 1)
        mp_put_int(&self.out, msgid)
        mp_put_byte(&self.out, 0xC0)
        _put_bytes(&self.out, result)
        return self.touch()

    # -- bytes out ---------------------------------------------------------------------------------------------

    cdef int touch(self) except -1:
        if not self.touched:
            self.touched = True
            self.router.touched.append(self)
            self.router.wake()
        return 0

    cdef int put_error(self, int64_t msgid, str code, str message) except -1:
        """msgid: -1 when it is not known."""
        _need(&self.out, 16)
        mp_put_byte(&self.out, 0x94)
        mp_put_byte(&self.out, 1)
        if msgid < 0:
            mp_put_byte(&self.out, 0xC0)
        else:
            mp_put_int(&self.out, msgid)
        _put_bytes(&self.out, msgpack.packb({"code": code, "message": message}, unicode_errors="replace"))
        _need(&self.out, 1)
        mp_put_byte(&self.out, 0xC0)
        return self.touch()

    cdef int write_out(self) except -1:
        self.touched = False
        if self.state != GONE and self.out.size:
            data = PyBytes_FromStringAndSize(<const char *>self.out.data, self.out.size)
            self.out.size = 0
            self.transport.write(data)
            self.sent += PyBytes_GET_SIZE(data)
            self.router.sent_bytes += PyBytes_GET_SIZE(data)
            self.owes = True
        if self.out.capacity > <size_t>KEPT_BYTES:
            free(self.out.data)
            memset(&self.out, 0, sizeof(mp_out))
        if self.state != OPEN:
            self.maybe_end()
        return 0

    cdef int maybe_end(self) except -1:
        """Close once nothing is owed."""
        if self.in_flight or self.touched or self.n_kept:
            return 0
        if self.state == ENDING:
            self.transport.close()
        elif self.state == REFUSED:
            self.state = LINGERING
            if self.secure:
                self.transport.close()
                return 0
            self.transport.write_eof()
            self.router.loop.call_later(LINGER_S, self.transport.abort)
        return 0
