/* Reads the rows of a table into columns, a batch of rows at a time. Columns have the layout of Arrow: adjacent values,
 * a bit for each value that is not null, and strings as their bytes with the offsets between them.
 */
#ifndef SHORTTAIL_SCAN_H
#define SHORTTAIL_SCAN_H

#include "tree.h"

/* A column to read. The caller sets the first line; st_scan_gather() sets text_bytes, and the caller then the pointers
 * to memory of that size. */
typedef struct {
    uint32_t code, width, row_offset, null_byte, null_bit; /* null_bit 0: the column has no nulls; else as in st_op */
    size_t text_bytes; /* of the batch, of a string column */
    uint8_t *values;   /* n * width elements, a bool as a byte; of a string column text_bytes */
    int32_t *ends;     /* n + 1: string i is values[ends[i]] .. values[ends[i + 1] - 1] */
    uint8_t *valid;    /* a bit for each value, the lowest first: 1 if the value is not null */
    size_t n_nulls;
} st_scan_column;

typedef struct {
    const st_tree *tree;
    const st_layout *layout;
    uint32_t table_id, n_columns;
    st_scan_column *columns;
    uint64_t next; /* first hash of the next bucket */
    int done;
    const uint8_t **pages; /* of the batch; freed by st_scan_free() */
    size_t n_pages, pages_max, n_rows, n_bytes;
    const uint8_t *last, *mapped_from, *mapped_to; /* the page before; the part of the map that was read ahead */
    uint64_t all_pages, all_rows, all_bytes; /* of all batches so far; bytes of page images */
} st_scan;

/* Find and check the pages of the next batch: as many as have at most `rows` rows and `bytes` bytes, but at least one.
 * n_pages is 0 at the end of the table. Returns 0, or -1 with fault set (what NULL: no memory). */
int st_scan_gather(st_scan *s, size_t rows, size_t bytes, st_fault *fault);

/* The same for the one page of the bucket that a hash belongs to. The next batch begins after this bucket. */
int st_scan_gather_bucket(st_scan *s, uint64_t hash, st_fault *fault);

/* Write the columns of the batch. */
void st_scan_fill(st_scan *s);

void st_scan_free(st_scan *s);

#endif
