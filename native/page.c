#include "page.h"

#include "crc32c.h"
#include "overlay.h"
#include "row.h"

/* ---- layout and rows ------------------------------------------------------------------------------------------- */

static uint32_t field_bytes(const st_field *f)
{
    switch (f->code) {
    case ST_BOOL: return 1;
    case ST_INT32: case ST_FLOAT32: return 4;
    case ST_VECTOR: return 4 * f->width;
    case ST_WIDE_VECTOR: return 8 * f->width;
    default: return 8;
    }
}

/* The bytes of a page that hold neither tags nor rows nor strings. */
static uint64_t frame_bytes(const st_layout *l) { return ST_HEADER_BYTES + l->end_bytes; }

static uint64_t tag_bytes_for(uint64_t rows) { return (rows + ST_TAG_ALIGN - 1) / ST_TAG_ALIGN * ST_TAG_ALIGN; }

static uint64_t whole_pages(uint64_t bytes)
{
    uint64_t pages = (bytes + ST_PAGE_OVERHEAD + ST_PAGE_BYTES - 1) / ST_PAGE_BYTES;
    return pages * ST_PAGE_BYTES - ST_PAGE_OVERHEAD;
}

int st_layout_finish(st_layout *l)
{
    uint64_t at = 8u * l->n_keys;
    l->end_bytes = ST_FOOTER_BYTES + (l->page_format > 2 ? ST_COMMIT_BYTES : 0);
    l->n_strings = 0;
    for (uint32_t k = 0; k < l->n_keys; k++)
        if (l->key_is_string[k]) l->string_offsets[l->n_strings++] = 8 * k;
    l->time_offset = (uint32_t)at;
    l->null_offset = l->time_offset + 8;
    l->null_bytes = (l->n_features + 7) / 8;
    at = (uint64_t)l->null_offset + l->null_bytes;
    for (uint32_t f = 0; f < l->n_features; f++) {
        st_field *field = &l->features[f];
        field->offset = (uint32_t)at;
        field->bytes = field_bytes(field);
        if (st_is_string(field->code)) l->string_offsets[l->n_strings++] = field->offset;
        at += field->bytes;
        if (at > (64u << 20)) return -1;
    }
    l->row_bytes = (uint32_t)at;
    l->second = st_fold(l->seed ^ 0x2545f4914f6cdd1du, 0xd6e8feb86659fd93u) | 1;
    if (!l->page_bytes) l->page_bytes = (uint32_t)whole_pages(frame_bytes(l) + ST_TAG_ALIGN + 8 * at);
    uint64_t rows = (l->page_bytes - frame_bytes(l)) / (at + 1);
    while (rows && frame_bytes(l) + tag_bytes_for(rows) + rows * at > l->page_bytes) rows--;
    l->rows_per_page = (uint32_t)(rows < ST_ROWS_MAX ? rows : ST_ROWS_MAX);
    return rows ? 0 : -1;
}

uint64_t st_hash_row(const st_layout *l, const uint8_t *row, const uint8_t *heap)
{
    uint64_t h = l->seed;
    for (uint32_t k = 0; k < l->n_keys; k++) {
        const uint8_t *at = row + 8 * k;
        h = l->key_is_string[k] ? st_hash_string(l, h, heap + st_load32(at), st_load32(at + 4))
                                : st_hash_int(l, h, st_load64(at));
    }
    return st_hash_end(l, h);
}

static int same_key(const st_layout *l, const st_item *a, const st_item *b)
{
    for (uint32_t k = 0; k < l->n_keys; k++) {
        const uint8_t *x = a->row + 8 * k, *y = b->row + 8 * k;
        if (!l->key_is_string[k]) {
            if (st_load64(x) != st_load64(y)) return 0;
        } else {
            uint32_t length = st_load32(x + 4);
            if (length != st_load32(y + 4) || memcmp(a->heap + st_load32(x), b->heap + st_load32(y), length)) return 0;
        }
    }
    return 1;
}

uint64_t st_heap_bytes(const st_layout *l, const st_item *item)
{
    uint64_t bytes = 0;
    for (uint32_t s = 0; s < l->n_strings; s++) bytes += st_load32(item->row + l->string_offsets[s] + 4);
    return bytes;
}

/* ---- sorted items ---------------------------------------------------------------------------------------------- */

static int64_t event_time(const st_layout *l, const st_item *item)
{
    return (int64_t)st_load64(item->row + l->time_offset);
}

static int is_stored(const st_lost *lost, const st_item *item) { return lost->stored && item->heap == lost->stored; }

/* Write the event time of a given row that has none. before_us: the latest time of its key that came before its push. */
static void make_time(const st_layout *l, const st_item *item, int64_t now_us, int64_t before_us, const st_lost *lost)
{
    if (now_us == ST_UNTIMED || is_stored(lost, item) || event_time(l, item) != ST_UNTIMED) return;
    int64_t after_us = before_us < INT64_MAX ? before_us + 1 : INT64_MAX;
    st_store64((uint8_t *)item->row + l->time_offset, (uint64_t)(after_us > now_us ? after_us : now_us));
}

/* The push that gave an item: 0 .. n_pushes, or SIZE_MAX for a stored row. */
static size_t push_of(const st_lost *lost, const st_item *item)
{
    if (is_stored(lost, item)) return SIZE_MAX;
    size_t low = 0, high = lost->n_pushes;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (lost->pushes[middle] <= item->row) low = middle + 1; else high = middle;
    }
    return low;
}

/* Count the items start .. stop - 1 with the key of items[start], all of one push, that lost against the winner. */
static void count_lost(const st_layout *l, const st_item *items, size_t start, size_t stop, size_t winner, st_lost *lost)
{
    if (push_of(lost, &items[start]) == SIZE_MAX) return;
    for (size_t i = start; i < stop; i++) {
        if (i == winner || !same_key(l, &items[start], &items[i])) continue;
        int older = event_time(l, &items[i]) < event_time(l, &items[winner]);
        if (lost->rows) lost->rows[older ? lost->n_older : lost->n_rows - 1 - lost->n_duplicate] = items[i].row;
        if (older) lost->n_older++; else lost->n_duplicate++;
    }
}

/* Lay each item with the key of items[start], up to the winner, over those before it that it replaces. All have times,
 * and only items[start] may be a stored row. Returns 0 with the row that this makes, or -1 without memory. */
static int overlay_items(const st_layout *l, const st_item *items, size_t start, size_t winner, const st_lost *lost,
                         st_overlay *overlay, st_item *made)
{
    const st_item *last = &items[start];
    st_overlay_start(overlay, l, last);
    for (const st_item *item = last + 1; item <= &items[winner]; item++) {
        if (event_time(l, item) < event_time(l, last) || !same_key(l, last, item)) continue;
        last = item;
        st_overlay_take(overlay, l, item, overlay->given[push_of(lost, item) - 1]);
    }
    return st_overlay_end(overlay, l, last, made);
}

/* Of the items start .. stop - 1, which have one hash, put the winner among those with the key of items[start] first,
 * and the items with other keys after it, in their order. Returns the new stop, or SIZE_MAX without memory. */
static size_t keep_one(const st_layout *l, st_item *items, size_t start, size_t stop, int64_t now_us, st_lost *lost,
                       st_overlay *overlay)
{
    size_t winner = start, first = start, left = start + 1; /* first: the first item of the present push */
    int64_t before_us = INT64_MIN;                          /* the latest time before the present push */
    size_t push = push_of(lost, &items[start]);
    for (size_t i = start + 1; i < stop; i++) {
        if (!same_key(l, &items[start], &items[i])) continue;
        size_t next = push_of(lost, &items[i]);
        if (next != push) {
            count_lost(l, items, first, i, winner, lost);
            push = next;
            first = i;
            before_us = event_time(l, &items[winner]);
        }
        make_time(l, &items[i], now_us, before_us, lost);
        if (event_time(l, &items[i]) >= event_time(l, &items[winner])) winner = i;
    }
    count_lost(l, items, first, stop, winner, lost);
    st_item kept = items[winner];
    if (overlay && overlay_items(l, items, start, winner, lost, overlay, &kept)) return SIZE_MAX;
    for (size_t i = start + 1; i < stop; i++)
        if (!same_key(l, &kept, &items[i])) items[left++] = items[i];
    items[start] = kept;
    return left;
}

size_t st_dedupe(const st_layout *l, st_item *items, size_t n, int64_t now_us, st_lost *lost, st_overlay *overlay)
{
    size_t kept = 0;
    for (size_t start = 0, next; start < n; start = next) {
        for (next = start + 1; next < n && items[next].hash == items[start].hash;) next++;
        for (size_t stop = next; start < stop; start++) {
            make_time(l, &items[start], now_us, INT64_MIN, lost);
            if (stop - start > 1 && (stop = keep_one(l, items, start, stop, now_us, lost, overlay)) == SIZE_MAX)
                return SIZE_MAX;
            items[kept++] = items[start];
        }
    }
    return kept;
}

size_t st_without(const st_layout *l, const st_item *a, size_t n_a, const st_item *b, size_t n_b, st_item *out)
{
    size_t kept = 0, at = 0;
    for (size_t i = 0; i < n_a; i++) {
        while (at < n_b && b[at].hash < a[i].hash) at++;
        size_t j = at;
        while (j < n_b && b[j].hash == a[i].hash && !same_key(l, &a[i], &b[j])) j++;
        if (j == n_b || b[j].hash != a[i].hash) out[kept++] = a[i];
    }
    return kept;
}

/* The number of hash bits for the first pass (counting sort), so that groups of about 8 items remain for the second. */
static unsigned sort_bits(size_t n)
{
    unsigned bits = n < 32 ? 0 : 60 - (unsigned)__builtin_clzll(n);
    return bits < 20 ? bits : 20;
}

size_t st_sort_counts(size_t n) { return sort_bits(n) ? (size_t)1 << sort_bits(n) : 0; }

void st_sort(const st_item *from, st_item *to, size_t n, size_t *counts)
{
    unsigned shift = 64 - sort_bits(n), skip = 0;
    size_t n_counts = st_sort_counts(n);
    if (n_counts) {
        uint64_t differ = 1; /* bits in which hashes differ; the counting sort starts at the highest of them */
        for (size_t i = 1; i < n; i++) differ |= from[i].hash ^ from[0].hash;
        skip = (unsigned)__builtin_clzll(differ);
        memset(counts, 0, n_counts * sizeof *counts);
        for (size_t i = 0; i < n; i++) counts[from[i].hash << skip >> shift]++;
        for (size_t c = 0, sum = 0; c < n_counts; c++) {
            size_t count = counts[c];
            counts[c] = sum;
            sum += count;
        }
        for (size_t i = 0; i < n; i++) to[counts[from[i].hash << skip >> shift]++] = from[i];
    } else if (n) {
        memcpy(to, from, n * sizeof *to);
    }
    for (size_t i = 1; i < n; i++) { /* insertion sort: items are nearly sorted, so each moves only a little */
        st_item item = to[i];
        size_t j = i;
        for (; j && to[j - 1].hash > item.hash; j--) to[j] = to[j - 1];
        to[j] = item;
    }
}

uint32_t st_page_rows(const uint8_t *page) { return st_rows(page); }
uint32_t st_page_depth(const uint8_t *page) { return st_depth(page); }
uint32_t st_page_bytes(const uint8_t *page) { return st_image_bytes(page); }
uint64_t st_page_commit(const st_layout *l, const uint8_t *page)
{
    return l->page_format > 2 ? st_load64(st_footer(page) - ST_COMMIT_BYTES) : 0;
}

uint32_t st_page_used_bytes(const st_layout *l, const uint8_t *page)
{
    uint32_t rows_end = ST_HEADER_BYTES + st_tag_bytes(page) + st_rows(page) * l->row_bytes;
    return st_image_bytes(page) - (st_load32(st_footer(page) + 8) - rows_end);
}

void st_page_items(const st_layout *l, const uint8_t *page, st_item *out)
{
    uint32_t n = st_rows(page);
    for (uint32_t i = 0; i < n; i++) {
        out[i].row = st_row(l, page, i);
        out[i].heap = page;
        out[i].hash = st_hash_row(l, out[i].row, page);
    }
}

/* ---- buckets --------------------------------------------------------------------------------------------------- */

/* The last hash of the bucket (key, depth). */
static uint64_t last_of(uint64_t key, uint32_t depth) { return depth ? key | (UINT64_MAX >> depth) : UINT64_MAX; }

void st_splitter_init(st_splitter *s, const st_layout *l, const st_item *items, size_t n, uint64_t key,
                      uint32_t depth, uint32_t depth_grow)
{
    *s = (st_splitter){.layout = l, .items = items, .n = n, .key = key, .last = last_of(key, depth), .depth = depth,
                       .depth_min = depth, .depth_grow = depth_grow};
}

/* The first item at or after start whose hash is greater than last. */
static size_t stop_of(const st_splitter *s, size_t start, uint64_t last)
{
    size_t low = start, high = s->n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (s->items[middle].hash <= last) low = middle + 1; else high = middle;
    }
    return low;
}

/* The image size for these items if they fit in a normal page, otherwise 0. */
static uint64_t bytes_if_one_page(const st_splitter *s, size_t start, size_t stop)
{
    const st_layout *l = s->layout;
    size_t rows = stop - start;
    if (rows > l->rows_per_page) return 0;
    if (l->n_strings) {
        uint64_t bytes = frame_bytes(l) + tag_bytes_for(rows) + (uint64_t)rows * l->row_bytes;
        for (size_t i = start; i < stop; i++) bytes += st_heap_bytes(l, &s->items[i]);
        if (bytes > l->page_bytes) return 0;
    }
    return l->page_bytes;
}

static uint64_t bytes_grown(const st_splitter *s, size_t start, size_t stop)
{
    uint64_t bytes = frame_bytes(s->layout) + tag_bytes_for(stop - start) + (uint64_t)(stop - start) * s->layout->row_bytes;
    for (size_t i = start; i < stop; i++) bytes += st_heap_bytes(s->layout, &s->items[i]);
    return whole_pages(bytes);
}

int st_splitter_next(st_splitter *s, st_bucket *bucket)
{
    if (s->done) return 0;
    size_t start = s->next, stop;
    uint64_t bytes;
    for (;;) {
        stop = stop_of(s, start, last_of(s->key, s->depth));
        bytes = bytes_if_one_page(s, start, stop);
        if (bytes) break;
        /* Splitting does not help a single long row, or rows whose hashes share this many bits. It would only double
         * the directory of every reader. */
        if (stop - start == 1 || s->depth >= s->depth_grow || s->depth >= 60) {
            bytes = bytes_grown(s, start, stop);
            if (stop - start > ST_ROWS_MAX || bytes > (uint64_t)ST_IMAGE_PAGES_MAX * ST_PAGE_BYTES) return -1;
            break;
        }
        s->depth++;
    }
    *bucket = (st_bucket){.key = s->key, .depth = s->depth, .start = start, .stop = stop, .bytes = bytes};
    s->next = stop;
    uint64_t last = last_of(s->key, s->depth);
    if (last == s->last) {
        s->done = 1;
    } else { /* the right sibling of this bucket, or of its nearest ancestor that is a left child */
        s->key = last + 1;
        s->depth = 64 - (uint32_t)__builtin_ctzll(s->key);
    }
    return 1;
}

void st_build(const st_layout *l, const st_item *items, size_t n, uint32_t depth, uint32_t table_id, uint64_t commit,
              uint8_t *image, uint32_t bytes)
{
    uint32_t tags = (uint32_t)tag_bytes_for(n > l->rows_per_page ? n : l->rows_per_page);
    /* Only a normal page without strings has space for the tags of a full page; other pages get just what they need. */
    if (l->n_strings || bytes != l->page_bytes) tags = (uint32_t)tag_bytes_for(n);
    memset(image, 0, bytes);
    uint8_t *row = image + ST_HEADER_BYTES + tags;
    uint32_t heap = bytes - l->end_bytes;
    for (size_t i = 0; i < n; i++, row += l->row_bytes) {
        image[ST_HEADER_BYTES + i] = st_tag(items[i].hash);
        memcpy(row, items[i].row, l->row_bytes);
        for (uint32_t s = 0; s < l->n_strings; s++) {
            uint8_t *reference = row + l->string_offsets[s];
            uint32_t length = st_load32(reference + 4);
            const uint8_t *from = items[i].heap + st_load32(reference);
            heap -= length;
            if (length) memcpy(image + heap, from, length);
            st_store32(reference, heap);
        }
    }
    st_store16(image, (uint16_t)n);
    st_store16(image + 2, (uint16_t)tags);
    image[4] = (uint8_t)depth;
    image[5] = st_format_byte(l);
    st_store16(image + 6, (uint16_t)((bytes + ST_PAGE_OVERHEAD) / ST_PAGE_BYTES));
    uint8_t *footer = image + bytes - ST_FOOTER_BYTES;
    if (l->page_format > 2) st_store64(footer - ST_COMMIT_BYTES, commit);
    st_store32(footer, table_id);
    st_store32(footer + 4, l->row_bytes);
    st_store32(footer + 8, heap);
    st_store32(footer + 12, st_crc32c(image, bytes - 4));
}

/* ---- checks ---------------------------------------------------------------------------------------------------- */

const char *st_check_header(const st_layout *l, const uint8_t *page, size_t bytes, uint32_t table_id)
{
    if (bytes < frame_bytes(l) || st_image_bytes(page) != bytes) return "its length is not the one in its header";
    if (page[5] != st_format_byte(l)) return "it has another page format";
    const uint8_t *footer = st_footer(page);
    if (table_id && st_load32(footer) != table_id) return "it belongs to another table";
    if (st_load32(footer + 4) != l->row_bytes) return "its rows have another layout";
    uint64_t n = st_rows(page), tags = st_tag_bytes(page), heap = st_load32(footer + 8);
    if (tags % ST_TAG_ALIGN || n > tags) return "it has more rows than tags";
    if (ST_HEADER_BYTES + tags + n * l->row_bytes > heap || heap > bytes - l->end_bytes) return "its rows do not fit";
    if (st_depth(page) > 60) return "its depth is too large";
    return NULL;
}

const char *st_check_page(const st_layout *l, const uint8_t *page, size_t bytes, uint32_t table_id, uint64_t key)
{
    const char *wrong = st_check_header(l, page, bytes, table_id);
    if (wrong) return wrong;
    if (st_load32(page + bytes - 4) != st_crc32c(page, bytes - 4)) return "its checksum is wrong";
    uint32_t n = st_rows(page);
    uint64_t heap = st_load32(st_footer(page) + 8), last = last_of(key, st_depth(page));
    if (key & (UINT64_MAX >> st_depth(page))) return "its key does not start a bucket of its depth";
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *row = st_row(l, page, i);
        for (uint32_t s = 0; s < l->n_strings; s++) {
            uint64_t at = st_load32(row + l->string_offsets[s]), length = st_load32(row + l->string_offsets[s] + 4);
            if (at < heap || at + length > bytes - l->end_bytes) return "a string lies outside its heap";
        }
        uint64_t hash = st_hash_row(l, row, page);
        if (hash < key || hash > last) return "a row lies in the wrong bucket";
        if (page[ST_HEADER_BYTES + i] != st_tag(hash)) return "a tag does not match its row";
    }
    return NULL;
}
