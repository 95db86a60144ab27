/* The batch lookup.
 *
 * The lookup of one key is a chain of dependent cache misses: directory entry, page header with tags, row. For a
 * single key their latencies add up. For many keys they overlap, if the first load of every key is prefetched before
 * the second load of any key. So groups of rows pass through a pipeline of short loops. Each loop prefetches what the
 * next loop reads, and each group is one loop ahead of the group after it: while rows of one group are copied, pages
 * and tags of the following groups are being fetched. Each loop handles all views of the batch, so a batch of one row
 * with four views overlaps as well. Source: group prefetching and software-pipelined prefetching in Chen, Ailamaki,
 * Gibbons, Mowry, "Improving hash join performance through prefetching", ICDE 2004.
 */
#include "row.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum {
    GROUP = 6, /* lookups per loop, measured: with 5 cache lines each they fill a core's miss buffers */
    LINE = 64,
    ROW_LINES = 8, /* of longer rows, only the first lines: the hardware prefetches sequential reads by itself */
    VIEWS_MAX = 64,
    SLOTS = VIEWS_MAX + GROUP,
};

typedef struct {
    uint64_t hash[SLOTS];
    const uint8_t *page[SLOTS]; /* NULL: the key was not found */
    uint32_t candidate[SLOTS];  /* a row with the key's tag */
} slots;

/* ---- values ---------------------------------------------------------------------------------------------------- */

/* Conversions never trap and give the same result on every machine: values out of range saturate, NaN becomes 0. */
static inline int64_t int64_of(double v)
{
    if (!(v == v)) return 0;
    if (v >= 9223372036854775808.0) return INT64_MAX;
    return v < -9223372036854775808.0 ? INT64_MIN : (int64_t)v;
}
static inline int32_t int32_of_int(int64_t v) { return v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : (int32_t)v; }
static inline int32_t int32_of(double v) { return int32_of_int(int64_of(v)); }

#define CONVERT(NAME, FROM, TO, VALUE)                                                \
    static void NAME(const uint8_t *from, uint8_t *to, uint32_t count)                \
    {                                                                                 \
        for (uint32_t i = 0; i < count; i++) {                                        \
            FROM x;                                                                   \
            memcpy(&x, from + i * sizeof x, sizeof x);                                \
            TO y = (TO)(VALUE);                                                       \
            memcpy(to + i * sizeof y, &y, sizeof y);                                  \
        }                                                                             \
    }
CONVERT(bool_f32, uint8_t, float, x) CONVERT(bool_f64, uint8_t, double, x)
CONVERT(bool_i64, uint8_t, int64_t, x) CONVERT(bool_i32, uint8_t, int32_t, x)
CONVERT(i32_f32, int32_t, float, x) CONVERT(i32_f64, int32_t, double, x)
CONVERT(i32_i64, int32_t, int64_t, x) CONVERT(i32_bool, int32_t, uint8_t, x != 0)
CONVERT(i64_f32, int64_t, float, x) CONVERT(i64_f64, int64_t, double, x)
CONVERT(i64_i32, int64_t, int32_t, int32_of_int(x)) CONVERT(i64_bool, int64_t, uint8_t, x != 0)
CONVERT(f32_f64, float, double, x) CONVERT(f32_i64, float, int64_t, int64_of(x))
CONVERT(f32_i32, float, int32_t, int32_of(x)) CONVERT(f32_bool, float, uint8_t, x != 0)
CONVERT(f64_f32, double, float, x) CONVERT(f64_i64, double, int64_t, int64_of(x))
CONVERT(f64_i32, double, int32_t, int32_of(x)) CONVERT(f64_bool, double, uint8_t, x != 0)

st_convert st_conversion(uint32_t from, uint32_t to)
{
    /* The order within each array is ST_OUT_FLOAT32, FLOAT64, INT64, INT32, BOOL. */
    static const st_convert of_bool[] = {bool_f32, bool_f64, bool_i64, bool_i32, NULL};
    static const st_convert of_i32[] = {i32_f32, i32_f64, i32_i64, NULL, i32_bool};
    static const st_convert of_i64[] = {i64_f32, i64_f64, NULL, i64_i32, i64_bool};
    static const st_convert of_f32[] = {NULL, f32_f64, f32_i64, f32_i32, f32_bool};
    static const st_convert of_f64[] = {f64_f32, NULL, f64_i64, f64_i32, f64_bool};
    switch (from) {
    case ST_BOOL: return of_bool[to];
    case ST_INT32: return of_i32[to];
    case ST_FLOAT32: case ST_VECTOR: return of_f32[to];
    case ST_FLOAT64: case ST_WIDE_VECTOR: return of_f64[to];
    default: return of_i64[to];
    }
}

uint32_t st_output_bytes(uint32_t to)
{
    static const uint32_t bytes[] = {4, 8, 8, 4, 1, sizeof(void *)};
    return bytes[to];
}

/* Copy bytes, without a call for the usual small sizes. */
static inline void copy_bytes(uint8_t *to, const uint8_t *from, uint32_t bytes)
{
    if (bytes == 4) memcpy(to, from, 4);
    else if (bytes == 8) memcpy(to, from, 8);
    else memcpy(to, from, bytes);
}

/* ---- the loops -------------------------------------------------------------------------------------------- */

static inline size_t string_start(const st_key_column *keys, size_t i) { return i ? keys->ends[i - 1] : 0; }

/* Rows first .. first + count - 1 of all views. */
typedef struct {
    size_t first, count;
} group;

/* Most tables have a single integer key. For them the loops over key columns are skipped. */
static inline int one_int_key(const st_layout *l) { return l->n_keys == 1 && !l->key_is_string[0]; }

static inline int has_string_key(const st_layout *l)
{
    for (uint32_t k = 0; k < l->n_keys; k++)
        if (l->key_is_string[k]) return 1;
    return 0;
}

/* Loop 1: hash the keys and prefetch directory entries. */
static void hash_keys(const st_view *v, group g, slots *s, size_t slot)
{
    const st_layout *l = v->layout;
    for (size_t i = g.first; i < g.first + g.count; i++, slot++) {
        uint64_t h = l->seed;
        if (one_int_key(l)) {
            h = st_hash_int(l, h, st_load64(v->keys[0].data + 8 * i));
        } else {
            for (uint32_t k = 0; k < l->n_keys; k++) {
                const st_key_column *keys = &v->keys[k];
                if (!l->key_is_string[k]) {
                    h = st_hash_int(l, h, st_load64(keys->data + 8 * i));
                } else {
                    size_t start = string_start(keys, i);
                    h = st_hash_string(l, h, keys->data + start, keys->ends[i] - start);
                }
            }
        }
        h = st_hash_end(l, h);
        s->hash[slot] = h;
        __builtin_prefetch(&v->pages[(h >> 1) >> (63 - v->depth)]); /* two shifts: a shift by 64 is undefined */
    }
}

/* Loop 2: load directory entries and prefetch page headers and tags. */
static void find_pages(const st_view *v, group g, slots *s, size_t slot)
{
    const st_layout *l = v->layout;
    uint32_t lines = (16 + ST_HEADER_BYTES + l->rows_per_page + LINE - 1) / LINE;
    if (lines > 4) lines = 4;
    for (size_t i = g.first; i < g.first + g.count; i++, slot++) {
        const uint8_t *page = v->pages[(s->hash[slot] >> 1) >> (63 - v->depth)];
        for (uint32_t line = 0; line < lines; line++) __builtin_prefetch(page + line * LINE);
        s->page[slot] = page;
    }
    for (uint32_t k = 0; k < l->n_keys; k++) {
        if (!v->keys[k].nulls) continue;
        for (size_t i = 0; i < g.count; i++)
            if (v->keys[k].nulls[g.first + i]) s->page[slot - g.count + i] = NULL;
    }
}

/* The first row at or after `from` with this tag, or n. Without SSE2 it may also return a row with another tag, which
 * does no harm because keys are compared in full. */
static inline uint32_t next_tag(const uint8_t *tags, uint32_t from, uint32_t n, uint8_t tag)
{
#if defined(__SSE2__)
    const __m128i wanted = _mm_set1_epi8((char)tag);
    for (uint32_t base = from & ~15u; base < n; base += 16) {
        __m128i block = _mm_loadu_si128((const __m128i *)(const void *)(tags + base));
        uint32_t hits = (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(block, wanted));
        if (from > base) hits &= ~0u << (from - base);
        if (hits) {
            uint32_t row = base + (uint32_t)__builtin_ctz(hits);
            return row < n ? row : n;
        }
    }
#else
    const uint64_t ones = 0x0101010101010101u;
    for (uint32_t base = from & ~7u; base < n; base += 8) {
        uint64_t x = st_load64(tags + base) ^ (ones * tag);
        uint64_t hits = (x - ones) & ~x & (ones << 7); /* 0x80 in each byte of x that is zero */
        if (from > base) hits &= ~0ull << (8 * (from - base));
        if (hits) {
            uint32_t row = base + (uint32_t)__builtin_ctzll(hits) / 8;
            return row < n ? row : n;
        }
    }
#endif
    return n;
}

/* Loop 3: match tags and prefetch the row. */
static void match_tags(const st_view *v, group g, slots *s, size_t slot)
{
    const st_layout *l = v->layout;
    uint32_t near = l->row_bytes < ROW_LINES * LINE ? l->row_bytes : ROW_LINES * LINE;
    for (size_t end = slot + g.count; slot < end; slot++) {
        const uint8_t *page = s->page[slot];
        if (!page) continue;
        uint32_t n = st_rows(page);
        uint32_t candidate = next_tag(page + ST_HEADER_BYTES, 0, n, st_tag(s->hash[slot]));
        s->candidate[slot] = candidate;
        if (candidate == n) {
            s->page[slot] = NULL;
            continue;
        }
        const uint8_t *row = st_row(l, page, candidate);
        for (uint32_t at = 0; at < near; at += LINE) __builtin_prefetch(row + at);
        __builtin_prefetch(row + near - 1);
    }
}

static inline void ask_for_string(const uint8_t *page, const uint8_t *reference)
{
    const uint8_t *string = page + st_load32(reference);
    __builtin_prefetch(string);
    __builtin_prefetch(string + st_load32(reference + 4) - 1); /* a string may cross a line boundary */
}

/* Loop 4, only if there are strings: prefetch the strings of the row. */
static void ask_for_strings(const st_view *v, group g, slots *s, size_t slot)
{
    const st_layout *l = v->layout;
    if (!l->n_strings || (!v->strings && !has_string_key(l))) return;
    for (size_t end = slot + g.count; slot < end; slot++) {
        const uint8_t *page = s->page[slot];
        if (!page) continue;
        const uint8_t *row = st_row(l, page, s->candidate[slot]);
        for (uint32_t k = 0; k < l->n_keys; k++)
            if (l->key_is_string[k]) ask_for_string(page, row + 8 * k);
        for (uint32_t o = 0; v->strings && o < v->plan->n_ops; o++)
            if (!v->plan->ops[o].bytes) ask_for_string(page, row + v->plan->ops[o].row_offset);
    }
}

/* memcmp() == 0, made for keys, which are short and nearly always equal. */
static inline int same_bytes(const uint8_t *a, const uint8_t *b, size_t n)
{
    if (n >= 8) {
        for (size_t at = 0; at + 8 <= n; at += 8)
            if (st_load64(a + at) != st_load64(b + at)) return 0;
        return st_load64(a + n - 8) == st_load64(b + n - 8);
    }
    if (n >= 4) return st_load32(a) == st_load32(b) && st_load32(a + n - 4) == st_load32(b + n - 4);
    for (size_t at = 0; at < n; at++)
        if (a[at] != b[at]) return 0;
    return 1;
}

static inline int key_matches(const st_view *v, const uint8_t *page, const uint8_t *row, size_t i)
{
    const st_layout *l = v->layout;
    if (one_int_key(l)) return st_load64(row) == st_load64(v->keys[0].data + 8 * i);
    for (uint32_t k = 0; k < l->n_keys; k++) {
        const st_key_column *keys = &v->keys[k];
        const uint8_t *stored = row + 8 * k;
        if (!l->key_is_string[k]) {
            if (st_load64(stored) != st_load64(keys->data + 8 * i)) return 0;
            continue;
        }
        size_t start = string_start(keys, i), length = keys->ends[i] - start;
        uint64_t at = st_load32(stored);
        if (st_load32(stored + 4) != length || at + length > st_image_bytes(page)) return 0;
        if (!same_bytes(page + at, keys->data + start, length)) return 0;
    }
    return 1;
}

/* Write the fill values to all outputs of a missing row. */
static void fill_row(const st_view *v, size_t i)
{
    const st_plan *p = v->plan;
    for (uint32_t r = 0; r < p->n_runs; r++) {
        const st_run *run = &p->runs[r];
        const st_output *out = &v->outputs[run->output];
        copy_bytes(out->data + i * out->stride + run->column_offset, p->fill + run->fill_offset, run->bytes);
    }
}

/* Replace null features of a row by their fill values. */
static void fix_nulls(const st_view *v, size_t i, size_t n, const uint8_t *row)
{
    const st_plan *p = v->plan;
    for (uint32_t o = 0; o < p->n_ops; o++) {
        const st_op *op = &p->ops[o];
        if (!(row[op->null_byte] & op->null_bit)) continue;
        if (v->feature_status) v->feature_status[o * n + i] = ST_NULL;
        if (!op->bytes) {
            v->strings[op->string_index * n + i].data = NULL;
            continue;
        }
        const st_output *out = &v->outputs[op->output];
        copy_bytes(out->data + i * out->stride + op->column_offset, p->fill + op->fill_offset, op->bytes);
    }
}

static void find_strings(const st_view *v, size_t i, size_t n, const uint8_t *page, const uint8_t *row)
{
    const st_plan *p = v->plan;
    for (uint32_t o = 0; o < p->n_ops; o++) {
        const st_op *op = &p->ops[o];
        if (op->bytes) continue;
        uint64_t at = st_load32(row + op->row_offset), length = st_load32(row + op->row_offset + 4);
        st_string *string = &v->strings[op->string_index * n + i];
        /* A damaged reference must not be followed out of the page. */
        if (at + length > st_image_bytes(page)) {
            if (v->feature_status) v->feature_status[o * n + i] = ST_NULL;
            continue;
        }
        *string = (st_string){page + at, length};
    }
}

static inline void copy_row(const st_view *v, size_t i, const uint8_t *row)
{
    const st_plan *p = v->plan;
    for (uint32_t r = 0; r < p->n_runs; r++) {
        const st_run *run = &p->runs[r];
        const st_output *out = &v->outputs[run->output];
        uint8_t *to = out->data + i * out->stride + run->column_offset;
        if (run->convert) run->convert(row + run->row_offset, to, run->count);
        else copy_bytes(to, row + run->row_offset, run->bytes);
    }
}

/* The status of a row in a batch where requests give moments. At a moment, a row that is newer was not there yet. */
static uint8_t status_at(const st_view *v, size_t i, int64_t time_us)
{
    int64_t as_of = v->as_of[i], oldest_us = v->oldest_us;
    if (as_of >= 0) {
        if (time_us > as_of) return ST_NOT_FOUND;
        oldest_us = v->ttl_us ? as_of - v->ttl_us : INT64_MIN; /* no overflow: neither is negative */
    }
    return time_us < oldest_us ? ST_STALE : ST_PRESENT;
}

/* Loop 5: compare keys in full and copy rows. */
static void copy_rows(const st_view *v, group g, size_t n, slots *s, size_t slot)
{
    const st_plan *p = v->plan;
    const st_layout *l = v->layout;
    for (size_t i = g.first; i < g.first + g.count; i++, slot++) {
        const uint8_t *page = s->page[slot], *row = NULL;
        uint8_t status = ST_NOT_FOUND;
        if (page) {
            uint32_t rows = st_rows(page), candidate = s->candidate[slot];
            while (candidate < rows) {
                const uint8_t *at = st_row(l, page, candidate);
                if (key_matches(v, page, at, i)) {
                    row = at;
                    break;
                }
                candidate = next_tag(page + ST_HEADER_BYTES, candidate + 1, rows, st_tag(s->hash[slot]));
            }
        }
        if (row) {
            int64_t time_us = (int64_t)st_load64(row + l->time_offset);
            status = v->as_of ? status_at(v, i, time_us) : time_us < v->oldest_us ? ST_STALE : ST_PRESENT;
        }
        v->status[i] = status;
        if (status != ST_PRESENT) {
            if (v->feature_status)
                for (uint32_t o = 0; o < p->n_ops; o++) v->feature_status[o * n + i] = status;
            fill_row(v, i);
            continue;
        }
        copy_row(v, i, row);
        if (v->strings) find_strings(v, i, n, page, row);
        for (uint32_t w = 0; w < p->n_null_words; w++) {
            if (st_load64(row + p->null_words[w].null_offset) & p->null_words[w].mask) {
                fix_nulls(v, i, n, row);
                break;
            }
        }
    }
}

static void all_absent(const st_view *v, size_t n)
{
    memset(v->status, ST_NOT_FOUND, n);
    if (v->feature_status) memset(v->feature_status, ST_NOT_FOUND, n * v->plan->n_ops);
    for (size_t i = 0; i < n; i++) fill_row(v, i);
}

static group group_at(size_t number, size_t rows, size_t n)
{
    size_t first = number * rows;
    return (group){first, n - first < rows ? n - first : rows};
}

enum { RING = 8 /* a power of two; group i uses ring[i % RING] */ };

/* Run one loop for the group that is at this point of the pipeline, in all views. At the start and the end of a batch
 * there may be no such group. */
#define LOOP(BEHIND, CALL)                                                                      \
    if (step - (BEHIND) < n_groups) { /* step < BEHIND wraps to a huge number, which is false */ \
        size_t number = step - (BEHIND);                                                        \
        group g = group_at(number, rows, n);                                                    \
        slots *s = &ring[number % RING];                                                        \
        for (size_t i = 0; i < n_views; i++) {                                                  \
            const st_view *v = views[i];                                                        \
            size_t slot = i * g.count;                                                          \
            CALL;                                                                               \
        }                                                                                       \
    }

/* Look up all rows in up to VIEWS_MAX views. At each step, group `step` is in the first loop, group `step - 1` in the
 * second loop, and so on. The loop for strings runs only if there are strings. */
static void look_up_together(const st_view *const *views, size_t n_views, size_t n, int strings)
{
    slots ring[RING];
    size_t rows = (GROUP + n_views - 1) / n_views, n_groups = (n + rows - 1) / rows;
    size_t last = strings ? 4 : 3;
    for (size_t step = 0; step < n_groups + last; step++) {
        LOOP(0, hash_keys(v, g, s, slot))
        LOOP(1, find_pages(v, g, s, slot))
        LOOP(2, match_tags(v, g, s, slot))
        if (strings) LOOP(3, ask_for_strings(v, g, s, slot))
        LOOP(last, copy_rows(v, g, n, s, slot))
    }
}

void st_lookup(const st_view *views, size_t n_views, size_t n)
{
    const st_view *together[VIEWS_MAX];
    size_t waiting = 0;
    int strings = 0;
    for (size_t v = 0; v < n_views; v++) {
        if (views[v].pages) {
            if (views[v].feature_status) memset(views[v].feature_status, ST_PRESENT, n * views[v].plan->n_ops);
            together[waiting++] = &views[v];
            strings |= views[v].strings != NULL || has_string_key(views[v].layout);
        } else {
            all_absent(&views[v], n);
        }
        if (waiting == VIEWS_MAX || (v + 1 == n_views && waiting)) {
            look_up_together(together, waiting, n, strings);
            waiting = strings = 0;
        }
    }
}
