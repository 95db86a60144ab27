/* See structure.h. */
#include "structure.h"

#include <stdlib.h>
#include <string.h>

#include "lmdb_page.h"

enum {
    NODE_BYTES_MAX = 2038, /* of a node whose value is in its page */
    KEY_BYTES_MAX = 511,
    ID_BYTES = 8, /* a page number, and a key of the free list: the number of the commit that freed the pages */
};

static const char NO_MEMORY[] = "";

/* A walk through one tree, or along one path of it. */
typedef struct {
    const st_tree *tree; /* its root and depth are those of the tree that is walked */
    uint64_t *used;      /* a bit for each page of the file; NULL on a path */
    int free_list;       /* which tree it is */
    int values;          /* read the headers of values, too */
    uint64_t branch_pages, leaf_pages, value_pages, entries, free_pages;
    uint64_t needed_pages; /* by the values; value_pages counts the pages that they have, as far as they were read */
    uint64_t number; /* the page at which the walk is */
} walk_t;

/* The keys that a page may hold: from `first` up to, and without, `end`. NULL: no bound. */
typedef struct {
    const node_t *first, *end;
} range_t;

static int order_of(const walk_t *w, const node_t *a, const node_t *b)
{
    if (w->free_list) {
        uint64_t x = st_load64(a->key), y = st_load64(b->key);
        return (x > y) - (x < y);
    }
    uint32_t n = a->key_bytes < b->key_bytes ? a->key_bytes : b->key_bytes;
    int order = memcmp(a->key, b->key, n);
    return order ? order : (a->key_bytes > b->key_bytes) - (a->key_bytes < b->key_bytes);
}

/* Note that pages are in use. -1 if one is in use already. The caller has checked that they lie in the file. */
static int use(walk_t *w, uint64_t first, uint64_t n)
{
    for (uint64_t page = first; w->used && page < first + n; page++) {
        uint64_t bit = (uint64_t)1 << (page % 64);
        if (w->used[page / 64] & bit) return -1;
        w->used[page / 64] |= bit;
    }
    return 0;
}

/* ---- values ---------------------------------------------------------------------------------------------------- */

/* Check a record of the free list: the pages that one commit freed, their number first, in descending order. */
static const char *check_free_record(walk_t *w, const node_t *node, const uint8_t *value, uint64_t bytes)
{
    uint64_t id = st_load64(node->key);
    if (!id || id > w->tree->txn_id) return "it lists pages that a later commit freed";
    if (bytes < ID_BYTES || bytes % ID_BYTES || st_load64(value) > bytes / ID_BYTES - 1)
        return "a list of free pages is longer than its entry";
    uint64_t before = w->tree->n_pages;
    for (uint64_t i = 1, n = st_load64(value); i <= n; i++) {
        uint64_t page = st_load64(value + i * ID_BYTES);
        if (page < FIRST_PAGE || page >= before) return "a list of free pages is not in order";
        if (use(w, page, 1)) return "it lists a page as free that is in use";
        before = page;
        w->free_pages++;
    }
    return NULL;
}

static const char *check_value(walk_t *w, const uint8_t *page, const node_t *node)
{
    uint64_t bytes;
    const uint8_t *value = value_of(w->tree, page, node, &bytes);
    if (!value) return "a value lies outside the file";
    if (flags_of(node) & NODE_BIG) {
        uint64_t n = pages_for(bytes);
        w->needed_pages += n;
        if (w->values || w->free_list) {
            if (!is_overflow(w->tree, value, bytes)) return "the pages of a value are not its own";
            n = st_load32(value - PAGE_HEADER + PAGE_COUNT);
        }
        if (use(w, (uint64_t)(value - w->tree->base) / ST_PAGE_BYTES, n)) return "a page of a value is used twice";
        w->value_pages += n;
    }
    w->entries++;
    return w->free_list ? check_free_record(w, node, value, bytes) : NULL;
}

/* ---- pages ----------------------------------------------------------------------------------------------------- */

/* The number of bytes that a node takes in its page; 0 for a node that LMDB cannot have written. */
static uint64_t node_bytes(const walk_t *w, const node_t *node, int leaf)
{
    uint64_t bytes = NODE_HEADER + node->key_bytes, value = st_load32(node->node);
    if (leaf && flags_of(node) == NODE_BIG) {
        if (!w->free_list && bytes + value <= NODE_BYTES_MAX) return 0;
        bytes += ID_BYTES;
    } else if (leaf) {
        if (flags_of(node) || bytes + value > NODE_BYTES_MAX) return 0;
        bytes += value;
    }
    return bytes + bytes % 2;
}

/* Note the bytes of a page that a node takes, a bit for two bytes. -1 if another node has one of them. */
static int take(uint64_t *taken, uint32_t offset, uint64_t bytes)
{
    for (uint32_t at = offset / 2, end = (offset + (uint32_t)bytes) / 2; at < end;) {
        uint32_t n = 64 - at % 64 < end - at ? 64 - at % 64 : end - at;
        uint64_t bits = (n == 64 ? UINT64_MAX : ((uint64_t)1 << n) - 1) << (at % 64);
        if (taken[at / 64] & bits) return -1;
        taken[at / 64] |= bits;
        at += n;
    }
    return 0;
}

/* Check a page: its nodes fill it from `upper` to its end, and their keys ascend within the range. The first key of a
 * branch page has no meaning. */
static const char *check_page(walk_t *w, const uint8_t *page, int leaf, range_t range)
{
    uint64_t taken[ST_PAGE_BYTES / 2 / 64] = {0}, bytes = 0;
    uint32_t n = count_of(page), upper = st_load16(page + PAGE_UPPER);
    node_t nodes[2]; /* in turn: this one and the one before it */
    if (n < (leaf || w->free_list ? 1u : 2u)) return "it has too few entries";
    for (uint32_t i = 0; i < n; i++) {
        node_t *node = &nodes[i % 2];
        const node_t *before = i > (leaf ? 0 : 1) ? &nodes[(i + 1) % 2] : range.first;
        if (node_at(page, i, node)) return "an entry lies outside it";
        uint32_t offset = (uint32_t)(node->node - page);
        uint64_t size = node_bytes(w, node, leaf);
        if (!size || offset % 2 || offset < upper || size > ST_PAGE_BYTES - offset) return "an entry is not valid";
        if (take(taken, offset, size)) return "two entries overlap";
        bytes += size;
        if (!leaf && i == 0) continue;
        if (w->free_list ? node->key_bytes != ID_BYTES : !node->key_bytes || node->key_bytes > KEY_BYTES_MAX)
            return "a key has a wrong length";
        int order = before ? order_of(w, before, node) : -1;
        if (order > 0 || (order == 0 && (!leaf || i)) || (range.end && order_of(w, node, range.end) >= 0))
            return "its keys are not in order";
    }
    return bytes == ST_PAGE_BYTES - upper ? NULL : "its entries do not fill it";
}

static const char *walk(walk_t *w, uint64_t number, uint32_t level, range_t range)
{
    const uint8_t *page = page_at(w->tree, number, level);
    int leaf = level + 1 == w->tree->depth;
    w->number = number;
    if (!page) return "it is not the page that it should be";
    if (use(w, number, 1)) return "it is used twice";
    const char *wrong = check_page(w, page, leaf, range);
    if (leaf) w->leaf_pages++; else w->branch_pages++;
    for (uint32_t i = 0, n = count_of(page); i < n && !wrong; i++) {
        node_t node, next;
        if (node_at(page, i, &node) || (i + 1 < n && node_at(page, i + 1, &next))) return "an entry lies outside it";
        range_t below = {i ? &node : range.first, i + 1 < n ? &next : range.end};
        wrong = leaf ? check_value(w, page, &node) : walk(w, child_of(&node), level + 1, below);
    }
    return wrong;
}

const char *st_structure_path(const st_tree *t, const uint8_t *key, uint32_t key_bytes, uint64_t *number)
{
    walk_t w = {.tree = t};
    const node_t wanted = {.key = key, .key_bytes = key_bytes};
    range_t range = {NULL, NULL};
    node_t node, first, end;
    *number = t->root;
    for (uint32_t level = 0; level < t->depth; level++) {
        const uint8_t *page = page_at(t, *number, level);
        int leaf = level + 1 == t->depth;
        const char *wrong = page ? check_page(&w, page, leaf, range) : "it is not the page that it should be";
        if (wrong || leaf) return wrong;
        uint32_t n = count_of(page), i = n - 1;
        while (!node_at(page, i, &node) && i && order_of(&w, &node, &wanted) > 0) i--;
        if (i + 1 < n && !node_at(page, i + 1, &end)) range.end = &end;
        if (i) range.first = memcpy(&first, &node, sizeof node);
        *number = child_of(&node);
    }
    return NULL;
}

/* ---- the file -------------------------------------------------------------------------------------------------- */

static const char *check_tree(walk_t *w, const st_record *r)
{
    range_t all = {NULL, NULL};
    const char *wrong = r->depth ? walk(w, r->root, 0, all) : NULL;
    if (wrong) return wrong;
    w->number = 0;
    if (w->branch_pages != r->branch_pages || w->leaf_pages != r->leaf_pages || w->entries != r->entries ||
        w->value_pages > r->value_pages || (w->value_pages < r->value_pages && (w->values || w->free_list)))
        return "its meta page counts pages and entries that are not there, or misses some";
    return NULL;
}

const char *st_structure_check(const st_tree *t, int values, int *spare, uint64_t *number)
{
    st_tree tree = *t;
    walk_t entries = {.tree = &tree, .values = values}, free_list = {.tree = &tree, .free_list = 1};
    entries.used = free_list.used = calloc(t->n_pages / 64 + 1, sizeof *entries.used);
    *number = 0;
    if (!entries.used) return NO_MEMORY;
    use(&entries, 0, FIRST_PAGE);
    const char *wrong = check_tree(&entries, &t->entries);
    *number = entries.number;
    if (!wrong) {
        tree.root = t->free_list.root;
        tree.depth = t->free_list.depth;
        wrong = check_tree(&free_list, &t->free_list);
        *number = free_list.number;
    }
    uint64_t n = FIRST_PAGE + entries.branch_pages + entries.leaf_pages + t->entries.value_pages +
                 free_list.branch_pages + free_list.leaf_pages + free_list.value_pages + free_list.free_pages;
    if (!wrong && n != t->n_pages) wrong = "some of its pages are neither in use nor free";
    free(entries.used);
    *spare = entries.needed_pages != t->entries.value_pages;
    /* Only the headers of the values tell which of them has the spare pages. */
    return !wrong && !values && *spare ? st_structure_check(t, 1, spare, number) : wrong;
}

int st_structure_may_free(const st_map *map, const uint8_t *value, uint64_t bytes, uint32_t key_bytes)
{
    uintptr_t at = (uintptr_t)value, base = (uintptr_t)map->base;
    if (at < base || at >= base + map->n_pages * ST_PAGE_BYTES) return 1;
    if (NODE_HEADER + key_bytes + bytes <= NODE_BYTES_MAX) return 1; /* it has no pages of its own */
    st_tree tree = {.base = map->base, .n_pages = map->n_pages, .spare = map->spare};
    return (at - base) % ST_PAGE_BYTES == PAGE_HEADER && is_freeable(&tree, value, bytes);
}
