/* Arrays in messages: nested MessagePack lists, or the tensor ext type.
 *
 * Tensor payload: u8 element code, u8 number of dimensions (0 to 8), a u32 little-endian size per dimension, then the
 * elements, little-endian, in C order. The codes are those of shorttail.define.dtypes, and ELEMENT_U8 for statuses. A
 * time is an int64 of microseconds since 1970; a missing time is TENSOR_NO_TIME.
 */
#ifndef SHORTTAIL_TENSOR_H
#define SHORTTAIL_TENSOR_H

#include "msgpack.h"

enum { TENSOR_EXT = 1, TENSOR_MAX_DIMS = 8 };
enum {
    ELEMENT_BOOL = 1, ELEMENT_I32 = 2, ELEMENT_I64 = 3, ELEMENT_F32 = 4, ELEMENT_F64 = 5, ELEMENT_OBJECT = 6,
    ELEMENT_TIME = 7, ELEMENT_U8 = 9
};
#define TENSOR_NO_TIME INT64_MIN

static inline int element_bytes(int code)
{
    switch (code) {
    case ELEMENT_BOOL: case ELEMENT_U8: return 1;
    case ELEMENT_I32: case ELEMENT_F32: return 4;
    case ELEMENT_I64: case ELEMENT_F64: case ELEMENT_TIME: return 8;
    default: return 0;
    }
}

struct tensor { int code, n_dims; uint32_t dims[TENSOR_MAX_DIMS]; uint64_t elements; const uint8_t *data; };

/* Reads the head of a payload. Returns 0, or -1 if it is not a tensor: unknown code, too many dimensions, or a payload
 * size that does not match the dimensions. */
static inline int tensor_read(const uint8_t *payload, uint32_t size, struct tensor *t)
{
    int k, bytes;
    if (size < 2)
        return -1;
    t->code = payload[0];
    t->n_dims = payload[1];
    bytes = element_bytes(t->code);
    if (bytes == 0 || t->n_dims > TENSOR_MAX_DIMS || size < 2 + 4 * (uint32_t)t->n_dims)
        return -1;
    t->data = payload + 2 + 4 * t->n_dims;
    t->elements = 1;
    for (k = 0; k < t->n_dims; k++) {
        memcpy(&t->dims[k], payload + 2 + 4 * k, 4);
        /* Each product is checked against the payload's size (u32), so both factors are below 2^32: no overflow. */
        t->elements *= t->dims[k];
        if (t->elements > size)
            return -1;
    }
    return t->elements * bytes == size - 2 - 4 * (uint32_t)t->n_dims ? 0 : -1;
}

/* Returns element i as a number. memcpy, because the payload is not aligned. */
static inline int64_t tensor_i64(const struct tensor *t, uint64_t i)
{
    int32_t i32;
    int64_t i64;
    if (t->code == ELEMENT_I64 || t->code == ELEMENT_TIME) {
        memcpy(&i64, t->data + 8 * i, 8);
        return i64;
    }
    if (t->code == ELEMENT_I32) {
        memcpy(&i32, t->data + 4 * i, 4);
        return i32;
    }
    return t->code == ELEMENT_BOOL ? t->data[i] != 0 : t->data[i];
}

static inline double tensor_f64(const struct tensor *t, uint64_t i)
{
    float f32;
    double f64;
    if (t->code == ELEMENT_F64) {
        memcpy(&f64, t->data + 8 * i, 8);
        return f64;
    }
    if (t->code == ELEMENT_F32) {
        memcpy(&f32, t->data + 4 * i, 4);
        return f32;
    }
    return (double)tensor_i64(t, i);
}

/* -- writing ---------------------------------------------------------------------------------------------- */

/* A range of rows of a C-contiguous array. dims[0] is the number of rows. */
struct array_part { int code, n_dims; int64_t dims[TENSOR_MAX_DIMS]; const uint8_t *data; };

static inline uint64_t part_elements(const struct array_part *s, int from_dim)
{
    uint64_t n = 1;
    for (; from_dim < s->n_dims; from_dim++)
        n *= (uint64_t)s->dims[from_dim];
    return n;
}

/* Returns an upper bound of the bytes that the nested lists need: 9 per element, 5 per list header. */
static inline uint64_t part_list_bytes(const struct array_part *s)
{
    uint64_t headers = 1, total = 0;
    int k;
    for (k = 0; k < s->n_dims; k++) {
        total += 5 * headers;
        headers *= (uint64_t)s->dims[k];
    }
    return total + 9 * headers;
}

static inline void put_elements(struct mp_out *out, int code, const uint8_t *data, uint64_t n)
{
    uint8_t *p = out->data + out->size;
    uint64_t i, bits64;
    uint32_t bits32;
    int32_t i32;
    int64_t i64;
    switch (code) {
    case ELEMENT_F32:
        for (i = 0; i < n; i++) {
            memcpy(&bits32, data + 4 * i, 4);
            p = mp_store(p, 0xca, bits32, 4);
        }
        break;
    case ELEMENT_F64:
        for (i = 0; i < n; i++) {
            memcpy(&bits64, data + 8 * i, 8);
            p = mp_store(p, 0xcb, bits64, 8);
        }
        break;
    case ELEMENT_I64:
        for (i = 0; i < n; i++) {
            memcpy(&i64, data + 8 * i, 8);
            p = mp_store_int(p, i64);
        }
        break;
    case ELEMENT_I32:
        for (i = 0; i < n; i++) {
            memcpy(&i32, data + 4 * i, 4);
            p = mp_store_int(p, i32);
        }
        break;
    case ELEMENT_U8:
        for (i = 0; i < n; i++)
            p = mp_store_uint(p, data[i]);
        break;
    default:
        for (i = 0; i < n; i++)
            *p++ = data[i] ? 0xc3 : 0xc2;
    }
    out->size = (size_t)(p - out->data);
}

/* Writes dimension `dim` and the dimensions inside it as lists, and moves *data past the elements. The caller reserves
 * part_list_bytes first. */
static inline void put_lists(struct mp_out *out, const struct array_part *s, int dim, const uint8_t **data)
{
    int64_t i;
    if (dim == s->n_dims) {
        put_elements(out, s->code, *data, 1);
        *data += element_bytes(s->code);
        return;
    }
    mp_put_array(out, (uint64_t)s->dims[dim]);
    if (dim == s->n_dims - 1) {
        put_elements(out, s->code, *data, (uint64_t)s->dims[dim]);
        *data += s->dims[dim] * element_bytes(s->code);
        return;
    }
    for (i = 0; i < s->dims[dim]; i++)
        put_lists(out, s, dim + 1, data);
}

/* Writes the whole array as lists, with nil instead of row i if missing[i] is not 0. */
static inline void put_lists_or_nil(struct mp_out *out, const struct array_part *s, const uint8_t *missing)
{
    const uint8_t *data = s->data;
    uint64_t row_bytes = part_elements(s, 1) * element_bytes(s->code);
    int64_t i;
    mp_put_array(out, (uint64_t)s->dims[0]);
    for (i = 0; i < s->dims[0]; i++) {
        if (missing[i]) {
            mp_put_byte(out, 0xc0);
            data += row_bytes;
        } else {
            put_lists(out, s, 1, &data);
        }
    }
}

/* Writes the array as a tensor ext. Returns 0, or -1 if there is no memory or the payload is over 4 GiB. */
static inline int put_tensor(struct mp_out *out, const struct array_part *s)
{
    uint64_t bytes = part_elements(s, 0) * element_bytes(s->code);
    uint64_t payload = 2 + 4 * (uint64_t)s->n_dims + bytes;
    uint32_t dim;
    int k;
    if (payload > UINT32_MAX || mp_reserve(out, payload + 6) < 0)
        return -1;
    mp_put_ext(out, TENSOR_EXT, payload);
    mp_put_byte(out, (uint8_t)s->code);
    mp_put_byte(out, (uint8_t)s->n_dims);
    for (k = 0; k < s->n_dims; k++) {
        dim = (uint32_t)s->dims[k];
        mp_put_raw(out, &dim, 4);
    }
    mp_put_raw(out, s->data, bytes);
    return 0;
}

#endif
