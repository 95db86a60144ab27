/* Bulk loads: columns of a batch into rows, and rows into partitions by the top bits of their keys' hashes.
 *
 * A table is built in the order of its hashes, and the rows of one partition are next to each other in that order. So
 * partitions are sorted one at a time, in cache, and those that do not fit in memory wait in a file. The rows of a
 * partition lie in chunks, in the order in which they came: rows grow from the front of a chunk, their strings from
 * its end, and string references are relative to its start. A chunk in the file is the same bytes.
 *
 * Nothing here touches Python; everything may run without the GIL. A struct st_load is used by one thread at a time.
 */
#ifndef SHORTTAIL_LOAD_H
#define SHORTTAIL_LOAD_H

#include "page.h"

/* One column of a batch of rows: a key, the event time, or a feature. */
typedef struct {
    const uint8_t *values; /* one after the other; of strings their bytes, UTF-8 */
    const void *offsets;   /* strings: where each starts in values, and where the last one ends; NULL otherwise */
    uint32_t offset_bytes; /* 4 or 8 */
    const uint8_t *nulls;  /* a byte a row, not 0 where it is null; NULL: no row is. In floats NaN is null as well */
} st_source;

typedef struct st_chunk {
    struct st_chunk *next;
    uint8_t *data;    /* NULL: it is in the file */
    uint64_t file_at;
    size_t bytes;
    uint32_t n_rows;
    int own; /* allocated alone: for a row that is longer than a usual chunk */
} st_chunk;

typedef struct {
    st_chunk *first, *last;
    uint8_t *row_end; /* in the last chunk: where the next row goes */
    uint8_t *heap;    /* in the last chunk: start of its strings */
    uint64_t n_rows;
    uint64_t bytes; /* of its chunks, wherever they are */
} st_partition;

typedef struct {
    const st_layout *layout;
    uint32_t bits;      /* 2^bits partitions, ... */
    uint32_t skip_bits; /* ... by the bits of the hash after so many, in which all its rows agree */
    size_t chunk_bytes;
    size_t memory_limit; /* st_load_add stops soon after it has passed it */
    size_t memory_bytes; /* of the chunks in memory */
    uint64_t n_rows;
    uint64_t heap_bytes; /* of all strings */
    uint64_t file_bytes;
    st_partition *partitions;
    uint8_t **slabs; /* what chunks are cut from */
    size_t n_slabs, slab_chunks, chunks_used;
    uint8_t *block; /* rows that are being put together */
    uint64_t *hashes;
    size_t block_rows;
} st_load;

enum { ST_LOAD_OK = 0, ST_LOAD_NO_MEMORY = -1, ST_LOAD_ROW_TOO_LONG = -2 }; /* above 0: an errno */

/* The fields that the caller does not set are zeroed; 0 or ST_LOAD_NO_MEMORY. */
int st_load_init(st_load *load, const st_layout *layout, uint32_t bits, uint32_t skip_bits, size_t chunk_bytes,
                 size_t memory_limit);
void st_load_free(st_load *load);

/* The first of n strings that is not valid UTF-8, is longer than the limit or not within n_values bytes; n: none. */
size_t st_source_check(const st_source *source, size_t n, size_t n_values, size_t length_max);

/* Add rows *at .. n - 1 of the batch: sources are keys, event time and features. *at becomes the next row to add, which
 * is less than n when the memory limit was reached; a call adds some rows at least. */
int st_load_add(st_load *load, const st_source *sources, size_t *at, size_t n);
/* Add a row, which came after those that are there. */
int st_load_put(st_load *load, const st_item *item);

/* Write all chunks that are in memory to the end of the file, and give up their memory. */
int st_load_spill(st_load *load, int fd);

/* Bytes that chunks from..to (exclusive; NULL: the end) have in the file. */
size_t st_chunks_file_bytes(const st_chunk *from, const st_chunk *to);
/* Their rows as items with hashes, in the order they came. Chunks in the file are read into buffer, which the items
 * then point into. */
int st_chunks_read(const st_load *load, const st_chunk *from, const st_chunk *to, int fd, uint8_t *buffer,
                   st_item *items);
/* Give the file's blocks of a partition back. */
void st_partition_punch(const st_partition *partition, int fd);

#endif
