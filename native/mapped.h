/* Buffers of messages of any size, on Linux. A large one has a mapping of its own, for two reasons: it grows by
 * mremap(2) without a copy, and its memory is given back in parts. The system takes 0.1 ms to take back 1 MiB, and more
 * on some virtual machines, which an event loop must not spend for 16 MiB at once. */

#ifndef SHORTTAIL_MAPPED_H
#define SHORTTAIL_MAPPED_H

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "msgpack.h"

#define MAPPED_MIN ((size_t)256 << 10) /* a buffer with more capacity is a mapping */
#define DROP_BYTES ((size_t)256 << 10) /* given back at once */
#define DROPPED_MAX ((size_t)256 << 20)

/* At the start of a mapping that is given back. */
struct dropped { struct dropped *next; size_t bytes; };

static struct dropped *dropped;
static size_t dropped_bytes;

/* Make room for `bytes` more bytes, as mp_reserve does. Returns -1 if there is no memory. */
static inline int mapped_reserve(struct mp_out *b, size_t bytes)
{
    size_t wanted = b->size + bytes, capacity = 2 * b->capacity > wanted ? 2 * b->capacity : wanted + 256;
    void *grown;
    if (wanted <= b->capacity)
        return 0;
    if (capacity <= MAPPED_MIN)
        return mp_reserve(b, bytes);
    if (b->capacity > MAPPED_MIN) {
        grown = mremap(b->data, b->capacity, capacity, MREMAP_MAYMOVE);
    } else {
        grown = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (grown != MAP_FAILED && b->size)
            memcpy(grown, b->data, b->size);
        if (grown != MAP_FAILED)
            free(b->data);
    }
    if (grown == MAP_FAILED)
        return -1;
    b->data = grown;
    b->capacity = capacity;
    return 0;
}

/* Empty a buffer. mapped_drop_on gives back the memory of a large one. */
static inline void mapped_drop(struct mp_out *b)
{
    if (b->capacity <= MAPPED_MIN) {
        free(b->data);
    } else if (dropped_bytes + b->capacity > DROPPED_MAX) {
        munmap(b->data, b->capacity);
    } else {
        struct dropped *d = (struct dropped *)b->data;
        d->next = dropped;
        d->bytes = b->capacity;
        dropped = d;
        dropped_bytes += d->bytes;
    }
    memset(b, 0, sizeof *b);
}

/* Give back a part of what was dropped. Returns whether there is more. */
static inline int mapped_drop_on(void)
{
    struct dropped *d = dropped;
    size_t kept;
    if (d == NULL)
        return 0;
    kept = (d->bytes - 1) / DROP_BYTES * DROP_BYTES;
    dropped_bytes -= d->bytes - kept;
    if (kept == 0)
        dropped = d->next;
    munmap((char *)d + kept, d->bytes - kept);
    if (kept)
        d->bytes = kept;
    return dropped != NULL;
}

#endif
