/* Rows that give only some of the features of a table: what they leave out comes from the rows that they replace. */
#ifndef SHORTTAIL_OVERLAY_H
#define SHORTTAIL_OVERLAY_H

#include "page.h"

typedef struct st_overlay_block {
    struct st_overlay_block *next;
    size_t bytes;
    uint8_t data[];
} st_overlay_block;

/* The caller sets given and origins, which has room for the features, and owns them. The rows that st_overlay_end makes
 * lie in the blocks, until st_overlay_reset. */
struct st_overlay {
    const uint8_t *const *given; /* for each of st_lost.pushes: a bit for each feature that it gives; NULL: all */
    const st_item **origins;     /* for each feature: the item whose value is kept */
    st_overlay_block *blocks;    /* the newest first */
    size_t used;                 /* bytes of the newest block */
};

/* Begin with an item: all values are those of its row. */
void st_overlay_start(st_overlay *overlay, const st_layout *layout, const st_item *item);
/* Take the values that an item gives from its row. given: a bit for each feature; NULL: all. */
void st_overlay_take(st_overlay *overlay, const st_layout *layout, const st_item *item, const uint8_t *given);
/* Make the row of all values, with the key and the event time of `last`, the last item that was taken. Returns 0, or -1
 * without memory. A row of more than 4 GiB has wrong strings, but no page image can hold it. */
int st_overlay_end(st_overlay *overlay, const st_layout *layout, const st_item *last, st_item *made);

/* Forget the rows that were made. */
void st_overlay_reset(st_overlay *overlay);
void st_overlay_free(st_overlay *overlay);

#endif
