"""Runs compiled on-demand functions (shorttail/ondemand/compile.py) over a batch: machine code at raw addresses."""

from libc.stdint cimport int64_t, intptr_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc

import numpy as np
cimport numpy as cnp

from shorttail.errors import Internal

cnp.import_array()

# The C signature of a function (table, rows) -> int64 that Numba compiled: it returns 0 for success and writes its
# result to the first argument.
ctypedef int (*loop_t)(int64_t *failed, void **exception, const intptr_t *table, int64_t rows) noexcept nogil

cdef enum:
    FEW_VALUES = 256  # computing this many values costs about as much as releasing the GIL and taking it again
    STACK_SLOTS = 256

# An array that a step reads or writes. Its slot in the table receives the address of its first element.
cdef struct place_t:
    int buffer
    int type_number
    Py_ssize_t width  # elements per row that the step uses
    Py_ssize_t offset  # the first of these elements in the row


cdef struct step_t:
    loop_t loop
    int first_place
    int n_places  # the arguments, then the output


cdef class TransformProgram:
    """TransformProgram(steps, failures=None): on-demand functions that run in order; a step may read the output of earlier steps.

    steps: (address, arguments, output) per function. An argument is (buffer number, dtype, width); the output is
    (buffer number, dtype, width, column offset). A width is the number of elements per row: 1 for scalars. The machine
    code at the addresses must outlive the program. Threads may share a program. failures: for each step a list of two
    ints, to which `run` adds the rows that failed and those whose vector has a wrong length; steps and programs may
    share a list. Raises ValueError for a null address.
    """
    cdef step_t *step
    cdef place_t *place
    cdef Py_ssize_t n_steps, n_places
    cdef readonly object steps
    cdef readonly tuple failures  # for each step [rows that failed, rows of a wrong length]
    # The same of all steps together: the number of rows so far whose function gave no value.
    cdef readonly int64_t failed_rows    # because it failed, such as by an index outside a vector
    cdef readonly int64_t wrong_lengths  # because it returned a vector of a wrong length

    def __cinit__(self, steps, failures=None):
        cdef Py_ssize_t s, p = 0
        self.steps = tuple(steps)
        self.n_steps = len(self.steps)
        self.failures = tuple([[0, 0] for _ in self.steps] if failures is None else failures)
        if len(self.failures) != self.n_steps:
            raise ValueError("a step needs its list of failures")
        self.n_places = sum(len(arguments) + 1 for _, arguments, _ in self.steps)
        self.step = <step_t *>calloc(max(1, self.n_steps), sizeof(step_t))
        self.place = <place_t *>calloc(max(1, self.n_places), sizeof(place_t))
        if self.step is NULL or self.place is NULL:
            raise MemoryError
        for s, (address, arguments, output) in enumerate(self.steps):
            if not address:
                raise ValueError("a step needs the address of its function")
            self.step[s].loop = <loop_t><uintptr_t>address
            self.step[s].first_place = p
            self.step[s].n_places = len(arguments) + 1
            for buffer, dtype, width, offset in [*((*argument, 0) for argument in arguments), output]:
                self.place[p].buffer = buffer
                self.place[p].type_number = np.dtype(dtype).num
                self.place[p].width = width
                self.place[p].offset = offset
                p += 1

    def __dealloc__(self):
        free(self.step)
        free(self.place)

    def run(self, buffers, Py_ssize_t rows):
        """Run all steps over `rows` rows. Releases the GIL once, or not at all for a few rows.

        buffers: the plan's arrays, C-contiguous, [rows] or [rows, width]. Raises Internal if an array does not have the
        type and width for which the program was made.
        """
        # The table of a step: the addresses of its arguments and its output, the width of the output array, and the
        # result of its function.
        cdef intptr_t stack[STACK_SLOTS]
        cdef intptr_t *table = stack
        cdef cnp.ndarray array
        cdef place_t *place
        cdef Py_ssize_t p, s, last, width = 1, slot = 0
        cdef int64_t failed = 0
        if self.n_places + 2 * self.n_steps > STACK_SLOTS:
            table = <intptr_t *>malloc((self.n_places + 2 * self.n_steps) * sizeof(intptr_t))
            if table is NULL:
                raise MemoryError
        try:
            for s in range(self.n_steps):
                last = self.step[s].first_place + self.step[s].n_places - 1
                for p in range(self.step[s].first_place, last + 1):
                    place = &self.place[p]
                    array = <cnp.ndarray?>buffers[place.buffer]
                    width = cnp.PyArray_DIM(array, 1) if cnp.PyArray_NDIM(array) == 2 else 1
                    if (cnp.PyArray_TYPE(array) != place.type_number or not cnp.PyArray_IS_C_CONTIGUOUS(array) or
                            cnp.PyArray_DIM(array, 0) < rows or place.offset + place.width > width or
                            (p < last and place.width != width)):
                        raise Internal(f"array {place.buffer} of a plan is {array.dtype} of shape {np.shape(array)}; "
                                       f"its on-demand functions were compiled for another type or shape")
                    table[slot] = <intptr_t>cnp.PyArray_DATA(array) + place.offset * cnp.PyArray_ITEMSIZE(array)
                    slot += 1
                table[slot] = width  # of the output, which is the step's last place
                table[slot + 1] = 0
                slot += 2
            if rows * self.n_steps <= FEW_VALUES:
                failed = self._run(table, rows)
            else:
                with nogil:
                    failed = self._run(table, rows)
            if failed:
                self._count(table)
        finally:
            if table is not stack:
                free(table)

    cdef int64_t _run(self, intptr_t *table, Py_ssize_t rows) noexcept nogil:
        """Run all steps; return 0 if no row failed."""
        cdef Py_ssize_t s
        cdef int64_t failed = 0
        cdef int64_t *result
        cdef void *exception = NULL
        for s in range(self.n_steps):
            result = <int64_t *>&table[self.step[s].n_places + 1]
            self.step[s].loop(result, &exception, table, rows)
            failed |= result[0]
            table += self.step[s].n_places + 2
        return failed

    cdef int _count(self, const intptr_t *table) except -1:
        """Count the rows that the steps' results say have failed."""
        cdef Py_ssize_t s
        cdef int64_t result
        cdef list failures
        for s in range(self.n_steps):
            result = table[self.step[s].n_places + 1]
            table += self.step[s].n_places + 2
            if result:
                failures = self.failures[s]
                failures[0] += result & 0xFFFFFFFF
                failures[1] += result >> 32
                self.failed_rows += result & 0xFFFFFFFF
                self.wrong_lengths += result >> 32
        return 0
