# PageRewrite: the pages of a table in another page format. Part of pages.pyx.

cdef class PageRewrite:
    """PageRewrite(layout, table_id, tree, depth_grow): reads the pages of a table, so that they are built anew.

    layout, table_id: of the present pages. depth_grow: as in PageImages.fill(). The read transaction of the tree must be
    open during every call.
    """
    cdef st_scan c
    cdef readonly Layout layout
    cdef Tree tree
    cdef uint32_t depth_grow
    cdef _Building building  # of the present page
    cdef bint started        # there is a present page
    cdef st_item *items
    cdef st_item *unsorted
    cdef size_t *counts

    def __cinit__(self, Layout layout not None, uint32_t table_id, Tree tree not None, uint32_t depth_grow):
        memset(&self.c, 0, sizeof(st_scan))
        self.layout, self.tree, self.depth_grow = layout, tree, depth_grow
        self.c.layout, self.c.tree, self.c.table_id = &layout.c, &tree.c, table_id
        self.items = <st_item *>malloc(ST_ROWS_MAX * sizeof(st_item))
        self.unsorted = <st_item *>malloc(ST_ROWS_MAX * sizeof(st_item))
        self.counts = <size_t *>malloc((st_sort_counts(ST_ROWS_MAX) + 1) * sizeof(size_t))
        if self.items is NULL or self.unsorted is NULL or self.counts is NULL:
            raise MemoryError

    def __dealloc__(self):
        st_scan_free(&self.c)
        free(self.items)
        free(self.unsorted)
        free(self.counts)

    def fill(self, PageImages images not None):
        """Append the next pages to images. Return False if there is no more room: clear them and call again.

        Every bucket keeps its rows; it is split only if they do not fit in a page of images.layout, which has the same
        columns and the same seed. Releases the GIL. Raises ValueError for a damaged page, and if a bucket does not fit
        in the longest image.
        """
        cdef st_fault fault
        cdef int found
        _check_same_columns(self.layout, images.layout)
        if images.layout.c.seed != self.layout.c.seed:
            raise ValueError("the pages are hashed with another seed")
        if self.started and self.building.splitter.layout != &images.layout.c:
            raise ValueError("earlier images of this table were made with another layout")
        images._make_room(&self.building)
        fault.what = NULL
        with nogil:
            found = self._fill(images, &fault)
        if found < 0 and (fault.what is not NULL or not self.started):
            _raise_fault(&fault)
        return _all_built(found)

    cdef int _fill(self, PageImages images, st_fault *fault) noexcept nogil:
        """As PageImages._build(), for all pages from the present one on; also -1 with fault set and no present page."""
        cdef int found
        cdef uint64_t key
        cdef size_t n
        while True:
            if self.started:
                found = images._build(&self.building)
                if found:
                    return found
                self.started = False
            key = self.c.next
            if st_scan_gather(&self.c, 1, 1, fault):  # one page
                return -1
            if self.c.n_pages == 0:
                return 0
            n = self.c.n_rows
            st_page_items(&self.layout.c, self.c.pages[0], self.unsorted)
            st_sort(self.unsorted, self.items, n, self.counts)
            st_splitter_init(&self.building.splitter, &images.layout.c, self.items, n, key,
                             st_page_depth(self.c.pages[0]), self.depth_grow)
            self.started = True
