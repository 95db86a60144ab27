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
            _call(self, &method, p, msgid, flags)
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
