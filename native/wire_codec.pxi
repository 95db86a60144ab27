# The codec without a connection, for tests and tools.


def read_columns(Columns columns, bytes message):
    """Append one request, given as the MessagePack map {column: value or array} of `predict`, and return its rows.

    Raises InvalidArgument or ResourceExhausted; then nothing is appended.
    """
    if scan(message) != len(message):
        raise InvalidArgument("not one whole MessagePack value")
    if message[0] >> 4 != 8 and message[0] not in (0xDE, 0xDF):
        raise InvalidArgument("not a map {column: value or array}")
    return _read_columns(columns, ColumnNames(columns), <const uint8_t *>PyBytes_AS_STRING(message))


def write_array(array, encoding="list", missing=None):
    """Encode an array as replies do, and return the bytes.

    encoding: "list" or "tensor". missing: uint8 [rows], not 0 where a row is sent as nil (only in a list).
    """
    cdef Encoder encoder = Encoder([""])
    cdef mp_out out
    cdef const uint8_t[::1] nil = missing
    cdef const uint8_t *rows_missing = NULL
    memset(&out, 0, sizeof(out))
    if missing is not None and nil.shape[0] == len(array) and nil.shape[0]:
        rows_missing = &nil[0]
    try:
        encoder.set_arrays([("", array)], len(array))
        encoder.put_rows(&out, 0, 0, encoder.parts[0].dims[0], encoding == "tensor", rows_missing)
        return PyBytes_FromStringAndSize(<const char *>out.data, out.size)
    finally:
        free(out.data)


def scan(bytes data, cuts=()):
    """Return the bytes of the first message in `data`, or 0 if the message is not complete.

    cuts: sizes at which the scanner runs before it sees all of `data`, as if the bytes arrived in these parts. Raises
    InvalidArgument or ResourceExhausted as a connection would.
    """
    cdef mp_scan state
    cdef int found
    mp_scan_reset(&state)
    for size in (*cuts, len(data)):
        found = mp_scan_on(&state, <const uint8_t *>PyBytes_AS_STRING(data), size, &MESSAGE)
        if found == MP_WHOLE:
            return state.position
        if found != MP_MORE:
            code, reason = _scan_error(found)
            raise (InvalidArgument if code == "INVALID_ARGUMENT" else ResourceExhausted)(reason)
    return 0
