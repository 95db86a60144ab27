"""Request columns: C arrays that collect the values of requests, row after row.

A `Columns` holds the open batch of a plan. Embedded calls fill it from Python (`append`); the server fills it directly
from MessagePack (native/wire_decode.pxi), so it creates no Python object per value. shorttail.define.values has the
rules for what a column takes. For speed, this module and wire_decode.pxi convert values of common types themselves,
with the same result, and pass everything else to shorttail.define.values. columns_append.pxi reads Python values,
columns_copy.pxi copies columns to the model's inputs, and columns_errors.pxi makes the error messages.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, int32_t
from libc.stdlib cimport free, malloc, realloc, calloc
from libc.string cimport memcpy, memset
from libc.math cimport NAN
from cpython.bool cimport PyBool_Check
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.float cimport PyFloat_Check, PyFloat_AS_DOUBLE
from cpython.long cimport PyLong_Check, PyLong_CheckExact, PyLong_AsLongLongAndOverflow
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_CheckExact

import numpy as np
cimport numpy as cnp

from shorttail.config import LIMITS
from shorttail.define.names import decomposed, quoted
from shorttail.define.values import Refused, as_column, as_value
from shorttail.errors import InvalidArgument, ResourceExhausted

cnp.import_array()

cdef Py_ssize_t STRING_BYTES = LIMITS.string_bytes
cdef Py_ssize_t REQUEST_ROWS = LIMITS.rows_per_request


cdef int _kind_of(dtype) except -1:
    cdef int code = dtype.code
    if code in (TYPE_BOOL, TYPE_INT32, 3, TYPE_TIME):
        return KIND_I64
    if code in (4, 5):
        return KIND_F64
    if code == 6:
        return KIND_STR
    return KIND_VEC


cdef object _numpy_of(const column_t *col):
    """Return the NumPy type of a column that is not of strings."""
    return np.int64 if col.kind == KIND_I64 else np.float32 if col.item == 4 else np.float64


cdef uint64_t _mixed(uint64_t x) noexcept nogil:
    """Return x with every bit mixed into all bits: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x += <uint64_t>0x9E3779B97F4A7C15ULL
    x = (x ^ (x >> 30)) * <uint64_t>0xBF58476D1CE4E5B9ULL
    x = (x ^ (x >> 27)) * <uint64_t>0x94D049BB133111EBULL
    return x ^ (x >> 31)


cdef class Columns:
    """Columns(names, dtypes, required=(), instead={}): an empty batch.

    names: column names; dtypes: their `shorttail.define.dtypes.DType`. required: names of the columns that refuse a
    missing value. instead: {name: the value that replaces a missing value}, in the form of `as_value`. In other columns
    a missing value is a null. `n_rows` counts the rows of finished requests.
    """

    def __cinit__(self, names, dtypes, required=(), instead=None):
        self.names = tuple(names)
        self.dtypes = tuple(dtypes)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.required = tuple(required)
        self.instead = dict(instead or {})
        self.n_columns = len(self.names)
        self.col = <column_t *>calloc(max(1, self.n_columns), sizeof(column_t))
        if self.col is NULL:
            raise MemoryError
        cdef int c
        for c in range(self.n_columns):
            self.col[c].kind = _kind_of(self.dtypes[c])
            self.col[c].type = self.dtypes[c].code
            self.col[c].width = self.dtypes[c].width
            self.col[c].item = 4 if self.dtypes[c].code == TYPE_VECTOR else 8
            if self.reserve(c, 64) < 0:
                raise MemoryError
        for name in self.required:
            self.col[<int>self.index[name]].required = True
        self._kept = tuple([self._hold_instead(self.index[name], value) for name, value in self.instead.items()])

    cdef bytes _hold_instead(self, int c, value):
        """Set the value that replaces a missing one. Returns its bytes, which the caller keeps alive.

        The value is appended to the empty column, to get its bytes, and removed again.
        """
        cdef column_t *col = &self.col[c]
        append_value(self, c, value, -1)
        held = col.data[:col.data_bytes if col.kind == KIND_STR else col.item * col.width]
        self.forget_column(c)
        col.instead = PyBytes_AS_STRING(held)
        col.instead_bytes = PyBytes_GET_SIZE(held)
        return held

    def __dealloc__(self):
        cdef int c
        if self.col is not NULL:
            for c in range(self.n_columns):
                free(self.col[c].data)
                free(self.col[c].ends)
                free(self.col[c].nulls)
            free(self.col)
        free(self.as_of)

    def reset(self):
        """Remove all rows, and keep the memory for the next batch."""
        cdef int c
        for c in range(self.n_columns):
            self.col[c].filled = 0
            self.col[c].data_bytes = 0
            self.col[c].has_nulls = 0
        self.n_rows = 0
        self.n_as_of = 0

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
            grown = realloc(col.data, cap * col.item * col.width)
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

    cdef int push_vec(self, int c, const double *values) noexcept nogil:
        cdef column_t *col = &self.col[c]
        cdef int k
        if col.filled == col.row_cap and self.reserve(c, 1) < 0:
            return -1
        if col.item == 8:
            memcpy(col.data + col.filled * col.width * 8, values, col.width * 8)
        else:
            for k in range(col.width):
                (<float *>col.data)[col.filled * col.width + k] = <float>values[k]
        col.nulls[col.filled] = 0
        col.filled += 1
        return 0

    cdef int push_null(self, int c) noexcept nogil:
        # A null also has a valid value, so that a kernel may read the value before it checks the null flag.
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t k
        cdef int failed
        if col.instead is not NULL:
            return self._push_instead(c)
        if col.kind == KIND_I64:
            failed = self.push_i64(c, 0)
        elif col.kind == KIND_F64:
            failed = self.push_f64(c, NAN)
        elif col.kind == KIND_STR:
            failed = self.push_str(c, NULL, 0)
        else:
            if col.filled == col.row_cap and self.reserve(c, 1) < 0:
                return -1
            for k in range(col.filled * col.width, (col.filled + 1) * col.width):
                if col.item == 8:
                    (<double *>col.data)[k] = NAN
                else:
                    (<float *>col.data)[k] = NAN
            col.filled += 1
            failed = 0
        if failed:
            return -1
        col.nulls[col.filled - 1] = 1
        col.has_nulls = 1
        return 0

    cdef int _push_instead(self, int c) noexcept nogil:
        cdef column_t *col = &self.col[c]
        if col.kind == KIND_I64:
            return self.push_i64(c, (<const int64_t *>col.instead)[0])
        if col.kind == KIND_F64:
            return self.push_f64(c, (<const double *>col.instead)[0])
        if col.kind == KIND_STR:
            return self.push_str(c, col.instead, col.instead_bytes)
        if col.filled == col.row_cap and self.reserve(c, 1) < 0:
            return -1
        memcpy(col.data + col.filled * col.instead_bytes, col.instead, col.instead_bytes)
        col.nulls[col.filled] = 0
        col.filled += 1
        return 0

    cdef int push_missing(self, int c, Py_ssize_t row) except -1:
        if self.col[c].required:
            raise missing_value(self, c, row)
        return self._checked(self.push_null(c))

    cdef int _repeat_last(self, int c, Py_ssize_t times) noexcept nogil:
        """Append `times` copies of the last row of column c."""
        cdef column_t *col = &self.col[c]
        cdef Py_ssize_t last = col.filled - 1
        cdef Py_ssize_t i, start, length, size = col.width * col.item
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
                memcpy(col.data + (col.filled + i) * size, col.data + last * size, size)
        else:
            for i in range(times):
                (<int64_t *>col.data)[col.filled + i] = (<int64_t *>col.data)[last]
        col.filled += times
        return 0

    cdef finish_t finish(self, Py_ssize_t *rows) noexcept nogil:
        cdef Py_ssize_t n = 1
        cdef Py_ssize_t given
        cdef int c
        for c in range(self.n_columns):
            n = max(n, self.col[c].filled - self.n_rows)
        for c in range(self.n_columns):
            self.at_fault = c
            given = self.col[c].filled - self.n_rows
            if self.col[c].instead is not NULL and self.col[c].kind == KIND_F64:
                self._replace_nans(c)
            if given == n:
                continue
            if given == 0:
                return FINISH_NO_COLUMN
            if given != 1:
                return FINISH_OTHER_LENGTH
            if self._repeat_last(c, n - 1) < 0:
                return FINISH_NO_MEMORY
        self.n_rows += n
        rows[0] = n
        return FINISHED

    cdef void _replace_nans(self, int c) noexcept nogil:
        """Replace each NaN of this request: in a float column NaN is a missing value, even in an array or a tensor."""
        cdef double *values = <double *>self.col[c].data
        cdef Py_ssize_t i
        for i in range(self.n_rows, self.col[c].filled):
            if values[i] != values[i]:
                values[i] = (<const double *>self.col[c].instead)[0]

    cdef Py_ssize_t end_request(self) except -1:
        cdef Py_ssize_t n = 0
        cdef finish_t outcome = self.finish(&n)
        if outcome != FINISHED:
            raise finish_error(self, outcome)
        if n > REQUEST_ROWS:
            self.n_rows -= n
            raise too_many_rows(n)
        return n

    cdef bint fits(self, int c) noexcept nogil:
        cdef const int64_t *values = <const int64_t *>self.col[c].data
        cdef Py_ssize_t i
        if self.col[c].type == TYPE_INT32:
            for i in range(self.n_rows, self.col[c].filled):
                if values[i] != <int32_t>values[i]:
                    return False
        return True

    cdef void forget_column(self, int c) noexcept nogil:
        cdef column_t *col = &self.col[c]
        col.filled = self.n_rows
        if col.kind == KIND_STR:
            col.data_bytes = col.ends[self.n_rows - 1] if self.n_rows else 0

    cdef void rollback(self) noexcept nogil:
        cdef int c
        for c in range(self.n_columns):
            self.forget_column(c)

    cdef void drop_last(self, Py_ssize_t rows) noexcept nogil:
        """Remove the rows of the last request, which is already finished."""
        self.n_rows -= rows
        self.n_as_of = min(self.n_as_of, self.n_rows)
        self.rollback()

    # -- the moments at which event times are judged --------------------------------------------------------

    cpdef int judge_at(self, int64_t as_of_us, Py_ssize_t rows) except -1:
        """Look the last `rows` rows up as of a moment, in microseconds since 1970 UTC, not as of the lookup.

        Call it for the last request, after it was appended. Raises ValueError for a moment before 1970, and
        ResourceExhausted if there is no memory; the rows are removed then.
        """
        if as_of_us < 0 or not 0 <= rows <= self.n_rows:
            raise ValueError(f"moment {as_of_us} for {rows} of {self.n_rows} rows")
        try:
            self._fill_moments(AT_LOOKUP, self.n_rows - rows)
            return self._fill_moments(as_of_us, self.n_rows)
        except ResourceExhausted:
            self.drop_last(rows)
            raise

    cdef int moments(self, const int64_t **as_of) except -1:
        as_of[0] = NULL
        if self.n_as_of:
            self._fill_moments(AT_LOOKUP, self.n_rows)
            as_of[0] = self.as_of
        return 0

    cdef int _fill_moments(self, int64_t as_of_us, Py_ssize_t n_rows) except -1:
        """Give this moment to the rows up to n_rows that have none."""
        cdef Py_ssize_t i, cap
        cdef void *grown
        if n_rows > self.as_of_cap:
            cap = max(n_rows, 2 * self.as_of_cap)
            grown = realloc(self.as_of, cap * sizeof(int64_t))
            self._checked(grown is NULL)
            self.as_of = <int64_t *>grown
            self.as_of_cap = cap
        for i in range(self.n_as_of, n_rows):
            self.as_of[i] = as_of_us
        self.n_as_of = max(self.n_as_of, n_rows)
        return 0

    # -- hashes ------------------------------------------------------------------------------------------------

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
                size = col.item * col.width
                start = row * size
            hash ^= <uint64_t>size << 1
            for i in range(0, size, 8):
                word = 0
                memcpy(&word, col.data + start + i, min(8, size - i))
                hash = _mixed(hash ^ word)
        return <uint32_t>(hash >> 32)

    def hash_row(self, Py_ssize_t row, int n_columns, uint32_t salt):
        """Return a 32-bit hash of the values that a row has in its first n_columns columns. Raises IndexError."""
        if not 0 <= row < self.n_rows:
            raise IndexError(row)
        return self.hash_values(row, n_columns, salt)

    # -- filling from Python -------------------------------------------------------------------------------

    def append(self, values):
        """Append a request: {column name: value, list or array}. A column with a single value is repeated.

        Every column must be given. docs/types.md says what each type takes. Returns the number of rows added. If it
        raises InvalidArgument, nothing is appended.
        """
        try:
            for name, value in values.items():
                c = self.index.get(name)
                if c is None:   # frames may have numbers as names; clients send them as text too
                    c = self.index.get(str(name))
                if c is None:
                    raise unknown_column(self, name)
                if self.col[<int>c].filled != self.n_rows:
                    raise InvalidArgument(f"column {name!r} is given twice")
                append_column(self, c, value)
            return self.end_request()
        except BaseException:
            self.rollback()
            raise

    cdef int append_any(self, int c, values) except -1:
        return append_any_column(self, c, values)

    cdef int _checked(self, int failed) except -1:
        if failed:
            raise ResourceExhausted("no memory for this batch; send fewer rows")
        return 0

    def column(self, name):
        """Return the values of a column as a new array: float64, int64, a matrix [n, width], or objects (str).

        A null is NaN, 0, a row of NaN, or None.
        """
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
            return np.empty(0, dtype=_numpy_of(col))
        if col.kind == KIND_I64:
            return np.array(<int64_t[:self.n_rows]><int64_t *>col.data)
        if col.kind == KIND_F64:
            return np.array(<double[:self.n_rows]><double *>col.data)
        if col.item == 8:
            return np.array(<double[:self.n_rows, :col.width]><double *>col.data)
        return np.array(<float[:self.n_rows, :col.width]><float *>col.data)


include "columns_append.pxi"
include "columns_errors.pxi"
include "columns_copy.pxi"
