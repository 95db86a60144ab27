/* Merges sorted rows into the buckets of a table: the inner loop of an upsert. */
#ifndef SHORTTAIL_MERGE_H
#define SHORTTAIL_MERGE_H

#include "overlay.h"
#include "tree.h"

enum { ST_AHEAD = 8 /* rows whose buckets are found and prefetched in advance; a power of two */ };

typedef struct {
    uint8_t key[ST_PAGE_KEY_BYTES]; /* LMDB key */
    size_t offset;                  /* offset in the arena */
    uint32_t bytes;
} st_image;

typedef struct {
    uint64_t key;
    const uint8_t *page; /* NULL: the table is empty */
    uint64_t bytes;
} st_found;

/* The state of a merge. The caller sets tree .. arena_bytes, images and images_max, and owns all memory except
 * scratch and the overlay's blocks. */
typedef struct {
    const st_tree *tree; /* the table before the merge */
    const st_layout *layout;
    uint32_t table_id;
    uint64_t commit; /* the number of the commit that writes the images */
    uint32_t depth_grow; /* see st_splitter */
    const st_item *rows; /* sorted; of equal keys, in the order given */
    size_t n;
    int64_t now_us; /* see st_dedupe */
    st_overlay *overlay; /* the same; NULL: all rows give all features */
    size_t next; /* index of the first row that is not merged yet */
    uint8_t *arena;
    size_t arena_bytes;
    st_image *images;
    size_t images_max;
    size_t n_images;
    st_item *scratch;
    size_t scratch_items;
    st_found ahead[ST_AHEAD];
    size_t looked; /* the buckets of all rows before this index have been found */
    st_lost lost;  /* rows that were merged and not kept; the caller sets its rows and n_rows */
} st_merger;

enum { ST_MERGE_OK = 0, ST_MERGE_ROOM = 1 /* the arena is too small for the next bucket's images */ };

/* Build images of the next buckets with their new rows, until the arena or images is full or next reaches n. A stored
 * row is kept if its event time is later than the new row's; new rows without a time get theirs, and features that new
 * rows do not give stay. Returns ST_MERGE_OK, ST_MERGE_ROOM, or -1 with fault set (what NULL: no memory). */
int st_merge(st_merger *m, st_fault *fault);
void st_merge_free(st_merger *m);

#endif
