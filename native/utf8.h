/* Checks that bytes are valid UTF-8 (RFC 3629), as every string of a store and of a request must be. */
#ifndef SHORTTAIL_UTF8_H
#define SHORTTAIL_UTF8_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline int is_ascii(const uint8_t *s, size_t n)
{
    uint64_t eight, all = 0;
    uint32_t first, last;
    size_t i;
    if (n >= 8) {
        for (i = 0; i < n - 8; i += 8) {
            memcpy(&eight, s + i, 8);
            all |= eight;
        }
        memcpy(&eight, s + n - 8, 8); /* overlaps the bytes read before */
        all |= eight;
    } else if (n >= 4) {
        memcpy(&first, s, 4);
        memcpy(&last, s + n - 4, 4);
        all = first | last;
    } else {
        for (i = 0; i < n; i++) all |= s[i];
    }
    return !(all & 0x8080808080808080u);
}

static inline int is_utf8(const uint8_t *s, size_t n)
{
    if (is_ascii(s, n)) return 1;
    for (size_t i = 0; i < n;) {
        uint8_t c = s[i++];
        if (c < 0x80) continue;
        size_t more = c >= 0xc2 && c <= 0xdf ? 1 : c >= 0xe0 && c <= 0xef ? 2 : c >= 0xf0 && c <= 0xf4 ? 3 : 0;
        if (!more || n - i < more) return 0;
        /* Refuse overlong forms, surrogates, and code points above U+10FFFF. */
        if ((c == 0xe0 && s[i] < 0xa0) || (c == 0xed && s[i] > 0x9f) || (c == 0xf0 && s[i] < 0x90) ||
            (c == 0xf4 && s[i] > 0x8f))
            return 0;
        for (; more; more--)
            if ((s[i++] & 0xc0) != 0x80) return 0;
    }
    return 1;
}

#endif
