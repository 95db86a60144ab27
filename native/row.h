/* Access to page fields and the hash of keys, shared by page.c, lookup.c and load.c. Part of the table format. */
#ifndef SHORTTAIL_ROW_H
#define SHORTTAIL_ROW_H

#include <string.h>

#include "page.h"

/* Rows have any length, so nothing in a row is aligned: memcpy instead of pointer casts. */
static inline uint16_t st_load16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static inline uint32_t st_load32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static inline uint64_t st_load64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static inline void st_store16(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }
static inline void st_store32(uint8_t *p, uint32_t v) { memcpy(p, &v, 4); }
static inline void st_store64(uint8_t *p, uint64_t v) { memcpy(p, &v, 8); }

/* Header: rows u16 | tag bytes u16 | local depth u8 | page format u8, 0 for format 2 | LMDB pages u16. It is short so that
 * LMDB's page header, this header and up to 40 tags share one cache line: a lookup reads only that line and the row. All
 * other fields are in the footer: table id u32 | row bytes u32 | heap start u32 | CRC-32C u32 of all bytes before it. In
 * format 3, the number of the commit, u64, comes before the footer. */
static inline uint32_t st_rows(const uint8_t *page) { return st_load16(page); }
static inline uint32_t st_tag_bytes(const uint8_t *page) { return st_load16(page + 2); }
static inline uint32_t st_depth(const uint8_t *page) { return page[4]; }
static inline uint32_t st_image_bytes(const uint8_t *page)
{
    return st_load16(page + 6) * (uint32_t)ST_PAGE_BYTES - ST_PAGE_OVERHEAD;
}
static inline uint8_t st_format_byte(const st_layout *l) { return l->page_format > 2 ? (uint8_t)l->page_format : 0; }
static inline const uint8_t *st_footer(const uint8_t *page) { return page + st_image_bytes(page) - ST_FOOTER_BYTES; }
static inline const uint8_t *st_row(const st_layout *l, const uint8_t *page, uint32_t i)
{
    return page + ST_HEADER_BYTES + st_tag_bytes(page) + (size_t)i * l->row_bytes;
}

/* Whether a value is a reference to bytes in the heap. */
static inline int st_is_string(uint32_t code) { return code == ST_STRING || code == ST_BLOB; }

#define ST_MIX_INT 0x9e3779b97f4a7c15u
#define ST_MIX_LENGTH 0xd1b54a32d192ed03u
#define ST_MIX_END 0x8bb84b93962eacc9u

/* The xor of both halves of the 128-bit product: every bit of the result depends on every bit of a and b. */
static inline uint64_t st_fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* The hash of a key: start with h = seed, add each key column, then call st_hash_end. Both factors of every product
 * depend on the table's random seed (h and second come from it), so a client cannot choose keys that collide. */
static inline uint64_t st_hash_int(const st_layout *l, uint64_t h, uint64_t value)
{
    return st_fold(value ^ h, l->second ^ ST_MIX_INT);
}

/* Load the last length % 16 bytes of a string into two words, padded with zeros. Overlapping loads and shifts avoid
 * both a call of memcpy and reads outside the string. */
static inline void st_load_tail(const uint8_t *data, size_t length, uint64_t *x, uint64_t *y)
{
    size_t tail = length & 15;
    const uint8_t *from = data + length - tail, *end = data + length;
    *y = 0;
    if (tail > 8) {
        *x = st_load64(from);
        *y = st_load64(end - 8) >> (8 * (16 - tail));
    } else if (length >= 8) {
        *x = st_load64(end - 8) >> (8 * (8 - tail));
    } else if (tail >= 4) {
        *x = st_load32(from) | (uint64_t)st_load32(end - 4) << (8 * (tail - 4));
    } else {
        *x = from[0] | (uint64_t)from[tail / 2] << (8 * (tail / 2)) | (uint64_t)end[-1] << (8 * (tail - 1));
    }
}

static inline uint64_t st_hash_string(const st_layout *l, uint64_t h, const uint8_t *data, size_t length)
{
    h = st_fold(h ^ length, l->second ^ ST_MIX_LENGTH);
    for (size_t at = 0; at + 16 <= length; at += 16)
        h = st_fold(st_load64(data + at) ^ h, st_load64(data + at + 8) ^ l->second);
    if (length & 15) {
        uint64_t x, y;
        st_load_tail(data, length, &x, &y);
        h = st_fold(x ^ h, y ^ l->second);
    }
    return h;
}

static inline uint64_t st_hash_end(const st_layout *l, uint64_t h) { return st_fold(h ^ l->second, ST_MIX_END ^ l->seed); }

/* A tag is the lowest byte of the hash: buckets use the top bits, so tags within a bucket still differ. */
static inline uint8_t st_tag(uint64_t hash) { return (uint8_t)hash; }

#endif
