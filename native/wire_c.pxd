# Cython declarations of msgpack.h, tensor.h, utf8.h and mapped.h.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "msgpack.h" nogil:
    cdef enum:
        MP_WHOLE, MP_MORE, MP_TOO_LONG, MP_TOO_DEEP, MP_TOO_MANY, MP_NOT_MSGPACK
    cdef enum:
        MP_NIL, MP_BOOL, MP_INT, MP_BIG, MP_FLOAT, MP_STR, MP_BIN, MP_EXT, MP_ARRAY, MP_MAP
    cdef enum:
        MP_MAX_DEPTH, MP_TIME_EXT

    ctypedef struct mp_limits "struct mp_limits":
        uint64_t frame_bytes
        uint32_t nesting_depth
        uint64_t declared_elements
    ctypedef struct mp_scan "struct mp_scan":
        uint64_t position, declared, at_depth_2
    void mp_scan_reset(mp_scan *s)
    int mp_scan_on "mp_scan"(mp_scan *s, const uint8_t *data, uint64_t size, const mp_limits *limits)

    ctypedef union mp_number:
        int64_t i
        uint64_t u
        double f
    ctypedef struct mp_value "struct mp_value":
        int kind
        int ext
        uint32_t size
        const uint8_t *body
        mp_number number
    const uint8_t *mp_read(const uint8_t *p, mp_value *v)
    int mp_time_us(const mp_value *v, int64_t *us)
    uint32_t mp_read_i64s(const uint8_t **p, uint32_t n, int64_t *out)
    uint32_t mp_read_f64s(const uint8_t **p, uint32_t n, double *out)
    const uint8_t *mp_skip(const uint8_t *p)

    ctypedef struct mp_out "struct mp_out":
        uint8_t *data
        size_t size
        size_t capacity
    int mp_reserve(mp_out *out, size_t bytes)
    void mp_put_raw(mp_out *out, const void *bytes, size_t size)
    void mp_put_byte(mp_out *out, uint8_t byte)
    void mp_put_int(mp_out *out, int64_t v)
    void mp_put_array(mp_out *out, uint64_t items)
    void mp_put_str(mp_out *out, uint64_t bytes)


cdef extern from "tensor.h" nogil:
    cdef enum:
        TENSOR_EXT, TENSOR_MAX_DIMS
        ELEMENT_BOOL, ELEMENT_I32, ELEMENT_I64, ELEMENT_F32, ELEMENT_F64, ELEMENT_OBJECT, ELEMENT_TIME, ELEMENT_U8
        TENSOR_NO_TIME
    int element_bytes(int code)

    ctypedef struct tensor "struct tensor":
        int code
        int n_dims
        uint32_t dims[8]
        uint64_t elements
        const uint8_t *data
    int tensor_read(const uint8_t *payload, uint32_t size, tensor *t)
    int64_t tensor_i64(const tensor *t, uint64_t i)
    double tensor_f64(const tensor *t, uint64_t i)

    ctypedef struct array_part "struct array_part":
        int code
        int n_dims
        int64_t dims[8]
        const uint8_t *data
    uint64_t part_elements(const array_part *s, int from_dim)
    uint64_t part_list_bytes(const array_part *s)
    void put_lists(mp_out *out, const array_part *s, int dim, const uint8_t **data)
    void put_lists_or_nil(mp_out *out, const array_part *s, const uint8_t *missing)
    int put_tensor(mp_out *out, const array_part *s)


cdef extern from "utf8.h" nogil:
    bint is_utf8(const uint8_t *s, size_t n)


cdef extern from "mapped.h" nogil:
    int mapped_reserve(mp_out *b, size_t bytes)
    void mapped_drop(mp_out *b)
    bint mapped_drop_on()
