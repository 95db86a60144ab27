/* Reads LMDB's B+tree directly in the map: to find an entry, to list all buckets of a table, and to find the buckets
 * that a commit changed. Through py-lmdb, each key would cost a Python call, and LMDB would follow a damaged page.
 *
 * lmdb_page.h describes the layout. Every offset is checked against the bounds of its page and of the map, so a damaged
 * file gives an error instead of a read out of bounds. Pages of a snapshot do not change as long as its read
 * transaction is open.
 */
#ifndef SHORTTAIL_TREE_H
#define SHORTTAIL_TREE_H

#include "page.h"

enum {
    ST_BUCKET_KEY_BYTES = 8,
    ST_CHANGE_BYTES = 12,   /* an entry of the change log: table id and bucket key, both big-endian */
    ST_PAGE_KEY_BYTES = 13, /* the LMDB key of a page image: 't', table id, bucket key */
    ST_DIRECTORY_DEPTH_MAX = 32, /* a directory of 2^32 entries has 32 GiB */
};

/* The data file in memory: LMDB's map of it, or another one. */
typedef struct {
    const uint8_t *base;
    uint64_t n_pages; /* that may be read */
    int spare;        /* values may have more pages than they need: LMDB leaves them if a value shrinks in one commit */
} st_map;

/* What a meta page says of a tree: of the database, or of the list of free pages. */
typedef struct {
    uint32_t depth; /* levels; 0: empty */
    uint64_t root;  /* page number */
    uint64_t branch_pages, leaf_pages, value_pages, entries;
} st_record;

typedef struct {
    const uint8_t *base; /* start of the map */
    uint64_t n_pages;    /* pages of the file in this snapshot */
    uint64_t n_mapped;   /* those of them that may be read; fewer if the file lacks unused pages at its end */
    uint64_t root;       /* page number of the root */
    uint32_t depth;      /* levels of the tree; 0: the database is empty */
    int spare;           /* as in st_map */
    uint64_t txn_id;
    st_record entries, free_list;
} st_tree;

typedef struct {
    const uint8_t **pages; /* 2^depth images; NULL for an empty table */
    uint32_t depth;
} st_directory;

/* An error in the bucket of a key. */
typedef struct {
    const char *what; /* the error; see each function for NULL */
    uint64_t key;
} st_fault;

enum { ST_TREE_OK = 0, ST_TREE_GONE = 1, ST_TREE_UNKNOWN = 2 };

/* Open the tree of the read transaction with this id. ST_TREE_GONE: two commits were made since the transaction began,
 * so both meta pages are overwritten and none names its root any more. ST_TREE_UNKNOWN: the meta page is not one of
 * LMDB 0.9 with pages of 4096 bytes, or is damaged. */
int st_tree_open(st_tree *tree, const st_map *map, uint64_t txn_id);

/* Find the value of a key. Returns 1, 0 if there is no such key, or -1 if the tree is damaged. */
int st_tree_find(const st_tree *tree, const uint8_t *key, uint32_t key_bytes, const uint8_t **value, uint64_t *bytes);

/* Find the bucket of a table that a hash belongs to, whose pages LMDB may free. Returns 1 and its key, its image and
 * the image's size; 0 if the table is empty; -1 if the tree is damaged. */
int st_tree_bucket(const st_tree *tree, uint32_t table_id, uint64_t hash, uint64_t *key, const uint8_t **image,
                   uint64_t *bytes);

/* Read a part of the map from disk and map its pages. One call costs a tenth of what a page fault per page costs. Pages
 * enter the page cache one by one, not as large folios (tree.c says why). Returns 0, or -1 if the system cannot. */
int st_populate(const uint8_t *start, size_t bytes);

/* Prefetch the leaf page in which a later st_tree_bucket() for this hash, or a close one, will search. The whole page
 * is prefetched, because a writer also copies it. */
void st_tree_prefetch(const st_tree *tree, uint32_t table_id, uint64_t hash);

/* Build the directory of all pages of a table and check their headers. rest_ns: the thread rests so long after each
 * 200 us of work; 0: never. d->pages is allocated by malloc. Returns the number of buckets, or -1 with fault set (what
 * NULL: no memory). */
int64_t st_directory_build(const st_tree *tree, const st_layout *layout, uint32_t table_id, int64_t rest_ns,
                           st_directory *d, st_fault *fault);

/* Update d from n entries of the change log; entries of other tables are skipped. An entry whose page is gone belongs
 * to a bucket that was merged into another bucket, which has its own entry. Returns the number of pages found, or -1
 * with fault set (what NULL: no memory). */
int64_t st_directory_update(const st_tree *tree, const st_layout *layout, uint32_t table_id, const uint8_t *changes,
                            size_t n, st_directory *d, st_fault *fault);

#endif
