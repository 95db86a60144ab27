#define _GNU_SOURCE /* fallocate */
#include "load.h"
#include "utf8.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "row.h"

enum {
    SLAB_BYTES = 4 << 20,
    SLAB_ALIGN = 2 << 20,   /* a huge page: page faults of 4 KiB pages would cost more than the rows themselves */
    BLOCK_BYTES = 16 << 10, /* a block stays in the L1 cache */
    BLOCK_ROWS_MIN = 16,    /* one cache line of a 4-byte column */
    BLOCK_ROWS_MAX = 256,
    GAP_BYTES = 4096, /* a smaller gap between rows and strings of a chunk is written as well */
};

/* ---- chunks ---------------------------------------------------------------------------------------------------- */

int st_load_init(st_load *l, const st_layout *layout, uint32_t bits, uint32_t skip_bits, size_t chunk_bytes,
                 size_t memory_limit)
{
    *l = (st_load){.layout = layout, .bits = bits, .skip_bits = skip_bits, .chunk_bytes = chunk_bytes,
                   .memory_limit = memory_limit};
    l->slab_chunks = chunk_bytes < SLAB_BYTES ? SLAB_BYTES / chunk_bytes : 1;
    l->block_rows = BLOCK_BYTES / layout->row_bytes / BLOCK_ROWS_MIN * BLOCK_ROWS_MIN;
    if (l->block_rows < BLOCK_ROWS_MIN) l->block_rows = BLOCK_ROWS_MIN;
    if (l->block_rows > BLOCK_ROWS_MAX) l->block_rows = BLOCK_ROWS_MAX;
    l->partitions = calloc((size_t)1 << bits, sizeof *l->partitions);
    l->block = malloc(l->block_rows * layout->row_bytes);
    l->hashes = malloc(l->block_rows * sizeof *l->hashes);
    return l->partitions && l->block && l->hashes ? ST_LOAD_OK : ST_LOAD_NO_MEMORY;
}

void st_load_free(st_load *l)
{
    for (size_t p = 0; l->partitions && p < (size_t)1 << l->bits; p++)
        for (st_chunk *chunk = l->partitions[p].first, *next; chunk; chunk = next) {
            next = chunk->next;
            if (chunk->own) free(chunk->data);
            free(chunk);
        }
    for (size_t s = 0; s < l->n_slabs; s++) free(l->slabs[s]);
    free(l->slabs);
    free(l->partitions);
    free(l->block);
    free(l->hashes);
    *l = (st_load){0};
}

static uint8_t *chunk_from_slab(st_load *l)
{
    size_t s = l->chunks_used / l->slab_chunks;
    if (s == l->n_slabs) {
        uint8_t **slabs = realloc(l->slabs, (s + 1) * sizeof *slabs);
        if (!slabs) return NULL;
        l->slabs = slabs;
        void *slab;
        if (posix_memalign(&slab, SLAB_ALIGN, l->slab_chunks * l->chunk_bytes)) return NULL;
#ifdef MADV_HUGEPAGE
        (void)madvise(slab, l->slab_chunks * l->chunk_bytes, MADV_HUGEPAGE); /* only speed depends on it */
#endif
        slabs[l->n_slabs++] = slab;
    }
    return l->slabs[s] + l->chunks_used++ % l->slab_chunks * l->chunk_bytes;
}

static int new_chunk(st_load *l, st_partition *p, size_t needed)
{
    if (needed > UINT32_MAX) return ST_LOAD_ROW_TOO_LONG; /* string references have 32 bits */
    st_chunk *chunk = malloc(sizeof *chunk);
    if (!chunk) return ST_LOAD_NO_MEMORY;
    *chunk = (st_chunk){.bytes = needed > l->chunk_bytes ? needed : l->chunk_bytes, .own = needed > l->chunk_bytes};
    chunk->data = chunk->own ? malloc(needed) : chunk_from_slab(l);
    if (!chunk->data) {
        free(chunk);
        return ST_LOAD_NO_MEMORY;
    }
    if (p->last) p->last->next = chunk; else p->first = chunk;
    p->last = chunk;
    p->row_end = chunk->data;
    p->heap = chunk->data + chunk->bytes;
    p->bytes += chunk->bytes;
    l->memory_bytes += chunk->bytes;
    return ST_LOAD_OK;
}

static inline st_partition *partition_of(const st_load *l, uint64_t hash)
{
    return &l->partitions[l->bits ? hash << l->skip_bits >> (64 - l->bits) : 0];
}

/* Make room for a row and its strings at the end of a partition, and count the row. */
static inline int make_room(st_load *l, st_partition *p, size_t heap_bytes)
{
    size_t needed = l->layout->row_bytes + heap_bytes;
    if (!p->row_end || (size_t)(p->heap - p->row_end) < needed) {
        int wrong = new_chunk(l, p, needed);
        if (wrong) return wrong;
    }
    p->last->n_rows++;
    p->n_rows++;
    l->n_rows++;
    l->heap_bytes += heap_bytes;
    return ST_LOAD_OK;
}

static inline void put_string(st_partition *p, uint8_t *reference, const uint8_t *from, uint32_t length)
{
    p->heap -= length;
    if (length) memcpy(p->heap, from, length);
    st_store32(reference, (uint32_t)(p->heap - p->last->data));
    st_store32(reference + 4, length);
}

int st_load_put(st_load *l, const st_item *item)
{
    st_partition *p = partition_of(l, item->hash);
    int wrong = make_room(l, p, st_heap_bytes(l->layout, item));
    if (wrong) return wrong;
    memcpy(p->row_end, item->row, l->layout->row_bytes);
    for (uint32_t s = 0; s < l->layout->n_strings; s++) {
        uint8_t *reference = p->row_end + l->layout->string_offsets[s];
        put_string(p, reference, item->heap + st_load32(reference), st_load32(reference + 4));
    }
    p->row_end += l->layout->row_bytes;
    return ST_LOAD_OK;
}

/* ---- columns into rows ----------------------------------------------------------------------------------------- */

static inline uint32_t string_length(const st_source *s, size_t i)
{
    return s->nulls && s->nulls[i] ? 0 : (uint32_t)(st_source_offset(s, i + 1) - st_source_offset(s, i));
}

size_t st_source_check(const st_source *s, size_t n, size_t n_values, size_t length_max)
{
    for (size_t i = 0; i < n; i++) {
        if (s->nulls && s->nulls[i]) continue;
        uint64_t start = st_source_offset(s, i), end = st_source_offset(s, i + 1);
        if (start > end || end > n_values || end - start > length_max) return i;
        if (!is_utf8(s->values + start, end - start)) return i;
    }
    return n;
}

/* Copy a column of fixed width into the rows of the block. */
static void put_values(uint8_t *to, size_t row_bytes, const uint8_t *values, uint32_t bytes, size_t n)
{
    if (bytes == 4) {
        for (size_t i = 0; i < n; i++, to += row_bytes) st_store32(to, st_load32(values + 4 * i));
    } else if (bytes == 8) {
        for (size_t i = 0; i < n; i++, to += row_bytes) memcpy(to, values + 8 * i, 8);
    } else if (bytes == 1) {
        for (size_t i = 0; i < n; i++, to += row_bytes) *to = values[i];
    } else {
        for (size_t i = 0; i < n; i++, to += row_bytes) memcpy(to, values + (size_t)bytes * i, bytes);
    }
}

/* Prefetch the next block's values: many columns are more streams than the hardware prefetcher follows. */
static inline void prefetch_values(const uint8_t *values, uint32_t bytes, size_t n)
{
    for (size_t at = 0; at < n * bytes; at += 64) __builtin_prefetch(values + at);
}

static int any_nan32(const uint8_t *values, size_t n)
{
    int found = 0;
    for (size_t i = 0; i < n; i++) found |= (st_load32(values + 4 * i) & 0x7fffffffu) > 0x7f800000u;
    return found;
}

static int any_nan64(const uint8_t *values, size_t n)
{
    int found = 0;
    for (size_t i = 0; i < n; i++) found |= (st_load64(values + 8 * i) & INT64_MAX) > 0x7ff0000000000000u;
    return found;
}

/* In the rows of the block where nulls is set (nulls NULL: where the value is NaN), set the null bit of feature f and
 * zero its value. */
static void set_nulls(const st_layout *l, uint32_t f, uint8_t *block, const uint8_t *nulls, size_t n)
{
    const st_field *field = &l->features[f];
    for (size_t i = 0; i < n; i++) {
        uint8_t *row = block + i * l->row_bytes, *value = row + field->offset;
        int null = nulls ? nulls[i] != 0 : field->code == ST_FLOAT32 ? any_nan32(value, 1) : any_nan64(value, 1);
        if (null) {
            memset(value, 0, field->bytes);
            row[l->null_offset + f / 8] |= (uint8_t)(1u << (f % 8));
        }
    }
}

/* Convert rows at .. at + n - 1 of the batch into the block, without string references, which depend on the chunk. */
static void fill_block(const st_load *load, const st_source *sources, size_t at, size_t n)
{
    const st_layout *l = load->layout;
    uint8_t *block = load->block;
    for (size_t i = 0; i < n; i++) memset(block + i * l->row_bytes + l->null_offset, 0, l->null_bytes);
    for (uint32_t k = 0; k < l->n_keys; k++)
        if (!l->key_is_string[k]) put_values(block + 8 * k, l->row_bytes, sources[k].values + 8 * at, 8, n);
    put_values(block + l->time_offset, l->row_bytes, sources[l->n_keys].values + 8 * at, 8, n);
    for (uint32_t f = 0; f < l->n_features; f++) {
        const st_source *s = &sources[l->n_keys + 1 + f];
        const st_field *field = &l->features[f];
        if (!st_is_string(field->code)) {
            const uint8_t *values = s->values + (size_t)field->bytes * at;
            prefetch_values(values + (size_t)field->bytes * n, field->bytes, n);
            put_values(block + field->offset, l->row_bytes, values, field->bytes, n);
            if ((field->code == ST_FLOAT32 && any_nan32(values, n)) || (field->code == ST_FLOAT64 && any_nan64(values, n)))
                set_nulls(l, f, block, NULL, n);
        }
        if (s->nulls) set_nulls(l, f, block, s->nulls + at, n);
    }
}

static uint64_t hash_of(const st_layout *l, const st_source *sources, const uint8_t *row, size_t i)
{
    uint64_t h = l->seed;
    for (uint32_t k = 0; k < l->n_keys; k++) {
        const st_source *s = &sources[k];
        h = l->key_is_string[k] ? st_hash_string(l, h, s->values + st_source_offset(s, i), string_length(s, i))
                                : st_hash_int(l, h, st_load64(row + 8 * k));
    }
    return st_hash_end(l, h);
}

/* The source of string column number s; keys come first, as in st_layout.string_offsets. */
static const st_source *string_source(const st_layout *l, const st_source *sources, uint32_t s)
{
    for (uint32_t c = 0; c < l->n_keys + l->n_features; c++) {
        int is_string = c < l->n_keys ? l->key_is_string[c] : st_is_string(l->features[c - l->n_keys].code);
        if (is_string && s-- == 0) return &sources[c < l->n_keys ? c : c + 1];
    }
    return NULL;
}

/* Copy row i of the batch, which is row b of the block, into its partition. */
static int scatter_row(st_load *load, const st_source *const *strings, size_t b, size_t i)
{
    const st_layout *l = load->layout;
    st_partition *p = partition_of(load, load->hashes[b]);
    size_t heap_bytes = 0;
    for (uint32_t s = 0; s < l->n_strings; s++) heap_bytes += string_length(strings[s], i);
    int wrong = make_room(load, p, heap_bytes);
    if (wrong) return wrong;
    memcpy(p->row_end, load->block + b * l->row_bytes, l->row_bytes);
    for (uint32_t s = 0; s < l->n_strings; s++)
        put_string(p, p->row_end + l->string_offsets[s], strings[s]->values + st_source_offset(strings[s], i),
                   string_length(strings[s], i));
    p->row_end += l->row_bytes;
    return ST_LOAD_OK;
}

int st_load_add(st_load *load, const st_source *sources, size_t *at, size_t n)
{
    const st_layout *l = load->layout;
    const st_source **strings = malloc((l->n_strings + 1) * sizeof *strings);
    if (!strings) return ST_LOAD_NO_MEMORY;
    for (uint32_t s = 0; s < l->n_strings; s++) strings[s] = string_source(l, sources, s);
    int wrong = ST_LOAD_OK;
    do {
        size_t rows = n - *at < load->block_rows ? n - *at : load->block_rows;
        fill_block(load, sources, *at, rows);
        for (size_t b = 0; b < rows; b++) {
            load->hashes[b] = hash_of(l, sources, load->block + b * l->row_bytes, *at + b);
            const uint8_t *to = partition_of(load, load->hashes[b])->row_end;
            if (to) __builtin_prefetch(to, 1);
        }
        for (size_t b = 0; b < rows && !wrong; b++) wrong = scatter_row(load, strings, b, *at + b);
        *at += rows;
    } while (!wrong && *at < n && load->memory_bytes < load->memory_limit);
    free(strings);
    return wrong;
}

/* ---- the file -------------------------------------------------------------------------------------------------- */

static int write_all(int fd, const uint8_t *data, size_t bytes, uint64_t at)
{
    while (bytes) {
        ssize_t done = pwrite(fd, data, bytes, (off_t)at);
        if (done < 0 && errno != EINTR) return errno;
        if (done > 0) {
            data += done;
            bytes -= (size_t)done;
            at += (uint64_t)done;
        }
    }
    return 0;
}

static int read_all(int fd, uint8_t *data, size_t bytes, uint64_t at)
{
    while (bytes) {
        ssize_t done = pread(fd, data, bytes, (off_t)at);
        if (done == 0) { /* the gap of the last chunk was not written, so the file may end early */
            memset(data, 0, bytes);
            return 0;
        }
        if (done < 0 && errno != EINTR) return errno;
        if (done > 0) {
            data += done;
            bytes -= (size_t)done;
            at += (uint64_t)done;
        }
    }
    return 0;
}

int st_load_spill(st_load *l, int fd)
{
    for (size_t i = 0; i < (size_t)1 << l->bits; i++) {
        st_partition *p = &l->partitions[i];
        for (st_chunk *chunk = p->first; chunk; chunk = chunk->next) {
            if (!chunk->data) continue;
            const uint8_t *end = chunk->data + chunk->bytes;
            const uint8_t *rows_end = chunk == p->last ? p->row_end : end, *heap = chunk == p->last ? p->heap : end;
            if (heap - rows_end < GAP_BYTES) rows_end = heap = end;
            int wrong = write_all(fd, chunk->data, (size_t)(rows_end - chunk->data), l->file_bytes);
            if (!wrong) wrong = write_all(fd, heap, (size_t)(end - heap), l->file_bytes + (uint64_t)(heap - chunk->data));
            if (wrong) return wrong;
            chunk->file_at = l->file_bytes;
            l->file_bytes += chunk->bytes;
            l->memory_bytes -= chunk->bytes;
            if (chunk->own) free(chunk->data);
            chunk->data = NULL;
        }
        p->row_end = p->heap = NULL;
    }
    l->chunks_used = 0;
    return 0;
}

size_t st_chunks_file_bytes(const st_chunk *from, const st_chunk *to)
{
    size_t bytes = 0;
    for (; from != to; from = from->next) bytes += from->data ? 0 : from->bytes;
    return bytes;
}

int st_chunks_read(const st_load *load, const st_chunk *from, const st_chunk *to, int fd, uint8_t *buffer,
                   st_item *items)
{
    const st_layout *l = load->layout;
    const st_chunk *read_to = from; /* chunks before it are already in the buffer */
    uint8_t *buffer_end = buffer;
    for (; from != to; from = from->next) {
        const uint8_t *data = from->data;
        if (!data) {
            if (read_to == from) { /* read it together with the chunks that follow it in the file */
                size_t bytes = 0;
                while (read_to != to && !read_to->data && read_to->file_at == from->file_at + bytes) {
                    bytes += read_to->bytes;
                    read_to = read_to->next;
                }
                int wrong = read_all(fd, buffer_end, bytes, from->file_at);
                if (wrong) return wrong;
                buffer_end += bytes;
            }
            data = buffer;
            buffer += from->bytes;
        } else {
            read_to = from->next;
        }
        for (uint32_t i = 0; i < from->n_rows; i++, items++) {
            items->row = data + (size_t)i * l->row_bytes;
            items->heap = data;
            items->hash = st_hash_row(l, items->row, data);
        }
    }
    return 0;
}

void st_partition_punch(const st_partition *p, int fd)
{
#ifdef FALLOC_FL_PUNCH_HOLE
    for (const st_chunk *chunk = p->first, *next; chunk; chunk = next) {
        uint64_t bytes = 0;
        for (next = chunk; next && !next->data && next->file_at == chunk->file_at + bytes; next = next->next)
            bytes += next->bytes;
        if (!bytes) /* the chunk is in memory */
            next = chunk->next;
        else
            (void)fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)chunk->file_at, (off_t)bytes);
    }
#else
    (void)p;
    (void)fd;
#endif
}
