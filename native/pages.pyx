"""Feature tables: page images, the directory of a snapshot, the batch lookup, upserts and bulk loads.

The C files do the work; this module checks arguments, owns memory and talks to Python. No function here calls LMDB:
pages are read at the addresses of buffers that py-lmdb returned, which are valid only as long as their read transaction
is open.
"""

from cpython.buffer cimport PyBUF_READ, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.errno cimport errno
from libc.stdint cimport INT64_MIN, SIZE_MAX, UINT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

import os

import numpy as np
cimport numpy as cnp

from shorttail._native.columns cimport KIND_I64, KIND_STR, Columns, column_t

cnp.import_array()

cdef extern from "page.h" nogil:
    enum: ST_KEYS_MAX, ST_PAGE_BYTES, ST_ROWS_MAX
    enum: ST_PAGE_FORMAT_OLDEST, ST_PAGE_FORMAT
    const int64_t ST_UNTIMED
    enum: ST_STRING, ST_TIMESTAMP, ST_VECTOR, ST_WIDE_VECTOR, ST_BLOB
    enum: ST_OUT_FLOAT32, ST_OUT_FLOAT64, ST_OUT_INT64, ST_OUT_INT32, ST_OUT_BOOL, ST_OUT_OBJECT
    ctypedef struct st_field:
        uint32_t code, width, offset, bytes
    ctypedef struct st_layout:
        uint64_t seed
        uint32_t n_keys, n_features, n_strings
        uint8_t *key_is_string
        uint32_t time_offset, null_offset, null_bytes, row_bytes, page_bytes, rows_per_page
        uint32_t page_format
        st_field *features
        uint32_t *string_offsets
    ctypedef struct st_item:
        uint64_t hash
        const uint8_t *row
        const uint8_t *heap
    ctypedef struct st_key_column:
        const uint8_t *data
        const uint32_t *ends
        const uint8_t *nulls
    ctypedef struct st_output:
        uint8_t *data
        size_t stride
    ctypedef struct st_string:
        const uint8_t *data
        size_t length
    ctypedef void (*st_convert)(const uint8_t *, uint8_t *, uint32_t) noexcept nogil
    ctypedef struct st_run:
        st_convert convert
        uint32_t row_offset, output, column_offset, count, bytes, fill_offset
    ctypedef struct st_op:
        uint32_t null_byte, null_bit, row_offset, output, column_offset, bytes, fill_offset, string_index
    ctypedef struct st_null_word:
        uint32_t null_offset
        uint64_t mask
    ctypedef struct st_plan:
        uint32_t n_runs, n_ops, n_null_words
        st_run *runs
        st_op *ops
        st_null_word *null_words
        uint8_t *fill
    ctypedef struct st_view:
        const st_plan *plan
        const st_layout *layout
        const uint8_t *const *pages
        uint32_t depth
        int64_t oldest_us, ttl_us
        const int64_t *as_of
        st_key_column *keys
        const st_output *outputs
        uint8_t *status
        uint8_t *feature_status
        st_string *strings
    ctypedef struct st_splitter:
        const st_layout *layout
        const st_item *items
    ctypedef struct st_bucket:
        uint64_t key
        uint32_t depth
        size_t start, stop
        uint64_t bytes
    ctypedef struct st_lost:
        const uint8_t *stored
        const uint8_t **pushes
        size_t n_pushes
        const uint8_t **rows
        size_t n_rows
        uint64_t n_older, n_duplicate
    int st_layout_finish(st_layout *)
    uint64_t st_hash_row(const st_layout *, const uint8_t *, const uint8_t *)
    st_convert st_conversion(uint32_t, uint32_t)
    uint32_t st_output_bytes(uint32_t)
    void st_lookup(const st_view *, size_t, size_t)
    ctypedef struct st_overlay:
        const uint8_t *const *given
        const st_item **origins
    size_t st_dedupe(const st_layout *, st_item *, size_t, int64_t, st_lost *,
                     st_overlay *)
    uint32_t st_page_rows(const uint8_t *)
    uint32_t st_page_depth(const uint8_t *)
    uint32_t st_page_bytes(const uint8_t *)
    uint64_t st_page_commit(const st_layout *, const uint8_t *)
    uint32_t st_page_used_bytes(const st_layout *, const uint8_t *)
    void st_page_items(const st_layout *, const uint8_t *, st_item *)
    size_t st_sort_counts(size_t)
    void st_sort(const st_item *, st_item *, size_t, size_t *)
    size_t st_without(const st_layout *, const st_item *, size_t, const st_item *, size_t, st_item *)
    void st_splitter_init(st_splitter *, const st_layout *, const st_item *, size_t, uint64_t, uint32_t, uint32_t)
    int st_splitter_next(st_splitter *, st_bucket *)
    uint64_t st_heap_bytes(const st_layout *, const st_item *)
    void st_build(const st_layout *, const st_item *, size_t, uint32_t, uint32_t, uint64_t, uint8_t *, uint32_t)
    const char *st_check_page(const st_layout *, const uint8_t *, size_t, uint32_t, uint64_t)

cdef extern from "row.h" nogil:
    int st_is_string(uint32_t)

cdef extern from "overlay.h" nogil:
    void st_overlay_reset(st_overlay *)

cdef extern from "crc32c.h" nogil:
    uint32_t st_crc32c(const uint8_t *, size_t)

cdef extern from "tree.h" nogil:
    enum: ST_CHANGE_BYTES
    enum: ST_TREE_GONE, ST_TREE_UNKNOWN
    ctypedef struct st_map:
        const uint8_t *base
        uint64_t n_pages
        int spare
    ctypedef struct st_tree:
        const uint8_t *base
        uint64_t n_pages
        uint32_t depth
    ctypedef struct st_directory:
        const uint8_t **pages
        uint32_t depth
    ctypedef struct st_fault:
        const char *what
        uint64_t key
    int st_tree_open(st_tree *, const st_map *, uint64_t)
    int st_tree_find(const st_tree *, const uint8_t *, uint32_t, const uint8_t **, uint64_t *)
    int st_tree_bucket(const st_tree *, uint32_t, uint64_t, uint64_t *, const uint8_t **, uint64_t *)
    int st_populate(const uint8_t *, size_t)
    int64_t st_directory_build(const st_tree *, const st_layout *, uint32_t, int64_t, st_directory *, st_fault *)
    int64_t st_directory_update(const st_tree *, const st_layout *, uint32_t, const uint8_t *, size_t, st_directory *,
                                st_fault *)

cdef extern from "structure.h" nogil:
    const char *st_structure_path(const st_tree *, const uint8_t *, uint32_t, uint64_t *)
    const char *st_structure_check(const st_tree *, int, int *, uint64_t *)
    int st_structure_may_free(const st_map *, const uint8_t *, uint64_t, uint32_t)

cdef extern from "load.h" nogil:
    enum: ST_LOAD_OK, ST_LOAD_NO_MEMORY, ST_LOAD_ROW_TOO_LONG
    ctypedef struct st_source:
        const uint8_t *values
        const void *offsets
        uint32_t offset_bytes
        const uint8_t *nulls
    ctypedef struct st_chunk:
        st_chunk *next
        size_t bytes
        uint32_t n_rows
    ctypedef struct st_partition:
        st_chunk *first
        uint64_t n_rows, bytes
    ctypedef struct st_load:
        uint32_t bits
        size_t memory_bytes
        uint64_t n_rows, heap_bytes, file_bytes
        st_partition *partitions
    int st_load_init(st_load *, const st_layout *, uint32_t, uint32_t, size_t, size_t)
    void st_load_free(st_load *)
    size_t st_source_check(const st_source *, size_t, size_t, size_t)
    int st_load_add(st_load *, const st_source *, size_t *, size_t)
    int st_load_put(st_load *, const st_item *)
    int st_load_spill(st_load *, int)
    size_t st_chunks_file_bytes(const st_chunk *, const st_chunk *)
    int st_chunks_read(const st_load *, const st_chunk *, const st_chunk *, int, uint8_t *, st_item *)
    void st_partition_punch(const st_partition *, int)

cdef extern from "secret_hash.h" nogil:
    void st_secret_hashes(const uint8_t *, const st_source *, size_t, size_t, uint8_t *)

cdef extern from "merge.h" nogil:
    enum: ST_PAGE_KEY_BYTES
    enum: ST_MERGE_ROOM
    ctypedef struct st_image:
        uint8_t *key
        size_t offset
        uint32_t bytes
    ctypedef struct st_merger:
        const st_tree *tree
        const st_layout *layout
        uint32_t table_id, depth_grow
        uint64_t commit
        const st_item *rows
        size_t n
        int64_t now_us
        st_overlay *overlay
        size_t next, looked
        uint8_t *arena
        size_t arena_bytes
        st_image *images
        size_t images_max, n_images
        st_lost lost
    int st_merge(st_merger *, st_fault *)
    void st_merge_free(st_merger *)

cdef extern from "scan.h" nogil:
    ctypedef struct st_scan_column:
        uint32_t code, width, row_offset, null_byte, null_bit
        size_t text_bytes
        uint8_t *values
        int32_t *ends
        uint8_t *valid
        size_t n_nulls
    ctypedef struct st_scan:
        const st_tree *tree
        const st_layout *layout
        uint32_t table_id, n_columns
        st_scan_column *columns
        uint64_t next
        const uint8_t **pages
        size_t n_pages, n_rows
        uint64_t all_pages, all_rows, all_bytes
    int st_scan_gather(st_scan *, size_t, size_t, st_fault *)
    int st_scan_gather_bucket(st_scan *, uint64_t, st_fault *)
    void st_scan_fill(st_scan *)
    void st_scan_free(st_scan *)

cdef extern from *:
    """
    #include <sys/mman.h>
    #define st_word_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define st_word_bump(p) __atomic_add_fetch((p), 1, __ATOMIC_ACQ_REL)
    """
    uint64_t st_word_load(uint64_t *) nogil
    uint64_t st_word_bump(uint64_t *) nogil
    int mlock(const void *, size_t) nogil

cdef enum:
    STACK_VIEWS = 16      # lookups with at most this many views and outputs allocate no memory for them
    ARENA_BYTES_MAX = 1 << 29
    HELD_GIL_LOOKUPS = 16 # up to this many lookups take less time than releasing the GIL and getting it back


include "pages_layout.pxi"
include "pages_tree.pxi"
include "pages_rows.pxi"
include "pages_lookup.pxi"
include "pages_load.pxi"
include "pages_secret.pxi"
include "pages_scan.pxi"
include "pages_rewrite.pxi"
include "pages_writeback.pxi"


def crc32c(data):
    """Return the CRC-32C (Castagnoli) of a buffer."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    cdef uint32_t crc = st_crc32c(<const uint8_t *>view.buf, view.len)
    PyBuffer_Release(&view)
    return crc


cdef class GenerationWord:
    """GenerationWord(buffer): the 8 bytes of shared memory that count commits.

    buffer: a writable mapping of at least 8 bytes; it is kept until release(). Raises ValueError if it is too short.
    """
    cdef uint64_t *word
    cdef uint64_t poison_value
    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, buffer):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.held = True
        if self.view.len < 8:
            raise ValueError("the generation word needs 8 bytes")
        self.word = <uint64_t *>self.view.buf

    def __dealloc__(self):
        self.release()

    def load(self):
        """Return the present count, by one atomic load."""
        return st_word_load(self.word)

    def bump(self):
        """Count a commit. Return the new count."""
        return st_word_bump(self.word)

    def poison(self):
        """Make load() return a value that no commit has. In a forked child, readers then look closer and are refused."""
        self.poison_value = <uint64_t>INT64_MIN  # as a signed number not -1 or -2, which snapshots have
        self.word = &self.poison_value

    cpdef release(self):
        """Release the buffer, so that the mapping can be closed. load() then returns the value of poison()."""
        self.poison()
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)


cdef class Gate:
    """Gate(word, generation): counts the threads that use a snapshot, at the cost of a few loads from memory.

    A thread is inside between try_enter() and leave(). Each call is atomic because the GIL is held. The owner
    (store/snapshot.py) decides what to do when try_enter() returns False, and wakes waiting threads.
    """
    cdef GenerationWord word
    cdef public int64_t generation   # generation of the snapshot; try_enter() fails if the word differs
    cdef public Py_ssize_t inside    # threads inside
    cdef public Py_ssize_t waiting   # threads that wait for exclusive use; no thread may enter meanwhile
    cdef public Py_ssize_t sleeping  # threads to be woken when the last thread leaves

    def __cinit__(self, GenerationWord word not None, int64_t generation):
        self.word = word
        self.generation = generation

    def try_enter(self):
        """Enter and return True if the snapshot is the newest and no thread waits for exclusive use; else False."""
        if self.waiting or <int64_t>st_word_load(self.word.word) != self.generation:
            return False
        self.inside += 1
        return True

    def leave(self):
        """Leave. Return True if this was the last thread inside and a thread sleeps until then: wake it."""
        self.inside -= 1
        return self.inside == 0 and self.sleeping > 0
