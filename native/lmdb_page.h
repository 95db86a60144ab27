/* Pages and nodes of LMDB's data format 1 (LMDB 0.9; struct MDB_meta, MDB_page and MDB_node in its mdb.c), for tree.c
 * and structure.c. No number from the file is followed here before it was compared with the bounds of its page and of
 * the map.
 */
#ifndef SHORTTAIL_LMDB_PAGE_H
#define SHORTTAIL_LMDB_PAGE_H

#include "row.h"
#include "tree.h"

enum {
    PAGE_FLAGS = 10, PAGE_LOWER = 12, PAGE_UPPER = 14, PAGE_COUNT = 12, PAGE_HEADER = 16,
    FLAG_BRANCH = 1, FLAG_LEAF = 2, FLAG_OVERFLOW = 4, FLAG_META = 8,
    NODE_HEADER = 8, NODE_BIG = 1, /* the value is in overflow pages */
    FIRST_PAGE = 2, /* after the meta pages */
};

typedef struct {
    const uint8_t *key;
    uint32_t key_bytes;
    const uint8_t *node;
} node_t;

/* The page of a level, or NULL if it lies outside the map or is not such a page. */
static inline const uint8_t *page_at(const st_tree *t, uint64_t number, uint32_t level)
{
    if (number < FIRST_PAGE || number >= t->n_mapped) return NULL;
    const uint8_t *page = t->base + number * ST_PAGE_BYTES;
    uint32_t kind = level + 1 == t->depth ? FLAG_LEAF : FLAG_BRANCH;
    if (st_load64(page) != number || st_load16(page + PAGE_FLAGS) != kind) return NULL;
    uint32_t lower = st_load16(page + PAGE_LOWER), upper = st_load16(page + PAGE_UPPER);
    return lower >= PAGE_HEADER && lower % 2 == 0 && lower <= upper && upper <= ST_PAGE_BYTES ? page : NULL;
}

static inline uint32_t count_of(const uint8_t *page) { return (st_load16(page + PAGE_LOWER) - PAGE_HEADER) / 2u; }

/* Node i of a page with more than i nodes. 0, or -1 if the node or its key does not lie inside the page. */
static inline int node_at(const uint8_t *page, uint32_t i, node_t *node)
{
    uint32_t offset = st_load16(page + PAGE_HEADER + 2 * i);
    if (offset < PAGE_HEADER || offset + NODE_HEADER > ST_PAGE_BYTES) return -1;
    node->node = page + offset;
    node->key_bytes = st_load16(node->node + 6);
    node->key = node->node + NODE_HEADER;
    return offset + NODE_HEADER + node->key_bytes <= ST_PAGE_BYTES ? 0 : -1;
}

static inline uint64_t child_of(const node_t *node)
{
    return st_load32(node->node) | (uint64_t)st_load16(node->node + 4) << 32;
}

static inline uint32_t flags_of(const node_t *node) { return st_load16(node->node + 4); }

/* The number of overflow pages that a value needs. */
static inline uint64_t pages_for(uint64_t bytes) { return (PAGE_HEADER + bytes + ST_PAGE_BYTES - 1) / ST_PAGE_BYTES; }

/* The value of a node in a leaf page, or NULL if it does not lie inside its page or the map. */
static inline const uint8_t *value_of(const st_tree *t, const uint8_t *page, const node_t *node, uint64_t *bytes)
{
    const uint8_t *data = node->key + node->key_bytes;
    *bytes = st_load32(node->node);
    if (!(flags_of(node) & NODE_BIG)) return (size_t)(data - page) + *bytes <= ST_PAGE_BYTES ? data : NULL;
    if ((size_t)(data - page) + sizeof(uint64_t) > ST_PAGE_BYTES) return NULL;
    uint64_t number = st_load64(data);
    if (number < FIRST_PAGE || number >= t->n_mapped || pages_for(*bytes) > t->n_mapped - number) return NULL;
    return t->base + number * ST_PAGE_BYTES + PAGE_HEADER;
}

/* Whether a value's first overflow page, in the map, has the right number, flags and page count. This check is not in
 * value_of(), so that a list of pages can be made without a cache miss on each of them. */
static inline int is_overflow(const st_tree *t, const uint8_t *value, uint64_t bytes)
{
    const uint8_t *page = value - PAGE_HEADER;
    uint64_t number = (uint64_t)(page - t->base) / ST_PAGE_BYTES, n = st_load32(page + PAGE_COUNT);
    return st_load64(page) == number && st_load16(page + PAGE_FLAGS) == FLAG_OVERFLOW && n >= pages_for(bytes) &&
           n <= t->n_pages - number;
}

/* Whether LMDB may free the pages of a value: it trusts their count. */
static inline int is_freeable(const st_tree *t, const uint8_t *value, uint64_t bytes)
{
    uint32_t n = st_load32(value - PAGE_HEADER + PAGE_COUNT);
    return is_overflow(t, value, bytes) && (t->spare || n == pages_for(bytes));
}

#endif
