# Scan: the rows of a table as columns. Part of pages.pyx.

cdef class Scan:
    """Scan(layout, tree, table_id, columns): reads the rows of a table into columns, a batch of rows at a time.

    columns: the numbers of the columns to read; a table has its keys, its event time and its features, in this order,
    counted from 0. The read transaction of the tree must be open during every call. Raises IndexError for
    another number, and ValueError for a blob.
    """
    cdef st_scan c
    cdef Layout layout
    cdef Tree tree

    def __cinit__(self, Layout layout not None, Tree tree not None, uint32_t table_id, columns):
        memset(&self.c, 0, sizeof(st_scan))
        self.layout, self.tree = layout, tree
        self.c.layout, self.c.tree, self.c.table_id = &layout.c, &tree.c, table_id
        cdef list numbers = list(columns)
        cdef const st_layout *l = &layout.c
        cdef uint32_t i, f
        cdef st_scan_column *column
        self.c.n_columns = len(numbers)
        self.c.columns = <st_scan_column *>PyMem_Malloc(max(1, len(numbers)) * sizeof(st_scan_column))
        if self.c.columns is NULL:
            raise MemoryError
        memset(self.c.columns, 0, max(1, len(numbers)) * sizeof(st_scan_column))
        for i in range(self.c.n_columns):
            if not 0 <= numbers[i] < l.n_keys + 1 + l.n_features:
                raise IndexError(f"the table has no column number {numbers[i]}")
            column = &self.c.columns[i]
            column.width = 1
            if numbers[i] < l.n_keys:
                column.code, column.row_offset = layout.key_codes[numbers[i]], 8 * <uint32_t>numbers[i]
            elif numbers[i] == l.n_keys:
                column.code, column.row_offset = ST_TIMESTAMP, l.time_offset
            else:
                f = numbers[i] - l.n_keys - 1
                if l.features[f].code == ST_BLOB:
                    raise ValueError(f"column number {numbers[i]} is a blob, which no scan reads")
                column.code, column.width = l.features[f].code, l.features[f].width
                column.row_offset = l.features[f].offset
                column.null_byte, column.null_bit = l.null_offset + f // 8, 1 << (f % 8)

    def __dealloc__(self):
        st_scan_free(&self.c)
        PyMem_Free(self.c.columns)

    @property
    def rows(self):
        """The number of rows that were read."""
        return self.c.all_rows

    @property
    def image_bytes(self):
        """The size of the pages that were read, without LMDB's headers."""
        return self.c.all_bytes

    @property
    def pages(self):
        """The number of pages that were read."""
        return self.c.all_pages

    def read(self, size_t rows, size_t n_bytes):
        """Return the next batch, or None at the end: the pages that hold at most `rows` rows and have at most n_bytes
        bytes, but at least one page. Releases the GIL.

        A batch is the number of rows n, and (values, ends, valid) per column. values: an array [n], or [n, width] of
        vectors. Of strings it is the UTF-8 bytes, and ends, int32 [n + 1], the offsets between them; otherwise ends is
        None. valid: a bit for each value, the lowest first, 0 where the value is null, in uint8; None if no value is
        null. Raises ValueError for a damaged page, after which no more may be read.
        """
        cdef st_fault fault
        cdef int failed
        with nogil:
            failed = st_scan_gather(&self.c, rows, n_bytes, &fault)
        if failed:
            _raise_fault(&fault)
        return self._fill() if self.c.n_pages else None

    def read_bucket(self, bytes row_hash):
        """Return the rows of the bucket that a hash belongs to as read() does, None if the table is empty.

        row_hash: 8 bytes, big-endian. Raises ValueError as read() does.
        """
        cdef st_fault fault
        cdef uint64_t key = _key_of(row_hash)
        if st_scan_gather_bucket(&self.c, key, &fault):
            _raise_fault(&fault)
        return self._fill() if self.c.n_pages else None

    cdef _fill(self):
        cdef size_t n = self.c.n_rows
        cdef uint32_t i
        cdef st_scan_column *column
        cdef cnp.ndarray values, ends, valid
        cdef list made = []
        for i in range(self.c.n_columns):
            column = &self.c.columns[i]
            ends = valid = None
            if column.code == ST_STRING:
                values = np.empty(column.text_bytes, np.uint8)
                ends = np.empty(n + 1, np.int32)
                column.ends = <int32_t *>cnp.PyArray_DATA(ends)
            else:
                values = np.empty(n * column.width, _SOURCE_DTYPES[column.code])
                if column.code == ST_VECTOR or column.code == ST_WIDE_VECTOR:
                    values = values.reshape(n, column.width)
            column.values = <uint8_t *>cnp.PyArray_DATA(values)
            if column.null_bit:
                valid = np.empty((n + 7) // 8, np.uint8)
                column.valid = <uint8_t *>cnp.PyArray_DATA(valid)
            made.append((values, ends, valid))
        with nogil:
            st_scan_fill(&self.c)
        return n, [(values, ends, valid if self.c.columns[i].n_nulls else None)
                   for i, (values, ends, valid) in enumerate(made)]
