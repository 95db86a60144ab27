from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef enum:
    KIND_I64 = 0
    KIND_F64 = 1
    KIND_STR = 2
    KIND_VEC = 3

cdef enum:                  # types that are stored as KIND_I64; codes of shorttail.define.dtypes
    TYPE_BOOL = 1
    TYPE_INT32 = 2
    TYPE_TIME = 7
    TYPE_VECTOR = 8         # of floats; the vectors of doubles have another code

cdef enum:
    AT_LOOKUP = -1          # a row without a moment of its own

cdef enum finish_t:
    FINISHED
    FINISH_NO_COLUMN        # a column is missing from the request
    FINISH_OTHER_LENGTH     # a column has more than one value, but fewer than the longest column
    FINISH_NO_MEMORY

cdef struct column_t:
    int kind
    int type            # code of the column's dtype
    int width           # elements per row for KIND_VEC, else 1
    int item            # bytes of an element: 4 for a vector of floats, else 8
    int required        # 1: a missing value is refused
    const char *instead # the value that replaces a missing one, in the layout of data; NULL: a missing value is a null
    Py_ssize_t instead_bytes
    char *data          # I64: int64_t[]; F64: double[]; VEC: float or double[rows * width]; STR: arena of bytes
    uint32_t *ends      # STR: end offset of each row in data; a row starts where the one before ends
    uint8_t *nulls      # a byte per row, 1 = null
    int has_nulls       # 1: a row since reset() is null
    Py_ssize_t filled   # rows in this column; equals n_rows between requests
    Py_ssize_t row_cap  # rows that fit the allocated memory
    Py_ssize_t data_bytes   # STR: arena bytes in use
    Py_ssize_t data_cap     # STR: arena bytes allocated


cdef class Columns:
    cdef column_t *col
    cdef readonly int n_columns
    cdef readonly Py_ssize_t n_rows
    cdef readonly tuple names
    cdef readonly tuple dtypes
    cdef readonly dict index
    cdef readonly tuple required    # names of the columns that refuse a missing value
    cdef readonly dict instead      # name -> the value that replaces a missing one
    cdef tuple _kept                # the bytes objects that column_t.instead points into
    cdef int at_fault               # the column of the last error of finish()
    # The moments that requests gave (judge_at): for each of the first n_as_of rows in microseconds since 1970, or
    # AT_LOOKUP. The rows after them have none. n_as_of is 0 until a request gives a moment.
    cdef int64_t *as_of
    cdef Py_ssize_t n_as_of, as_of_cap

    # Each returns 0, or -1 if there is no memory (or, for strings, if the arena would grow over 4 GiB).
    cdef int reserve(self, int c, Py_ssize_t rows) noexcept nogil
    cdef int push_i64(self, int c, int64_t value) noexcept nogil
    cdef int push_f64(self, int c, double value) noexcept nogil
    cdef int push_str(self, int c, const char *bytes, Py_ssize_t length) noexcept nogil
    # values: `width` elements, which become floats where the column has floats.
    cdef int push_vec(self, int c, const double *values) noexcept nogil
    cdef int push_null(self, int c) noexcept nogil
    # Ends a request: repeats columns of a single value to the length of the longest column. rows: receives the number
    # of rows added. If the outcome is not FINISHED, the caller must call rollback().
    cdef finish_t finish(self, Py_ssize_t *rows) noexcept nogil
    # Calls finish() and raises its errors. Returns the number of rows added.
    cdef Py_ssize_t end_request(self) except -1
    cdef void rollback(self) noexcept nogil

    cdef int _grow_arena(self, int c, Py_ssize_t need) noexcept nogil
    cdef int _repeat_last(self, int c, Py_ssize_t times) noexcept nogil
    cdef int _push_instead(self, int c) noexcept nogil
    cdef void _replace_nans(self, int c) noexcept nogil
    cdef bytes _hold_instead(self, int c, value)
    # Removes the values that the current request has appended to a column.
    cdef void forget_column(self, int c) noexcept nogil
    # Returns whether all values of the current request are in the range of Int32, if the column is Int32; else True.
    cdef bint fits(self, int c) noexcept nogil
    # Appends a missing value: its replacement, or a null. row: for the error message, -1 for a single value.
    cdef int push_missing(self, int c, Py_ssize_t row) except -1
    # Appends a column by the rules of shorttail.define.values, where the fast paths do not apply.
    cdef int append_any(self, int c, values) except -1
    cdef int _checked(self, int failed) except -1
    # Hashes the values of a row in its first n_columns columns. The hash decides whether the canary answers a request,
    # so the same values must give the same hash in every process, at any time.
    cdef uint32_t hash_values(self, Py_ssize_t row, int n_columns, uint32_t salt) noexcept nogil
    cdef void drop_last(self, Py_ssize_t rows) noexcept nogil
    cpdef int judge_at(self, int64_t as_of_us, Py_ssize_t rows) except -1
    # Returns the moment of each row, or NULL if no row has one: all are judged at the time of the lookup.
    cdef int moments(self, const int64_t **as_of) except -1
    cdef int _fill_moments(self, int64_t as_of_us, Py_ssize_t n_rows) except -1


cdef class CopyColumns:
    cdef Py_ssize_t n_ops
    cdef int *op        # column, output, offset for each operation
    cdef tuple _keep
