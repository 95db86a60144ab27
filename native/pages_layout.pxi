# Layout and Directory. Part of pages.pyx.

cdef uint64_t _key_of(bytes bucket_key) except? 1:
    if len(bucket_key) != 8:
        raise ValueError("a bucket key has 8 bytes")
    return int.from_bytes(bucket_key, "big")


cdef class Layout:
    """Layout(key_codes, features, seed, page_bytes=0, page_format=3): the byte offsets of a table's rows and pages.

    key_codes: one dtype code (Int64 or String) per key column; without keys all rows have the same key, so a table has
    at most one row. features: (dtype code, width) per feature. seed: 64
    bits, for the key hash. page_bytes: size of a page image, k * 4096 - 16; 0 chooses the smallest that holds 8 rows.
    page_format: of its pages, 2 or 3. Raises ValueError if there are too many keys or a row is too large.
    """
    cdef st_layout c
    cdef readonly tuple features      # (dtype code, width) per feature
    cdef readonly bytes key_codes
    cdef readonly list key_offsets    # bytes from the start of the row
    cdef readonly list feature_offsets

    def __cinit__(self, bytes key_codes, features, seed, page_bytes=0, page_format=ST_PAGE_FORMAT):
        memset(&self.c, 0, sizeof(st_layout))
        self.key_codes = key_codes
        self.features = tuple((int(code), int(width)) for code, width in features)
        if len(key_codes) > ST_KEYS_MAX:
            raise ValueError(f"a table has at most {ST_KEYS_MAX} key columns, not {len(key_codes)}")
        if not ST_PAGE_FORMAT_OLDEST <= page_format <= ST_PAGE_FORMAT:
            raise ValueError(f"pages have format {ST_PAGE_FORMAT_OLDEST} or {ST_PAGE_FORMAT}, not {page_format}")
        cdef uint32_t n = len(self.features), f
        self.c.page_format = page_format
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
            raise ValueError("a row of this table is too large for its pages; use fewer or shorter features")
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
    def page_format(self):
        return self.c.page_format

    @property
    def rows_per_page(self):
        """The largest number of rows that fit in a page if they have no strings."""
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
        """Check a page completely: header, checksum, strings, hashes and tags. Raises ValueError with what is wrong."""
        cdef Py_buffer view
        cdef uint64_t key = _key_of(bucket_key)
        PyObject_GetBuffer(page, &view, PyBUF_SIMPLE)
        cdef const char *wrong = st_check_page(&self.c, <const uint8_t *>view.buf, view.len, table_id, key)
        PyBuffer_Release(&view)
        if wrong is not NULL:
            raise ValueError(wrong.decode())

    def commit(self, page):
        """Return the number of the commit that wrote a page, which must have passed check(); 0 in format 2."""
        cdef Py_buffer view
        PyObject_GetBuffer(page, &view, PyBUF_SIMPLE)
        cdef uint64_t number = st_page_commit(&self.c, <const uint8_t *>view.buf)
        PyBuffer_Release(&view)
        return number


cdef class Directory:
    """Directory(layout, table_id=0): an array that maps a hash prefix to the address of its page in a snapshot.

    The directory does not own the pages: their read transaction must stay open while they are used.
    """
    cdef readonly Layout layout
    cdef st_directory c
    cdef uint32_t table_id

    def __cinit__(self, Layout layout not None, table_id=0):
        self.layout = layout
        self.table_id = table_id

    def __dealloc__(self):
        free(<void *>self.c.pages)

    @property
    def depth(self):
        return self.c.depth

    @property
    def n_buckets(self):
        cdef uint64_t i, n = 0
        if self.c.pages is NULL:
            return 0
        for i in range(<uint64_t>1 << self.c.depth):
            n += i == 0 or self.c.pages[i] != self.c.pages[i - 1]
        return n

    def count_rows(self):
        """Return the number of rows in the table. Reads the header of every page and releases the GIL."""
        cdef uint64_t i, n = 0
        if self.c.pages is NULL:
            return 0
        with nogil:
            for i in range(<uint64_t>1 << self.c.depth):
                if self.c.pages[i] is not NULL and (i == 0 or self.c.pages[i] != self.c.pages[i - 1]):
                    n += st_page_rows(self.c.pages[i])
        return n

    def measure(self):
        """Return (buckets, rows, bytes of the page images, used bytes of them).

        Reads header and footer of every page and releases the GIL.
        """
        cdef uint64_t i, buckets = 0, rows = 0, image_bytes = 0, used_bytes = 0
        cdef const uint8_t *page
        if self.c.pages is NULL:
            return 0, 0, 0, 0
        with nogil:
            for i in range(<uint64_t>1 << self.c.depth):
                page = self.c.pages[i]
                if page is NULL or (i and page == self.c.pages[i - 1]):
                    continue
                buckets += 1
                rows += st_page_rows(page)
                image_bytes += st_page_bytes(page)
                used_bytes += st_page_used_bytes(&self.layout.c, page)
        return buckets, rows, image_bytes, used_bytes

    def build(self, Tree tree not None, int64_t rest_us=0):
        """Build the directory from the table's pages in a tree. Return the number of buckets. Releases the GIL.

        rest_us: the thread rests so long after each 200 us of work, to leave the CPU to others. Raises ValueError if a
        page or the tree is damaged.
        """
        cdef st_fault fault
        cdef int64_t n
        free(<void *>self.c.pages)
        with nogil:
            n = st_directory_build(&tree.c, &self.layout.c, self.table_id, 1000 * rest_us, &self.c, &fault)
        if n < 0:
            _raise_fault(&fault)
        return n

    def update(self, Tree tree not None, bytes changes):
        """Move the directory to a newer tree. Return the number of pages that were found. Releases the GIL.

        changes: the entries of the change log since the present tree, 12 bytes each, of any table. Raises ValueError if
        a page or the tree is damaged; then call build() before the next use.
        """
        cdef st_fault fault
        cdef int64_t n_found
        cdef size_t n = len(changes) // ST_CHANGE_BYTES
        cdef const uint8_t *entries = <const uint8_t *>PyBytes_AS_STRING(changes)
        with nogil:
            n_found = st_directory_update(&tree.c, &self.layout.c, self.table_id, entries, n, &self.c, &fault)
        if n_found < 0:
            _raise_fault(&fault)
        return n_found


cdef int _raise_fault(const st_fault *fault) except -1:
    if fault.what is NULL:
        raise MemoryError
    raise ValueError(f"bucket {fault.key:016x}: {fault.what.decode()}")
