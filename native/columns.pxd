from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef enum:
    KIND_I64 = 0
    KIND_F64 = 1
    KIND_STR = 2
    KIND_VEC = 3

cdef struct column_t:
    int kind
    int width           # floats a row for KIND_VEC, else 1
    int narrow          # I64 of dtype Int32: finish() refuses what does not fit
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

    # Each returns 0, or -1 when there is no memory (or, for strings, when an arena would pass 4 GiB).
    cdef int reserve(self, int c, Py_ssize_t rows) noexcept nogil
    cdef int push_i64(self, int c, int64_t value) noexcept nogil
    cdef int push_f64(self, int c, double value) noexcept nogil
    cdef int push_str(self, int c, const char *bytes, Py_ssize_t length) noexcept nogil
    cdef int push_vec(self, int c, const float *values) noexcept nogil
    cdef int push_null(self, int c) noexcept nogil
    # End of one request: columns of one row are repeated to the length of the others.
    # Returns the rows added, or -(c + 1): column c has another length, or -(c + 1001): column c was not
    # given, or -(c + 2001): a value of Int32 column c does not fit, or -1000000: no memory. The caller then calls rollback().
    cdef Py_ssize_t finish(self) noexcept nogil
    cdef void rollback(self) noexcept nogil

    cdef int _grow_arena(self, int c, Py_ssize_t need) noexcept nogil
    cdef int _repeat_last(self, int c, Py_ssize_t times) noexcept nogil
    cdef int _append_column(self, int c, value) except -1
    cdef int _append_scalar(self, int c, value, Py_ssize_t row) except -1
    cdef int _append_array(self, int c, array) except -1
    cdef int _append_vectors(self, int c, value) except -1
    cdef int _checked(self, int failed) except -1
    # Stays the same for the same values, in any process at any time: it decides who is asked which version.
    cdef uint32_t hash_values(self, Py_ssize_t row, int n_columns, uint32_t salt) noexcept nogil
    cdef void drop_last(self, Py_ssize_t rows) noexcept nogil


cdef class CopyColumns:
    cdef Py_ssize_t n_ops
    cdef int *op        # column, output, offset for each operation
    cdef tuple _keep
