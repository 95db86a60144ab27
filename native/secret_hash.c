#include "secret_hash.h"

#include "row.h"

typedef struct {
    uint64_t v0, v1, v2, v3;
} sip;

static inline uint64_t rotated(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

static inline void rounds(sip *s, int n)
{
    for (int i = 0; i < n; i++) {
        s->v0 += s->v1, s->v1 = rotated(s->v1, 13) ^ s->v0, s->v0 = rotated(s->v0, 32);
        s->v2 += s->v3, s->v3 = rotated(s->v3, 16) ^ s->v2;
        s->v0 += s->v3, s->v3 = rotated(s->v3, 21) ^ s->v0;
        s->v2 += s->v1, s->v1 = rotated(s->v1, 17) ^ s->v2, s->v2 = rotated(s->v2, 32);
    }
}

static inline void add(sip *s, uint64_t word)
{
    s->v3 ^= word;
    rounds(s, 2);
    s->v0 ^= word;
}

/* A message is made of whole words, so that no word spans two columns: of an integer 0 and its value, of a string one
 * more than its length and its bytes, padded with zeros. No two keys have the same words. */
static inline uint64_t add_string(sip *s, const uint8_t *data, uint64_t length)
{
    uint64_t at = 0, last = 0;
    add(s, length + 1);
    for (; at + 8 <= length; at += 8) add(s, st_load64(data + at));
    if (at == length) return 1 + length / 8;
    memcpy(&last, data + at, length - at);
    add(s, last);
    return 2 + length / 8;
}

void st_secret_hashes(const uint8_t *secret, const st_source *columns, size_t n_keys, size_t n, uint8_t *out)
{
    const uint64_t k0 = st_load64(secret), k1 = st_load64(secret + 8);
    const sip start = {k0 ^ 0x736f6d6570736575u, k1 ^ 0x646f72616e646f6du ^ 0xee, k0 ^ 0x6c7967656e657261u,
                       k1 ^ 0x7465646279746573u};
    for (size_t i = 0; i < n; i++, out += 16) {
        sip s = start;
        uint64_t words = 0;
        for (size_t k = 0; k < n_keys; k++) {
            const st_source *c = &columns[k];
            if (c->offsets) {
                uint64_t from = st_source_offset(c, i);
                words += add_string(&s, c->values + from, st_source_offset(c, i + 1) - from);
            } else {
                add(&s, 0);
                add(&s, st_load64(c->values + 8 * i));
                words += 2;
            }
        }
        add(&s, words << 59); /* the top byte is the length of the message in bytes, modulo 256 */
        s.v2 ^= 0xee;
        rounds(&s, 4);
        st_store64(out, s.v0 ^ s.v1 ^ s.v2 ^ s.v3);
        s.v1 ^= 0xdd;
        rounds(&s, 4);
        st_store64(out + 8, s.v0 ^ s.v1 ^ s.v2 ^ s.v3);
    }
}
