from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef enum:
    KIND_I64 = 0
    KIND_F64 = 1
    KIND_STR = 2
    KIND_VEC = 3

cdef enum:                  # types that share KIND_I64; codes of shorttail.define.dtypes
    TYPE_BOOL = 1
    TYPE_INT32 = 2
    TYPE_TIME = 7

cdef enum finish_t:
    FINISHED
    FINISH_NO_COLUMN        # a column was not given
    FINISH_OTHER_LENGTH     # a column has neither one value nor as many as the others
    FINISH_NO_MEMORY

cdef struct column_t:
    int kind
    int type            # code of its dtype
    int width           # floats a row for KIND_VEC, else 1
    int required        # a missing value is refused
    const char *instead # what is taken for a missing value, as it lies in data; NULL: nothing, it is a null
    Py_ssize_t instead_bytes
    char *data          # I64: int64_t[]; F64: double[]; VEC: float[rows * width]; STR: arena of bytes
    uint32_t *ends      # STR: end offset of each row in data; a row starts where the one before ends
    uint8_t *nulls      # one byte a row, 1 = null
    int has_nulls       # some row since reset is null
    Py_ssize_t filled   # rows in this column; equals n_rows between requests
    Py_ssize_t row_cap
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
    cdef readonly dict instead      # name -> what is taken for a missing value
    cdef tuple _kept                # the bytes that column_t.instead points to
    cdef int at_fault               # the column that finish() found wrong

    # Each returns 0, or -1 when there is no memory (or, for strings, when an arena would pass 4 GiB).
    cdef int reserve(self, int c, Py_ssize_t rows) noexcept nogil
    cdef int push_i64(self, int c, int64_t value) noexcept nogil
    cdef int push_f64(self, int c, double value) noexcept nogil
    cdef int push_str(self, int c, const char *bytes, Py_ssize_t length) noexcept nogil
    cdef int push_vec(self, int c, const float *values) noexcept nogil
    cdef int push_null(self, int c) noexcept nogil
    # End of one request: columns of one row are repeated to the length of the others. rows: how many were added.
    # Unless it is FINISHED, the caller calls rollback().
    cdef finish_t finish(self, Py_ssize_t *rows) noexcept nogil
    # finish(), with errors raised. Returns the rows added.
    cdef Py_ssize_t end_request(self) except -1
    cdef void rollback(self) noexcept nogil

    cdef int _grow_arena(self, int c, Py_ssize_t need) noexcept nogil
    cdef int _repeat_last(self, int c, Py_ssize_t times) noexcept nogil
    cdef int _push_instead(self, int c) noexcept nogil
    cdef void _replace_nans(self, int c) noexcept nogil
    cdef bytes _hold_instead(self, int c, value)
    # Take back what the request that is being read has put into one column.
    cdef void forget_column(self, int c) noexcept nogil
    # Whether all that this request has put into a column of Int32 is within its range.
    cdef bint fits(self, int c) noexcept nogil
    # A missing value: what is taken instead, or a null. row: for the message, -1 for a bare scalar.
    cdef int push_missing(self, int c, Py_ssize_t row) except -1
    # A column that no short way takes, by the rules of shorttail.define.values.
    cdef int append_any(self, int c, values) except -1
    cdef int _checked(self, int failed) except -1
    # Stays the same for the same values, in any process at any time: it decides who is asked which version.
    cdef uint32_t hash_values(self, Py_ssize_t row, int n_columns, uint32_t salt) noexcept nogil
    cdef void drop_last(self, Py_ssize_t rows) noexcept nogil


cdef class CopyColumns:
    cdef Py_ssize_t n_ops
    cdef int *op        # column, output, offset for each operation
    cdef tuple _keep
