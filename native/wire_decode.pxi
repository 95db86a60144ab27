# Reads request columns from MessagePack into Columns, without a Python object per value.
#
# mp_scan has checked the structure of the message, so reads here stay inside it. Names, types and lengths may still be
# wrong. The fast paths here read the common values of each type. If a column has any other value, the whole column is
# read again as Python values, and shorttail.define.values converts it (Columns.append_any). The result is the same.

cdef Py_ssize_t ANY_VALUES = <Py_ssize_t>1 << 62     # no limit for ColumnNames.uncommon_left
cdef double EXACT = 9007199254740992.0  # 2**53: a double with a larger absolute value may be a rounded integer


cdef object _as_python(const uint8_t *p):
    """Return the value at p as a Python object, for error messages and for methods that are not on the hot path."""
    cdef const uint8_t *end = mp_skip(p)
    try:
        return msgpack.unpackb(
            PyBytes_FromStringAndSize(<const char *>p, end - p), unicode_errors="replace", strict_map_key=False
        )
    except (ValueError, TypeError) as error:  # such as a map as a key, or a timestamp of 5 bytes
        raise InvalidArgument(f"a map key or ext value that cannot be read: {error}") from None


cdef object _column_in_python(Columns columns, int c, const uint8_t *p):
    """Return the column at p as Python objects. A tensor is an array.

    A string that is not UTF-8 gets lone surrogates, which shorttail.define.values then refuses.
    """
    cdef const uint8_t *end = mp_skip(p)
    try:
        return msgpack.unpackb(
            PyBytes_FromStringAndSize(<const char *>p, end - p), ext_hook=unpack_ext, unicode_errors="surrogateescape",
            strict_map_key=False,
        )
    except InvalidArgument as error:
        raise InvalidArgument(f"column '{columns.names[c]}': {error.message}") from None
    except (ValueError, TypeError) as error:
        raise InvalidArgument(
            f"column '{columns.names[c]}': a map key or ext value that cannot be read: {error}") from None


cdef const uint8_t *_read_scalar(Columns columns, int c, const uint8_t *p, Py_ssize_t row) except? NULL:
    """Read a value of a column that is not a vector. Returns its end, or NULL if no fast path applies.

    row: for the error message, -1 for a single value.
    """
    cdef mp_value v
    cdef const uint8_t *end = mp_read(p, &v)
    cdef column_t *col = &columns.col[c]
    cdef int64_t us
    cdef int failed
    if v.kind == MP_NIL:
        columns.push_missing(c, row)
        return end
    if col.kind == KIND_F64:
        if v.kind == MP_FLOAT:
            failed = columns.push_f64(c, v.number.f)
        elif v.kind == MP_INT or v.kind == MP_BOOL:
            failed = columns.push_f64(c, <double>v.number.i)
        elif v.kind == MP_BIG:
            failed = columns.push_f64(c, <double>v.number.u)
        else:
            return NULL
    elif v.kind == MP_FLOAT and v.number.f != v.number.f:  # NaN: pandas writes a missing value so
        columns.push_missing(c, row)
        return end
    elif col.kind == KIND_I64:
        if v.kind == MP_FLOAT and _is_whole(v.number.f):
            v.number.i = <int64_t>v.number.f
        elif v.kind == MP_EXT and col.type == TYPE_TIME and mp_time_us(&v, &us) == 0:
            v.number.i = us
        elif v.kind != MP_INT and (v.kind != MP_BOOL or col.type != TYPE_BOOL):
            return NULL
        if col.type == TYPE_BOOL and not 0 <= v.number.i <= 1:
            return NULL
        failed = columns.push_i64(c, v.number.i)
    else:
        if v.kind != MP_STR or v.size > STRING_BYTES or not is_utf8(v.body, v.size):
            return NULL
        failed = columns.push_str(c, <const char *>v.body, v.size)
    if failed:
        columns._checked(failed)
    return end


cdef inline bint _is_whole(double number) noexcept:
    """Return whether a double is a whole number of absolute value up to 2**53, so not a rounded one. NaN: False."""
    return -EXACT <= number <= EXACT and <double><int64_t>number == number


cdef const uint8_t *_read_vector(Columns columns, int c, double *room, const uint8_t *p, Py_ssize_t row) except? NULL:
    """Read a vector, or nil. Returns its end, or NULL for other values and for a vector of NaN and nil alone.

    room: a buffer for as many doubles as the column is wide.
    """
    cdef mp_value v, item
    cdef const uint8_t *at = mp_read(p, &v)
    cdef Py_ssize_t k
    if v.kind == MP_NIL:
        columns.push_missing(c, row)
        return at
    if v.kind != MP_ARRAY or v.size != <uint32_t>columns.col[c].width:
        return NULL
    for k in range(v.size):
        at = mp_read(at, &item)
        if item.kind == MP_FLOAT:
            room[k] = item.number.f
        elif item.kind == MP_INT or item.kind == MP_BOOL:
            room[k] = <double>item.number.i
        elif item.kind == MP_NIL:
            room[k] = NAN
        else:
            return NULL
    for k in range(v.size):
        if room[k] == room[k]:
            columns._checked(columns.push_vec(c, room))
            return at
    return NULL


cdef const uint8_t *_read_vectors(Columns columns, int c, const uint8_t *p) except? NULL:
    """Read a vector, an array of vectors, or nil. Returns its end, or NULL if no fast path applies."""
    cdef mp_value v, first
    cdef const uint8_t *at = mp_read(p, &v)
    cdef Py_ssize_t i
    cdef bint many = False
    cdef double *room
    if v.kind == MP_ARRAY:
        if v.size == 0:
            raise empty_column(columns, c)
        first.kind = MP_NIL
        for i in range(v.size):  # rows may be nil: the first other item tells a vector from an array of vectors
            at = mp_read(at, &first)
            if first.kind != MP_NIL:
                break
        many = first.kind == MP_ARRAY
        mp_read(p, &v)
    if many and v.size > REQUEST_ROWS:
        raise too_many_rows(v.size)
    room = <double *>malloc(columns.col[c].width * sizeof(double))
    if room is NULL:
        raise MemoryError
    try:
        if not many:
            return _read_vector(columns, c, room, p, -1)
        at = mp_read(p, &v)
        for i in range(v.size):
            at = _read_vector(columns, c, room, at, i)
            if at is NULL:
                break
        return at
    finally:
        free(room)


cdef bint _read_tensor(Columns columns, int c, const mp_value *v) except -1:
    """Read a column that is a tensor. Returns False if no fast path applies.

    Without dimensions it is a single value; with one dimension it has a value per row; with two it has a vector per
    row, and a vector column takes one dimension as a single vector. Raises InvalidArgument for a malformed tensor.
    """
    cdef column_t *col = &columns.col[c]
    cdef tensor t
    cdef int row_dims = 2 if col.kind == KIND_VEC else 1
    cdef Py_ssize_t i, rows
    if tensor_read(v.body, v.size, &t) < 0:
        raise InvalidArgument(
            f"column {columns.names[c]!r}: not a tensor: {v.size} bytes do not fit the type and shape they announce")
    if t.n_dims > row_dims or t.n_dims < row_dims - 1 or col.kind == KIND_STR:
        return False
    rows = t.dims[0] if t.n_dims == row_dims else 1
    if rows > REQUEST_ROWS:
        raise too_many_rows(rows)
    if rows == 0 or t.code == ELEMENT_TIME and col.type != TYPE_TIME:
        return False
    columns._checked(columns.reserve(c, rows))
    if col.kind == KIND_VEC:
        if t.dims[t.n_dims - 1] != <uint32_t>col.width:
            return False
        for i in range(<Py_ssize_t>t.elements):
            if col.item == 8:
                (<double *>col.data)[col.filled * col.width + i] = tensor_f64(&t, i)
            else:
                (<float *>col.data)[col.filled * col.width + i] = <float>tensor_f64(&t, i)
    elif col.kind == KIND_F64:
        for i in range(<Py_ssize_t>t.elements):
            (<double *>col.data)[col.filled + i] = tensor_f64(&t, i)
    else:
        return _read_whole_tensor(columns, c, &t)
    memset(col.nulls + col.filled, 0, rows)
    col.filled += rows
    return True


cdef bint _read_whole_tensor(Columns columns, int c, const tensor *t) except -1:
    """Read a tensor into a Bool, integer or Timestamp column, which has memory reserved for it.

    Returns False if no fast path applies to an element.
    """
    cdef column_t *col = &columns.col[c]
    cdef bint is_float = t.code == ELEMENT_F32 or t.code == ELEMENT_F64
    cdef bint boolean = col.type == TYPE_BOOL
    cdef Py_ssize_t row, rows = t.elements
    cdef int64_t value
    cdef double number
    if t.code == ELEMENT_BOOL and not boolean:
        return False
    if not is_float and not boolean and t.code != ELEMENT_TIME:
        for row in range(rows):
            (<int64_t *>col.data)[col.filled + row] = tensor_i64(t, row)
        memset(col.nulls + col.filled, 0, rows)
        col.filled += rows
        return True
    for row in range(rows):
        if is_float:
            number = tensor_f64(t, row)
            if number != number:
                columns.push_missing(c, row if t.n_dims else -1)
                continue
            if not _is_whole(number):
                return False
            value = <int64_t>number
        else:
            value = tensor_i64(t, row)
            if t.code == ELEMENT_TIME and value == TENSOR_NO_TIME:
                columns.push_missing(c, row if t.n_dims else -1)
                continue
        if boolean and not 0 <= value <= 1:
            return False
        columns.push_i64(c, value)
    return True


cdef uint32_t _read_texts(Columns columns, int c, const uint8_t **p, uint32_t n) noexcept:
    """Read up to n strings from *p on, and return how many were read. Moves *p past them.

    Stops at the first value that is not a string, or is refused.
    """
    cdef const uint8_t *end
    cdef mp_value v
    cdef uint32_t i
    for i in range(n):
        end = mp_read(p[0], &v)
        if v.kind != MP_STR or v.size > STRING_BYTES or not is_utf8(v.body, v.size):
            return i
        if columns.push_str(c, <const char *>v.body, v.size) < 0:
            return i
        p[0] = end
    return n


cdef const uint8_t *_read_usual(Columns columns, int c, const uint8_t *p) except? NULL:
    """Read the column at p by the fast paths. Returns its end, or NULL if a value is uncommon or wrong."""
    cdef mp_value v
    cdef const uint8_t *at = mp_read(p, &v)
    cdef column_t *col = &columns.col[c]
    cdef uint32_t done, row = 0
    if v.kind == MP_EXT and v.ext == TENSOR_EXT:
        return at if _read_tensor(columns, c, &v) else NULL
    if col.kind == KIND_VEC:
        return _read_vectors(columns, c, p)
    if v.kind != MP_ARRAY:
        return _read_scalar(columns, c, p, -1)
    if v.size == 0:
        raise empty_column(columns, c)
    if v.size > REQUEST_ROWS:
        raise too_many_rows(v.size)
    columns._checked(columns.reserve(c, v.size))
    while row < v.size:
        # Read a run of values of the column's own type at once. A value that stops the run (nil, another type) is read
        # by _read_scalar.
        if col.kind == KIND_STR:
            row += _read_texts(columns, c, &at, v.size - row)
        elif col.type != TYPE_BOOL:
            if col.kind == KIND_I64:
                done = mp_read_i64s(&at, v.size - row, <int64_t *>col.data + col.filled)
            else:
                done = mp_read_f64s(&at, v.size - row, <double *>col.data + col.filled)
            memset(col.nulls + col.filled, 0, done)
            col.filled += done
            row += done
        if row < v.size:
            at = _read_scalar(columns, c, at, row)
            if at is NULL:
                return NULL
            row += 1
    return at


class _TooLong(Exception):
    """Python would have to convert too many values of a request in the event loop."""


cdef const uint8_t *_read_column(Columns columns, ColumnNames names, int c, const uint8_t *p) except NULL:
    cdef mp_value v
    cdef const uint8_t *end = _read_usual(columns, c, p)
    if end is not NULL and (columns.col[c].type != TYPE_INT32 or columns.fits(c)):
        return end
    columns.forget_column(c)
    mp_read(p, &v)
    names.uncommon_left -= <Py_ssize_t>v.size * columns.col[c].width if v.kind == MP_ARRAY else 1
    if names.uncommon_left < 0:
        raise _TooLong
    columns.append_any(c, _column_in_python(columns, c, p))
    return mp_skip(p)


cdef class ColumnNames:
    def __cinit__(self, Columns columns):
        self.names = tuple([name.encode() for name in columns.names])
        self.n = columns.n_columns
        self.uncommon_left = ANY_VALUES

    cdef bint matches(self, int c, const mp_value *name) noexcept:
        cdef bytes known = <bytes>self.names[c]
        return PyBytes_GET_SIZE(known) == name.size and memcmp(PyBytes_AS_STRING(known), name.body, name.size) == 0

    cdef int find(self, int guess, const mp_value *name) noexcept:
        """Return the number of a column, or -1. guess: tried first; most callers send columns in the plan's order."""
        cdef int c
        if guess < self.n and self.matches(guess, name):
            return guess
        for c in range(self.n):
            if self.matches(c, name):
                return c
        return -1


cdef Py_ssize_t _read_columns(Columns columns, ColumnNames names, const uint8_t *p) except -1:
    """Append a request: the map {column: value or array} at p. Returns the rows added; an error appends nothing."""
    cdef mp_value v, name
    cdef const uint8_t *at = mp_read(p, &v)
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
            at = _read_column(columns, names, c, at)
        return columns.end_request()
    except BaseException:
        columns.rollback()
        raise
