/* See overlay.h. */
#include "overlay.h"

#include <stdlib.h>

#include "row.h"

enum { BLOCK_BYTES = 64 << 10 };

void st_overlay_start(st_overlay *overlay, const st_layout *l, const st_item *item)
{
    for (uint32_t f = 0; f < l->n_features; f++) overlay->origins[f] = item;
}

void st_overlay_take(st_overlay *overlay, const st_layout *l, const st_item *item, const uint8_t *given)
{
    for (uint32_t f = 0; f < l->n_features; f++)
        if (!given || given[f / 8] >> (f % 8) & 1) overlay->origins[f] = item;
}

static uint8_t *allocate(st_overlay *overlay, size_t bytes)
{
    if (!overlay->blocks || overlay->blocks->bytes - overlay->used < bytes) {
        size_t room = bytes > BLOCK_BYTES ? bytes : BLOCK_BYTES;
        st_overlay_block *block = malloc(sizeof *block + room);
        if (!block) return NULL;
        block->next = overlay->blocks;
        block->bytes = room;
        overlay->blocks = block;
        overlay->used = 0;
    }
    uint8_t *start = overlay->blocks->data + overlay->used;
    overlay->used += bytes;
    return start;
}

static uint32_t string_length(const st_item *item, uint32_t offset) { return st_load32(item->row + offset + 4); }

/* Copy the string at this offset of an item's row to heap, and refer to it in row. Returns the end of the heap. */
static uint8_t *put_string(uint8_t *row, uint32_t offset, const st_item *item, uint8_t *heap)
{
    uint32_t length = string_length(item, offset);
    if (length) memcpy(heap, item->heap + st_load32(item->row + offset), length);
    st_store32(row + offset, (uint32_t)(heap - row));
    st_store32(row + offset + 4, length);
    return heap + length;
}

int st_overlay_end(st_overlay *overlay, const st_layout *l, const st_item *last, st_item *made)
{
    size_t bytes = l->row_bytes;
    int whole = 1;
    for (uint32_t k = 0; k < l->n_keys; k++)
        if (l->key_is_string[k]) bytes += string_length(last, 8 * k);
    for (uint32_t f = 0; f < l->n_features; f++) {
        whole &= overlay->origins[f] == last;
        if (st_is_string(l->features[f].code)) bytes += string_length(overlay->origins[f], l->features[f].offset);
    }
    if (whole) {
        *made = *last;
        return 0;
    }
    uint8_t *row = allocate(overlay, bytes);
    if (!row) return -1;
    uint8_t *heap = row + l->row_bytes;
    memcpy(row, last->row, l->row_bytes);
    for (uint32_t k = 0; k < l->n_keys; k++)
        if (l->key_is_string[k]) heap = put_string(row, 8 * k, last, heap);
    for (uint32_t f = 0; f < l->n_features; f++) {
        const st_field *field = &l->features[f];
        const st_item *from = overlay->origins[f];
        uint32_t at = l->null_offset + f / 8;
        uint8_t bit = (uint8_t)(1u << (f % 8));
        row[at] = (uint8_t)((row[at] & ~bit) | (from->row[at] & bit));
        if (st_is_string(field->code))
            heap = put_string(row, field->offset, from, heap);
        else
            memcpy(row + field->offset, from->row + field->offset, field->bytes);
    }
    *made = (st_item){.hash = last->hash, .row = row, .heap = row};
    return 0;
}

void st_overlay_reset(st_overlay *overlay)
{
    if (!overlay->blocks) return;
    for (st_overlay_block *block = overlay->blocks->next, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    overlay->blocks->next = NULL;
    overlay->used = 0;
}

void st_overlay_free(st_overlay *overlay)
{
    st_overlay_reset(overlay);
    free(overlay->blocks);
    overlay->blocks = NULL;
}
