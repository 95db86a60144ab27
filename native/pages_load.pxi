# RowPartitions, RowRange and PageImages, for bulk loads. Part of pages.pyx; see load.h.

cdef int _load_outcome(int outcome) except -1:
    if outcome == ST_LOAD_OK:
        return 0
    if outcome == ST_LOAD_NO_MEMORY:
        raise MemoryError
    if outcome == ST_LOAD_ROW_TOO_LONG:
        raise ValueError("the strings of one row exceed 4 GiB")
    raise OSError(outcome, os.strerror(outcome))


cdef class _Sources:
    """The columns of a batch, as st_source structs with their Python buffers."""
    cdef st_source *sources
    cdef Py_buffer *views
    cdef size_t n_views

    def __dealloc__(self):
        self.release()

    cdef void release(self) noexcept:
        cdef size_t v
        for v in range(self.n_views):
            PyBuffer_Release(&self.views[v])
        self.n_views = 0
        PyMem_Free(self.views)
        PyMem_Free(self.sources)
        self.views, self.sources = NULL, NULL

    cdef int hold(self, columns) except -1:
        cdef Py_ssize_t n = len(columns)
        self.sources = <st_source *>PyMem_Malloc((n + 1) * sizeof(st_source))
        self.views = <Py_buffer *>PyMem_Malloc((3 * n + 1) * sizeof(Py_buffer))
        if self.sources is NULL or self.views is NULL:
            raise MemoryError
        memset(self.sources, 0, (n + 1) * sizeof(st_source))
        return 0

    cdef Py_buffer *view(self, buffer) except NULL:
        PyObject_GetBuffer(buffer, &self.views[self.n_views], PyBUF_SIMPLE)
        self.n_views += 1
        return &self.views[self.n_views - 1]


cdef class RowPartitions:
    """RowPartitions(layout, bits, skip_bits, chunk_bytes, memory_limit): the rows of a bulk load, by their key hashes.

    There are 2^bits partitions, by the hash bits after the first skip_bits. Rows are stored in chunks of chunk_bytes; a
    longer row gets its own chunk. memory_limit: add() stops when the chunks in memory have this many bytes. Raises
    ValueError for numbers out of range.
    """
    cdef readonly Layout layout
    cdef st_load c
    cdef st_lost lost

    def __cinit__(self, Layout layout not None, uint32_t bits, uint32_t skip_bits, size_t chunk_bytes,
                  size_t memory_limit):
        self.layout = layout
        if bits + skip_bits > 60 or bits > 16 or not 4096 <= chunk_bytes <= 1 << 30:
            raise ValueError("bits, skip_bits or chunk_bytes is out of range")
        _load_outcome(st_load_init(&self.c, &layout.c, bits, skip_bits, chunk_bytes, memory_limit))

    def __dealloc__(self):
        st_load_free(&self.c)

    def __len__(self):
        """Return the number of rows added, including rows with equal keys."""
        return self.c.n_rows

    @property
    def older(self):
        """The rows that take() and move() dropped so far because the row they kept has a later event time.

        move() drops rows before the last row of their key is known. So some older rows of a key that has more rows than
        fit in the memory of a range are not counted here, but as duplicates.
        """
        return self.lost.n_older

    @property
    def memory_bytes(self):
        """The bytes of all chunks in memory."""
        return self.c.memory_bytes

    @property
    def file_bytes(self):
        """The bytes written to the file so far."""
        return self.c.file_bytes

    @property
    def image_bytes(self):
        """The bytes of the rows in page images, including strings and tags."""
        return self.c.n_rows * (<uint64_t>self.layout.c.row_bytes + 1) + self.c.heap_bytes

    def partition_bytes(self, uint32_t p):
        """Return the memory that sorting a partition needs, in bytes: all its chunks and two items per row."""
        self._check(p, p + 1)
        return self.c.partitions[p].bytes + 2 * sizeof(st_item) * self.c.partitions[p].n_rows

    cdef int _check(self, uint32_t first, uint32_t last) except -1:
        if not first < last <= <uint32_t>1 << self.c.bits:
            raise IndexError(f"no partitions {first} to {last}")
        return 0

    def add(self, columns, size_t start, size_t n, last=None):
        """Add rows start .. last - 1 of a batch of n rows. Return the next row to add: less than last if memory is full.

        columns: (values, offsets, nulls) for each key, the event time, and each feature, in this order. values: a
        buffer of n contiguous values with offsets None; or of UTF-8 bytes, with a buffer of n + 1 offsets of 4 or 8
        bytes. nulls: a buffer of n bytes, not 0 where the value is null, or None. NaN in a Float32 or Float64 feature
        is null as well. last: None is n. Each call adds at least some rows. Strings must have passed
        first_bad_string(). Releases the GIL. Raises ValueError if a buffer has a wrong length.
        """
        cdef const st_layout *c = &self.layout.c
        cdef _Sources sources = _Sources()
        cdef size_t i, stop = n if last is None else last
        cdef int outcome
        if len(columns) != c.n_keys + 1 + c.n_features or not start < stop <= n:
            raise ValueError(f"expected {c.n_keys + 1 + c.n_features} columns and rows from 0 to {n - 1}, "
                             f"got {len(columns)} columns and rows {start} to {stop - 1}")
        sources.hold(columns)
        for i, (values, offsets, nulls) in enumerate(columns):
            self._hold(sources, i, n, values, offsets, nulls)
        with nogil:
            outcome = st_load_add(&self.c, sources.sources, &start, stop)
        sources.release()
        _load_outcome(outcome)
        return start

    cdef int _hold(self, _Sources sources, size_t i, size_t n, values, offsets, nulls) except -1:
        cdef const st_layout *c = &self.layout.c
        cdef st_source *source = &sources.sources[i]
        cdef bint is_string = c.key_is_string[i] if i < c.n_keys else (
            i > c.n_keys and st_is_string(c.features[i - c.n_keys - 1].code))
        cdef uint32_t width = 8 if i <= c.n_keys else c.features[i - c.n_keys - 1].bytes
        cdef Py_buffer *view = sources.view(values)
        source.values = <const uint8_t *>view.buf
        if is_string == (offsets is None) or (not is_string and <size_t>view.len != n * width):
            raise ValueError(f"column {i}: values of {view.len} bytes")
        if is_string:
            view = sources.view(offsets)
            source.offsets = view.buf
            source.offset_bytes = <uint32_t>(view.len // (n + 1))
            if <size_t>view.len != (n + 1) * source.offset_bytes or source.offset_bytes not in (4, 8):
                raise ValueError(f"column {i}: offsets of {view.len} bytes")
        if nulls is not None:
            view = sources.view(nulls)
            source.nulls = <const uint8_t *>view.buf
            if i <= c.n_keys or <size_t>view.len != n:
                raise ValueError(f"column {i}: nulls of {view.len} bytes")
        return 0

    def spill(self, int fd):
        """Write all chunks in memory to the end of the file and free them. Raises OSError.

        fd: the same file at each call. Releases the GIL.
        """
        cdef int outcome
        with nogil:
            outcome = st_load_spill(&self.c, fd)
        _load_outcome(outcome)

    def move(self, uint32_t p, int fd, RowPartitions into not None, size_t group_bytes):
        """Move a partition's rows into another RowPartitions, in groups of chunks with about group_bytes.

        Yields the number of rows of each group after it has been moved. Of equal keys within a group only one row is
        moved, so that a key with very many rows cannot fill a partition at every number of bits.
        """
        _check_same_columns(self.layout, into.layout)
        self._check(p, p + 1)
        cdef const st_chunk *at = self.c.partitions[p].first
        cdef const st_chunk *to
        cdef size_t bytes, i, n
        cdef RowRange rows
        cdef int outcome = 0
        while at is not NULL:
            to, bytes, n = at, 0, 0
            while to is not NULL and (to == at or bytes + to.bytes <= group_bytes):
                bytes += to.bytes
                n += to.n_rows
                to = to.next
            rows = RowRange(self)
            rows.allocate(n, n, st_chunks_file_bytes(at, to))
            rows.read(at, to, n, fd, 0)
            with nogil:
                for i in range(rows.n):
                    outcome = st_load_put(&into.c, &rows.items[i])
                    if outcome:
                        break
            _load_outcome(outcome)
            at = to
            yield n

    def take(self, uint32_t first, uint32_t last, int fd):
        """Return the rows of partitions first .. last - 1 as a RowRange: sorted, one row per key.

        Of rows with equal keys, the row with the latest event time is kept; at equal times, the row added last. fd: the
        file, or -1 if there is none. The rows' disk blocks are released; rows in memory stay until this object is
        deleted. Raises OSError.
        """
        self._check(first, last)
        cdef RowRange rows = RowRange(self)
        cdef size_t n = 0, largest = 0, file_bytes = 0
        cdef uint32_t p
        for p in range(first, last):
            n += self.c.partitions[p].n_rows
            largest = max(largest, self.c.partitions[p].n_rows)
            file_bytes += st_chunks_file_bytes(self.c.partitions[p].first, NULL)
        rows.allocate(n, largest, file_bytes)
        file_bytes = 0
        for p in range(first, last):
            rows.read(self.c.partitions[p].first, NULL, self.c.partitions[p].n_rows, fd, file_bytes)
            file_bytes += st_chunks_file_bytes(self.c.partitions[p].first, NULL)
            if fd >= 0:
                st_partition_punch(&self.c.partitions[p], fd)
        return rows


cdef struct _Building:
    # Buckets of which page images are built.
    st_splitter splitter
    st_bucket waiting  # a bucket whose image did not fit into the last PageImages
    bint has_waiting


cdef class RowRange:
    """The sorted rows of consecutive partitions, made by RowPartitions.take()."""
    cdef RowPartitions owner
    cdef st_item *items
    cdef st_item *unsorted
    cdef size_t *counts
    cdef uint8_t *buffer  # chunks that were in the file
    cdef size_t n
    cdef _Building building
    cdef bint started

    def __cinit__(self, RowPartitions owner not None):
        self.owner = owner

    def __dealloc__(self):
        free(self.items)
        free(self.unsorted)
        free(self.counts)
        free(self.buffer)

    def __len__(self):
        return self.n

    cdef int allocate(self, size_t n, size_t largest, size_t file_bytes) except -1:
        self.items = <st_item *>malloc((n + 1) * sizeof(st_item))
        self.unsorted = <st_item *>malloc((largest + 1) * sizeof(st_item))
        self.counts = <size_t *>malloc((st_sort_counts(largest) + 1) * sizeof(size_t))
        self.buffer = <uint8_t *>malloc(file_bytes + 1)
        if self.items is NULL or self.unsorted is NULL or self.counts is NULL or self.buffer is NULL:
            raise MemoryError
        return 0

    cdef int read(self, const st_chunk *first, const st_chunk *to, size_t n, int fd, size_t buffer_at) except -1:
        """Read chunks, sort and deduplicate their rows, and append them. Their hashes must be above the present ones."""
        cdef int outcome
        with nogil:
            outcome = st_chunks_read(&self.owner.c, first, to, fd, self.buffer + buffer_at, self.unsorted)
            if outcome == 0:
                st_sort(self.unsorted, self.items + self.n, n, self.counts)
                self.n += st_dedupe(&self.owner.layout.c, self.items + self.n, n, ST_UNTIMED, &self.owner.lost,
                                    NULL)
        return _load_outcome(outcome)


cdef class PageImages:
    """PageImages(layout, table_id, capacity_bytes, commit=0): page images of a new table, in the order of their keys.

    commit: the number that each page gets: of the last commit before the first page, since that of the commit which puts
    a page is not known while it is built. Iteration yields (LMDB key, page image): 13 bytes, and a memoryview that is valid until clear().
    """
    cdef readonly Layout layout
    cdef uint32_t table_id
    cdef uint64_t commit
    cdef uint8_t *data
    cdef size_t capacity, used, n, n_max
    cdef uint64_t n_rows
    cdef uint64_t *keys
    cdef size_t *ends

    def __cinit__(self, Layout layout not None, uint32_t table_id, size_t capacity_bytes, uint64_t commit=0):
        self.layout = layout
        self.table_id = table_id
        self.commit = commit
        self.capacity = max(capacity_bytes, layout.c.page_bytes)
        self.n_max = self.capacity // layout.c.page_bytes
        self.data = <uint8_t *>malloc(self.capacity)
        self.keys = <uint64_t *>malloc(self.n_max * sizeof(uint64_t))
        self.ends = <size_t *>malloc(self.n_max * sizeof(size_t))
        if self.data is NULL or self.keys is NULL or self.ends is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.data)
        free(self.keys)
        free(self.ends)

    def __len__(self):
        """Return the number of images."""
        return self.n

    @property
    def rows(self):
        """The number of rows in the images."""
        return self.n_rows

    def clear(self):
        """Remove all images. Their memory is used again, so memoryviews from iteration become invalid."""
        self.n = self.used = self.n_rows = 0

    def fill(self, RowRange rows not None, uint64_t first, uint32_t depth, uint32_t depth_grow):
        """Append the images of the rows' buckets. Return False if there is no more room: clear() and call again.

        rows: all rows of the table whose hashes share the top `depth` bits of `first`; they form one or more buckets.
        depth_grow: from this depth on, a full bucket gets a longer image instead of a split. Releases the GIL. Raises
        ValueError if a row, or rows with one hash, do not fit in the longest image.
        """
        if not rows.started:
            _check_same_columns(self.layout, rows.owner.layout)
            if self.layout.c.seed != rows.owner.layout.c.seed:
                raise ValueError("the rows were hashed with another seed")
            st_splitter_init(&rows.building.splitter, &self.layout.c, rows.items, rows.n, first, depth, depth_grow)
            rows.started = True
        elif rows.building.splitter.layout != &self.layout.c:
            raise ValueError("earlier images of these rows were made with another layout")
        cdef int found
        self._make_room(&rows.building)
        with nogil:
            found = self._build(&rows.building)
        return _all_built(found)

    cdef int _make_room(self, const _Building *b) except -1:
        """Enlarge the empty buffer for a bucket that is waiting and larger than it."""
        if b.has_waiting and self.n == 0 and b.waiting.bytes > self.capacity:
            self._widen(b.waiting.bytes)
        return 0

    cdef int _build(self, _Building *b) noexcept nogil:
        """Append the images of buckets. Return 0 after the last one, 1 without room, -1 if a bucket is too large."""
        cdef st_bucket *bucket = &b.waiting
        cdef int found
        while True:
            if not b.has_waiting:
                found = st_splitter_next(&b.splitter, bucket)
                if found != 1:
                    return found
                b.has_waiting = True
            if self.n == self.n_max or bucket.bytes > self.capacity - self.used:
                return 1
            st_build(&self.layout.c, b.splitter.items + bucket.start, bucket.stop - bucket.start, bucket.depth,
                     self.table_id, self.commit, self.data + self.used, <uint32_t>bucket.bytes)
            self.used += bucket.bytes
            self.keys[self.n] = bucket.key
            self.ends[self.n] = self.used
            self.n_rows += bucket.stop - bucket.start
            self.n += 1
            b.has_waiting = False

    cdef int _widen(self, size_t bytes) except -1:
        cdef uint8_t *data = <uint8_t *>realloc(self.data, bytes)
        if data is NULL:
            raise MemoryError
        self.data, self.capacity = data, bytes
        return 0

    def __iter__(self):
        cdef size_t i, start = 0
        prefix = b"t" + int(self.table_id).to_bytes(4, "big")
        for i in range(self.n):
            yield (
                prefix + int(self.keys[i]).to_bytes(8, "big"),
                PyMemoryView_FromMemory(<char *>self.data + start, self.ends[i] - start, PyBUF_READ),
            )
            start = self.ends[i]


cdef bint _all_built(int found) except *:
    """Return whether PageImages._build() has built all images. Raises ValueError if it cannot build one."""
    if found < 0:
        raise ValueError("a row, or all rows with one hash, do not fit in the longest page image")
    return found == 0


def first_bad_string(values, offsets, nulls, size_t n, size_t length_max):
    """Return the index of the first of n strings that is not valid UTF-8, too long, or not inside values; else None.

    values, offsets, nulls: buffers as in RowPartitions.add(). length_max: bytes. Null strings are not checked. Releases
    the GIL. Raises ValueError if offsets or nulls has a wrong length.
    """
    cdef _Sources sources = _Sources()
    cdef Py_buffer *view
    cdef size_t n_values, bad
    sources.hold([None])
    view = sources.view(values)
    sources.sources[0].values, n_values = <const uint8_t *>view.buf, view.len
    view = sources.view(offsets)
    sources.sources[0].offsets = view.buf
    sources.sources[0].offset_bytes = <uint32_t>(view.len // (n + 1))
    if <size_t>view.len != (n + 1) * sources.sources[0].offset_bytes or sources.sources[0].offset_bytes not in (4, 8):
        raise ValueError(f"offsets of {view.len} bytes for {n} strings")
    if nulls is not None:
        view = sources.view(nulls)
        if <size_t>view.len != n:
            raise ValueError(f"nulls of {view.len} bytes for {n} strings")
        sources.sources[0].nulls = <const uint8_t *>view.buf
    with nogil:
        bad = st_source_check(&sources.sources[0], n, n_values, length_max)
    return None if bad == n else bad
