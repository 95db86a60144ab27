# Writeback. Part of pages.pyx; see writeback.h.

cdef extern from "writeback.h" nogil:
    ctypedef struct st_writeback:
        pass
    int st_writeback_start(st_writeback *, const char *)
    void st_writeback_stop(st_writeback *)


cdef class Writeback:
    """Writeback(path): a context manager during which a thread starts disk writes of a file's dirty pages.

    It is only a hint to the kernel: if the thread cannot be started, nothing happens. For durability call fsync.
    """
    cdef bytes path
    cdef bint running
    cdef st_writeback c

    def __init__(self, path):
        self.path = os.fsencode(path)

    def __enter__(self):
        self.running = st_writeback_start(&self.c, PyBytes_AS_STRING(self.path)) == 0
        return self

    def __exit__(self, *_):
        self.stop()

    def __dealloc__(self):
        self.stop()

    cdef void stop(self) noexcept:
        if self.running:
            self.running = False
            with nogil:
                st_writeback_stop(&self.c)
