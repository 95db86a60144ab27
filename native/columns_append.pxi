# Appends Python values to columns: scalars, lists and arrays.
#
# The fast paths here read exact Python types and common NumPy arrays. shorttail.define.values has the rules, and reads
# everything else. If a fast path meets a value that it does not know, its values are removed from the column, and
# shorttail.define.values reads the whole column.

cdef object _ndarray = np.ndarray
# NumPy scalar type -> Python type. Long doubles and times are left out, because a conversion would lose precision.
cdef dict _PYTHON = {
    np.bool_: bool, np.str_: str, np.float16: float, np.float32: float,
    **dict.fromkeys((np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64), int),
}


cdef int append_column(Columns columns, int c, values) except -1:
    if not _append_usual(columns, c, values):
        columns.forget_column(c)
        append_any_column(columns, c, values)
    if columns.col[c].filled == columns.n_rows:
        raise empty_column(columns, c)
    return 0


cdef bint _append_usual(Columns columns, int c, values) except -1:
    """Append a column by a fast path. Returns False if none applies; the column may then hold some of its values."""
    cdef int kind = columns.col[c].kind
    cls = type(values)
    if cls is list or cls is tuple:
        return _append_vectors(columns, c, values) if kind == KIND_VEC else _append_items(columns, c, values)
    if cls is _ndarray:
        return _append_matrix(columns, c, values) if kind == KIND_VEC else _append_array(columns, c, values)
    if kind == KIND_VEC:
        return False
    return _append_exact(columns, c, values, -1) or _append_numpy(columns, c, values, -1)


cdef bint _append_exact(Columns columns, int c, value, Py_ssize_t row) except -1:
    """Append a value of an exact Python type, or None. Returns False for other values. Not for vectors."""
    cdef column_t *col = &columns.col[c]
    cdef int overflow = 0
    cdef long long integer
    cdef Py_ssize_t length
    cdef const char *text
    if col.kind == KIND_F64:
        if PyFloat_Check(value):
            columns._checked(columns.push_f64(c, PyFloat_AS_DOUBLE(value)))
            return True
        if PyLong_Check(value):  # also a bool
            integer = PyLong_AsLongLongAndOverflow(value, &overflow)
            if overflow == 0:
                columns._checked(columns.push_f64(c, <double>integer))
                return True
    elif col.kind == KIND_I64:
        if PyLong_CheckExact(value):
            integer = PyLong_AsLongLongAndOverflow(value, &overflow)
            if overflow == 0 and (col.type != TYPE_BOOL or 0 <= integer <= 1):
                if col.type == TYPE_INT32 and integer != <int32_t>integer:
                    return False
                columns._checked(columns.push_i64(c, integer))
                return True
        elif col.type == TYPE_BOOL and PyBool_Check(value):
            columns._checked(columns.push_i64(c, value is True))
            return True
    elif PyUnicode_CheckExact(value):
        try:
            text = PyUnicode_AsUTF8AndSize(value, &length)
        except UnicodeEncodeError:  # a lone surrogate
            return False
        if length <= STRING_BYTES:
            columns._checked(columns.push_str(c, text, length))
            return True
    if value is None:
        columns.push_missing(c, row)
        return True
    return False


cdef bint _append_numpy(Columns columns, int c, value, Py_ssize_t row) except -1:
    """Append a NumPy scalar whose type is in _PYTHON. Returns False for other values."""
    kind = _PYTHON.get(type(value))
    return kind is not None and _append_exact(columns, c, kind(value), row)


cdef object _value_of(Columns columns, int c, value, Py_ssize_t row):
    try:
        return as_value(columns.dtypes[c], value)
    except Refused as error:
        raise refusal(columns, c, error, row) from None


cdef int append_value(Columns columns, int c, value, Py_ssize_t row) except -1:
    """Append a value that `as_value` has converted; None is a missing value."""
    cdef column_t *col = &columns.col[c]
    cdef Py_ssize_t length, k
    cdef const char *text
    if value is None:
        return columns.push_missing(c, row)
    if col.kind == KIND_F64:
        return columns._checked(columns.push_f64(c, value))
    if col.kind == KIND_I64:
        return columns._checked(columns.push_i64(c, value))
    if col.kind == KIND_STR:
        text = PyUnicode_AsUTF8AndSize(value, &length)
        return columns._checked(columns.push_str(c, text, length))
    columns._checked(columns.reserve(c, 1))
    for k in range(col.width):
        if col.item == 8:
            (<double *>col.data)[col.filled * col.width + k] = value[k]
        else:
            (<float *>col.data)[col.filled * col.width + k] = <float><double>value[k]
    col.nulls[col.filled] = 0
    col.filled += 1
    return 0


cdef bint _append_items(Columns columns, int c, values) except -1:
    cdef Py_ssize_t row = 0
    for item in values:
        if not _append_exact(columns, c, item, row) and not _append_numpy(columns, c, item, row):
            append_value(columns, c, _value_of(columns, c, item, row), row)
        row += 1
    return True


cdef bint _append_array(Columns columns, int c, array) except -1:
    cdef column_t *col = &columns.col[c]
    cdef cnp.ndarray numbers
    cdef Py_ssize_t n
    kind = array.dtype.kind
    if array.ndim != 1:
        return False
    n = array.shape[0]
    if kind in "OUT":
        return _append_items(columns, c, array.tolist())
    if n == 0:
        return True
    if col.kind == KIND_F64 and kind in "iufb" and array.dtype.itemsize <= 8:
        numbers = np.ascontiguousarray(array, dtype=np.float64)
    elif col.kind == KIND_I64 and (kind == "b" if col.type == TYPE_BOOL else kind in "iu"):
        if kind == "u" and array.dtype.itemsize == 8 and int(array.max()) > 0x7FFFFFFFFFFFFFFF:
            return False
        numbers = np.ascontiguousarray(array, dtype=np.int64)
    else:
        return False
    columns._checked(columns.reserve(c, n))
    memcpy(col.data + 8 * col.filled, cnp.PyArray_DATA(numbers), 8 * n)
    memset(col.nulls + col.filled, 0, n)
    col.filled += n
    return columns.fits(c)


cdef bint _append_matrix(Columns columns, int c, array) except -1:
    """Append a matrix of floats, whose rows are vectors, or a single vector. Returns False for other arrays."""
    cdef column_t *col = &columns.col[c]
    cdef cnp.ndarray floats
    cdef Py_ssize_t i, n
    cdef float *to
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        return False
    if array.ndim not in (1, 2) or array.shape[array.ndim - 1] != col.width:
        return False
    floats = np.ascontiguousarray(array, dtype=np.float32 if array.dtype.itemsize == col.item == 4 else np.float64)
    n = array.size
    columns._checked(columns.reserve(c, n // col.width))
    if floats.dtype.itemsize == col.item:
        memcpy(col.data + col.filled * col.width * col.item, cnp.PyArray_DATA(floats), col.item * n)
    else:
        to = <float *>col.data + col.filled * col.width
        for i in range(n):
            to[i] = <float>(<double *>cnp.PyArray_DATA(floats))[i]
    memset(col.nulls + col.filled, 0, n // col.width)
    col.filled += n // col.width
    return True


cdef bint _append_vectors(Columns columns, int c, values) except -1:
    """Append a list of numbers (a single vector), or a list of such lists. Returns False for other lists."""
    cdef double *room
    if len(values) == 0:
        return True
    room = <double *>malloc(columns.col[c].width * sizeof(double))
    if room is NULL:
        raise MemoryError
    try:
        cls = type(values[0])
        if cls is not list and cls is not tuple:
            return _append_vector(columns, c, values, room)
        for row in values:
            cls = type(row)
            if (cls is not list and cls is not tuple) or not _append_vector(columns, c, row, room):
                return False
        return True
    finally:
        free(room)


cdef bint _append_vector(Columns columns, int c, values, double *room) except -1:
    """Append a vector of floats and ints. Returns False for other values, and if all its numbers are NaN.

    A vector of NaN alone is left to shorttail.define.values, which decides between a vector and missing rows. room: a
    buffer for `width` doubles.
    """
    cdef Py_ssize_t k = 0
    cdef int overflow = 0
    cdef bint any_number = False
    cdef double number
    if len(values) != columns.col[c].width:
        return False
    for item in values:
        if PyFloat_Check(item):
            number = PyFloat_AS_DOUBLE(item)
        elif PyLong_Check(item):
            number = <double>PyLong_AsLongLongAndOverflow(item, &overflow)
            if overflow:
                return False
        else:
            return False
        any_number |= number == number
        room[k] = number
        k += 1
    if any_number:
        columns._checked(columns.push_vec(c, room))
    return any_number


cdef int append_any_column(Columns columns, int c, values) except -1:
    """Append a column by the rules of shorttail.define.values."""
    cdef column_t *col = &columns.col[c]
    cdef Py_ssize_t row, n, bytes
    cdef cnp.ndarray numbers
    try:
        found, nulls, is_scalar = as_column(columns.dtypes[c], values)
    except Refused as error:
        raise refusal(columns, c, error, -1) from None
    n = len(found)
    if n == 0:
        raise empty_column(columns, c)
    if n > REQUEST_ROWS:
        raise too_many_rows(n)
    if nulls is None and col.kind != KIND_STR:
        numbers = np.ascontiguousarray(found, dtype=_numpy_of(col))
        bytes = col.item * col.width
        columns._checked(columns.reserve(c, n))
        memcpy(col.data + bytes * col.filled, cnp.PyArray_DATA(numbers), bytes * n)
        memset(col.nulls + col.filled, 0, n)
        col.filled += n
        return 0
    missing = bytearray(n) if nulls is None else nulls.tolist()
    for row, value in enumerate(found.tolist()):
        append_value(columns, c, None if missing[row] else value, -1 if is_scalar else row)
    return 0
