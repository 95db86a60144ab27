# Map and Tree: LMDB's data file in memory. Part of pages.pyx.

cdef class Map:
    """Map(buffer): LMDB's data file in memory. buffer: a mapping of the file; it is kept until release().

    Raises ValueError if the buffer does not begin at a page.
    """
    cdef st_map c
    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, buffer=None):
        if buffer is not None:
            PyObject_GetBuffer(buffer, &self.view, PyBUF_SIMPLE)
            self.held = True
            self._set(<uintptr_t>self.view.buf, self.view.len)

    def __dealloc__(self):
        self.release()

    @staticmethod
    def around(value, size_t offset, size_t map_bytes):
        """Return LMDB's own map, of map_bytes, by a value in it: a buffer that LMDB returned, at an offset of the file.

        The value must lie within a page of LMDB's tree. The map lasts until LMDB's environment is closed. Raises
        ValueError if LMDB's page has another number: then it maps another file.
        """
        cdef Map found = Map()
        cdef Py_buffer view
        PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
        cdef uintptr_t at = <uintptr_t>view.buf
        PyBuffer_Release(&view)
        if (<uint64_t *>(at - at % ST_PAGE_BYTES))[0] != offset // ST_PAGE_BYTES:
            raise ValueError("the file was replaced while it was opened")
        found._set(at - offset, map_bytes)
        return found

    cdef int _set(self, uintptr_t base, size_t n_bytes) except -1:
        if base % ST_PAGE_BYTES:
            raise ValueError("a map begins at a page")
        self.c.base = <const uint8_t *>base
        self.c.n_pages = n_bytes // ST_PAGE_BYTES

    cpdef release(self):
        """Release the buffer, so that the mapping can be closed. No Tree of this map may be used afterwards."""
        self.c.n_pages = 0
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)

    def may_free(self, value, uint32_t key_bytes):
        """Return whether LMDB may free the pages of a value: it trusts the header in front of the value.

        value: a buffer that LMDB returned. key_bytes: the length of its key.
        """
        cdef Py_buffer view
        PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
        cdef int right = st_structure_may_free(&self.c, <const uint8_t *>view.buf, view.len, key_bytes)
        PyBuffer_Release(&view)
        return right != 0


cdef class Tree:
    """Tree(map, txn_id): LMDB's B+tree as of a transaction, read directly in the map. See tree.h.

    A read transaction must be open while the tree is used. Raises ValueError if the meta page is damaged.
    """
    cdef st_tree c
    cdef Map map
    cdef readonly bint gone  # two commits have overwritten the meta page with its root: begin a new transaction

    def __cinit__(self, Map map not None, uint64_t txn_id):
        cdef int outcome = st_tree_open(&self.c, &map.c, txn_id)
        if outcome == ST_TREE_UNKNOWN:
            raise ValueError("its meta page is damaged, or not one of LMDB 0.9 with pages of 4096 bytes")
        self.gone = outcome == ST_TREE_GONE
        self.map = map

    @property
    def map_bytes(self):
        """The number of bytes, from the start of the map, that this snapshot uses."""
        return self.c.n_pages * ST_PAGE_BYTES

    cdef const uint8_t *_find(self, bytes key, uint64_t *n_bytes) except? NULL:
        cdef const uint8_t *value = NULL
        if st_tree_find(&self.c, <const uint8_t *>PyBytes_AS_STRING(key), len(key), &value, n_bytes) < 0:
            raise ValueError(f"a page on the path to {key!r} is damaged")
        return value

    def get(self, bytes key):
        """Return a copy of the value of a key; None if there is no such key. Raises ValueError for a damaged page."""
        cdef uint64_t n_bytes = 0
        cdef const uint8_t *value = self._find(key, &n_bytes)
        return None if value is NULL else PyBytes_FromStringAndSize(<const char *>value, n_bytes)

    def offset(self, bytes key):
        """Return the offset in the file of the value of a key, or None if there is no such key. Raises as get()."""
        cdef uint64_t n_bytes = 0
        cdef const uint8_t *value = self._find(key, &n_bytes)
        return None if value is NULL else value - self.c.base

    def check_path(self, bytes key):
        """Check in full the pages that a search for a key reads. Raises ValueError with the page and what is wrong."""
        cdef uint64_t number = 0
        cdef const char *wrong = st_structure_path(&self.c, <const uint8_t *>PyBytes_AS_STRING(key), len(key), &number)
        if wrong is not NULL:
            raise ValueError(f"page {number}: {wrong.decode()}")

    def check(self, bint values=False):
        """Check in full all pages that LMDB follows, and that each page of the file is used once. Releases the GIL.

        values: also check the header of each value, which costs a read of its first page. Raises ValueError with the
        page and what is wrong.
        """
        cdef uint64_t number = 0
        cdef int spare = 0
        cdef const char *wrong
        with nogil:
            wrong = st_structure_check(&self.c, values, &spare, &number)
        if wrong is not NULL:
            if wrong[0] == 0:
                raise MemoryError
            raise ValueError(f"page {number}: {wrong.decode()}" if number else wrong.decode())
        self.map.c.spare |= spare

    def populate(self):
        """Map all pages of the file into this process now, instead of by a page fault at the first use of each.

        Reads pages that are not in memory from disk. Releases the GIL. Returns False if the system cannot do it.
        """
        cdef int failed
        with nogil:
            failed = st_populate(self.c.base, self.c.n_pages * ST_PAGE_BYTES)
        return failed == 0

    def lock(self, uint64_t from_bytes=0):
        """Lock the map in memory, starting at byte from_bytes. Raises OSError, such as for a too low memlock limit."""
        cdef int failed
        cdef uint64_t bytes = self.c.n_pages * ST_PAGE_BYTES
        if from_bytes >= bytes:
            return
        with nogil:
            failed = mlock(<void *>(self.c.base + from_bytes), bytes - from_bytes)
        if failed:
            raise OSError(errno, os.strerror(errno))


