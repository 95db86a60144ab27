# SortedRows and join(), for upserts and deletes. Part of pages.pyx.

cdef class SortedRows:
    """SortedRows(layout, parts, pushes=(), now_us=None, given=(), commit=0): rows to write or remove, sorted by hash.

    parts: pairs (rows, arena) of buffers. rows: n * layout.row_bytes bytes in the row format; a string is a u32 offset
    into the arena and a u32 length. The buffers are kept and read in place. pushes: the number of rows of each push, in
    the order of the rows; a push does not extend over two parts. now_us: a merge writes the event times of rows that
    have none (store.table.UNTIMED): now_us, or 1 us more than the time of the row that they replace. given: for each
    push, a bit for each feature that its rows give, as in a row's null bitmap, or None for all; () is None for each.
    In a merge the other features keep the values of the row that is replaced; without one they stay as they are in the
    rows. commit: the number of the commit, which each page image gets. Raises ValueError if a string lies outside its arena.
    """
    cdef readonly Layout layout
    cdef st_item *items
    cdef size_t n
    cdef Py_buffer *views
    cdef size_t n_views
    cdef st_merger merger
    cdef st_overlay overlay
    cdef list bitmaps     # of the pushes, where some are partial
    cdef bytearray arena  # memory for the images of merge_all()

    def __cinit__(self, Layout layout not None, parts, pushes=(), now_us=None, given=(), uint64_t commit=0):
        cdef size_t total = 0, at = 0, v
        cdef st_item *unsorted
        cdef size_t *counts
        cdef int writable = PyBUF_SIMPLE if now_us is None else PyBUF_WRITABLE
        self.layout = layout
        self.merger.commit = commit
        self.merger.now_us = ST_UNTIMED if now_us is None else now_us
        parts = list(parts)
        self.views = <Py_buffer *>PyMem_Malloc((2 * len(parts) + 1) * sizeof(Py_buffer))
        if self.views is NULL:
            raise MemoryError
        for rows, arena in parts:
            PyObject_GetBuffer(rows, &self.views[self.n_views], writable)
            self.n_views += 1
            PyObject_GetBuffer(arena, &self.views[self.n_views], PyBUF_SIMPLE)
            self.n_views += 1
            total += self.views[self.n_views - 2].len // layout.c.row_bytes
        self.items = <st_item *>PyMem_Malloc((total + 1) * sizeof(st_item))
        self.merger.lost.rows = <const uint8_t **>PyMem_Malloc((total + 1) * sizeof(uint8_t *))
        unsorted = <st_item *>PyMem_Malloc((total + 1) * sizeof(st_item))
        counts = <size_t *>PyMem_Malloc((st_sort_counts(total) + 1) * sizeof(size_t))
        try:
            if self.items is NULL or self.merger.lost.rows is NULL or unsorted is NULL or counts is NULL:
                raise MemoryError
            for v in range(0, self.n_views, 2):
                at += self._read(&self.views[v], &self.views[v + 1], unsorted + at)
            with nogil:
                st_sort(unsorted, self.items, total, counts)
            self.n = total
            self.merger.lost.n_rows = total
        finally:
            PyMem_Free(unsorted)
            PyMem_Free(counts)
        partial = [bits for bits in given if bits is not None]
        if len(pushes) > 1 or partial:
            order = self._mark(pushes)
            if partial:
                self._overlay([given[k] for k in order])

    cdef list _mark(self, pushes):
        """Set the first row of each push that has rows. Returns the numbers of these pushes, by their addresses."""
        cdef st_lost *lost = &self.merger.lost
        cdef size_t k, v = 0, at = 0
        first = []
        for k, rows in enumerate(pushes):
            while at == <size_t>self.views[v].len and v + 2 < self.n_views:
                v, at = v + 2, 0
            if rows:
                first.append((<size_t>self.views[v].buf + at, k))
            at += rows * self.layout.c.row_bytes
            if at > <size_t>self.views[v].len:
                raise ValueError("a push has more rows than its part")
        lost.pushes = <const uint8_t **>PyMem_Malloc((len(first) + 1) * sizeof(uint8_t *))
        if lost.pushes is NULL:
            raise MemoryError
        first.sort()
        for k, (address, _) in enumerate(first):
            lost.pushes[k] = <const uint8_t *><size_t>address
        lost.n_pushes = len(first)
        return [number for _, number in first]

    cdef int _overlay(self, list bitmaps) except -1:
        """Keep features that are not given. bitmaps: of the pushes that have rows, as `given`, by their addresses."""
        cdef const st_layout *c = &self.layout.c
        cdef const uint8_t **given = <const uint8_t **>PyMem_Malloc((len(bitmaps) + 1) * sizeof(uint8_t *))
        cdef size_t k
        self.overlay.given = given
        self.overlay.origins = <const st_item **>PyMem_Malloc((c.n_features + 1) * sizeof(st_item *))
        if given is NULL or self.overlay.origins is NULL:
            raise MemoryError
        for k, bits in enumerate(bitmaps):
            if bits is not None and len(bits) != c.null_bytes:
                raise ValueError(f"push {k} has {len(bits)} bytes for {c.n_features} features")
            given[k] = NULL
            if bits is not None:
                given[k] = <const uint8_t *>PyBytes_AS_STRING(bits)
        self.bitmaps = bitmaps
        self.merger.overlay = &self.overlay
        return 0

    def __dealloc__(self):
        cdef size_t v
        for v in range(self.n_views):
            PyBuffer_Release(&self.views[v])
        PyMem_Free(self.views)
        PyMem_Free(self.items)
        PyMem_Free(self.merger.lost.rows)
        PyMem_Free(self.merger.lost.pushes)
        PyMem_Free(self.merger.images)
        PyMem_Free(<void *>self.overlay.given)
        PyMem_Free(<void *>self.overlay.origins)
        st_merge_free(&self.merger)

    def __len__(self):
        return self.n

    cdef size_t _read(self, Py_buffer *rows, Py_buffer *arena, st_item *out) except? 0:
        cdef const st_layout *c = &self.layout.c
        cdef size_t n = rows.len // c.row_bytes, i
        cdef uint32_t s
        cdef uint32_t reference[2]
        with nogil:
            for i in range(n):
                out[i].row = <const uint8_t *>rows.buf + i * c.row_bytes
                out[i].heap = <const uint8_t *>arena.buf
                for s in range(c.n_strings):
                    memcpy(reference, out[i].row + c.string_offsets[s], 8)
                    if <uint64_t>reference[0] + reference[1] > <uint64_t>arena.len:
                        with gil:
                            raise ValueError("a row refers to a string outside its arena")
                out[i].hash = st_hash_row(c, out[i].row, out[i].heap)
        return n

    def lost(self):
        """Return which rows were merged and not kept: a byte per row, in the order given; None if all were kept.

        0: the row was kept, at least until a later push. 1, older: the row that was kept for its key, which may have
        been stored before, has a later event time. 2, duplicate: it has the same event time, and was given later.
        """
        cdef const st_lost *c = &self.merger.lost
        cdef size_t k
        if c.n_older + c.n_duplicate == 0:
            return None
        found = bytearray(self.n)
        for k in range(c.n_older):
            found[self._number(c.rows[k])] = 1
        for k in range(c.n_rows - c.n_duplicate, c.n_rows):
            found[self._number(c.rows[k])] = 2
        return found

    cdef size_t _number(self, const uint8_t *row) noexcept:
        """Return the number of a row in the order given."""
        cdef size_t v = 0, before = 0
        while not 0 <= row - <const uint8_t *>self.views[v].buf < self.views[v].len:
            before += self.views[v].len // self.layout.c.row_bytes
            v += 2
        return before + (row - <const uint8_t *>self.views[v].buf) // self.layout.c.row_bytes

    def hash(self, size_t i):
        """Return the hash of row i as 8 bytes, big-endian, like a bucket key. Raises IndexError."""
        if i >= self.n:
            raise IndexError(i)
        return int(self.items[i].hash).to_bytes(8, "big")

    def image_bytes(self):
        """Return the bytes of the rows in page images, including strings and tags."""
        cdef uint64_t bytes = self.n * (<uint64_t>self.layout.c.row_bytes + 1)
        cdef size_t i
        if self.layout.c.n_strings:
            with nogil:
                for i in range(self.n):
                    bytes += st_heap_bytes(&self.layout.c, &self.items[i])
        return bytes

    def merge(self, size_t i, bytes bucket_key, page, uint32_t table_id, uint32_t depth_grow):
        """Merge rows i, i + 1, ... into a bucket, as far as they belong to it. page: its image; None in an empty table.

        Returns (next i, [(bucket key, page image), ...]): one image, or several if the bucket was split. A stored row
        is kept if its event time is later, and features that rows do not give are kept. Raises ValueError if the page is damaged or row i belongs to another bucket.
        """
        cdef _Bucket bucket = _Bucket()
        cdef Py_buffer view
        cdef list images = []
        if page is None:
            bucket.open(self, i, _key_of(bucket_key), NULL, 0, table_id)
        else:
            PyObject_GetBuffer(page, &view, PyBUF_SIMPLE)
            try:
                bucket.open(self, i, _key_of(bucket_key), <const uint8_t *>view.buf, view.len, table_id)
                self._merge(i, bucket, table_id, depth_grow, images)
                return bucket.stop, images
            finally:
                PyBuffer_Release(&view)
        self._merge(i, bucket, table_id, depth_grow, images)
        return bucket.stop, images

    def merge_all(self, Tree tree not None, size_t i, size_t pages_max, uint32_t table_id, uint32_t depth_grow):
        """Merge rows i, i + 1, ... into their buckets, which are read from a tree that holds the present table.

        Returns (next i, [(LMDB key, page image), ...], entries for the change log), with about pages_max images. The
        next call overwrites the images. Releases the GIL. Raises ValueError if a page or the tree is damaged.
        """
        cdef st_merger *m = &self.merger
        cdef st_fault fault
        cdef int outcome
        cdef size_t k
        cdef st_image *image
        if self.arena is None or m.images_max != pages_max:
            # The arena is kept between calls: a page fault on new memory costs as much as building a page.
            self.arena = bytearray(self.layout.c.page_bytes * pages_max)
            PyMem_Free(m.images)
            m.images = <st_image *>PyMem_Malloc(pages_max * sizeof(st_image))
            if m.images is NULL:
                raise MemoryError
            m.images_max = pages_max
        m.tree, m.layout, m.table_id, m.depth_grow = &tree.c, &self.layout.c, table_id, depth_grow
        m.rows, m.n, m.next, m.looked = self.items, self.n, i, i
        while True:
            m.arena, m.arena_bytes = <uint8_t *>PyByteArray_AS_STRING(self.arena), len(self.arena)
            with nogil:
                outcome = st_merge(m, &fault)
            if outcome != ST_MERGE_ROOM:
                break
            if m.arena_bytes > ARENA_BYTES_MAX:
                raise ValueError("a bucket has more rows than a commit can hold")
            self.arena = bytearray(2 * m.arena_bytes)
            PyMem_Free(m.images)
            m.images = <st_image *>PyMem_Malloc(2 * m.images_max * sizeof(st_image))
            if m.images is NULL:
                raise MemoryError
            m.images_max *= 2
        if outcome < 0:
            _raise_fault(&fault)
        images = []
        changes = PyBytes_FromStringAndSize(NULL, m.n_images * ST_CHANGE_BYTES)
        for k in range(m.n_images):
            image = &m.images[k]
            memcpy(PyBytes_AS_STRING(changes) + k * ST_CHANGE_BYTES, image.key + 1, ST_CHANGE_BYTES)
            images.append((PyBytes_FromStringAndSize(<char *>image.key, ST_PAGE_KEY_BYTES),
                           PyMemoryView_FromMemory(<char *>m.arena + image.offset, image.bytes, PyBUF_READ)))
        return m.next, images, changes

    cdef int _merge(self, size_t i, _Bucket bucket, uint32_t table_id, uint32_t depth_grow, list images) except -1:
        cdef size_t n_new = bucket.stop - i, n_all = bucket.n + n_new
        cdef st_item *both = <st_item *>PyMem_Malloc((2 * n_all + 1) * sizeof(st_item))
        cdef size_t *counts = <size_t *>PyMem_Malloc((st_sort_counts(n_all) + 1) * sizeof(size_t))
        cdef _Buckets buckets
        try:
            if both is NULL or counts is NULL:
                raise MemoryError
            # Stored rows come first, so that at equal event times the new row, being last, is kept.
            self.merger.lost.stored = bucket.page
            if bucket.n:
                memcpy(both, bucket.items, bucket.n * sizeof(st_item))
            memcpy(both + bucket.n, self.items + i, n_new * sizeof(st_item))
            st_sort(both, both + n_all, n_all, counts)
            buckets = _Buckets(self.layout, table_id, self.merger.commit, depth_grow)
            if self.merger.overlay is not NULL:
                st_overlay_reset(self.merger.overlay)
            n_all = st_dedupe(&self.layout.c, both + (bucket.n + n_new), n_all, self.merger.now_us,
                              &self.merger.lost, self.merger.overlay)
            if n_all == SIZE_MAX:
                raise MemoryError
            buckets.start(both + (bucket.n + n_new), n_all, bucket.key, bucket.depth)
            images.extend(buckets)
            return 0
        finally:
            PyMem_Free(both)
            PyMem_Free(counts)

    def remove(self, size_t i, bytes bucket_key, page, uint32_t table_id):
        """Remove the keys of rows i, i + 1, ... from a bucket, as far as they belong to it.

        Returns (next i, number of rows removed, page image); the image is None if no row was removed. Raises ValueError
        if the page is damaged or row i belongs to another bucket.
        """
        cdef _Bucket bucket = _Bucket()
        cdef Py_buffer view
        cdef st_item *left = NULL
        cdef _Buckets buckets
        PyObject_GetBuffer(page, &view, PyBUF_SIMPLE)
        try:
            bucket.open(self, i, _key_of(bucket_key), <const uint8_t *>view.buf, view.len, table_id)
            left = <st_item *>PyMem_Malloc((bucket.n + 1) * sizeof(st_item))
            if left is NULL:
                raise MemoryError
            kept = st_without(&self.layout.c, bucket.items, bucket.n, self.items + i, bucket.stop - i, left)
            if kept == bucket.n:
                return bucket.stop, 0, None
            buckets = _Buckets(self.layout, table_id, self.merger.commit, bucket.depth)  # never splits: a long image stays long
            buckets.start(left, kept, bucket.key, bucket.depth)
            return bucket.stop, bucket.n - kept, next(buckets)[1]
        finally:
            PyMem_Free(left)
            PyBuffer_Release(&view)


def join(Layout layout not None, uint32_t table_id, uint64_t commit, bytes bucket_key, page, bytes sibling_key,
         sibling):
    """Return the image of two sibling buckets merged into one, or None if together they fill more than half a page.

    The limit of half a page (not counting strings) avoids that a few more rows split the bucket again. bucket_key,
    page: of the sibling with the lower hashes. commit: its number, which the image gets. Raises ValueError if a page is damaged.
    """
    cdef Py_buffer views[2]
    cdef const uint8_t *pages[2]
    cdef const char *wrong
    cdef size_t n = 0, rows
    cdef uint32_t depth
    cdef st_item *items = NULL
    cdef st_splitter splitter
    cdef st_bucket bucket
    cdef Py_ssize_t v, held = 0
    try:
        for v, (key, buffer) in enumerate(((bucket_key, page), (sibling_key, sibling))):
            PyObject_GetBuffer(buffer, &views[v], PyBUF_SIMPLE)
            held += 1
            pages[v] = <const uint8_t *>views[v].buf
            wrong = st_check_page(&layout.c, pages[v], views[v].len, table_id, _key_of(key))
            if wrong is not NULL:
                raise ValueError(f"bucket {key.hex()}: {wrong.decode()}")
            n += st_page_rows(pages[v])
        depth = st_page_depth(pages[0])
        if depth == 0 or depth != st_page_depth(pages[1]) or 2 * n > layout.c.rows_per_page:
            return None
        items = <st_item *>PyMem_Malloc((n + 1) * sizeof(st_item))
        if items is NULL:
            raise MemoryError
        rows = st_page_rows(pages[0])
        st_page_items(&layout.c, pages[0], items)
        st_page_items(&layout.c, pages[1], items + rows)
        # The items are not sorted, because the splitter makes only one bucket here.
        st_splitter_init(&splitter, &layout.c, items, n, _key_of(bucket_key), depth - 1, depth - 1)
        if st_splitter_next(&splitter, &bucket) != 1 or bucket.stop != n or bucket.bytes != layout.c.page_bytes:
            return None
        image = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>bucket.bytes)
        st_build(&layout.c, items, n, depth - 1, table_id, commit, <uint8_t *>PyBytes_AS_STRING(image),
                 <uint32_t>bucket.bytes)
        return image
    finally:
        PyMem_Free(items)
        for v in range(held):
            PyBuffer_Release(&views[v])


cdef class _Bucket:
    """A bucket to be edited: its rows sorted by hash, and the range of the edit's rows that belong to it."""
    cdef uint64_t key
    cdef uint32_t depth
    cdef const uint8_t *page
    cdef st_item *items  # they point into the page, which must outlive this object
    cdef size_t n        # rows in the page
    cdef size_t stop     # index after the last of the edit's rows that belong to the bucket

    cdef int open(self, SortedRows rows, size_t i, uint64_t key, const uint8_t *page, size_t n_bytes,
                  uint32_t table_id) except -1:
        cdef const char *wrong
        cdef size_t *counts
        cdef uint64_t last
        self.key, self.page = key, page
        if page is not NULL:
            wrong = st_check_page(&rows.layout.c, page, n_bytes, table_id, key)
            if wrong is not NULL:
                raise ValueError(f"bucket {key:016x}: {wrong.decode()}")
            self.n = st_page_rows(page)
            self.depth = st_page_depth(page)
            self.items = <st_item *>PyMem_Malloc((2 * self.n + 1) * sizeof(st_item))
            counts = <size_t *>PyMem_Malloc((st_sort_counts(self.n) + 1) * sizeof(size_t))
            if self.items is NULL or counts is NULL:
                PyMem_Free(counts)
                raise MemoryError
            st_page_items(&rows.layout.c, page, self.items + self.n)
            st_sort(self.items + self.n, self.items, self.n, counts)
            PyMem_Free(counts)
        last = self.key | (UINT64_MAX >> self.depth)
        if i >= rows.n or not self.key <= rows.items[i].hash <= last:
            raise ValueError("the row does not belong to this bucket")
        self.stop = i
        while self.stop < rows.n and rows.items[self.stop].hash <= last:
            self.stop += 1
        return 0

    def __dealloc__(self):
        PyMem_Free(self.items)


cdef class _Buckets:
    """Iterates over the buckets of sorted items as (bucket key, page image)."""
    cdef object owner  # keeps the items alive
    cdef Layout layout
    cdef uint32_t table_id, depth_grow
    cdef uint64_t commit
    cdef st_splitter splitter
    cdef const st_item *items

    def __cinit__(self, Layout layout not None, uint32_t table_id, uint64_t commit, uint32_t depth_grow):
        self.layout = layout
        self.table_id = table_id
        self.commit = commit
        self.depth_grow = depth_grow

    cdef void start(self, const st_item *items, size_t n, uint64_t key, uint32_t depth) noexcept:
        self.items = items
        st_splitter_init(&self.splitter, &self.layout.c, items, n, key, depth, self.depth_grow)

    def __iter__(self):
        return self

    def __next__(self):
        cdef st_bucket bucket
        cdef int found = st_splitter_next(&self.splitter, &bucket)
        if found == 0:
            raise StopIteration
        if found < 0:
            raise ValueError("more rows share a bucket than a page image can hold")
        image = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>bucket.bytes)
        st_build(&self.layout.c, self.items + bucket.start, bucket.stop - bucket.start, bucket.depth, self.table_id,
                 self.commit, <uint8_t *>PyBytes_AS_STRING(image), <uint32_t>bucket.bytes)
        return int(bucket.key).to_bytes(8, "big"), image
