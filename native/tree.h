/* Reading LMDB's B+tree where it lies in the map, for what would cost a call of py-lmdb a key: listing all buckets of a
 * table, and finding those that a commit changed.
 *
 * The layout is that of data format 1 (LMDB 0.9; struct MDB_meta, MDB_page and MDB_node in its mdb.c), which LMDB
 * itself checks when it opens the file. Everything read is checked against the bounds of its page and of the file, so
 * a damaged file gives an error and no wild read. Pages of a snapshot do not change while its read transaction lives.
 */
#ifndef SHORTTAIL_TREE_H
#define SHORTTAIL_TREE_H

#include "page.h"

enum {
    ST_BUCKET_KEY_BYTES = 8,
    ST_CHANGE_BYTES = 12,   /* of an entry of the change log: table id, bucket key, both big-endian */
    ST_PAGE_KEY_BYTES = 13, /* 't' and the same: the key of a page image in LMDB */
    ST_DIRECTORY_DEPTH_MAX = 32, /* 2^32 entries of a directory are 32 GiB */
};

typedef struct {
    const uint8_t *base; /* of the map */
    uint64_t n_pages;    /* that the file has in this snapshot */
    uint64_t root;
    uint32_t depth; /* 0: no entries at all */
} st_tree;

typedef struct {
    const uint8_t **pages; /* 2^depth images; NULL for an empty table */
    uint32_t depth;
} st_directory;

/* What is wrong, and with the bucket of which key. */
typedef struct {
    const char *what; /* NULL: nothing */
    uint64_t key;
} st_fault;

enum { ST_TREE_OK = 0, ST_TREE_GONE = 1, ST_TREE_UNKNOWN = 2 };

/* The tree of the read transaction of that id; value is anywhere in a value that the transaction gave. ST_TREE_GONE:
 * two commits have been made since it began, so that its root is written nowhere any more. ST_TREE_UNKNOWN: these are
 * not pages of LMDB 0.9 with 4096 bytes. */
int st_tree_open(st_tree *tree, const uint8_t *value, uint64_t txn_id);

/* The bucket of the table that a hash belongs to: 1, and its key, image and the image's bytes; 0: the table is empty; -1:
 * damaged. */
int st_tree_bucket(const st_tree *tree, uint32_t table_id, uint64_t hash, uint64_t *key, const uint8_t **image,
                   uint64_t *bytes);

/* Have that part of the map read from disk and mapped: one call costs a tenth of a fault for each page. Pages come into
 * the system's cache one by one and not in large pieces (see tree.c). 0, or -1 where the system cannot. */
int st_populate(const uint8_t *start, size_t bytes);

/* Have that leaf of the tree brought from memory in which the next call for this hash, or one near to it, will search.
 * All of it: a writer copies it too. */
void st_tree_prefetch(const st_tree *tree, uint32_t table_id, uint64_t hash);

/* Directory of all pages of the table, whose headers are checked. d->pages comes from malloc. Returns the number of
 * buckets, or -1 with fault set (what NULL: no memory). */
int64_t st_directory_build(const st_tree *tree, const st_layout *layout, uint32_t table_id, st_directory *d,
                           st_fault *fault);

/* Point d at the present pages of those entries of a change log, n of them, that are of this table. A bucket that is
 * no more was merged into another one, which is an entry too. Returns how many pages were found, or -1. */
int64_t st_directory_update(const st_tree *tree, const st_layout *layout, uint32_t table_id, const uint8_t *changes,
                            size_t n, st_directory *d, st_fault *fault);

#endif
