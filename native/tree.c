/* See tree.h. */
#include "tree.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "lmdb_page.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* since Linux 5.14; older kernels return an error */
#endif

enum {
    META_MAGIC = 16, META_VERSION = 20, META_FREE_LIST = 40, META_ENTRIES = 88, META_LAST_PAGE = 136,
    META_TXN_ID = 144, META_BYTES = 152, /* byte offsets in a meta page */
    LEVELS_MAX = 32,
    PREFETCH_PAGES = 12,
    LINE = 64,
    POPULATE_PAGES_MIN = 4096,
    READ_BYTES = 128 << 10,
    WORK_NS = 200000,
    LOOK_ENTRIES = 256, /* so often a loop looks whether it should rest */
};
static const uint32_t MAGIC = 0xBEEFC0DE, INTEGER_KEYS = 8;

/* Read a tree's record: pad u32 | flags u16 | depth u16 | pages of branches, leaves and values | entries | root. 0, or
 * -1 if LMDB cannot have written it. pad: LMDB keeps the page size in the free list's. */
static int read_record(const uint8_t *at, uint32_t pad, uint32_t flags, uint64_t n_pages, st_record *r)
{
    *r = (st_record){.depth = st_load16(at + 6), .branch_pages = st_load64(at + 8), .leaf_pages = st_load64(at + 16),
                     .value_pages = st_load64(at + 24), .entries = st_load64(at + 32), .root = st_load64(at + 40)};
    if (st_load32(at) != pad || st_load16(at + 4) != flags) return -1;
    if (!r->depth)
        return r->root == UINT64_MAX && !r->branch_pages && !r->leaf_pages && !r->value_pages && !r->entries ? 0 : -1;
    return r->depth <= LEVELS_MAX && r->root >= FIRST_PAGE && r->root < n_pages && r->leaf_pages && r->entries ? 0 : -1;
}

int st_tree_open(st_tree *t, const st_map *map, uint64_t txn_id)
{
    uint8_t copy[META_BYTES];
    if (map->n_pages < FIRST_PAGE) return ST_TREE_UNKNOWN;
    const uint8_t *meta = map->base + (txn_id & 1) * ST_PAGE_BYTES;
    /* Another process may be writing this page. So, as in a seqlock, the transaction id is compared before and after.
     * */
    const uint64_t *id = (const uint64_t *)(const void *)(meta + META_TXN_ID);
    if (__atomic_load_n(id, __ATOMIC_ACQUIRE) != txn_id) return ST_TREE_GONE;
    memcpy(copy, meta, sizeof copy);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (__atomic_load_n(id, __ATOMIC_ACQUIRE) != txn_id) return ST_TREE_GONE;
    if (st_load64(copy) != (txn_id & 1) || st_load16(copy + PAGE_FLAGS) != FLAG_META ||
        st_load32(copy + META_MAGIC) != MAGIC || st_load32(copy + META_VERSION) != 1)
        return ST_TREE_UNKNOWN;
    uint64_t last = st_load64(copy + META_LAST_PAGE);
    if (last >= UINT64_MAX / ST_PAGE_BYTES) return ST_TREE_UNKNOWN;
    *t = (st_tree){.base = map->base, .n_pages = last + 1, .spare = map->spare, .txn_id = txn_id};
    if (read_record(copy + META_FREE_LIST, ST_PAGE_BYTES, INTEGER_KEYS, t->n_pages, &t->free_list) ||
        read_record(copy + META_ENTRIES, 0, 0, t->n_pages, &t->entries))
        return ST_TREE_UNKNOWN;
    t->n_mapped = t->n_pages < map->n_pages ? t->n_pages : map->n_pages;
    t->depth = t->entries.depth;
    t->root = t->entries.root;
    return ST_TREE_OK;
}

static int compare(const node_t *node, const uint8_t *key, uint32_t key_bytes)
{
    uint32_t n = node->key_bytes < key_bytes ? node->key_bytes : key_bytes;
    int order = memcmp(node->key, key, n);
    return order ? order : (node->key_bytes > key_bytes) - (node->key_bytes < key_bytes);
}

/* The index of the first node at or after `from` whose key is not less than key; count_of(page) if there is none; -1 if
 * the page is damaged. */
static int64_t lower_bound(const uint8_t *page, uint32_t from, const uint8_t *key, uint32_t key_bytes)
{
    uint32_t low = from, high = count_of(page);
    node_t node;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (node_at(page, middle, &node)) return -1;
        if (compare(&node, key, key_bytes) < 0) low = middle + 1; else high = middle;
    }
    return low;
}

/* The index of the child that covers a key, or -1. The first child's key is empty and counts as less than every key. */
static int64_t child_index(const uint8_t *page, const uint8_t *key, uint32_t key_bytes)
{
    if (!count_of(page)) return -1;
    int64_t i = lower_bound(page, 1, key, key_bytes);
    node_t node;
    if (i < 0 || (i < count_of(page) && node_at(page, (uint32_t)i, &node))) return -1;
    return i < count_of(page) && compare(&node, key, key_bytes) == 0 ? i : i - 1;
}

int st_tree_find(const st_tree *t, const uint8_t *key, uint32_t key_bytes, const uint8_t **value, uint64_t *bytes)
{
    uint64_t number = t->root;
    node_t node;
    for (uint32_t level = 0; level < t->depth; level++) {
        const uint8_t *page = page_at(t, number, level);
        if (!page) return -1;
        int64_t i;
        if (level + 1 < t->depth) {
            i = child_index(page, key, key_bytes);
            if (i < 0 || node_at(page, (uint32_t)i, &node)) return -1;
            number = child_of(&node);
            continue;
        }
        i = lower_bound(page, 0, key, key_bytes);
        if (i < 0) return -1;
        if (i == count_of(page)) return 0;
        if (node_at(page, (uint32_t)i, &node)) return -1;
        if (compare(&node, key, key_bytes)) return 0;
        *value = value_of(t, page, &node, bytes);
        return *value && (!(flags_of(&node) & NODE_BIG) || is_overflow(t, *value, *bytes)) ? 1 : -1;
    }
    return 0;
}

/* ---- the list of a table's pages ------------------------------------------------------------------------------- */

typedef struct {
    uint64_t key;
    const uint8_t *image;
    uint64_t bytes;
} bucket_t;

typedef struct {
    bucket_t *items;
    size_t n, room;
} list_t;

static const char DAMAGED[] = "LMDB's tree is damaged", NO_MEMORY[] = "";

static void page_key(uint8_t *key, uint32_t table_id)
{
    key[0] = 't';
    table_id = __builtin_bswap32(table_id);
    memcpy(key + 1, &table_id, 4);
}

static uint64_t bucket_key(const uint8_t *bytes) { return __builtin_bswap64(st_load64(bytes)); }

static const char *add(const st_tree *t, const uint8_t *page, const node_t *node, list_t *list)
{
    if (list->n == list->room) {
        size_t room = list->room ? 2 * list->room : 256;
        bucket_t *items = realloc(list->items, room * sizeof *items);
        if (!items) return NO_MEMORY;
        list->items = items;
        list->room = room;
    }
    bucket_t *item = &list->items[list->n];
    if (node->key_bytes != ST_PAGE_KEY_BYTES) return DAMAGED;
    item->key = bucket_key(node->key + ST_PAGE_KEY_BYTES - ST_BUCKET_KEY_BYTES);
    item->image = value_of(t, page, node, &item->bytes);
    if (!item->image || item->bytes < ST_PAGE_BYTES - PAGE_HEADER) return DAMAGED;
    list->n++;
    return NULL;
}

/* Add all entries below a page whose keys begin with prefix to the list. Returns NULL or what is wrong. */
/* The scheduler lets a thread run for some milliseconds before another that wakes up gets the CPU. So a thread that has
 * time rests for rest_ns after every WORK_NS of its own CPU time. */
typedef struct {
    int64_t rest_ns, until_ns;
} pace_t;

static int64_t worked_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static void rest(pace_t *pace)
{
    if (!pace->rest_ns || worked_ns() < pace->until_ns) return;
    struct timespec pause = {.tv_sec = pace->rest_ns / 1000000000, .tv_nsec = pace->rest_ns % 1000000000};
    nanosleep(&pause, NULL);
    pace->until_ns = worked_ns() + WORK_NS;
}

static const char *collect(const st_tree *t, uint64_t number, uint32_t level, const uint8_t *prefix, uint32_t n_prefix,
                           list_t *list, pace_t *pace)
{
    const uint8_t *page = page_at(t, number, level);
    if (!page) return DAMAGED;
    rest(pace);
    int leaf = level + 1 == t->depth;
    int64_t first = leaf ? lower_bound(page, 0, prefix, n_prefix) : child_index(page, prefix, n_prefix);
    if (first < 0) return DAMAGED;
    for (uint32_t i = (uint32_t)first, n = count_of(page); i < n; i++) {
        node_t node;
        if (node_at(page, i, &node)) return DAMAGED;
        /* In a branch page, the first child visited may have a smaller key and still hold matching entries. All later
         * children must have the prefix. */
        if ((leaf || i > first) && (node.key_bytes < n_prefix || memcmp(node.key, prefix, n_prefix))) break;
        const char *wrong = leaf ? add(t, page, &node, list)
                                 : collect(t, child_of(&node), level + 1, prefix, n_prefix, list, pace);
        if (wrong) return wrong;
    }
    return NULL;
}

/* Find the last node below a page whose key is not greater than key. Returns 1, 0 if there is none, or -1 if the tree
 * is damaged. A child may have no such node if its first entries were deleted; then the node is in the child before.
 * */
static int floor_node(const st_tree *t, uint64_t number, uint32_t level, const uint8_t *key, const uint8_t **page,
                      node_t *node)
{
    *page = page_at(t, number, level);
    if (!*page) return -1;
    if (level + 1 == t->depth) {
        int64_t i = lower_bound(*page, 0, key, ST_PAGE_KEY_BYTES);
        if (i < 0) return -1;
        if (i < count_of(*page) && node_at(*page, (uint32_t)i, node)) return -1;
        if (i < count_of(*page) && compare(node, key, ST_PAGE_KEY_BYTES) == 0) return 1;
        return i == 0 ? 0 : node_at(*page, (uint32_t)i - 1, node) ? -1 : 1;
    }
    const uint8_t *branch = *page;
    for (int64_t i = child_index(branch, key, ST_PAGE_KEY_BYTES); ; i--) {
        if (i < 0 || node_at(branch, (uint32_t)i, node)) return -1;
        int found = floor_node(t, child_of(node), level + 1, key, page, node);
        if (found || i == 0) return found;
    }
}

static void wanted_key(uint8_t *key, uint32_t table_id, uint64_t hash)
{
    page_key(key, table_id);
    hash = __builtin_bswap64(hash);
    memcpy(key + ST_PAGE_KEY_BYTES - ST_BUCKET_KEY_BYTES, &hash, sizeof hash);
}

void st_tree_prefetch(const st_tree *t, uint32_t table_id, uint64_t hash)
{
    uint8_t wanted[ST_PAGE_KEY_BYTES];
    uint64_t number = t->root;
    wanted_key(wanted, table_id, hash);
    for (uint32_t level = 0; level + 1 < t->depth; level++) {
        const uint8_t *page = page_at(t, number, level);
        node_t node;
        int64_t i = page ? child_index(page, wanted, sizeof wanted) : -1;
        if (i < 0 || node_at(page, (uint32_t)i, &node)) return;
        number = child_of(&node);
    }
    if (!t->depth || number >= t->n_mapped) return;
    const uint8_t *leaf = t->base + number * ST_PAGE_BYTES;
    for (size_t at = 0; at < ST_PAGE_BYTES; at += LINE) __builtin_prefetch(leaf + at);
}

int st_tree_bucket(const st_tree *t, uint32_t table_id, uint64_t hash, uint64_t *key, const uint8_t **image,
                   uint64_t *bytes)
{
    uint8_t wanted[ST_PAGE_KEY_BYTES];
    const uint8_t *page;
    node_t node;
    wanted_key(wanted, table_id, hash);
    int found = t->depth ? floor_node(t, t->root, 0, wanted, &page, &node) : 0;
    if (found <= 0) return found;
    if (node.key_bytes != ST_PAGE_KEY_BYTES ||
        memcmp(node.key, wanted, ST_PAGE_KEY_BYTES - ST_BUCKET_KEY_BYTES))
        return 0;
    *key = bucket_key(node.key + ST_PAGE_KEY_BYTES - ST_BUCKET_KEY_BYTES);
    *image = value_of(t, page, &node, bytes);
    return *image && *bytes >= ST_PAGE_BYTES - PAGE_HEADER && is_freeable(t, *image, *bytes) ? 1 : -1;
}

/* ---- directories ----------------------------------------------------------------------------------------------- */

/* Enlarge the directory to a greater depth: every entry is repeated 2^(depth - d->depth) times. */
static int grow(st_directory *d, uint32_t depth)
{
    size_t n_old = (size_t)1 << d->depth, times = (size_t)1 << (depth - d->depth);
    int first = d->pages == NULL;
    const uint8_t **pages = realloc((void *)d->pages, n_old * times * sizeof *pages);
    if (!pages) return -1;
    d->pages = pages;
    d->depth = depth;
    if (first) {
        memset((void *)pages, 0, n_old * times * sizeof *pages);
        return 0;
    }
    for (size_t i = n_old; i-- > 0;) { /* from the end, so that no entry is overwritten before it is read */
        const uint8_t *page = pages[i];
        for (size_t j = 0; j < times; j++) pages[i * times + j] = page;
    }
    return 0;
}

/* Point the entries of a bucket at its page. 0, or -1: no memory. */
static int point(st_directory *d, uint64_t key, uint32_t depth, const uint8_t *page)
{
    if ((!d->pages || depth > d->depth) && grow(d, depth)) return -1;
    size_t start = (key >> 1) >> (63 - d->depth), n = (size_t)1 << (d->depth - depth);
    for (size_t i = start; i < start + n; i++) d->pages[i] = page;
    return 0;
}

static const char *check_bucket(const st_tree *t, const st_layout *layout, uint32_t table_id, uint64_t key,
                                const uint8_t *image, uint64_t bytes)
{
    if (!is_overflow(t, image, bytes)) return DAMAGED;
    const char *wrong = st_check_header(layout, image, bytes, table_id);
    if (wrong) return wrong;
    uint32_t depth = st_depth(image);
    if (depth > ST_DIRECTORY_DEPTH_MAX || key & (UINT64_MAX >> depth)) return "its depth does not fit its key";
    return NULL;
}

static int64_t fail(st_fault *fault, const char *what, uint64_t key)
{
    *fault = (st_fault){.what = what == NO_MEMORY ? NULL : what, .key = key};
    return -1;
}

/* The kernel's read-ahead uses folios of up to several MiB. Whenever a 4 KiB block of a folio is written, and again at
 * write-back, ext4 walks all blocks of the folio: with folios of 2 MiB, a commit took three times as long. Memory that
 * is requested by MADV_WILLNEED in steps of at most the default read-ahead size comes as single pages. */
static int populate(const uint8_t *start, size_t bytes, pace_t *pace)
{
    int failed = 0;
    for (size_t at = 0; at < bytes; at += READ_BYTES)
        madvise((void *)(start + at), bytes - at < READ_BYTES ? bytes - at : READ_BYTES, MADV_WILLNEED);
    /* Not in one call: it would keep the lock of the address space, and a thread that maps memory would wait for it. */
    for (size_t at = 0; at < bytes && !failed; at += READ_BYTES) {
        failed = madvise((void *)(start + at), bytes - at < READ_BYTES ? bytes - at : READ_BYTES, MADV_POPULATE_READ);
        rest(pace);
    }
    return failed;
}

int st_populate(const uint8_t *start, size_t bytes)
{
    return populate(start, bytes, &(pace_t){0});
}

/* Map the pages of a large table together if they are close to each other, as they are after a bulk load. */
static void populate_all(const list_t *list, pace_t *pace)
{
    uintptr_t first = UINTPTR_MAX, last = 0;
    if (list->n < POPULATE_PAGES_MIN) return;
    for (size_t i = 0; i < list->n; i++) {
        uintptr_t start = (uintptr_t)list->items[i].image - PAGE_HEADER;
        uintptr_t end = (uintptr_t)list->items[i].image + list->items[i].bytes;
        if (start < first) first = start;
        if (end > last) last = end;
    }
    if ((last - first) / ST_PAGE_BYTES <= 2 * list->n) populate((const uint8_t *)first, last - first, pace);
}

static int64_t fill(const st_tree *t, const st_layout *layout, uint32_t table_id, const list_t *list, st_directory *d,
                    pace_t *pace, st_fault *fault)
{
    uint64_t expected = 0;
    uint32_t deepest = 0;
    for (size_t i = 0; i < list->n; i++) {
        const bucket_t *item = &list->items[i];
        if (i % LOOK_ENTRIES == 0) rest(pace);
        if (i + PREFETCH_PAGES < list->n) {
            const bucket_t *ahead = &list->items[i + PREFETCH_PAGES];
            __builtin_prefetch(ahead->image);
            __builtin_prefetch(ahead->image + ahead->bytes - ST_FOOTER_BYTES);
        }
        const char *wrong = check_bucket(t, layout, table_id, item->key, item->image, item->bytes);
        if (wrong) return fail(fault, wrong, item->key);
        if (item->key != expected || (i && !expected)) return fail(fault, "the bucket before it is missing", item->key);
        expected = item->key + (((uint64_t)1 << (63 - st_depth(item->image))) << 1);
        if (st_depth(item->image) > deepest) deepest = st_depth(item->image);
    }
    if (expected) return fail(fault, "it is missing", expected);
    if (grow(d, deepest)) return fail(fault, NO_MEMORY, 0); /* once: each growth copies all entries */
    for (size_t i = 0; i < list->n; i++) {
        if (i % LOOK_ENTRIES == 0) rest(pace);
        point(d, list->items[i].key, st_depth(list->items[i].image), list->items[i].image);
    }
    return (int64_t)list->n;
}

int64_t st_directory_build(const st_tree *t, const st_layout *layout, uint32_t table_id, int64_t rest_ns,
                           st_directory *d, st_fault *fault)
{
    uint8_t prefix[ST_PAGE_KEY_BYTES];
    list_t list = {0};
    pace_t pace = {.rest_ns = rest_ns, .until_ns = rest_ns ? worked_ns() + WORK_NS : 0};
    const char *wrong = NULL;
    page_key(prefix, table_id);
    *d = (st_directory){0};
    if (t->depth) wrong = collect(t, t->root, 0, prefix, ST_PAGE_KEY_BYTES - ST_BUCKET_KEY_BYTES, &list, &pace);
    if (!wrong) populate_all(&list, &pace);
    int64_t n = wrong ? fail(fault, wrong, 0) : list.n ? fill(t, layout, table_id, &list, d, &pace, fault) : 0;
    free(list.items);
    if (n < 0) {
        free((void *)d->pages);
        *d = (st_directory){0};
    }
    return n;
}

int64_t st_directory_update(const st_tree *t, const st_layout *layout, uint32_t table_id, const uint8_t *changes,
                            size_t n, st_directory *d, st_fault *fault)
{
    int64_t n_found = 0;
    uint8_t key[ST_PAGE_KEY_BYTES];
    page_key(key, table_id);
    for (size_t i = 0; i < n; i++) {
        const uint8_t *change = changes + i * ST_CHANGE_BYTES, *image;
        if (memcmp(change, key + 1, ST_CHANGE_BYTES - ST_BUCKET_KEY_BYTES)) continue;
        memcpy(key + 1, change, ST_CHANGE_BYTES);
        uint64_t bytes, bucket = bucket_key(change + ST_CHANGE_BYTES - ST_BUCKET_KEY_BYTES);
        int found = st_tree_find(t, key, ST_PAGE_KEY_BYTES, &image, &bytes);
        if (found < 0) return fail(fault, DAMAGED, bucket);
        if (!found) continue;
        const char *wrong = bytes < ST_PAGE_BYTES - PAGE_HEADER ? DAMAGED
                                                                : check_bucket(t, layout, table_id, bucket, image, bytes);
        if (wrong) return fail(fault, wrong, bucket);
        if (point(d, bucket, st_depth(image), image)) return fail(fault, NO_MEMORY, bucket);
        n_found++;
    }
    return n_found;
}
