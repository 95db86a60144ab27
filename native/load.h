/* Bulk loads: converts the columns of a batch to rows and puts rows into partitions by the top bits of their key
 * hashes.
 *
 * A table is built in the order of the hashes, and each partition is a contiguous range of hashes. So one partition at
 * a time is sorted, within the CPU cache, and partitions that do not fit in memory wait in a file. A partition is a
 * list of chunks with rows in the order in which they came. In a chunk, rows grow from the front and strings from the
 * end, and string references are relative to the chunk's start. A chunk has the same bytes in memory and in the file.
 *
 * Nothing here uses Python; every function may run without the GIL. Only one thread at a time may use an st_load.
 */
#ifndef SHORTTAIL_LOAD_H
#define SHORTTAIL_LOAD_H

#include "row.h"

/* One column of a batch of rows: a key, the event time, or a feature. */
typedef struct {
    const uint8_t *values; /* contiguous values; for strings, their UTF-8 bytes */
    const void *offsets;   /* strings: start of each string in values, and the end of the last one; otherwise NULL */
    uint32_t offset_bytes; /* size of an offset: 4 or 8 */
    const uint8_t *nulls;  /* one byte per row, not 0 if null; NULL: no nulls. NaN in a float column is null as well */
} st_source;

/* The offset of string i in the values of a column of strings. */
static inline uint64_t st_source_offset(const st_source *s, size_t i)
{
    return s->offset_bytes == 8 ? st_load64((const uint8_t *)s->offsets + 8 * i)
                                : st_load32((const uint8_t *)s->offsets + 4 * i);
}

typedef struct st_chunk {
    struct st_chunk *next;
    uint8_t *data;    /* NULL: the chunk is in the file */
    uint64_t file_at; /* its offset there */
    size_t bytes;
    uint32_t n_rows;
    int own; /* 1: allocated by its own malloc, for a row that is longer than a normal chunk */
} st_chunk;

typedef struct {
    st_chunk *first, *last;
    uint8_t *row_end; /* in the last chunk: address of the next row */
    uint8_t *heap;    /* in the last chunk: start of its strings */
    uint64_t n_rows;
    uint64_t bytes; /* of all its chunks, in memory and in the file */
} st_partition;

typedef struct {
    const st_layout *layout;
    uint32_t bits;      /* there are 2^bits partitions ... */
    uint32_t skip_bits; /* ... by the hash bits after the first skip_bits, which are equal in all rows */
    size_t chunk_bytes;
    size_t memory_limit; /* st_load_add stops soon after memory_bytes exceeds it */
    size_t memory_bytes; /* of all chunks in memory */
    uint64_t n_rows;
    uint64_t heap_bytes; /* of all strings */
    uint64_t file_bytes;
    st_partition *partitions;
    uint8_t **slabs; /* large allocations that are divided into chunks */
    size_t n_slabs, slab_chunks, chunks_used;
    uint8_t *block; /* rows that are being assembled from columns */
    uint64_t *hashes;
    size_t block_rows;
} st_load;

enum { ST_LOAD_OK = 0, ST_LOAD_NO_MEMORY = -1, ST_LOAD_ROW_TOO_LONG = -2 }; /* a code above 0 is an errno */

/* Initialize an st_load. Returns ST_LOAD_OK or ST_LOAD_NO_MEMORY; call st_load_free() in either case. */
int st_load_init(st_load *load, const st_layout *layout, uint32_t bits, uint32_t skip_bits, size_t chunk_bytes,
                 size_t memory_limit);
void st_load_free(st_load *load);

/* The index of the first of n strings that is not valid UTF-8, is longer than length_max or does not lie within
 * n_values bytes; n if there is none. */
size_t st_source_check(const st_source *source, size_t n, size_t n_values, size_t length_max);

/* Add rows *at .. n - 1 of a batch. sources: keys, event time, features. Sets *at to the next row to add, which is less
 * than n if the memory limit was reached. Each call adds at least some rows. */
int st_load_add(st_load *load, const st_source *sources, size_t *at, size_t n);
/* Add one row after all rows of its partition. */
int st_load_put(st_load *load, const st_item *item);

/* Write all chunks in memory to the end of the file and release their memory. */
int st_load_spill(st_load *load, int fd);

/* The bytes that the chunks from .. to (exclusive; NULL: to the end) occupy in the file. */
size_t st_chunks_file_bytes(const st_chunk *from, const st_chunk *to);
/* Write the rows of these chunks to items, with their hashes, in the order in which they came. Chunks in the file are
 * read into buffer; the items point into the buffer or the chunks. */
int st_chunks_read(const st_load *load, const st_chunk *from, const st_chunk *to, int fd, uint8_t *buffer,
                   st_item *items);
/* Release the file's disk blocks of a partition, if the file system can. */
void st_partition_punch(const st_partition *partition, int fd);

#endif
