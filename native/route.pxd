from libc.stdint cimport int64_t, uint32_t, uint64_t

from shorttail._native.columns cimport Columns


cdef class Split:
    cdef readonly int64_t version
    cdef readonly uint64_t below    # of 2**32
    cdef readonly uint32_t salt
    cdef readonly int n_columns
    cpdef bint takes(self, Columns columns, Py_ssize_t row)


cdef class Route:
    cdef readonly object plan
    cdef tuple directories          # one for each of the plan's views
    cdef object directories_of      # the dict of the store's that they were taken from
    cdef list spare                 # empty Columns, kept for their memory
