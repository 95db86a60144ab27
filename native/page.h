/* Pages of the feature tables: row layout, page images, and the batch lookup. docs/format.md describes the format.
 *
 * Nothing here calls LMDB or uses Python. Callers own all memory, except the rows that an st_overlay makes; every
 * function may run without the GIL.
 */
#ifndef SHORTTAIL_PAGE_H
#define SHORTTAIL_PAGE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tables are little-endian and read in place"
#endif

enum {
    ST_HEADER_BYTES = 8,
    ST_FOOTER_BYTES = 16, /* of every page; in format 3 the number of a commit comes before it */
    ST_COMMIT_BYTES = 8,
    ST_KEYS_MAX = 8,
    ST_TAG_ALIGN = 16,     /* tags are compared 16 at a time */
    ST_PAGE_BYTES = 4096,  /* an LMDB page */
    ST_PAGE_OVERHEAD = 16, /* LMDB's page header, at the start of the first overflow page of a value */
    ST_IMAGE_PAGES_MAX = 65535,
    ST_ROWS_MAX = 65520,   /* rows in a page image: the count has 16 bits */
};

/* The event time of a given row that has none, as in shorttail.store.table.UNTIMED: the merge makes its time. */
#define ST_UNTIMED INT64_MIN

/* Formats of pages: format 3 has the number of the commit that wrote the page. */
enum { ST_PAGE_FORMAT_OLDEST = 2, ST_PAGE_FORMAT = 3 };

/* Type codes, as in shorttail.define.dtypes. A blob is a string of any bytes, which lookups and scans do not read. */
enum {
    ST_BOOL = 1, ST_INT32, ST_INT64, ST_FLOAT32, ST_FLOAT64, ST_STRING, ST_TIMESTAMP, ST_VECTOR, ST_WIDE_VECTOR, ST_BLOB
};

/* Element types of output columns. */
enum { ST_OUT_FLOAT32, ST_OUT_FLOAT64, ST_OUT_INT64, ST_OUT_INT32, ST_OUT_BOOL, ST_OUT_OBJECT };

/* Status of a row or value, as in shorttail.results.Status. */
enum { ST_PRESENT = 0, ST_NULL = 1, ST_NOT_FOUND = 2, ST_STALE = 3 };

typedef struct {
    uint32_t code;   /* ST_BOOL .. ST_BLOB; a wide vector has doubles */
    uint32_t width;  /* elements */
    uint32_t offset; /* in the row */
    uint32_t bytes;
} st_field;

/* The layout of a row: keys (8 bytes each) | event time | null bitmap | features. Offsets are bytes from its start. */
typedef struct {
    uint64_t seed;   /* seed of the key hash */
    uint64_t second; /* second secret of the key hash, derived from seed */
    uint32_t n_keys; /* 0: all rows have the same key, so there is at most one */
    uint8_t key_is_string[ST_KEYS_MAX];
    uint32_t time_offset;
    uint32_t null_offset;
    uint32_t null_bytes;
    uint32_t row_bytes;
    uint32_t page_bytes;    /* size of a normal image: a multiple of 4096, minus 16 */
    uint32_t rows_per_page; /* most rows in such an image if they have no strings */
    uint32_t page_format;   /* of its pages: ST_PAGE_FORMAT_OLDEST .. ST_PAGE_FORMAT */
    uint32_t end_bytes;     /* of an image after its strings: the footer, and the number of the commit */
    uint32_t n_features;
    st_field *features;
    uint32_t n_strings;       /* columns of strings or blobs, keys first */
    uint32_t *string_offsets; /* offset of each string reference in the row */
} st_layout;

/* A row in memory with its hash. Its string references are relative to heap. */
typedef struct {
    uint64_t hash;
    const uint8_t *row;
    const uint8_t *heap;
} st_item;

/* One key column of a request. */
typedef struct {
    const uint8_t *data;
    const uint32_t *ends; /* strings: end of row i's bytes in data; NULL for int64 */
    const uint8_t *nulls; /* one byte per row; NULL if the column has no nulls */
} st_key_column;

typedef struct {
    uint8_t *data;
    size_t stride; /* bytes per row */
} st_output;

typedef struct {
    const uint8_t *data; /* NULL: no value */
    size_t length;
} st_string;

typedef void (*st_convert)(const uint8_t *from, uint8_t *to, uint32_t count);

/* Elements that are adjacent both in the row and in the output, copied by one memcpy or one conversion loop. */
typedef struct {
    st_convert convert; /* NULL: copy bytes */
    uint32_t row_offset;
    uint32_t output;
    uint32_t column_offset; /* bytes from the start of the output's row */
    uint32_t count;         /* elements */
    uint32_t bytes;         /* bytes written to the output */
    uint32_t fill_offset;   /* offset in st_plan.fill of the values for a row that is missing */
} st_run;

/* One feature that goes to one output. Used where the feature's own null bit matters. */
typedef struct {
    uint32_t null_byte; /* offset of its null bit's byte in the row */
    uint32_t null_bit;  /* mask within that byte */
    uint32_t row_offset;
    uint32_t output;
    uint32_t column_offset;
    uint32_t bytes; /* 0 for strings, which are returned as st_string */
    uint32_t fill_offset;
    uint32_t string_index; /* index of this op among the plan's string ops */
} st_op;

typedef struct {
    uint32_t null_offset; /* offset in the row of 8 bytes that end at or inside the null bitmap */
    uint64_t mask;        /* null bits of the features that are used */
} st_null_word;

/* The features that one lookup copies from a row. */
typedef struct {
    uint32_t n_runs, n_ops, n_null_words;
    st_run *runs;
    st_op *ops;
    st_null_word *null_words; /* a quick test of whether any used feature is null */
    uint8_t *fill;
} st_plan;

/* The lookup of a batch of n rows in one view. Arrays start at row 0 of the batch. */
typedef struct {
    const st_plan *plan;
    const st_layout *layout; /* layout of the present table: the plan's columns, but its own seed */
    const uint8_t *const *pages; /* the directory: addresses of 2^depth images; NULL if the table is empty */
    uint32_t depth;
    int64_t oldest_us; /* rows with an earlier event time are STALE */
    int64_t ttl_us;    /* of the view; 0: none */
    const int64_t *as_of; /* [n]: the moments at which rows of the batch are judged; negative: by oldest_us. Or NULL */
    st_key_column keys[ST_KEYS_MAX];
    const st_output *outputs;
    uint8_t *status;          /* [n] */
    uint8_t *feature_status;  /* [n_ops, n] or NULL */
    st_string *strings;       /* [n string ops, n] or NULL */
} st_view;

/* Compute all offsets and sizes. The caller has set n_keys, key_is_string, n_features, features[].code and .width, seed,
 * page_format and page_bytes (0: choose one), and string_offsets has room. Returns 0, or -1 if a row is too large. */
int st_layout_finish(st_layout *layout);

uint64_t st_hash_row(const st_layout *layout, const uint8_t *row, const uint8_t *heap);

/* The conversion from a type (ST_BOOL..) to an output type (ST_OUT_FLOAT32..); NULL if both have the same bytes. */
st_convert st_conversion(uint32_t from, uint32_t to);
uint32_t st_output_bytes(uint32_t to);

/* Look up n rows in all views. Writes every output and status. Writes strings only where there is a value: the caller
 * has set them to zero. */
void st_lookup(const st_view *views, size_t n_views, size_t n);

/* Counts the rows given that st_dedupe did not keep. Items may come from several pushes, in their order: a row that a
 * later push replaces was kept, and is not counted. */
typedef struct {
    const uint8_t *stored; /* a page: its rows were stored before, and are not counted; NULL: all rows are given */
    const uint8_t **pushes; /* the address of the first row of each push with rows, sorted; NULL: all are of one push */
    size_t n_pushes;
    const uint8_t **rows; /* NULL, or room for the rows that are counted: older ones at the front, others at the end */
    size_t n_rows;        /* the length of rows */
    uint64_t n_older;     /* the row that was kept has a later event time */
    uint64_t n_duplicate; /* it has the same event time, and was given later */
} st_lost;

typedef struct st_overlay st_overlay; /* see overlay.h */

/* Remove duplicates from sorted items: per key, keep the item with the latest event time, or the last of those. Returns
 * the number of items kept, or SIZE_MAX without memory, which only an overlay needs.
 *
 * overlay: NULL if all rows give all features. Otherwise the features that a kept row does not give are those of the
 * row that it replaces, and the item kept is a row that the overlay has made. A stored row gives all features.
 *
 * A given row of time ST_UNTIMED gets its time, in place: now_us, or 1 us more than the latest time of its key in the
 * store and in earlier pushes. So a clock that went back does not make a push older than what it replaces. now_us:
 * ST_UNTIMED if all rows have times. */
size_t st_dedupe(const st_layout *layout, st_item *items, size_t n, int64_t now_us, st_lost *lost, st_overlay *overlay);

uint32_t st_page_rows(const uint8_t *page);
uint32_t st_page_depth(const uint8_t *page);
uint32_t st_page_bytes(const uint8_t *page);
uint64_t st_page_commit(const st_layout *layout, const uint8_t *page); /* 0 for a page of format 2 */
uint32_t st_page_used_bytes(const st_layout *layout, const uint8_t *page); /* without the gap that rows could fill */
/* Write the items of a page with their hashes to out, which has room for st_page_rows(page) items. */
void st_page_items(const st_layout *layout, const uint8_t *page, st_item *out);
/* Sort by hash, stable. counts: scratch memory for st_sort_counts(n) elements, which may be 0. from is not changed. */
size_t st_sort_counts(size_t n);
void st_sort(const st_item *from, st_item *to, size_t n, size_t *counts);
/* Write the items of a whose keys are not in b to out; both are sorted. Returns the number of items written. */
size_t st_without(const st_layout *layout, const st_item *a, size_t n_a, const st_item *b, size_t n_b, st_item *out);

/* Splits the sorted items of a range of hashes, the bucket (key, depth), into buckets in the order of their keys. */
typedef struct {
    const st_layout *layout;
    const st_item *items;
    size_t n, next;
    uint64_t key, last; /* key of the next bucket; last hash of the range */
    uint32_t depth;
    uint32_t depth_min;  /* depth of the range */
    uint32_t depth_grow; /* from this depth on, a full bucket gets a longer image instead of a split */
    int done;
} st_splitter;

typedef struct {
    uint64_t key;
    uint32_t depth;
    size_t start, stop; /* its items */
    uint64_t bytes;     /* size of its image */
} st_bucket;

void st_splitter_init(st_splitter *s, const st_layout *layout, const st_item *items, size_t n, uint64_t key,
                      uint32_t depth, uint32_t depth_grow);
/* Return 1 and the next bucket, 0 at the end, or -1 if a bucket exceeds the limits of an image. */
int st_splitter_next(st_splitter *s, st_bucket *bucket);

/* The total length of a row's strings in bytes. */
uint64_t st_heap_bytes(const st_layout *layout, const st_item *item);

/* Write the image of a bucket. commit: its number, for a page of format 3. bytes: the size that st_splitter_next
 * computed. */
void st_build(const st_layout *layout, const st_item *items, size_t n, uint32_t depth, uint32_t table_id,
              uint64_t commit, uint8_t *image, uint32_t bytes);

/* Check that header and footer belong to an image of this size, layout and table (0: any table). Returns NULL, or what
 * is wrong. After this check, rows and tags are known to lie inside the image. */
const char *st_check_header(const st_layout *layout, const uint8_t *page, size_t bytes, uint32_t table_id);
/* Check the whole page: also its checksum, its string references, and that its rows belong to the bucket `key`. */
const char *st_check_page(const st_layout *layout, const uint8_t *page, size_t bytes, uint32_t table_id, uint64_t key);


#endif
