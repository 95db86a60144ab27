/* Finds where one MessagePack message ends, without decoding it, and reads the head of a MessagePack-RPC reply.
 *
 * The scan needs no stack: it only counts the values that are still to come. So it can stop where the bytes that have
 * arrived end and go on when there are more, and a large reply is walked once however many reads it takes.
 */
#ifndef SHORTTAIL_BENCH_MSGPACK_SCAN_H
#define SHORTTAIL_BENCH_MSGPACK_SCAN_H

#include <stddef.h>
#include <stdint.h>

struct scan {
    size_t position;  /* first byte not looked at yet; may lie beyond what has arrived */
    uint64_t missing; /* values still to come before the message is whole */
};

enum scan_result { SCAN_WHOLE, SCAN_MORE, SCAN_INVALID };

static inline uint64_t read_big_endian(const uint8_t *p, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value = value << 8 | p[i];
    return value;
}

static inline void scan_start(struct scan *s, size_t position)
{
    s->position = position;
    s->missing = 1;
}

/* The types 0xc0..0xdf: bytes of a length field after the tag, then bytes of payload besides what that field says. */
static const struct {
    uint8_t length_bytes, fixed_bytes;
} scan_types[32] = {
    {0, 0}, {0, 0}, {0, 0}, {0, 0},          /* c0 nil, c1 (never used), c2 false, c3 true */
    {1, 0}, {2, 0}, {4, 0},                  /* c4 bin */
    {1, 1}, {2, 1}, {4, 1},                  /* c7 ext: a type byte besides the length */
    {0, 4}, {0, 8},                          /* ca float */
    {0, 1}, {0, 2}, {0, 4}, {0, 8},          /* cc uint */
    {0, 1}, {0, 2}, {0, 4}, {0, 8},          /* d0 int */
    {0, 2}, {0, 3}, {0, 5}, {0, 9}, {0, 17}, /* d4 fixext */
    {1, 0}, {2, 0}, {4, 0},                  /* d9 str */
    {2, 0}, {4, 0}, {2, 0}, {4, 0},          /* dc array, de map: the length counts values, not bytes */
};

/* Walk on from s over data[0..size). SCAN_WHOLE: s->position is the end of the message. */
static inline enum scan_result scan_message(struct scan *s, const uint8_t *data, size_t size)
{
    while (s->missing > 0) {
        if (s->position >= size)
            return SCAN_MORE;
        uint8_t tag = data[s->position];
        uint64_t values = 0, bytes = 1;
        if (tag < 0x80 || tag >= 0xe0) {
            /* a small whole number: the tag is all */
        } else if (tag < 0x90) {
            values = 2u * (tag & 15u);
        } else if (tag < 0xa0) {
            values = tag & 15u;
        } else if (tag < 0xc0) {
            bytes += tag & 31u;
        } else {
            int length_bytes = scan_types[tag - 0xc0].length_bytes;
            if (tag == 0xc1)
                return SCAN_INVALID;
            if (s->position + 1 + (size_t)length_bytes > size)
                return SCAN_MORE;
            uint64_t length = read_big_endian(data + s->position + 1, length_bytes);
            bytes += (uint64_t)length_bytes + scan_types[tag - 0xc0].fixed_bytes;
            if (tag >= 0xde)
                values = 2 * length;
            else if (tag >= 0xdc)
                values = length;
            else
                bytes += length;
        }
        s->position += bytes;
        s->missing += values - 1;
    }
    return s->position <= size ? SCAN_WHOLE : SCAN_MORE;
}

struct reply_head {
    uint64_t msgid;
    int is_error;
    size_t error_at; /* where the error value starts, when is_error */
};

/* The head of a whole message [1, msgid, error, result]. 0, or -1 when it is something else. */
static inline int read_reply_head(const uint8_t *data, size_t size, struct reply_head *head)
{
    if (size < 5 || data[0] != 0x94 || data[1] != 1)
        return -1;
    size_t at = 3;
    uint8_t tag = data[2];
    if (tag < 0x80) {
        head->msgid = tag;
    } else if (tag >= 0xcc && tag <= 0xcf) {
        int bytes = 1 << (tag - 0xcc);
        if (size < at + (size_t)bytes + 2)
            return -1;
        head->msgid = read_big_endian(data + at, bytes);
        at += (size_t)bytes;
    } else {
        return -1;
    }
    head->is_error = data[at] != 0xc0;
    head->error_at = at;
    return 0;
}

#endif
