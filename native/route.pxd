from libc.stdint cimport int64_t, uint32_t, uint64_t

from shorttail._native.columns cimport Columns


cdef class Split:
    cdef readonly int64_t version
    cdef readonly uint64_t below    # the canary answers hashes below this, of 2**32 in all
    cdef readonly uint32_t salt
    cdef readonly int n_columns
    cpdef bint takes(self, Columns columns, Py_ssize_t row)


cdef class Route:
    cdef readonly object plan
    cdef tuple directories          # for each view of the plan; None where a table is empty
    cdef object directories_of      # the store's dict at that time: if the store has another, they are outdated
    cdef list spare                 # empty Columns, kept so that their memory is reused
