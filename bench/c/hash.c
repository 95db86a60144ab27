/* An in-memory hash table of rows with the loops and the prefetching of shorttail's lookup: what a lookup could cost if
 * rows need not lie in a file, be shared between processes, or be written while they are read. For bench/micro/lookup.py.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 64 };

typedef struct {
    int64_t key;
    uint32_t row;
    uint32_t used;
} slot;

typedef struct {
    slot *slots;
    uint64_t mask;
    uint8_t *rows;
    uint32_t row_bytes;
} table;

static uint64_t hash(int64_t key)
{
    unsigned __int128 product = (unsigned __int128)((uint64_t)key ^ 0x9e3779b97f4a7c15u) * 0xd6e8feb86659fd93u;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* rows: n * row_bytes, kept by the caller. At most half full. NULL: no memory. */
table *table_new(const int64_t *keys, uint8_t *rows, uint64_t n, uint32_t row_bytes)
{
    table *t = malloc(sizeof *t);
    uint64_t size = 16;
    while (size < 2 * n) size *= 2;
    if (!t) return NULL;
    *t = (table){.slots = calloc(size, sizeof(slot)), .mask = size - 1, .rows = rows, .row_bytes = row_bytes};
    if (!t->slots) return NULL;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t at = hash(keys[i]) & t->mask;
        while (t->slots[at].used) at = (at + 1) & t->mask;
        t->slots[at] = (slot){.key = keys[i], .row = (uint32_t)i, .used = 1};
    }
    return t;
}

void table_free(table *t)
{
    free(t->slots);
    free(t);
}

/* out: n * row_bytes; status: 0 found, 2 not. */
void table_lookup(const table *t, const int64_t *keys, uint64_t n, uint8_t *out, uint8_t *status)
{
    const slot *slots[CHUNK];
    const uint8_t *rows[CHUNK];
    for (uint64_t start = 0; start < n; start += CHUNK) {
        uint32_t m = n - start < CHUNK ? (uint32_t)(n - start) : CHUNK;
        for (uint32_t i = 0; i < m; i++) {
            slots[i] = &t->slots[hash(keys[start + i]) & t->mask];
            __builtin_prefetch(slots[i]);
        }
        for (uint32_t i = 0; i < m; i++) {
            const slot *s = slots[i];
            while (s->used && s->key != keys[start + i]) s = s == &t->slots[t->mask] ? t->slots : s + 1;
            rows[i] = s->used ? t->rows + (uint64_t)s->row * t->row_bytes : NULL;
            for (uint32_t b = 0; rows[i] && b < t->row_bytes; b += 64) __builtin_prefetch(rows[i] + b);
        }
        for (uint32_t i = 0; i < m; i++) {
            uint8_t *to = out + (start + i) * t->row_bytes;
            status[start + i] = rows[i] ? 0 : 2;
            if (rows[i]) memcpy(to, rows[i], t->row_bytes); else memset(to, 0, t->row_bytes);
        }
    }
}
