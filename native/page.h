/* Pages of the feature tables: row layout, page images, and the batch lookup. The format is in docs/format.md.
 *
 * Nothing here allocates, calls LMDB or touches Python: callers own all memory, and everything may run without the GIL.
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
    ST_FOOTER_BYTES = 16,
    ST_KEYS_MAX = 8,
    ST_TAG_ALIGN = 16,     /* tags are compared 16 at a time */
    ST_PAGE_BYTES = 4096,  /* of LMDB ... */
    ST_PAGE_OVERHEAD = 16, /* ... of which its own header takes so many once in an overflow value */
    ST_IMAGE_PAGES_MAX = 65535,
    ST_ROWS_MAX = 65520,   /* rows of a page: they are counted in 16 bits */
};

/* Codes of shorttail.dtypes. */
enum { ST_BOOL = 1, ST_INT32, ST_INT64, ST_FLOAT32, ST_FLOAT64, ST_STRING, ST_TIMESTAMP, ST_VECTOR };

/* Element types of output columns. */
enum { ST_OUT_FLOAT32, ST_OUT_FLOAT64, ST_OUT_INT64, ST_OUT_INT32, ST_OUT_BOOL, ST_OUT_OBJECT };

/* shorttail.results.Status */
enum { ST_PRESENT = 0, ST_NULL = 1, ST_NOT_FOUND = 2, ST_STALE = 3 };

typedef struct {
    uint32_t code;   /* ST_BOOL .. ST_VECTOR */
    uint32_t width;  /* elements */
    uint32_t offset; /* in the row */
    uint32_t bytes;
} st_field;

/* Where everything lies in a row: keys (8 bytes each) | event time | null bitmap | features. */
typedef struct {
    uint64_t seed;   /* of the key hash; second is derived from it */
    uint64_t second;
    uint32_t n_keys;
    uint8_t key_is_string[ST_KEYS_MAX];
    uint32_t time_offset;
    uint32_t null_offset;
    uint32_t null_bytes;
    uint32_t row_bytes;
    uint32_t page_bytes;    /* of an image, a multiple of 4096 less 16 */
    uint32_t rows_per_page; /* most rows of such an image, strings aside */
    uint32_t n_features;
    st_field *features;
    uint32_t n_strings; /* string references in a row, keys first */
    uint32_t *string_offsets;
} st_layout;

/* A row somewhere in memory; its string references are relative to heap. */
typedef struct {
    uint64_t hash;
    const uint8_t *row;
    const uint8_t *heap;
} st_item;

/* One key column of a request. */
typedef struct {
    const uint8_t *data;
    const uint32_t *ends; /* strings: end of row i in data; NULL for int64 */
    const uint8_t *nulls; /* NULL when the column has none */
} st_key_column;

typedef struct {
    uint8_t *data;
    size_t stride; /* bytes a row */
} st_output;

typedef struct {
    const uint8_t *data; /* NULL: no value */
    size_t length;
} st_string;

typedef void (*st_convert)(const uint8_t *from, uint8_t *to, uint32_t count);

/* Elements that are adjacent in the row and in the output: one memcpy or one conversion loop. */
typedef struct {
    st_convert convert; /* NULL: copy bytes */
    uint32_t row_offset;
    uint32_t output;
    uint32_t column_offset; /* bytes from the start of the output's row */
    uint32_t count;         /* elements */
    uint32_t bytes;         /* written */
    uint32_t fill_offset;   /* in st_plan.fill: what a row without a value gets */
} st_run;

/* One feature into one output, for what depends on the feature's own null bit. */
typedef struct {
    uint32_t null_byte; /* in the row */
    uint32_t null_bit;
    uint32_t row_offset;
    uint32_t output;
    uint32_t column_offset;
    uint32_t bytes; /* 0 for strings, which are handed back as st_string */
    uint32_t fill_offset;
    uint32_t string_index; /* of this op among the plan's string ops */
} st_op;

typedef struct {
    uint32_t null_offset; /* in the row, of 8 bytes that end with or within the null bitmap */
    uint64_t mask;
} st_null_word;

/* What one lookup copies from a row. */
typedef struct {
    uint32_t n_runs, n_ops, n_null_words;
    st_run *runs;
    st_op *ops;
    st_null_word *null_words; /* bits of all features used */
    uint8_t *fill;
} st_plan;

/* One view of a batch. Arrays of n rows start at row 0 of the batch. */
typedef struct {
    const st_plan *plan;
    const st_layout *layout; /* the table's: it has the plan's columns, but a seed of its own */
    const uint8_t *const *pages; /* directory: 2^depth images; NULL when the table is empty */
    uint32_t depth;
    int64_t oldest_us; /* event times before it are STALE */
    st_key_column keys[ST_KEYS_MAX];
    const st_output *outputs;
    uint8_t *status;          /* [n] */
    uint8_t *feature_status;  /* [n_ops, n] or NULL */
    st_string *strings;       /* [n string ops, n] or NULL */
} st_view;

/* Choose offsets and sizes: n_keys, key_is_string, n_features, features[].code/.width, seed and page_bytes (0: choose)
 * are set by the caller, and string_offsets has room. Returns 0, or -1: a row is too large. */
int st_layout_finish(st_layout *layout);

uint64_t st_hash_row(const st_layout *layout, const uint8_t *row, const uint8_t *heap);

/* The value at table[from][to], NULL for equal representations. from: ST_BOOL.., to: ST_OUT_FLOAT32.. */
st_convert st_conversion(uint32_t from, uint32_t to);
uint32_t st_output_bytes(uint32_t to);

/* Look n rows up in all views. Outputs and statuses are written in full; strings, zero before, where there is a value. */
void st_lookup(const st_view *views, size_t n_views, size_t n);

/* Sorted items: keep one for each key, that of the latest event time (the later item where equal). Returns how many. */
size_t st_dedupe(const st_layout *layout, st_item *items, size_t n);

/* The items of a page with their hashes; out has room for st_page_rows. */
uint32_t st_page_rows(const uint8_t *page);
uint32_t st_page_depth(const uint8_t *page);
uint32_t st_page_bytes(const uint8_t *page);
uint32_t st_page_used_bytes(const st_layout *layout, const uint8_t *page); /* all but the gap that rows could fill */
void st_page_items(const st_layout *layout, const uint8_t *page, st_item *out);
/* Sort by hash, equal ones in their order. counts: room for st_sort_counts(n), which may be 0. from is left as it is. */
size_t st_sort_counts(size_t n);
void st_sort(const st_item *from, st_item *to, size_t n, size_t *counts);
/* The items of a (sorted) that have no equal key in b (sorted) go to out. Returns how many. */
size_t st_without(const st_layout *layout, const st_item *a, size_t n_a, const st_item *b, size_t n_b, st_item *out);

/* Walks sorted items of the bucket (key, depth) as the buckets they will lie in, in order of their keys. */
typedef struct {
    const st_layout *layout;
    const st_item *items;
    size_t n, next;
    uint64_t key, last; /* last hash of the range */
    uint32_t depth;
    uint32_t depth_min;  /* of the range itself */
    uint32_t depth_grow; /* from here on a bucket gets more pages instead of being split */
    int done;
} st_splitter;

typedef struct {
    uint64_t key;
    uint32_t depth;
    size_t start, stop; /* items */
    uint64_t bytes;     /* of the image */
} st_bucket;

void st_splitter_init(st_splitter *s, const st_layout *layout, const st_item *items, size_t n, uint64_t key,
                      uint32_t depth, uint32_t depth_grow);
/* 1 and the next bucket, 0 at the end, -1 when a bucket would pass the limits of an image. */
int st_splitter_next(st_splitter *s, st_bucket *bucket);

/* Bytes of strings that a row refers to. */
uint64_t st_heap_bytes(const st_layout *layout, const st_item *item);

/* Write the image of a bucket: bytes as st_splitter_next gave them. */
void st_build(const st_layout *layout, const st_item *items, size_t n, uint32_t depth, uint32_t table_id,
              uint8_t *image, uint32_t bytes);

/* NULL when the header is that of a page of this layout and table (0: any) that is bytes long, or what is wrong. After
 * this, rows and tags lie inside the image. */
const char *st_check_header(const st_layout *layout, const uint8_t *page, size_t bytes, uint32_t table_id);
/* The same for everything: checksum, string references, and that rows belong to the bucket of that key. */
const char *st_check_page(const st_layout *layout, const uint8_t *page, size_t bytes, uint32_t table_id, uint64_t key);


#endif
