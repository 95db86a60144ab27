# One connection: an asyncio protocol that splits received bytes into messages and writes replies.

cdef enum:  # the state of a connection
    OPEN = 0
    ENDING = 1      # takes no more requests; is closed when all requests in flight are answered
    REFUSED = 2     # as ENDING, after a protocol error or a refused connection, with an error as the last reply
    LINGERING = 3   # the last reply is written; what the peer still sends is dropped until it closes
    GONE = 4        # closed

cdef int64_t MSGID_MAX = (1 << 32) - 1
# How long a connection lingers. To close it at once, with input unread, would send a TCP reset, which can destroy the
# error reply before the peer reads it.
cdef double LINGER_S = 1.0

NOT_RPC = "not a MessagePack-RPC message: expected [0, msgid, method, [params]] or [2, method, [params]]"


cdef tuple _scan_error(int found):
    """Return the code and the message of the error for a result of mp_scan."""
    if found == MP_NOT_MSGPACK:
        return "INVALID_ARGUMENT", "not MessagePack: byte 0xc1 is never used"
    if found == MP_TOO_LONG:
        return "RESOURCE_EXHAUSTED", f"a message of more than {LIMITS.frame_bytes} bytes; send it in parts"
    if found == MP_TOO_DEEP:
        return "RESOURCE_EXHAUSTED", f"a message nested more than {LIMITS.nesting_depth} deep"
    return "RESOURCE_EXHAUSTED", f"a message of more than {LIMITS.declared_elements} elements; send it in parts"


cdef tuple _stranger_error(int found):
    """As _scan_error, for a connection that has not authenticated."""
    if found == MP_TOO_LONG or found == MP_TOO_MANY:
        return "UNAUTHENTICATED", (
            f"a message of more than {LIMITS.stranger_frame_bytes} bytes or 64 elements; call `auth` first")
    return _scan_error(found)


cdef size_t SLICE_BYTES = 16 << 10              # of an incomplete message, scanned at once
cdef size_t LARGE_PARTIAL_BYTES = 128 << 10     # an incomplete message of this size is read slowly
cdef int64_t LONG_SLICE_NS = 100_000
cdef int REST_TURNS = 4


cdef class Connection:
    """Connection(router, secure=False): the asyncio protocol of one peer. secure: the transport is TLS."""

    def __cinit__(self, Router router, bint secure=False):
        self.router = router
        self.secure = secure
        self.access = router.access
        mp_scan_reset(&self.scan)

    def __dealloc__(self):
        free(self.out.data)
        if self.taken is None:
            mapped_drop(&self.partial)

    # -- called by asyncio and by the server -------------------------------------------------------------------

    def connection_made(self, transport):
        self.transport = transport
        transport.set_write_buffer_limits(high=LIMITS.output_high_water_bytes, low=LIMITS.output_low_water_bytes)
        self.router.connections.add(self)
        self.router.accepted += 1
        address = transport.get_extra_info("peername")
        # A peer on a Unix socket has no address of its own: it is blamed for this connection alone.
        self.sender = (None, address[0] if isinstance(address, tuple) else object())
        if self.router.max_connections or self.router.max_peer_connections:
            self.count_peer()
        if self.carried is not None:
            carried, self.carried = self.carried, None
            self.data_received(carried)

    def connection_lost(self, error):
        self.state = GONE
        self.transport = None
        # Free the buffers now: requests that still run may hold references to the connection for a while.
        free(self.out.data)
        memset(&self.out, 0, sizeof(mp_out))
        if self.taken is None:
            mapped_drop(&self.partial)
        while self.relayed:
            self.relayed.pop()
            self.end_forwarded()
        self.router.connections.discard(self)
        if self.peer is not None:
            self.router.peers[self.peer] -= 1
            if self.router.peers[self.peer] == 0:
                del self.router.peers[self.peer]

    cdef int count_peer(self) except -1:
        """Count this connection by its address, and refuse it if there are too many, in all or from that address."""
        cdef Router router = self.router
        address = self.transport.get_extra_info("peername")
        if isinstance(address, tuple):  # the address of a Unix socket is a string; all its peers are on this machine
            self.peer = address[0]
            router.peers[self.peer] = router.peers.get(self.peer, 0) + 1
            if router.max_peer_connections and router.peers[self.peer] > router.max_peer_connections:
                router.refused += 1
                return self.refuse("RESOURCE_EXHAUSTED",
                                   f"more than {router.max_peer_connections} connections from one address; close some")
        if router.max_connections and len(router.connections) > router.max_connections:
            router.refused += 1
            return self.refuse("RESOURCE_EXHAUSTED",
                               f"more than {router.max_connections} connections; connect again later")
        return 0

    def data_received(self, bytes data not None):
        cdef const uint8_t *p = <const uint8_t *>PyBytes_AS_STRING(data)
        cdef size_t size = PyBytes_GET_SIZE(data)
        cdef size_t taken
        cdef bint joined
        self.received = True
        self.router.received_bytes += size
        _ensure_turn_begun(self.router)
        self.router.reading = True
        # Requests in `partial` cannot be deferred, so join it with the data while the turn defers requests. A longer
        # `partial` is not copied: one byte at a time would then copy it again and again.
        joined = self.router.newest_first and 0 < self.partial.size <= size
        if joined:
            data = PyBytes_FromStringAndSize(<const char *>self.partial.data, self.partial.size) + data
            p = <const uint8_t *>PyBytes_AS_STRING(data)
            size = PyBytes_GET_SIZE(data)
            self.partial.size = 0
        if self.partial.size == 0:
            self.data = data
            taken = self.handle_messages(p, size)
            self.data = None
            if taken < size:
                if taken or not joined:
                    self.partial_s = 0
                self.keep_partial(p + taken, size - taken)
        elif self.state == OPEN:
            self.keep_partial(p, size)
        if self.scanned < self.partial.size and not self.resting and self.state == OPEN:
            self.handle_partial()
        self.router.reading = False

    def eof_received(self):
        """End the connection, because the peer sends no more. True keeps it open until all replies are written."""
        if self.state < LINGERING:
            self.state = ENDING
            return not self.secure and bool(self.in_flight or self.has_output or self.n_deferred)
        return False

    def carry(self, bytes held not None, int access):
        """Continue a connection that another worker had. Call it before connection_made.

        held: the bytes of an incomplete message that the other worker had received. access: of the connection there.
        """
        self.carried = held or None
        self.access = access

    def fileno(self):
        """The socket's file descriptor. Raises OSError when the connection is gone."""
        if self.transport is None:
            raise OSError("the connection is gone")
        return self.transport.get_extra_info("socket").fileno()

    @property
    def cannot_move(self):
        """Whether the connection can never move to another worker: it is over TLS, or it is ending."""
        return self.state != OPEN or self.secure

    def park(self, Py_ssize_t most):
        """Stop reading, so that the connection can move to another worker, and return whether that was possible.

        It is not possible over TLS, while the connection ends, or within a message of which more than `most` bytes have
        been received.
        """
        if self.state != OPEN or self.secure or self.transport is None or self.partial.size > <size_t>most:
            return False
        if not self.parked:
            self.parked = True
            self.transport.pause_reading()
        return True

    def partial_if_idle(self, Py_ssize_t most):
        """Return the received bytes of an incomplete message if the connection can move now, else None.

        It can move if no request is in flight or deferred, no output is unsent, and there are at most `most` bytes.
        """
        if (self.state != OPEN or self.in_flight or self.n_deferred or self.has_output or self.out.size or self.secure
                or self.partial.size > <size_t>most or self.transport is None
                or self.transport.get_write_buffer_size()):
            return None
        return PyBytes_FromStringAndSize(<const char *>self.partial.data, self.partial.size)

    def pause_writing(self):
        self.paused = True
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self):
        self.paused = False
        if self.relayed:
            self.router.loop.call_soon(self.write_relayed)
        if not self.parked and not self.resting and not self.transport.is_closing():
            self.transport.resume_reading()

    def finish(self):
        """Take no more requests, and close when those in flight are answered."""
        if self.state == OPEN:
            self.state = ENDING
        self.maybe_end()

    def abort(self):
        """Close at once, even if replies are unsent."""
        if self.transport is not None:
            self.transport.abort()

    # -- input -------------------------------------------------------------------------------------------------

    cdef int keep_partial(self, const uint8_t *data, size_t size) except -1:
        """Append received bytes to `partial`: memory grows with what arrives, never with what a header declares."""
        _reserve_mapped(&self.partial, size)
        mp_put_raw(&self.partial, data, size)
        return 0

    cdef int handle_partial(self) except -1:
        """Handle the messages in `partial`. A large message is scanned in slices, and read no faster than that.

        Otherwise the event loop would read one socket up to 32 times before it looks at the next, and scan for
        milliseconds. After a slice that took long, the loop does other work for REST_TURNS times as long.
        """
        cdef int64_t began_ns = _now_ns()
        cdef int64_t took_ns = 0
        while self.state == OPEN:
            self.drop_from_partial(self.handle_messages(self.partial.data, self.partial.size))
            took_ns = _now_ns() - began_ns
            if self.scanned == self.partial.size or took_ns > LONG_SLICE_NS:
                break
        if self.state == OPEN and (self.partial.size >= LARGE_PARTIAL_BYTES or self.scanned < self.partial.size):
            self.resting = True
            self.transport.pause_reading()
            self.router.loop.call_later(REST_TURNS * took_ns / 1e9 if took_ns > LONG_SLICE_NS else 0.0, self.read_on)
        return 0

    def read_on(self):
        """Go on with a large message after a rest."""
        self.resting = False
        if self.state == GONE:
            return
        if self.state == OPEN and self.scanned < self.partial.size:
            _ensure_turn_begun(self.router)
            self.router.reading = True
            self.handle_partial()
            self.router.reading = False
        if not (self.resting or self.paused or self.parked or self.transport.is_closing()):
            self.transport.resume_reading()

    cdef int drop_from_partial(self, size_t size) except -1:
        """Remove the first `size` bytes of `partial`: the messages that were handled."""
        if size:
            self.partial_s = 0  # the rest belongs to another message, whose frame timeout begins now
        if self.taken is not None:
            return self.leave_partial(size)
        self.partial.size -= size
        if self.partial.size:
            memmove(self.partial.data, self.partial.data + size, self.partial.size)
        elif self.partial.capacity > <size_t>SPARE_BUFFER_BYTES:
            mapped_drop(&self.partial)
        return 0

    cdef int leave_partial(self, size_t size) except -1:
        """Give up `partial`, whose buffer was taken (_rest_of), and keep a copy of what follows its first `size` bytes."""
        cdef TakenMessage taken = self.taken
        cdef mp_out left = self.partial
        self.taken = None
        memset(&self.partial, 0, sizeof(mp_out))
        if left.size > size:
            self.keep_partial(left.data + size, left.size - size)
        return 0

    cdef size_t handle_messages(self, const uint8_t *data, size_t size) except? 0:
        """Handle the complete messages at the start of `data` and return their bytes. No byte is scanned twice.

        The last message is scanned no further than SLICE_BYTES, to which `scanned` is set; call it again then.
        """
        cdef size_t start = 0
        cdef size_t length, end
        cdef int found
        while start < size and self.state == OPEN:
            end = min(size - start, max(self.scanned, self.scan.position) + SLICE_BYTES)
            found = mp_scan_on(&self.scan, data + start, end, &MESSAGE if self.access else &STRANGER)
            if found == MP_MORE:
                self.scanned = end
                return start
            self.scanned = 0
            if found != MP_WHOLE:
                code, reason = _scan_error(found) if self.access else _stranger_error(found)
                self.refuse(code, reason)
                break
            length = self.scan.position
            self.scan_bytes = length
            self.scan_elements = self.scan.declared
            self.last_param = data + start + self.scan.at_depth_2
            mp_scan_reset(&self.scan)
            self.handle_message(data + start)
            start += length
        return size

    cdef int refuse(self, str code, str reason) except -1:
        """Reply with an error that has no msgid, and end the connection: where the next message starts is not known."""
        self.put_error(-1, code, reason)
        self.state = REFUSED
        return 0

    cdef int handle_message(self, const uint8_t *p) except -1:
        """Handle one message that the scanner has passed: answer it, add it to a batch, defer it or refuse it."""
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
        self.route = None
        method.kind = MP_NIL
        try:
            p = mp_read(p, &method)
            if method.kind != MP_STR:
                raise InvalidArgument("method must be a string")
            _dispatch(self, &method, p, msgid, flags)
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
        """Reply to a request that was forwarded. outcome: the encoded error, followed by the encoded result."""
        if not self.end_forwarded():
            return
        _reserve(&self.out, 16)
        mp_put_byte(&self.out, 0x94)
        mp_put_byte(&self.out, 1)
        mp_put_int(&self.out, msgid)
        _put_bytes(&self.out, outcome)
        self.schedule_write()

    def relay_error(self, uint32_t msgid, str code not None, str message not None):
        """Reply to a request that was forwarded and has failed."""
        if self.end_forwarded():
            self.put_error(msgid, code, message)

    def relay_reply(self, BulkReply reply not None):
        """Reply to a large request that was forwarded. reply: the whole message, with the msgid of its request."""
        if self.state == GONE:
            self.end_forwarded()
            return
        if self.relayed is None:
            self.relayed = []
        self.relayed.append(memoryview(reply))
        if len(self.relayed) == 1:
            self.write_relayed()

    def fail_forwarded(self, uint32_t msgid, str code not None, str message not None):
        """Reply with an error to a large request that was forwarded, and count it."""
        _count_errors(self.router, "other", "", code, 1, msgid, message)
        self.relay_error(msgid, code, message)

    cdef bint end_forwarded(self) except -1:
        """Count a forwarded request as answered. Returns False if its peer has gone."""
        self.in_flight -= 1
        self.router.in_flight -= 1
        self.forwarded -= 1
        return self.state != GONE

    # -- output ------------------------------------------------------------------------------------------------

    cdef int schedule_write(self) except -1:
        """Have `out` written at the end of this turn."""
        if not self.has_output:
            self.has_output = True
            self.router.to_write.append(self)
            self.router.wake()
        return 0

    cdef int put_error(self, int64_t msgid, str code, str message) except -1:
        """Append the error reply to a request. msgid: -1 if it is not known."""
        _reserve(&self.out, 16)
        mp_put_byte(&self.out, 0x94)
        mp_put_byte(&self.out, 1)
        if msgid < 0:
            mp_put_byte(&self.out, 0xC0)
        else:
            mp_put_int(&self.out, msgid)
        _put_bytes(&self.out, _packed_error(code, message, self.router.error_form))
        _reserve(&self.out, 1)
        mp_put_byte(&self.out, 0xC0)
        return self.schedule_write()

    def write_relayed(self):
        """Give the next piece of a relayed reply to the transport. Nothing else is written until the reply has ended."""
        if self.state == GONE or self.paused or not self.relayed:
            return  # resume_writing calls again
        began_ns = _now_ns()
        reply = self.relayed[0]
        piece = reply[:PIECE_BYTES]
        self.transport.write(piece)
        self.count_sent(len(piece))
        if len(piece) < len(reply):
            self.relayed[0] = reply[PIECE_BYTES:]
        else:
            del self.relayed[0]
            self.end_forwarded()
        if self.relayed:
            self.router.loop.call_later(REST_TURNS * (_now_ns() - began_ns) / 1e9, self.write_relayed)
        elif self.out.size:
            self.schedule_write()
        elif self.state != OPEN:
            self.maybe_end()

    cdef int count_sent(self, Py_ssize_t size) except -1:
        self.sent += size
        self.router.sent_bytes += size
        self.maybe_unsent = True
        return 0

    cdef int write_out(self) except -1:
        """Give `out` to the transport, in one write."""
        self.has_output = False
        if self.relayed:
            return 0    # after that reply
        if self.state != GONE and self.out.size:
            data = PyBytes_FromStringAndSize(<const char *>self.out.data, self.out.size)
            self.out.size = 0
            self.transport.write(data)
            self.count_sent(PyBytes_GET_SIZE(data))
        if self.out.capacity > <size_t>SPARE_BUFFER_BYTES:
            free(self.out.data)
            memset(&self.out, 0, sizeof(mp_out))
        if self.state != OPEN:
            self.maybe_end()
        return 0

    cdef int maybe_end(self) except -1:
        """Close the connection if it is ending and nothing is in flight, deferred or unwritten."""
        if self.in_flight or self.has_output or self.n_deferred:
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
