/* See scan.h. */
#include "scan.h"

#include <stdlib.h>
#include <string.h>

#include "row.h"

enum { AHEAD_BYTES = 1 << 20, NEAR_BYTES = 64 << 10 };
static const size_t BATCH_BYTES_MAX = (size_t)1 << 30; /* with one more image, offsets still fit 32 bits */

static int fail(st_fault *fault, const char *what, uint64_t key)
{
    *fault = (st_fault){.what = what, .key = key};
    return -1;
}

/* Add the lengths of a page's strings to the string columns. Returns NULL, or what is wrong: st_build() stores each
 * string by itself, so those of a column are shorter than the page. */
static const char *add_text(st_scan *s, const uint8_t *page)
{
    for (uint32_t c = 0; c < s->n_columns; c++) {
        st_scan_column *column = &s->columns[c];
        if (column->code != ST_STRING) continue;
        const uint8_t *at = st_row(s->layout, page, 0) + column->row_offset + 4;
        uint64_t bytes = 0;
        for (uint32_t i = 0, n = st_rows(page); i < n; i++, at += s->layout->row_bytes) bytes += st_load32(at);
        if (bytes > st_image_bytes(page)) return "its strings overlap";
        column->text_bytes += bytes;
    }
    return NULL;
}

/* Check a page and take it into the batch. */
static int take(st_scan *s, uint64_t key, const uint8_t *page, uint64_t bytes, st_fault *fault)
{
    const char *wrong = st_check_page(s->layout, page, bytes, s->table_id, key);
    if (!wrong) wrong = add_text(s, page);
    if (wrong) return fail(fault, wrong, key);
    if (s->n_pages == s->pages_max) {
        size_t room = s->pages_max ? 2 * s->pages_max : 256;
        const uint8_t **pages = realloc((void *)s->pages, room * sizeof *pages);
        if (!pages) return fail(fault, NULL, key);
        s->pages = pages;
        s->pages_max = room;
    }
    s->pages[s->n_pages++] = page;
    s->n_rows += st_rows(page);
    s->n_bytes += bytes;
    s->all_pages++;
    s->all_rows += st_rows(page);
    s->all_bytes += bytes;
    s->next = key + (((uint64_t)1 << (63 - st_depth(page))) << 1); /* 2^64, for depth 0, is 0 */
    s->done = s->next == 0;
    return 0;
}

static void begin(st_scan *s)
{
    s->n_pages = s->n_rows = s->n_bytes = 0;
    for (uint32_t c = 0; c < s->n_columns; c++) s->columns[c].text_bytes = 0;
}

/* Read a part of the map from `page` on if pages follow each other there, as they do after a bulk load: LMDB tells the
 * system that access is random, so every page would be read from disk by itself. */
static void read_ahead(st_scan *s, const uint8_t *page)
{
    const uint8_t *start = page - ST_PAGE_OVERHEAD, *end = s->tree->base + s->tree->n_mapped * ST_PAGE_BYTES;
    int follows = s->last && start > s->last && start - s->last <= NEAR_BYTES;
    s->last = start;
    if (!follows || (start >= s->mapped_from && start < s->mapped_to)) return;
    size_t bytes = (size_t)(end - start) < AHEAD_BYTES ? (size_t)(end - start) : AHEAD_BYTES;
    st_populate(start, bytes);
    s->mapped_from = start;
    s->mapped_to = start + bytes;
}

/* Find the bucket that a hash belongs to. Returns 1; 0 if the table is empty; -1 with fault set. */
static int find(st_scan *s, uint64_t hash, uint64_t *key, const uint8_t **page, uint64_t *bytes, st_fault *fault)
{
    int found = st_tree_bucket(s->tree, s->table_id, hash, key, page, bytes);
    if (!found && st_tree_bucket(s->tree, s->table_id, UINT64_MAX, key, page, bytes))
        return fail(fault, "it is missing", hash); /* only an empty table has no bucket before a hash */
    if (found > 0) read_ahead(s, *page);
    return found < 0 ? fail(fault, "LMDB's tree is damaged", hash) : found;
}

int st_scan_gather(st_scan *s, size_t rows, size_t bytes, st_fault *fault)
{
    uint64_t key, image_bytes;
    const uint8_t *page;
    if (bytes > BATCH_BYTES_MAX) bytes = BATCH_BYTES_MAX;
    begin(s);
    while (!s->done) {
        int found = find(s, s->next, &key, &page, &image_bytes, fault);
        if (found < 0) return -1;
        if (!found) s->done = 1;
        else if (key != s->next) return fail(fault, "it is missing", s->next);
        /* The page is not checked yet: its number of rows may be any. */
        else if (s->n_pages && (s->n_rows + st_rows(page) > rows || s->n_bytes + image_bytes > bytes)) break;
        else if (take(s, key, page, image_bytes, fault)) return -1;
    }
    return 0;
}

int st_scan_gather_bucket(st_scan *s, uint64_t hash, st_fault *fault)
{
    uint64_t key, image_bytes;
    const uint8_t *page;
    begin(s);
    int found = find(s, hash, &key, &page, &image_bytes, fault);
    return found > 0 ? take(s, key, page, image_bytes, fault) : found;
}

/* ---- columns --------------------------------------------------------------------------------------------------- */

/* Copy `n` elements of a fixed size. `bytes` is a constant where this is called, so memcpy becomes a load and a store. */
static inline void copy(uint8_t *to, const uint8_t *from, size_t stride, uint32_t n, size_t bytes)
{
    for (uint32_t i = 0; i < n; i++, from += stride, to += bytes) memcpy(to, from, bytes);
}

static void copy_bools(uint8_t *to, const uint8_t *from, size_t stride, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++, from += stride) to[i] = *from != 0;
}

/* Copy strings; first: index in the batch of the page's first row. */
static void copy_texts(st_scan_column *c, const uint8_t *page, const uint8_t *from, size_t stride, uint32_t n, size_t first)
{
    int32_t end = c->ends[first];
    for (uint32_t i = 0; i < n; i++, from += stride) {
        uint32_t length = st_load32(from + 4);
        if (length) memcpy(c->values + end, page + st_load32(from), length);
        end += (int32_t)length;
        c->ends[first + i + 1] = end;
    }
}

static void mark_nulls(st_scan_column *c, const uint8_t *row, size_t stride, uint32_t n, size_t first)
{
    row += c->null_byte;
    for (size_t i = first; i < first + n; i++, row += stride) {
        if (!(*row & c->null_bit)) continue;
        c->valid[i / 8] &= (uint8_t)~(1u << (i % 8));
        c->n_nulls++;
    }
}

static void fill_page(const st_layout *l, st_scan_column *c, const uint8_t *page, size_t first)
{
    const uint8_t *rows = st_row(l, page, 0), *from = rows + c->row_offset;
    uint32_t n = st_rows(page);
    switch (c->code) {
    case ST_STRING: copy_texts(c, page, from, l->row_bytes, n, first); break;
    case ST_BOOL: copy_bools(c->values + first, from, l->row_bytes, n); break;
    case ST_INT32: case ST_FLOAT32: copy(c->values + 4 * first, from, l->row_bytes, n, 4); break;
    case ST_VECTOR: copy(c->values + 4 * c->width * first, from, l->row_bytes, n, 4 * (size_t)c->width); break;
    case ST_WIDE_VECTOR: copy(c->values + 8 * c->width * first, from, l->row_bytes, n, 8 * (size_t)c->width); break;
    default: copy(c->values + 8 * first, from, l->row_bytes, n, 8);
    }
    if (c->null_bit) mark_nulls(c, rows, l->row_bytes, n, first);
}

void st_scan_fill(st_scan *s)
{
    for (uint32_t c = 0; c < s->n_columns; c++) {
        st_scan_column *column = &s->columns[c];
        column->n_nulls = 0;
        if (column->null_bit) memset(column->valid, 0xff, (s->n_rows + 7) / 8);
        if (column->code == ST_STRING) column->ends[0] = 0;
    }
    size_t first = 0;
    for (size_t p = 0; p < s->n_pages; p++) {
        for (uint32_t c = 0; c < s->n_columns; c++) fill_page(s->layout, &s->columns[c], s->pages[p], first);
        first += st_rows(s->pages[p]);
    }
}

void st_scan_free(st_scan *s)
{
    free((void *)s->pages);
    s->pages = NULL;
    s->pages_max = 0;
}
