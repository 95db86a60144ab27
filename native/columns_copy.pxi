# Copies request columns to the buffers of a batch: model inputs and arguments of on-demand functions.


cdef class CopyColumns:
    """CopyColumns(ops): copies request columns to fixed places in output arrays.

    ops: tuples (column number, output number, offset). offset: the first output column; a Vector(n) fills n of them.
    """

    def __cinit__(self, ops):
        cdef Py_ssize_t k
        self._keep = tuple(ops)
        self.n_ops = len(self._keep)
        self.op = <int *>calloc(max(1, 3 * self.n_ops), sizeof(int))
        if self.op is NULL:
            raise MemoryError
        for k in range(self.n_ops):
            self.op[3 * k], self.op[3 * k + 1], self.op[3 * k + 2] = self._keep[k]

    def __dealloc__(self):
        free(self.op)

    def run(self, Columns columns, outputs):
        """Copy all rows. outputs: C-contiguous arrays [n] or [n, width] of float32, float64, int64, int32 or bool.

        Strings are copied to arrays of objects, a null as "". A null becomes NaN in a float array. Raises
        InvalidArgument for an array of another type.
        """
        cdef Py_ssize_t k, n = columns.n_rows
        cdef column_t *col
        cdef char *data
        for k in range(self.n_ops):
            col = &columns.col[self.op[3 * k]]
            out = outputs[self.op[3 * k + 1]]
            offset = self.op[3 * k + 2]
            if col.kind == KIND_STR:
                values = ["" if text is None else text for text in columns.column(columns.names[self.op[3 * k]])]
                if out.ndim == 1:
                    out[:] = values
                else:
                    out[:, offset] = values
                continue
            stride = out.shape[1] if out.ndim == 2 else 1
            data = <char *>cnp.PyArray_DATA(out)
            code = out.dtype.char
            if code == "f":
                _copy_f32(col, n, <float *>data + <Py_ssize_t>offset, stride)
            elif code == "d":
                _copy_f64(col, n, <double *>data + <Py_ssize_t>offset, stride)
            elif code == "l" or code == "q":
                _copy_i64(col, n, <int64_t *>data + <Py_ssize_t>offset, stride)
            elif code == "i":
                _copy_i32(col, n, <int32_t *>data + <Py_ssize_t>offset, stride)
            elif code == "?":
                _copy_bool(col, n, <uint8_t *>data + <Py_ssize_t>offset, stride)
            else:
                raise InvalidArgument(f"a request column cannot fill an array of {out.dtype}")


ctypedef fused target_t:
    float
    double
    int64_t
    int32_t
    uint8_t


cdef inline void _copy(column_t *col, Py_ssize_t n, target_t *out, Py_ssize_t stride) noexcept nogil:
    cdef Py_ssize_t i, k
    cdef bint to_float = target_t is float or target_t is double
    for i in range(n):
        if col.kind == KIND_VEC:
            for k in range(col.width):
                if col.item == 8:
                    out[i * stride + k] = <target_t>(<double *>col.data)[i * col.width + k]
                else:
                    out[i * stride + k] = <target_t>(<float *>col.data)[i * col.width + k]
        elif col.kind == KIND_F64:
            out[i * stride] = <target_t>(<double *>col.data)[i]
        elif to_float and col.nulls[i]:
            out[i * stride] = <target_t>NAN
        else:
            out[i * stride] = <target_t>(<int64_t *>col.data)[i]


cdef void _copy_f32(column_t *col, Py_ssize_t n, float *out, Py_ssize_t stride) noexcept nogil:
    _copy(col, n, out, stride)


cdef void _copy_f64(column_t *col, Py_ssize_t n, double *out, Py_ssize_t stride) noexcept nogil:
    _copy(col, n, out, stride)


cdef void _copy_i64(column_t *col, Py_ssize_t n, int64_t *out, Py_ssize_t stride) noexcept nogil:
    _copy(col, n, out, stride)


cdef void _copy_i32(column_t *col, Py_ssize_t n, int32_t *out, Py_ssize_t stride) noexcept nogil:
    _copy(col, n, out, stride)


cdef void _copy_bool(column_t *col, Py_ssize_t n, uint8_t *out, Py_ssize_t stride) noexcept nogil:
    _copy(col, n, out, stride)
