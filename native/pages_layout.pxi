# Layout and Directory: see pages.pyx.

cdef uint64_t _key_of(bytes bucket_key) except? 1:
    if len(bucket_key) != 8:
        raise ValueError("a bucket key has 8 bytes")
    return int.from_bytes(bucket_key, "big")


cdef class Layout:
    """Layout(key_codes, features, seed, page_bytes=0): where everything lies in a table's rows and pages.

    key_codes: one dtype code (Int64 or String) a key column. features: (dtype code, width) each. seed: of the key
    hash, 64 bits. page_bytes: size of a page image, k * 4096 - 16; 0 chooses the smallest that holds 8 rows.
    Raises ValueError when there are too many keys or a row is too large.
    """
    cdef st_layout c
    cdef readonly tuple features      # (code, width) each
    cdef readonly bytes key_codes
    cdef readonly list key_offsets    # bytes from the start of the row
    cdef readonly list feature_offsets

    def __cinit__(self, bytes key_codes, features, seed, page_bytes=0):
        memset(&self.c, 0, sizeof(st_layout))
        self.key_codes = key_codes
        self.features = tuple((int(code), int(width)) for code, width in features)
        if not 1 <= len(key_codes) <= ST_KEYS_MAX:
            raise ValueError(f"a table has 1 to {ST_KEYS_MAX} key columns, not {len(key_codes)}")
        cdef uint32_t n = len(self.features), f
        self.c.seed = seed
        self.c.n_keys = len(key_codes)
        self.c.n_features = n
        self.c.page_bytes = page_bytes
        self.c.features = <st_field *>PyMem_Malloc(max(1, n) * sizeof(st_field))
        self.c.string_offsets = <uint32_t *>PyMem_Malloc((ST_KEYS_MAX + n) * sizeof(uint32_t))
        if self.c.features is NULL or self.c.string_offsets is NULL:
            raise MemoryError
        for f in range(self.c.n_keys):
            self.c.key_is_string[f] = key_codes[f] == ST_STRING
        for f in range(n):
            self.c.features[f].code, self.c.features[f].width = self.features[f]
        if st_layout_finish(&self.c):
            raise ValueError("a row of this table is too large for its pages")
        self.key_offsets = [8 * k for k in range(self.c.n_keys)]
        self.feature_offsets = [self.c.features[f].offset for f in range(n)]

    def __dealloc__(self):
        PyMem_Free(self.c.features)
        PyMem_Free(self.c.string_offsets)

    @property
    def row_bytes(self):
        return self.c.row_bytes

    @property
    def page_bytes(self):
        return self.c.page_bytes

    @property
    def rows_per_page(self):
        """Most rows that fit a page, strings aside."""
        return self.c.rows_per_page

    @property
    def time_offset(self):
        return self.c.time_offset

    @property
    def null_offset(self):
        return self.c.null_offset

    @property
    def null_bytes(self):
        return self.c.null_bytes

    def check(self, page, bytes bucket_key, uint32_t table_id=0):
        """Check everything about a page, its checksum first of all. Raises ValueError that says what is wrong."""
        cdef Py_buffer view
        cdef uint64_t key = _key_of(bucket_key)
        PyObject_GetBuffer(page, &view, PyBUF_SIMPLE)
        cdef const char *wrong = st_check_page(&self.c, <const uint8_t *>view.buf, view.len, table_id, key)
        PyBuffer_Release(&view)
        if wrong is not NULL:
            raise ValueError(wrong.decode())


cdef class Directory:
    """Directory(layout, table_id=0): hash prefix -> page address, for the snapshot that the pages belong to.

    The pages' memory is not owned: the read transaction that gave them must outlive their use.
    """
    cdef readonly Layout layout
    cdef const uint8_t **pages
    cdef uint32_t c_depth
    cdef uint32_t table_id

    def __cinit__(self, Layout layout not None, table_id=0):
        self.layout = layout
        self.table_id = table_id

    def __dealloc__(self):
        PyMem_Free(self.pages)

    @property
    def depth(self):
        return self.c_depth

    @property
    def n_buckets(self):
        cdef uint64_t i, n = 0
        if self.pages is NULL:
            return 0
        for i in range(<uint64_t>1 << self.c_depth):
            n += i == 0 or self.pages[i] != self.pages[i - 1]
        return n

    def count_rows(self):
        """Rows in the table. Reads the header of every page."""
        cdef uint64_t i, n = 0
        if self.pages is NULL:
            return 0
        with nogil:
            for i in range(<uint64_t>1 << self.c_depth):
                if self.pages[i] is not NULL and (i == 0 or self.pages[i] != self.pages[i - 1]):
                    n += st_page_rows(self.pages[i])
        return n

    def put(self, bytes bucket_key, page):
        """Point the entries of a bucket at its page, a buffer. Raises ValueError when the page is not sound."""
        self._put(_key_of(bucket_key), page)

    def rebuild(self, items):
        """Start again from (bucket key, page) buffers in the order of their keys, which must cover all hashes.

        Returns the number of buckets; with none the directory is that of an empty table. Raises ValueError.
        """
        cdef uint64_t expected = 0, key, n = 0
        cdef uint32_t depth
        cdef bint complete = False
        PyMem_Free(self.pages)
        self.pages = NULL
        self.c_depth = 0
        for name, page in items:
            key = _key_of(bytes(name))
            if complete or key != expected:
                raise ValueError(f"bucket {key:016x} follows where {expected:016x} should")
            depth = self._put(key, page)
            expected = key + ((<uint64_t>1 << (63 - depth)) << 1)
            complete = expected == 0
            n += 1
        if n and not complete:
            raise ValueError(f"bucket {expected:016x} is missing")
        return n

    cdef uint32_t _put(self, uint64_t key, page) except? 99:
        cdef Py_buffer view
        cdef const uint8_t *at
        cdef const char *wrong
        PyObject_GetBuffer(page, &view, PyBUF_SIMPLE)
        at = <const uint8_t *>view.buf
        wrong = st_check_header(&self.layout.c, at, view.len, self.table_id)
        PyBuffer_Release(&view)
        if wrong is not NULL:
            raise ValueError(f"bucket {key:016x}: {wrong.decode()}")
        cdef uint32_t depth = st_page_depth(at)
        if depth > DEPTH_MAX or (depth < 64 and key & (UINT64_MAX >> depth)):
            raise ValueError(f"bucket {key:016x}: its depth of {depth} is impossible")
        if self.pages is NULL or depth > self.c_depth:
            self._grow(depth)
        cdef uint64_t i, start = (key >> 1) >> (63 - self.c_depth)
        for i in range(start, start + (<uint64_t>1 << (self.c_depth - depth))):
            self.pages[i] = at
        return depth

    cdef int _grow(self, uint32_t depth) except -1:
        """Double the directory until it has that depth: every entry becomes several."""
        cdef uint64_t n_old = <uint64_t>1 << self.c_depth, i, j
        cdef uint64_t times = <uint64_t>1 << (depth - self.c_depth)
        cdef bint first = self.pages is NULL
        cdef const uint8_t *page
        cdef const uint8_t **pages = <const uint8_t **>PyMem_Realloc(self.pages, n_old * times * sizeof(void *))
        if pages is NULL:
            raise MemoryError
        self.pages = pages
        self.c_depth = depth
        if first:
            memset(pages, 0, n_old * times * sizeof(void *))
            return 0
        i = n_old
        while i > 0:  # from the end, so that nothing is overwritten before it is read
            i -= 1
            page = pages[i]
            for j in range(times):
                pages[i * times + j] = page
        return 0
