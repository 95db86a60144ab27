"""Request columns: the values that callers send, gathered row after row into C arrays.

One `Columns` holds the pending batch of one plan. Embedded calls fill it from Python (`append`), the server
straight from MessagePack (native/wire), so no Python object is made for a value on the wire. columns_copy.pxi takes
them on into the model's inputs, columns_errors.pxi says what is wrong with them.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, int32_t
from libc.stdlib cimport free, realloc, calloc
from libc.string cimport memcpy, memset
from libc.math cimport NAN
from cpython.float cimport PyFloat_CheckExact, PyFloat_AS_DOUBLE
from cpython.long cimport PyLong_CheckExact, PyLong_AsLongLongAndOverflow
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_CheckExact

import numpy as np
cimport numpy as cnp

from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, ResourceExhausted

cnp.import_array()

cdef Py_ssize_t STRING_BYTES = LIMITS.string_bytes
cdef Py_ssize_t REQUEST_ROWS = LIMITS.rows_per_request

cdef enum:
    NO_MEMORY = -1000000


cdef int _kind_of(dtype) except -1:
    cdef int code = dtype.code
    if code in (1, 2, 3, 7):  # Bool, Int32, Int64, Timestamp
        return KIND_I64
    if code in (4, 5):
        return KIND_F64
    if code == 6:
        return KIND_STR
    return KIND_VEC


cdef uint64_t _mixed(uint64_t x) noexcept nogil:
    """Every bit of x spread over all bits: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x += <uint64_t>0x9E3779B97F4A7C15ULL
    x = (x ^ (x >> 30)) * <uint64_t>0xBF58476D1CE4E5B9ULL
    x = (x ^ (x >> 27)) * <uint64_t>0x94D049BB133111EBULL
    return x ^ (x >> 31)


cdef class Columns:
    """Columns(names, dtypes): an empty batch.

    names: column names; dtypes: their `shorttail.define.dtypes.DType`. `n_rows` counts the rows of finished requests.
    """

    def __cinit__(self, names, dtypes):
        self.names = tuple(names)
        self.dtypes = tuple(dtypes)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.n_columns = len(self.names)
        self.col = <column_t *>calloc(max(1, self.n_columns), sizeof(column_t))
        if self.col is NULL:
            raise MemoryError
        cdef int c
        for c in range(self.n_columns):
            self.col[c].kind = _kind_of(self.dtypes[c])
            self.col[c].width = self.dtypes[c].width
            self.col[c].narrow = self.dtypes[c].code == 2
            if self.reserve(c, 64) < 0:
                raise MemoryError

    def __dealloc__(self):
        cdef int c
        if self.col is not NULL:
            for c in range(self.n_columns):
                free(self.col[c].data)
                free(self.col[c].ends)
                free(self.col[c].nulls)
            free(self.col)

    def reset(self):
        """Forget all rows; the memory is kept for the next batch."""
        cdef int c
        for c in range(self.n_columns):
            self.col[c].filled = 0
            self.col[c].data_bytes = 0
            self.col[c].has_nulls = 0
        self.n_rows = 0

    # -- filling from C ------------------------------------------------------------------------------------

    cdef int reserve(self, int c, Py_ssize_t rows) noexcept nogil:
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t need = col.filled + rows
        cdef Py_ssize_t cap = col.row_cap
        cdef void *grown
        if need <= cap:
            return 0
        cap = max(need, 2 * cap)
        grown = realloc(col.nulls, cap)
        if grown is NULL:
            return -1
        col.nulls = <uint8_t *>grown
        if col.kind == KIND_STR:
            grown = realloc(col.ends, cap * sizeof(uint32_t))
            if grown is NULL:
                return -1
            col.ends = <uint32_t *>grown
        else:
            grown = realloc(col.data, cap * (4 * col.width if col.kind == KIND_VEC else 8))
            if grown is NULL:
                return -1
            col.data = <char *>grown
        col.row_cap = cap
        return 0

    cdef int push_i64(self, int c, int64_t value) noexcept nogil:
        cdef column_t *col = &self.col[c]
        if col.filled == col.row_cap and self.reserve(c, 1) < 0:
            return -1
        (<int64_t *>col.data)[col.filled] = value
        col.nulls[col.filled] = 0
        col.filled += 1
        return 0

    cdef int push_f64(self, int c, double value) noexcept nogil:
        cdef column_t *col = &self.col[c]
        if col.filled == col.row_cap and self.reserve(c, 1) < 0:
            return -1
        (<double *>col.data)[col.filled] = value
        col.nulls[col.filled] = 0
        col.filled += 1
        return 0

    cdef int _grow_arena(self, int c, Py_ssize_t need) noexcept nogil:
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t cap = max(need, max(256, 2 * col.data_cap))
        cdef void *grown
        if need <= col.data_cap:
            return 0
        if need > <Py_ssize_t>0xFFFFFFFF:
            return -1
        grown = realloc(col.data, cap)
        if grown is NULL:
            return -1
        col.data = <char *>grown
        col.data_cap = cap
        return 0

    cdef int push_str(self, int c, const char *bytes, Py_ssize_t length) noexcept nogil:
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t end = col.data_bytes + length
        if col.filled == col.row_cap and self.reserve(c, 1) < 0:
            return -1
        if end > col.data_cap and self._grow_arena(c, end) < 0:
            return -1
        if length:
            memcpy(col.data + col.data_bytes, bytes, length)
        col.data_bytes = end
        col.ends[col.filled] = <uint32_t>end
        col.nulls[col.filled] = 0
        col.filled += 1
        return 0

    cdef int push_vec(self, int c, const float *values) noexcept nogil:
        cdef column_t *col = &self.col[c]
        if col.filled == col.row_cap and self.reserve(c, 1) < 0:
            return -1
        memcpy(col.data + col.filled * col.width * 4, values, col.width * 4)
        col.nulls[col.filled] = 0
        col.filled += 1
        return 0

    cdef int push_null(self, int c) noexcept nogil:
        # A null carries a harmless value, so that a kernel may read it before it looks at the flag.
        cdef column_t *col = &self.col[c]
        cdef float *vector
        cdef int k
        cdef int failed
        if col.kind == KIND_I64:
            failed = self.push_i64(c, 0)
        elif col.kind == KIND_F64:
            failed = self.push_f64(c, NAN)
        elif col.kind == KIND_STR:
            failed = self.push_str(c, NULL, 0)
        else:
            if col.filled == col.row_cap and self.reserve(c, 1) < 0:
                return -1
            vector = <float *>col.data + col.filled * col.width
            for k in range(col.width):
                vector[k] = NAN
            col.filled += 1
            failed = 0
        if failed:
            return -1
        col.nulls[col.filled - 1] = 1
        col.has_nulls = 1
        return 0

    cdef int _repeat_last(self, int c, Py_ssize_t times) noexcept nogil:
        """Append `times` copies of the last row of column c."""
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t last = col.filled - 1
        cdef Py_ssize_t i, start, length
        if self.reserve(c, times) < 0:
            return -1
        memset(col.nulls + col.filled, col.nulls[last], times)
        if col.kind == KIND_STR:
            start = col.ends[last - 1] if last else 0
            length = col.ends[last] - start
            if self._grow_arena(c, col.data_bytes + times * length) < 0:
                return -1
            for i in range(times):
                if length:
                    memcpy(col.data + col.data_bytes, col.data + start, length)
                col.data_bytes += length
                col.ends[col.filled + i] = <uint32_t>col.data_bytes
        elif col.kind == KIND_VEC:
            for i in range(times):
                memcpy(col.data + (col.filled + i) * col.width * 4, col.data + last * col.width * 4, col.width * 4)
        else:
            for i in range(times):
                (<int64_t *>col.data)[col.filled + i] = (<int64_t *>col.data)[last]
        col.filled += times
        return 0

    cdef Py_ssize_t finish(self) noexcept nogil:
        cdef Py_ssize_t n = 1
        cdef Py_ssize_t given, i
        cdef int64_t value
        cdef int c
        for c in range(self.n_columns):
            n = max(n, self.col[c].filled - self.n_rows)
            if self.col[c].narrow:
                for i in range(self.n_rows, self.col[c].filled):
                    value = (<int64_t *>self.col[c].data)[i]
                    if value != <int32_t>value:
                        return -(c + 2001)
        for c in range(self.n_columns):
            given = self.col[c].filled - self.n_rows
            if given == n:
                continue
            if given == 0:
                return -(c + 1001)
            if given != 1:
                return -(c + 1)
            if self._repeat_last(c, n - 1) < 0:
                return NO_MEMORY
        self.n_rows += n
        return n

    cdef void rollback(self) noexcept nogil:
        cdef column_t *col
        cdef int c
        for c in range(self.n_columns):
            col = &self.col[c]
            col.filled = self.n_rows
            if col.kind == KIND_STR:
                col.data_bytes = col.ends[self.n_rows - 1] if self.n_rows else 0

    cdef void drop_last(self, Py_ssize_t rows) noexcept nogil:
        """Take back the rows of the last request, which is whole."""
        self.n_rows -= rows
        self.rollback()

    cdef uint32_t hash_values(self, Py_ssize_t row, int n_columns, uint32_t salt) noexcept nogil:
        cdef uint64_t hash = _mixed(salt)
        cdef column_t *col
        cdef Py_ssize_t start, size, i
        cdef uint64_t word
        cdef int c
        for c in range(min(n_columns, self.n_columns)):
            col = &self.col[c]
            if col.nulls[row]:
                hash = _mixed(hash ^ 1)
                continue
            if col.kind == KIND_STR:
                start = col.ends[row - 1] if row else 0
                size = col.ends[row] - start
            else:
                size = 4 * col.width if col.kind == KIND_VEC else 8
                start = row * size
            hash ^= <uint64_t>size << 1
            for i in range(0, size, 8):
                word = 0
                memcpy(&word, col.data + start + i, min(8, size - i))
                hash = _mixed(hash ^ word)
        return <uint32_t>(hash >> 32)

    def hash_row(self, Py_ssize_t row, int n_columns, uint32_t salt):
        """32 bits of the values of a row in its first columns. Raises IndexError."""
        if not 0 <= row < self.n_rows:
            raise IndexError(row)
        return self.hash_values(row, n_columns, salt)

    # -- filling from Python -------------------------------------------------------------------------------

    def append(self, values):
        """Append one request: {column name: scalar, list or array}; columns of one value are repeated.

        Every column must be given; None is null. Returns the rows added. Raises InvalidArgument with nothing
        appended.
        """
        cdef Py_ssize_t n
        try:
            for name, value in values.items():
                c = self.index.get(name)
                if c is None:
                    raise unknown_column(self, name)
                self._append_column(c, value)
            n = self.finish()
            if n < 0:
                raise finish_error(self, n)
            if n > REQUEST_ROWS:
                self.n_rows -= n
                raise too_many_rows(n)
            return n
        except BaseException:
            self.rollback()
            raise

    cdef int _append_column(self, int c, value) except -1:
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t before = col.filled
        cdef Py_ssize_t row = 0
        if col.kind == KIND_VEC:
            return self._append_vectors(c, value)
        cls = type(value)
        if cls is list or cls is tuple:
            for item in value:
                self._append_scalar(c, item, row)
                row += 1
        elif cls is int or cls is float or cls is str or cls is bool or value is None:
            self._append_scalar(c, value, -1)
            return 0
        else:
            array = np.asarray(value)
            if array.ndim == 0:
                self._append_scalar(c, array.item(), -1)
                return 0
            if array.ndim != 1:
                raise InvalidArgument(f"column {self.names[c]!r} takes one value a row; got an array of shape {array.shape}")
            self._append_array(c, array)
        if col.filled == before:
            raise empty_column(self, c)
        return 0

    cdef int _append_scalar(self, int c, value, Py_ssize_t row) except -1:
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t length
        cdef const char *text
        cdef int overflow = 0
        cdef long long integer
        cdef int failed
        # The three that make nearly all requests, before the rules for everything else.
        if col.kind == KIND_F64 and PyFloat_CheckExact(value):
            return self._checked(self.push_f64(c, PyFloat_AS_DOUBLE(value)))
        if col.kind != KIND_STR and PyLong_CheckExact(value):
            integer = PyLong_AsLongLongAndOverflow(value, &overflow)
            if overflow == 0 and col.kind == KIND_F64:
                return self._checked(self.push_f64(c, <double>integer))
            if overflow == 0 and self.dtypes[c].code != 1:
                return self._checked(self.push_i64(c, integer))
        if value is None:
            failed = self.push_null(c)
        elif col.kind == KIND_F64:
            if not isinstance(value, (int, float, np.number, np.bool_)):
                raise wrong_type(self, c, value, row)
            failed = self.push_f64(c, value)
        elif col.kind == KIND_I64:
            if isinstance(value, (bool, np.bool_)) != (self.dtypes[c].code == 1):
                if isinstance(value, (bool, np.bool_)) or value not in (0, 1):
                    raise wrong_type(self, c, value, row)
            elif not isinstance(value, (int, np.integer, np.bool_)):
                raise wrong_type(self, c, value, row)
            try:
                failed = self.push_i64(c, value)
            except OverflowError:
                raise wrong_type(self, c, value, row) from None
        else:
            if not isinstance(value, str):
                if value != value:  # NaN, as pandas writes a missing string
                    return self._checked(self.push_null(c))
                raise wrong_type(self, c, value, row)
            text = PyUnicode_AsUTF8AndSize(value, &length)
            if length > STRING_BYTES:
                raise string_too_long(self, c, length)
            failed = self.push_str(c, text, length)
        self._checked(failed)
        return 0

    cdef int _checked(self, int failed) except -1:
        if failed:
            raise ResourceExhausted("no memory for this batch; send fewer rows")
        return 0

    cdef int _append_array(self, int c, array) except -1:
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t n = array.shape[0]
        cdef const int64_t[::1] integers
        cdef const double[::1] doubles
        kind = array.dtype.kind
        if col.kind == KIND_STR or kind not in "iufbM":
            for row, item in enumerate(array.tolist()):
                self._append_scalar(c, item, row)
            return 0
        if n == 0:
            return 0
        self._checked(self.reserve(c, n))
        if col.kind == KIND_F64:
            doubles = np.ascontiguousarray(array, dtype=np.float64)
            memcpy(<double *>col.data + col.filled, &doubles[0], n * 8)
        else:
            code = self.dtypes[c].code
            if kind == "M" and code == 7:
                array = array.astype("datetime64[us]").view(np.int64)
            elif (kind == "b") != (code == 1) or kind == "f" or kind == "M":
                raise InvalidArgument(
                    f"column {self.names[c]!r} takes {self.dtypes[c]}; got an array of {array.dtype}: "
                    f"cast it, and send what is missing as None")
            elif kind == "u" and array.dtype.itemsize == 8 and int(array.max()) > 0x7FFFFFFFFFFFFFFF:
                raise wrong_type(self, c, int(array.max()), -1)
            integers = np.ascontiguousarray(array, dtype=np.int64)
            memcpy(<int64_t *>col.data + col.filled, &integers[0], n * 8)
        memset(col.nulls + col.filled, 0, n)
        col.filled += n
        return 0

    cdef int _append_vectors(self, int c, value) except -1:
        cdef column_t *col = &self.col[c]
        cdef const float[:, ::1] rows
        cdef Py_ssize_t i
        if value is None:
            self._checked(self.push_null(c))
            return 0
        try:
            array = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError):
            raise wrong_type(self, c, value, -1) from None
        if array.ndim == 1:
            array = array.reshape(1, -1)
        if array.ndim != 2 or array.shape[1] != col.width:
            raise InvalidArgument(
                f"column {self.names[c]!r} takes {self.dtypes[c]}; got values of shape {np.shape(value)}")
        if array.shape[0] == 0:
            raise empty_column(self, c)
        rows = np.ascontiguousarray(array)
        for i in range(rows.shape[0]):
            self._checked(self.push_vec(c, &rows[i, 0]))
        return 0

    def column(self, name):
        """The values of one column as a new array (float64, int64, float32 [n, width], or object of str)."""
        cdef int c = self.index[name]
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t i, start = 0
        if col.kind == KIND_STR:
            texts = np.empty(self.n_rows, dtype=object)
            for i in range(self.n_rows):
                texts[i] = None if col.nulls[i] else col.data[start:col.ends[i]].decode("utf-8", "surrogateescape")
                start = col.ends[i]
            return texts
        if self.n_rows == 0:
            return np.empty(0, dtype=(np.int64, np.float64, None, np.float32)[col.kind])
        if col.kind == KIND_I64:
            return np.array(<int64_t[:self.n_rows]><int64_t *>col.data)
        if col.kind == KIND_F64:
            return np.array(<double[:self.n_rows]><double *>col.data)
        return np.array(<float[:self.n_rows, :col.width]><float *>col.data)


include "columns_errors.pxi"
include "columns_copy.pxi"
