/* MessagePack in C: a resumable scanner that checks limits, readers for messages that the scanner has passed, and a
 * writer.
 *
 * The scanner (mp_scan) is the only function here that sees bytes which nothing has checked. It stops at the end of a
 * complete message, or at the first byte that breaks a rule. The readers run on the same bytes afterwards, so they need
 * no bounds checks of their own.
 */
#ifndef SHORTTAIL_MSGPACK_H
#define SHORTTAIL_MSGPACK_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tensors are little-endian on the wire and are copied without conversion: build on a little-endian machine"
#endif

static inline uint16_t mp_be16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return __builtin_bswap16(v); }
static inline uint32_t mp_be32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return __builtin_bswap32(v); }
static inline uint64_t mp_be64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return __builtin_bswap64(v); }

/* -- scanner ---------------------------------------------------------------------------------------------- */

enum { MP_MAX_DEPTH = 32 };

enum mp_scan_result {
    MP_WHOLE,     /* a complete message ends at scan.position */
    MP_MORE,      /* no error so far; call again when more bytes have arrived */
    MP_TOO_LONG, MP_TOO_DEEP, MP_TOO_MANY, MP_NOT_MSGPACK
};

struct mp_limits { uint64_t frame_bytes; uint32_t nesting_depth; uint64_t declared_elements; };

/* The state of the scanner. Call mp_scan_reset before each message. Positions count from the message's first byte. */
struct mp_scan {
    uint64_t position;               /* of the next tag; past the data if the body of a string has not arrived */
    uint64_t declared;               /* array items and map pairs declared so far */
    uint64_t at_depth_2;             /* begin of the last value inside two containers: a call's last param */
    uint32_t depth;
    int ended;                       /* the last value's tag was read; its body may not have arrived */
    uint64_t left[MP_MAX_DEPTH];     /* values that are missing in each open container */
};

/* For the tags 0xc0 to 0xdf: bytes of the length field, and bytes of the body of fixed size. 0xc1 is never used. */
static const struct { uint8_t length, body; } mp_shape[32] = {
    {0, 0}, {0, 0}, {0, 0}, {0, 0},         /* nil, (never used), false, true */
    {1, 0}, {2, 0}, {4, 0},                 /* bin */
    {1, 1}, {2, 1}, {4, 1},                 /* ext: length, type */
    {0, 4}, {0, 8},                         /* float32, float64 */
    {0, 1}, {0, 2}, {0, 4}, {0, 8},         /* uint */
    {0, 1}, {0, 2}, {0, 4}, {0, 8},         /* int */
    {0, 2}, {0, 3}, {0, 5}, {0, 9}, {0, 17},/* fixext: type, body */
    {1, 0}, {2, 0}, {4, 0},                 /* str */
    {2, 0}, {4, 0},                         /* array */
    {2, 0}, {4, 0},                         /* map */
};

/* Read a length field of 1, 2 or 4 bytes. */
static inline uint64_t mp_length(const uint8_t *p, int bytes)
{
    return bytes == 1 ? *p : bytes == 2 ? mp_be16(p) : mp_be32(p);
}

/* Bytes of a whole scalar value that has no length field, such as a small integer (1); 0 for all other values. */
static inline uint32_t mp_fixed_bytes(uint8_t tag)
{
    if (tag < 0x80 || tag >= 0xe0)
        return 1;
    if (tag < 0xc0 || tag == 0xc1 || mp_shape[tag - 0xc0].length)
        return 0;
    return 1 + (uint32_t)mp_shape[tag - 0xc0].body;
}

/* Prepare for the next message. left[] need not be cleared: it is written before it is read. */
static inline void mp_scan_reset(struct mp_scan *s)
{
    s->position = s->declared = s->at_depth_2 = 0;
    s->depth = 0;
    s->ended = 0;
}

/* Scan the tag at data + s->position. On success, move past the tag and its body, even if the body has not arrived. */
static inline enum mp_scan_result mp_scan_value(struct mp_scan *s, const uint8_t *data, uint64_t size,
                                                const struct mp_limits *limits)
{
    const uint8_t *p = data + s->position;
    uint8_t tag = *p;
    uint64_t items = 0, bytes = 1;
    int container = 0, pairs = 0;

    if (tag < 0x80 || tag >= 0xe0) {
        /* a small integer */
    } else if (tag < 0xa0) {
        container = 1;
        pairs = tag < 0x90;
        items = tag & 0x0f;
    } else if (tag < 0xc0) {
        bytes += tag & 0x1f;
    } else {
        int length = mp_shape[tag - 0xc0].length;
        if (tag == 0xc1)
            return MP_NOT_MSGPACK;
        if (size - s->position < (uint64_t)1 + length)
            return MP_MORE;
        bytes += length + mp_shape[tag - 0xc0].body;
        if (tag >= 0xdc) {
            container = 1;
            pairs = tag >= 0xde;
            items = mp_length(p + 1, length);
        } else if (length) {
            bytes += mp_length(p + 1, length);
        }
    }
    if (s->position + bytes > limits->frame_bytes)
        return MP_TOO_LONG;
    if (s->depth == 2)
        s->at_depth_2 = s->position;
    if (container) {
        if (s->depth >= limits->nesting_depth)
            return MP_TOO_DEEP;
        s->declared += items;
        if (s->declared > limits->declared_elements)
            return MP_TOO_MANY;
        s->left[s->depth++] = pairs ? 2 * items : items;
    } else if (s->depth) {
        s->left[s->depth - 1]--;
    }
    while (s->depth && s->left[s->depth - 1] == 0) {
        s->depth--;
        if (s->depth)
            s->left[s->depth - 1]--;
    }
    s->ended = s->depth == 0;
    s->position += bytes;
    return MP_WHOLE;
}

/* Continue to scan where the last call stopped. data: the message from its first byte; size: the bytes that have
 * arrived. limits->nesting_depth must not exceed MP_MAX_DEPTH. */
static inline enum mp_scan_result mp_scan(struct mp_scan *s, const uint8_t *data, uint64_t size,
                                          const struct mp_limits *limits)
{
    while (!s->ended) {
        enum mp_scan_result result;
        if (s->depth) {
            /* Skip a run of numbers, except the last value of the container. The scanner spends half its time here. */
            uint64_t position = s->position, left = s->left[s->depth - 1];
            uint64_t end = size < limits->frame_bytes ? size : limits->frame_bytes;
            uint32_t bytes = 0;
            uint8_t last = 0xc1;
            while (left > 1 && position < end) {
                if (data[position] != last) { /* tags are mostly equal: the next position need not wait for a load */
                    last = data[position];
                    bytes = mp_fixed_bytes(last);
                    if (bytes == 0)
                        break;
                }
                position += bytes;
                left--;
            }
            s->position = position;
            s->left[s->depth - 1] = left;
            if (position > limits->frame_bytes)
                return MP_TOO_LONG;
        }
        if (s->position >= size)
            return s->position >= limits->frame_bytes ? MP_TOO_LONG : MP_MORE;
        result = mp_scan_value(s, data, size, limits);
        if (result != MP_WHOLE)
            return result;
    }
    return s->position <= size ? MP_WHOLE : MP_MORE;
}

/* -- reader ----------------------------------------------------------------------------------------------- */

enum mp_kind {
    MP_NIL, MP_BOOL, MP_INT, MP_BIG, /* an integer above 2^63 - 1 */
    MP_FLOAT, MP_STR, MP_BIN, MP_EXT, MP_ARRAY, MP_MAP
};

enum { MP_TIME_EXT = -1 };

struct mp_value {
    enum mp_kind kind;
    int ext;                /* the extension type, of an MP_EXT */
    uint32_t size;          /* bytes of a string, bin or ext; items of an array; pairs of a map */
    const uint8_t *body;    /* the first byte of a string, bin or ext */
    union { int64_t i; uint64_t u; double f; } number;
};

static inline const uint8_t *mp_span(const uint8_t *body, uint32_t size, enum mp_kind kind, struct mp_value *v)
{
    v->kind = kind;
    v->size = size;
    v->body = body;
    return body + size;
}

static inline const uint8_t *mp_open(const uint8_t *body, uint32_t size, enum mp_kind kind, struct mp_value *v)
{
    v->kind = kind;
    v->size = size;
    return body;
}

static inline const uint8_t *mp_int(const uint8_t *next, int64_t i, struct mp_value *v)
{
    v->kind = MP_INT;
    v->number.i = i;
    return next;
}

static inline const uint8_t *mp_ext(const uint8_t *type, uint32_t size, struct mp_value *v)
{
    v->ext = (int8_t)*type;
    return mp_span(type + 1, size, MP_EXT, v);
}

/* Read a value with a tag from 0xc0 to 0xdf; p is the byte after the tag. */
static inline const uint8_t *mp_read_tagged(uint8_t tag, const uint8_t *p, struct mp_value *v)
{
    uint32_t bits32;
    uint64_t bits64;
    float f;
    switch (tag) {
    case 0xc2: case 0xc3: v->kind = MP_BOOL; v->number.i = tag & 1; return p;
    case 0xc4: return mp_span(p + 1, *p, MP_BIN, v);
    case 0xc5: return mp_span(p + 2, mp_be16(p), MP_BIN, v);
    case 0xc6: return mp_span(p + 4, mp_be32(p), MP_BIN, v);
    case 0xc7: return mp_ext(p + 1, *p, v);
    case 0xc8: return mp_ext(p + 2, mp_be16(p), v);
    case 0xc9: return mp_ext(p + 4, mp_be32(p), v);
    case 0xca: bits32 = mp_be32(p); memcpy(&f, &bits32, 4); v->kind = MP_FLOAT; v->number.f = f; return p + 4;
    case 0xcb: bits64 = mp_be64(p); memcpy(&v->number.f, &bits64, 8); v->kind = MP_FLOAT; return p + 8;
    case 0xcc: return mp_int(p + 1, *p, v);
    case 0xcd: return mp_int(p + 2, mp_be16(p), v);
    case 0xce: return mp_int(p + 4, mp_be32(p), v);
    case 0xcf: v->number.u = mp_be64(p); v->kind = v->number.u >> 63 ? MP_BIG : MP_INT; return p + 8;
    case 0xd0: return mp_int(p + 1, (int8_t)*p, v);
    case 0xd1: return mp_int(p + 2, (int16_t)mp_be16(p), v);
    case 0xd2: return mp_int(p + 4, (int32_t)mp_be32(p), v);
    case 0xd3: return mp_int(p + 8, (int64_t)mp_be64(p), v);
    case 0xd4: case 0xd5: case 0xd6: case 0xd7: case 0xd8: return mp_ext(p, 1u << (tag - 0xd4), v);
    case 0xd9: return mp_span(p + 1, *p, MP_STR, v);
    case 0xda: return mp_span(p + 2, mp_be16(p), MP_STR, v);
    case 0xdb: return mp_span(p + 4, mp_be32(p), MP_STR, v);
    case 0xdc: return mp_open(p + 2, mp_be16(p), MP_ARRAY, v);
    case 0xdd: return mp_open(p + 4, mp_be32(p), MP_ARRAY, v);
    case 0xde: return mp_open(p + 2, mp_be16(p), MP_MAP, v);
    case 0xdf: return mp_open(p + 4, mp_be32(p), MP_MAP, v);
    default: v->kind = MP_NIL; return p;
    }
}

/* Read the value at p. Returns the byte after the value; for an array or a map, the byte of its first item. */
static inline const uint8_t *mp_read(const uint8_t *p, struct mp_value *v)
{
    uint8_t tag = *p++;
    if (tag < 0x80 || tag >= 0xe0)
        return mp_int(p, (int8_t)tag, v);
    if (tag < 0x90)
        return mp_open(p, tag & 0x0f, MP_MAP, v);
    if (tag < 0xa0)
        return mp_open(p, tag & 0x0f, MP_ARRAY, v);
    if (tag < 0xc0)
        return mp_span(p, tag & 0x1f, MP_STR, v);
    return mp_read_tagged(tag, p, v);
}

/* Read a MessagePack timestamp as microseconds since 1970 UTC; nanoseconds are rounded down. Returns 0, or -1 if the value is
 * not a timestamp or may not fit. */
static inline int mp_time_us(const struct mp_value *v, int64_t *us)
{
    uint32_t nanoseconds = 0;
    uint64_t both;
    int64_t seconds;
    if (v->ext != MP_TIME_EXT)
        return -1;
    switch (v->size) {
    case 4: seconds = mp_be32(v->body); break;
    case 8: both = mp_be64(v->body); nanoseconds = (uint32_t)(both >> 34); seconds = both & 0x3ffffffff; break;
    case 12: nanoseconds = mp_be32(v->body); seconds = (int64_t)mp_be64(v->body + 4); break;
    default: return -1;
    }
    if (nanoseconds > 999999999 || __builtin_mul_overflow(seconds, 1000000, us) ||
        __builtin_add_overflow(*us, nanoseconds / 1000, us))
        return -1;
    return 0;
}

/* Read up to n integers from *p into out, and stop at the first value that is not an integer. Moves *p past what was
 * read, and returns how many integers that was. */
static inline uint32_t mp_read_i64s(const uint8_t **p, uint32_t n, int64_t *out)
{
    uint32_t i;
    for (i = 0; i < n; i++) {
        struct mp_value v;
        const uint8_t *end;
        if (**p == 0xce) { /* uint32: most ids */
            out[i] = mp_be32(*p + 1);
            *p += 5;
            continue;
        }
        end = mp_read(*p, &v);
        if (v.kind != MP_INT)
            break;
        out[i] = v.number.i;
        *p = end;
    }
    return i;
}

/* As mp_read_i64s, but reads floats and integers as doubles. */
static inline uint32_t mp_read_f64s(const uint8_t **p, uint32_t n, double *out)
{
    uint32_t i;
    for (i = 0; i < n; i++) {
        struct mp_value v;
        const uint8_t *end;
        if (**p == 0xcb) {
            uint64_t bits = mp_be64(*p + 1);
            memcpy(&out[i], &bits, 8);
            *p += 9;
            continue;
        }
        end = mp_read(*p, &v);
        if (v.kind == MP_FLOAT)
            out[i] = v.number.f;
        else if (v.kind == MP_INT)
            out[i] = (double)v.number.i;
        else
            break;
        *p = end;
    }
    return i;
}

/* Return the byte after the value at p, including all that a container holds. */
static inline const uint8_t *mp_skip(const uint8_t *p)
{
    uint64_t left = 1;
    struct mp_value v;
    while (left--) {
        p = mp_read(p, &v);
        if (v.kind == MP_ARRAY)
            left += v.size;
        else if (v.kind == MP_MAP)
            left += 2 * (uint64_t)v.size;
    }
    return p;
}

/* -- writer ----------------------------------------------------------------------------------------------- */

struct mp_out { uint8_t *data; size_t size, capacity; };

/* Make room for `bytes` more bytes. The mp_put functions do not check: call this before them. Returns -1 if there is
 * no memory. */
static inline int mp_reserve(struct mp_out *out, size_t bytes)
{
    size_t capacity = out->capacity;
    uint8_t *grown;
    if (bytes <= capacity - out->size)
        return 0;
    capacity = capacity * 2 > out->size + bytes ? capacity * 2 : out->size + bytes + 256;
    grown = realloc(out->data, capacity);
    if (grown == NULL)
        return -1;
    out->data = grown;
    out->capacity = capacity;
    return 0;
}

static inline void mp_put_raw(struct mp_out *out, const void *bytes, size_t size)
{
    memcpy(out->data + out->size, bytes, size);
    out->size += size;
}

static inline void mp_put_byte(struct mp_out *out, uint8_t byte) { out->data[out->size++] = byte; }

/* Write a tag and the low `bytes` bytes of value, big-endian. */
static inline uint8_t *mp_store(uint8_t *p, uint8_t tag, uint64_t value, int bytes)
{
    uint64_t big = __builtin_bswap64(value << (64 - 8 * bytes));
    *p++ = tag;
    memcpy(p, &big, bytes);
    return p + bytes;
}

static inline uint8_t *mp_store_uint(uint8_t *p, uint64_t v)
{
    if (v < 0x80) {
        *p = (uint8_t)v;
        return p + 1;
    }
    return v <= UINT8_MAX ? mp_store(p, 0xcc, v, 1) : v <= UINT16_MAX ? mp_store(p, 0xcd, v, 2)
         : v <= UINT32_MAX ? mp_store(p, 0xce, v, 4) : mp_store(p, 0xcf, v, 8);
}

static inline uint8_t *mp_store_int(uint8_t *p, int64_t v)
{
    if (v >= 0)
        return mp_store_uint(p, (uint64_t)v);
    if (v >= -32) {
        *p = (uint8_t)v;
        return p + 1;
    }
    return v >= INT8_MIN ? mp_store(p, 0xd0, (uint8_t)v, 1) : v >= INT16_MIN ? mp_store(p, 0xd1, (uint16_t)v, 2)
         : v >= INT32_MIN ? mp_store(p, 0xd2, (uint32_t)v, 4) : mp_store(p, 0xd3, (uint64_t)v, 8);
}

static inline void mp_put_int(struct mp_out *out, int64_t v)
{
    out->size = (size_t)(mp_store_int(out->data + out->size, v) - out->data);
}

/* Write the header of an array (at most 5 bytes). */
static inline void mp_put_array(struct mp_out *out, uint64_t items)
{
    uint8_t *p = out->data + out->size;
    if (items < 16)
        *p++ = (uint8_t)(0x90 | items);
    else
        p = items <= UINT16_MAX ? mp_store(p, 0xdc, items, 2) : mp_store(p, 0xdd, items, 4);
    out->size = (size_t)(p - out->data);
}

/* Write the header of a string (at most 5 bytes). */
static inline void mp_put_str(struct mp_out *out, uint64_t bytes)
{
    uint8_t *p = out->data + out->size;
    if (bytes < 32)
        *p++ = (uint8_t)(0xa0 | bytes);
    else
        p = bytes <= UINT8_MAX ? mp_store(p, 0xd9, bytes, 1)
          : bytes <= UINT16_MAX ? mp_store(p, 0xda, bytes, 2) : mp_store(p, 0xdb, bytes, 4);
    out->size = (size_t)(p - out->data);
}

/* Write the header of an ext (at most 6 bytes). The fixext forms, for 1, 2, 4, 8 or 16 bytes, are not used: readers
 * accept both. */
static inline void mp_put_ext(struct mp_out *out, int type, uint64_t bytes)
{
    uint8_t *p = out->data + out->size;
    p = bytes <= UINT8_MAX ? mp_store(p, 0xc7, bytes, 1)
      : bytes <= UINT16_MAX ? mp_store(p, 0xc8, bytes, 2) : mp_store(p, 0xc9, bytes, 4);
    *p++ = (uint8_t)type;
    out->size = (size_t)(p - out->data);
}

#endif
