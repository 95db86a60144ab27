# Request columns: from MessagePack into Columns, with no Python object for a value.
#
# Everything here reads a message that mp_scan has passed, so a read cannot leave it. What may still be wrong is the
# meaning: names, types, lengths. Those errors are raised in the words of native/columns.


cdef object _as_python(const uint8_t *p):
    """The value at p as msgpack reads it: for error messages and for methods off the hot path."""
    cdef const uint8_t *end = mp_skip(p)
    try:
        return msgpack.unpackb(
            PyBytes_FromStringAndSize(<const char *>p, end - p), unicode_errors="replace", strict_map_key=False
        )
    except (ValueError, TypeError) as error:  # whole, but of no use: a map as a key, a timestamp of 5 bytes
        raise InvalidArgument(f"a map key or ext value that cannot be read: {error}") from None


cdef object _wrong_type(Columns columns, int c, const uint8_t *p, Py_ssize_t row):
    return wrong_type(columns, c, _as_python(p), row)


cdef const uint8_t *_read_scalar(Columns columns, int c, bint boolean, const uint8_t *p, Py_ssize_t row) except NULL:
    """One value of a column that is not a vector. row: for the message, -1 for a bare scalar."""
    cdef mp_value v
    cdef const uint8_t *end = mp_read(p, &v)
    cdef int kind = columns.col[c].kind
    cdef int failed
    if v.kind == MP_NIL:
        failed = columns.push_null(c)
    elif kind == KIND_F64:
        if v.kind == MP_FLOAT:
            failed = columns.push_f64(c, v.number.f)
        elif v.kind == MP_INT or v.kind == MP_BOOL:
            failed = columns.push_f64(c, <double>v.number.i)
        elif v.kind == MP_BIG:
            failed = columns.push_f64(c, <double>v.number.u)
        else:
            raise _wrong_type(columns, c, p, row)
    elif kind == KIND_I64:
        if v.kind == MP_INT and (not boolean or 0 <= v.number.i <= 1) or v.kind == MP_BOOL and boolean:
            failed = columns.push_i64(c, v.number.i)
        else:
            raise _wrong_type(columns, c, p, row)
    elif v.kind == MP_STR:
        if v.size > STRING_BYTES:
            raise string_too_long(columns, c, v.size)
        failed = columns.push_str(c, <const char *>v.body, v.size)
    elif v.kind == MP_FLOAT and v.number.f != v.number.f:  # NaN, as pandas writes a missing string
        failed = columns.push_null(c)
    else:
        raise _wrong_type(columns, c, p, row)
    if failed:
        raise ResourceExhausted("no memory for this batch; send fewer rows")
    return end


cdef const uint8_t *_read_vector(Columns columns, int c, float *room, const uint8_t *p, Py_ssize_t row) except NULL:
    """One vector, or nil. room: the column's width in floats."""
    cdef mp_value v, item
    cdef const uint8_t *at = mp_read(p, &v)
    cdef Py_ssize_t k
    if v.kind == MP_NIL:
        columns._checked(columns.push_null(c))
        return at
    if v.kind != MP_ARRAY:
        raise _wrong_type(columns, c, p, row)
    if v.size != <uint32_t>columns.col[c].width:
        raise _wrong_shape(columns, c, f"({v.size},)")
    for k in range(v.size):
        at = mp_read(at, &item)
        if item.kind == MP_FLOAT:
            room[k] = <float>item.number.f
        elif item.kind == MP_INT or item.kind == MP_BOOL:
            room[k] = <float>item.number.i
        elif item.kind == MP_BIG:
            room[k] = <float>item.number.u
        elif item.kind == MP_NIL:
            room[k] = NAN
        else:
            raise _wrong_type(columns, c, p, row)
    columns._checked(columns.push_vec(c, room))
    return at


cdef object _wrong_shape(Columns columns, int c, shape):
    return InvalidArgument(f"column {columns.names[c]!r} takes {columns.dtypes[c]}; got values of shape {shape}")


cdef const uint8_t *_read_vectors(Columns columns, int c, const uint8_t *p) except NULL:
    """One vector, an array of vectors, or nil."""
    cdef mp_value v, first
    cdef const uint8_t *at = mp_read(p, &v)
    cdef Py_ssize_t i
    cdef bint many = False
    cdef float *room
    if v.kind == MP_ARRAY:
        if v.size == 0:
            raise empty_column(columns, c)
        first.kind = MP_NIL
        many = True
        for i in range(v.size):  # rows may be nil: the first item that is not tells a vector from an array of them
            at = mp_read(at, &first)
            if first.kind != MP_NIL:
                break
        many = first.kind == MP_ARRAY
        mp_read(p, &v)
    if many and v.size > REQUEST_ROWS:
        raise too_many_rows(v.size)
    room = <float *>malloc(columns.col[c].width * sizeof(float))
    if room is NULL:
        raise MemoryError
    try:
        if not many:
            return _read_vector(columns, c, room, p, -1)
        at = mp_read(p, &v)
        for i in range(v.size):
            at = _read_vector(columns, c, room, at, i)
        return at
    finally:
        free(room)


cdef int _read_tensor(Columns columns, int c, const mp_value *v) except -1:
    """A column sent as a tensor: no dimension is a scalar, one is a row a value, two are rows of vectors."""
    cdef column_t *col = &columns.col[c]
    cdef int code = columns.dtypes[c].code
    cdef tensor t
    cdef Py_ssize_t i
    if v.ext != TENSOR_EXT:
        raise InvalidArgument(f"column {columns.names[c]!r}: ext type {v.ext} is not known; tensors are ext type 1")
    if tensor_read(v.body, v.size, &t) < 0:
        raise InvalidArgument(
            f"column {columns.names[c]!r}: not a tensor: {v.size} bytes do not fit the type and shape they announce")
    shape = tuple([t.dims[i] for i in range(t.n_dims)])
    if col.kind == KIND_VEC:
        if t.n_dims not in (1, 2) or t.dims[t.n_dims - 1] != <uint32_t>col.width:
            raise _wrong_shape(columns, c, shape)
    elif t.n_dims > 1:
        raise InvalidArgument(f"column {columns.names[c]!r} takes one value a row; got an array of shape {shape}")
    rows = t.dims[0] if t.n_dims == (2 if col.kind == KIND_VEC else 1) else 1
    if rows == 0:
        raise empty_column(columns, c)
    if rows > REQUEST_ROWS:
        raise too_many_rows(rows)
    floats = t.code == ELEMENT_F32 or t.code == ELEMENT_F64
    if col.kind == KIND_STR or col.kind == KIND_I64 and (floats or (code == ELEMENT_BOOL) != (t.code == ELEMENT_BOOL)):
        raise InvalidArgument(
            f"column {columns.names[c]!r} takes {columns.dtypes[c]}; got a tensor of {_ELEMENT_NAMES[t.code]}: "
            f"cast it, and send what is missing as null in a list")
    columns._checked(columns.reserve(c, rows))
    if col.kind == KIND_VEC:
        for i in range(<Py_ssize_t>t.elements):
            (<float *>col.data)[col.filled * col.width + i] = <float>tensor_f64(&t, i)
    elif col.kind == KIND_F64:
        for i in range(<Py_ssize_t>t.elements):
            (<double *>col.data)[col.filled + i] = tensor_f64(&t, i)
    else:
        for i in range(<Py_ssize_t>t.elements):
            (<int64_t *>col.data)[col.filled + i] = tensor_i64(&t, i)
    memset(col.nulls + col.filled, 0, rows)
    col.filled += rows
    return 0


cdef const uint8_t *_read_column(Columns columns, int c, bint boolean, const uint8_t *p) except NULL:
    cdef mp_value v
    cdef const uint8_t *at = mp_read(p, &v)
    cdef column_t *col = &columns.col[c]
    cdef uint32_t done, row = 0
    if v.kind == MP_EXT:
        _read_tensor(columns, c, &v)
        return at
    if col.kind == KIND_VEC:
        return _read_vectors(columns, c, p)
    if v.kind != MP_ARRAY:
        return _read_scalar(columns, c, boolean, p, -1)
    if v.size == 0:
        raise empty_column(columns, c)
    if v.size > REQUEST_ROWS:
        raise too_many_rows(v.size)
    columns._checked(columns.reserve(c, v.size))
    while row < v.size:
        # Runs of plain numbers at once; whatever stops a run (nil, another type, the end) value by value.
        done = 0
        if col.kind == KIND_I64 and not boolean:
            done = mp_read_i64s(&at, v.size - row, <int64_t *>col.data + col.filled)
        elif col.kind == KIND_F64:
            done = mp_read_f64s(&at, v.size - row, <double *>col.data + col.filled)
        memset(col.nulls + col.filled, 0, done)
        col.filled += done
        row += done
        if row < v.size:
            at = _read_scalar(columns, c, boolean, at, row)
            row += 1
    return at


cdef class ColumnNames:
    def __cinit__(self, Columns columns):
        self.names = tuple([name.encode() for name in columns.names])
        self.booleans = bytes([dtype.code == ELEMENT_BOOL for dtype in columns.dtypes])
        self.n = columns.n_columns

    cdef bint matches(self, int c, const mp_value *name) noexcept:
        cdef bytes known = <bytes>self.names[c]
        return PyBytes_GET_SIZE(known) == name.size and memcmp(PyBytes_AS_STRING(known), name.body, name.size) == 0

    cdef int find(self, int guess, const mp_value *name) noexcept:
        """Its number, or -1. guess: callers mostly send columns in the order in which the plan names them."""
        cdef int c
        if guess < self.n and self.matches(guess, name):
            return guess
        for c in range(self.n):
            if self.matches(c, name):
                return c
        return -1


cdef Py_ssize_t _read_columns(Columns columns, ColumnNames names, const uint8_t *p) except -1:
    """Append one request from the map {column: value or array} at p. Returns its rows; on error appends nothing."""
    cdef mp_value v, name
    cdef const uint8_t *at = mp_read(p, &v)
    cdef Py_ssize_t rows
    cdef uint32_t k
    cdef int c
    try:
        for k in range(v.size):
            at = mp_read(at, &name)
            c = names.find(<int>k, &name) if name.kind == MP_STR else -1
            if c < 0:
                raise unknown_column(columns, name.body[:name.size].decode("utf-8", "replace")
                                     if name.kind == MP_STR else "of a name that is not a string")
            if columns.col[c].filled != columns.n_rows:
                raise InvalidArgument(f"column {columns.names[c]!r} is given twice")
            at = _read_column(columns, c, PyBytes_AS_STRING(names.booleans)[c], at)
        rows = columns.finish()
        if rows < 0:
            raise finish_error(columns, rows)
        return rows
    except BaseException:
        columns.rollback()
        raise
