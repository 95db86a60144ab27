/* See merge.h. */
#include "merge.h"

#include <stdlib.h>
#include <string.h>

#include "row.h"

enum { LINE = 64 };

/* Find and prefetch the buckets of the next ST_AHEAD rows. Returns the bucket of row m->next, or NULL for damage. */
static const st_found *look_ahead(st_merger *m)
{
    if (m->looked < m->next) m->looked = m->next;
    for (; m->looked < m->n && m->looked < m->next + ST_AHEAD; m->looked++) {
        st_found *found = &m->ahead[m->looked % ST_AHEAD];
        *found = (st_found){0};
        if (m->looked + ST_AHEAD < m->n) st_tree_prefetch(m->tree, m->table_id, m->rows[m->looked + ST_AHEAD].hash);
        uint64_t hash = m->rows[m->looked].hash;
        if (st_tree_bucket(m->tree, m->table_id, hash, &found->key, &found->page, &found->bytes) < 0) return NULL;
        for (uint64_t at = 0; found->page && at < found->bytes; at += LINE) __builtin_prefetch(found->page + at);
    }
    return &m->ahead[m->next % ST_AHEAD];
}

static st_item *scratch_for(st_merger *m, size_t items)
{
    if (items > m->scratch_items) {
        st_item *larger = realloc(m->scratch, 2 * items * sizeof *larger);
        if (!larger) return NULL;
        m->scratch = larger;
        m->scratch_items = 2 * items;
    }
    return m->scratch;
}

/* Insertion sort by hash, because the rows of a page are sorted or nearly sorted already. */
static void sort(st_item *items, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        st_item item = items[i];
        size_t j = i;
        for (; j && items[j - 1].hash > item.hash; j--) items[j] = items[j - 1];
        items[j] = item;
    }
}

/* Merge two sorted lists. Stored rows come before new rows with the same hash, so st_dedupe() prefers the new row at
 * equal event times. */
static size_t merge_sorted(const st_item *stored, size_t n_stored, const st_item *rows, size_t n_rows, st_item *out)
{
    size_t n = 0, s = 0, r = 0;
    while (s < n_stored || r < n_rows)
        out[n++] = r == n_rows || (s < n_stored && stored[s].hash <= rows[r].hash) ? stored[s++] : rows[r++];
    return n;
}

/* Build the images of a bucket with its new items. On ST_MERGE_ROOM m->n_images is unchanged; only the arena is dirty.
 * */
static int build(st_merger *m, const st_item *items, size_t n, uint64_t key, uint32_t depth, size_t *used)
{
    st_splitter splitter;
    st_bucket bucket;
    size_t n_images = m->n_images;
    int more;
    st_splitter_init(&splitter, m->layout, items, n, key, depth, m->depth_grow);
    while ((more = st_splitter_next(&splitter, &bucket)) == 1) {
        if (n_images == m->images_max || *used + bucket.bytes > m->arena_bytes) return ST_MERGE_ROOM;
        st_image *image = &m->images[n_images++];
        uint32_t table_id = __builtin_bswap32(m->table_id);
        uint64_t name = __builtin_bswap64(bucket.key);
        image->key[0] = 't';
        memcpy(image->key + 1, &table_id, 4);
        memcpy(image->key + 5, &name, 8);
        image->offset = *used;
        image->bytes = (uint32_t)bucket.bytes;
        st_build(m->layout, items + bucket.start, bucket.stop - bucket.start, bucket.depth, m->table_id,
                 m->commit, m->arena + *used, (uint32_t)bucket.bytes);
        *used += bucket.bytes;
    }
    if (more < 0) return -1;
    m->n_images = n_images;
    return ST_MERGE_OK;
}

static int fail(st_fault *fault, const char *what, uint64_t key)
{
    *fault = (st_fault){.what = what, .key = key};
    return -1;
}

int st_merge(st_merger *m, st_fault *fault)
{
    size_t used = 0;
    m->n_images = 0;
    while (m->next < m->n && m->n_images < m->images_max) {
        const st_found *found = look_ahead(m);
        if (!found) return fail(fault, "LMDB's tree is damaged", m->rows[m->next].hash);
        uint64_t key = found->key;
        size_t n_stored = 0;
        uint32_t depth = 0;
        if (found->page) {
            const char *wrong = st_check_page(m->layout, found->page, found->bytes, m->table_id, key);
            if (wrong) return fail(fault, wrong, key);
            n_stored = st_rows(found->page);
            depth = st_depth(found->page);
        }
        uint64_t last = depth ? key | (UINT64_MAX >> depth) : UINT64_MAX;
        size_t stop = m->next;
        while (stop < m->n && m->rows[stop].hash <= last) stop++;
        if (stop == m->next) return fail(fault, "the bucket after it is missing", key);
        size_t n_new = stop - m->next;
        st_item *stored = scratch_for(m, 2 * n_stored + n_new);
        if (!stored) return fail(fault, NULL, key);
        st_item *all = stored + n_stored;
        if (n_stored) st_page_items(m->layout, found->page, stored);
        sort(stored, n_stored);
        size_t n_all = merge_sorted(stored, n_stored, m->rows + m->next, n_new, all);
        st_lost before = m->lost;
        m->lost.stored = found->page;
        if (m->overlay) st_overlay_reset(m->overlay); /* its rows are in the images */
        n_all = st_dedupe(m->layout, all, n_all, m->now_us, &m->lost, m->overlay);
        if (n_all == SIZE_MAX) return fail(fault, NULL, key);
        int outcome = build(m, all, n_all, key, depth, &used);
        if (outcome < 0) return fail(fault, "it has more rows than a page image can hold", key);
        if (outcome == ST_MERGE_ROOM) {
            m->lost = before; /* the bucket is merged again */
            return m->n_images ? ST_MERGE_OK : ST_MERGE_ROOM;
        }
        m->next = stop;
    }
    return ST_MERGE_OK;
}

void st_merge_free(st_merger *m)
{
    free(m->scratch);
    m->scratch = NULL;
    m->scratch_items = 0;
    if (m->overlay) st_overlay_free(m->overlay);
}
