# Large requests. To read, run and answer one would hold up the event loop for longer than LIMITS allow, so another
# process does it all: the bulk worker (server/bulk.py). It gets the message as it came and sends the reply as its client
# gets it. This side only finds out that a request is large, and moves bytes.

cdef Py_ssize_t LOOP_BYTES = LIMITS.loop_bytes
cdef Py_ssize_t LOOP_ELEMENTS = LIMITS.loop_elements
cdef Py_ssize_t LOOP_VALUES = LIMITS.loop_values
cdef Py_ssize_t LOOP_UNCOMMON_VALUES = LIMITS.loop_uncommon_values
cdef uint32_t LOOP_REFERENCES = LIMITS.loop_references
cdef Py_ssize_t REPLY_VALUES = LIMITS.reply_values
cdef Py_ssize_t CALL_BYTES = LIMITS.call_bytes
# A relayed reply is given to the transport in pieces of this size, so that no turn of the loop encrypts all of it.
cdef Py_ssize_t PIECE_BYTES = 128 << 10

cdef mp_limits REPLY
REPLY.frame_bytes = 16 * LIMITS.frame_bytes
REPLY.nesting_depth = MP_MAX_DEPTH
REPLY.declared_elements = <uint64_t>1 << 40


cdef bint _is_large(Connection connection) noexcept:
    """Whether the message that is being read is too large for the event loop."""
    return connection.router.bulk is not None and (
        connection.scan_bytes > LOOP_BYTES or connection.scan_elements > LOOP_ELEMENTS)


cdef int _forward_bulk(Connection connection, uint32_t msgid, const options_t *options) except -1:
    """Forward the request that is being read to the bulk worker."""
    silent = bool(options.flags & SILENT)
    if connection.forwarded >= PUSHES_PER_CONNECTION:
        raise ResourceExhausted(f"{connection.forwarded} large requests of this connection are in flight; "
                                f"wait for their answers, then send it again")
    connection.router.bulk(None if silent else connection, msgid, _rest_of(connection, connection.message_at),
                           options.deadline_ns)
    if not silent:
        connection.in_flight += 1
        connection.router.in_flight += 1
        connection.forwarded += 1
    return 0


cdef object _rest_of(Connection connection, const uint8_t *begin):
    """Return the bytes of the message that is being read, from `begin` on. A large message is not copied, if possible."""
    cdef Py_ssize_t size = connection.message_at + connection.scan_bytes - begin
    cdef TakenMessage taken
    if connection.scan_bytes <= LOOP_BYTES or connection.message_at != connection.partial.data:
        return PyBytes_FromStringAndSize(<const char *>begin, size)
    taken = TakenMessage()
    taken.buffer = connection.partial
    taken.size = connection.scan_bytes
    connection.taken = taken    # drop_from_partial gives the connection another buffer
    return memoryview(taken)[connection.scan_bytes - size:]


cdef class TakenMessage:
    def __dealloc__(self):
        mapped_drop(&self.buffer)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.buffer.data, self.size, True, flags)


cdef class BulkReply:
    """BulkReply(): collects one reply. `feed` it until it is whole, then give it to `Connection.relay_reply`."""

    def __cinit__(self):
        mp_scan_reset(&self.scan)

    def __dealloc__(self):
        mapped_drop(&self.buffer)

    def __len__(self):
        return self.buffer.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.buffer.data, self.buffer.size, True, flags)

    def feed(self, bytes data not None):
        """Append received bytes. Returns whether the reply is whole. Raises Internal for what is not one reply."""
        cdef int found
        _reserve_mapped(&self.buffer, PyBytes_GET_SIZE(data))
        mp_put_raw(&self.buffer, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        if self.whole:
            raise Internal("the bulk worker sent more than one reply")
        found = mp_scan_on(&self.scan, self.buffer.data, self.buffer.size, &REPLY)
        if found != MP_WHOLE and found != MP_MORE or found == MP_WHOLE and self.scan.position != self.buffer.size:
            raise Internal("the bulk worker sent something that is not one reply")
        self.whole = found == MP_WHOLE
        return self.whole
