/* Merging sorted rows into the buckets of a table: the writer's inner loop. */
#ifndef SHORTTAIL_MERGE_H
#define SHORTTAIL_MERGE_H

#include "tree.h"

enum { ST_AHEAD = 8 /* buckets that are found before they are needed; a power of two */ };

typedef struct {
    uint8_t key[ST_PAGE_KEY_BYTES]; /* in LMDB */
    size_t offset;                  /* in the arena */
    uint32_t bytes;
} st_image;

typedef struct {
    uint64_t key;
    const uint8_t *page; /* NULL: the table is empty */
    uint64_t bytes;
} st_found;

/* Set by the caller: tree .. arena_bytes, images, images_max. All memory but scratch is the caller's. */
typedef struct {
    const st_tree *tree; /* has the table as it is */
    const st_layout *layout;
    uint32_t table_id;
    uint32_t depth_grow; /* see st_splitter */
    const st_item *rows; /* sorted, one for each key */
    size_t n;
    size_t next; /* first row that is not merged yet */
    uint8_t *arena;
    size_t arena_bytes;
    st_image *images;
    size_t images_max;
    size_t n_images;
    st_item *scratch;
    size_t scratch_items;
    st_found ahead[ST_AHEAD];
    size_t looked; /* rows before this one have their bucket in ahead */
} st_merger;

enum { ST_MERGE_OK = 0, ST_MERGE_ROOM = 1 /* the arena is too small for the next bucket's images */ };

/* Build the images of the next buckets that rows belong to, until arena or images are full or next reaches n. A stored
 * row with a later event time than the new one stays. ST_MERGE_OK, ST_MERGE_ROOM, or -1 with fault (what NULL: no memory). */
int st_merge(st_merger *m, st_fault *fault);
void st_merge_free(st_merger *m);

#endif
