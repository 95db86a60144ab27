# Encoding of results, from NumPy arrays into the output buffer of a connection, the rows of one request at a time; and
# of errors.


cdef int _reserve(mp_out *out, size_t bytes) except -1:
    """Make room for `bytes` more bytes, as the mp_put functions need."""
    if mp_reserve(out, bytes) < 0:
        raise MemoryError
    return 0


cdef int _reserve_mapped(mp_out *out, size_t bytes) except -1:
    """Make room for `bytes` more bytes in a buffer that mapped_drop empties."""
    if mapped_reserve(out, bytes) < 0:
        raise MemoryError
    return 0


cdef int _put_bytes(mp_out *out, bytes piece) except -1:
    _reserve(out, len(piece))
    mp_put_raw(out, <const char *>piece, len(piece))
    return 0


cdef int _put_text(mp_out *out, str text) except -1:
    cdef Py_ssize_t size
    cdef const char *utf8
    try:
        utf8 = PyUnicode_AsUTF8AndSize(text, &size)
    except UnicodeEncodeError:  # a lone surrogate: MessagePack strings have to be UTF-8
        text = text.encode("utf-8", "replace").decode()
        utf8 = PyUnicode_AsUTF8AndSize(text, &size)
    _reserve(out, size + 5)
    mp_put_str(out, size)
    mp_put_raw(out, utf8, size)
    return 0


cdef int _put_statuses(mp_out *out, const uint8_t *statuses, Py_ssize_t rows, bint as_tensor) except -1:
    cdef array_part part
    part.code = ELEMENT_U8
    part.n_dims = 1
    part.dims[0] = rows
    part.data = statuses
    if as_tensor:
        if put_tensor(out, &part) < 0:
            raise MemoryError
        return 0
    _reserve(out, part_list_bytes(&part))
    put_lists(out, &part, 0, &part.data)
    return 0


cdef class Encoder:
    def __cinit__(self, list names):
        self.names = names
        self.n = len(names)
        self.copies = []
        self.stop_at = <size_t>-1
        self.parts = <array_part *>calloc(max(1, self.n), sizeof(array_part))
        if self.parts is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.parts)

    cdef int set_arrays(self, list outputs, Py_ssize_t n_rows) except -1:
        """Take the outputs [(name, array)] of a result; the caller keeps the list alive. Raises Internal.

        Returns 1, or 0 if the number or the names of the outputs differ from those of this Encoder.
        """
        cdef tuple output
        cdef int k
        if len(outputs) != self.n:
            return 0
        self.copies.clear()
        for k in range(self.n):
            output = outputs[k]
            if output[0] is not self.names[k] and output[0] != self.names[k]:
                return 0
            array = _prepare(output[1], &self.parts[k])
            if array is not output[1]:
                self.copies.append(array)
            if self.parts[k].dims[0] != n_rows:
                raise Internal(f"'{output[0]}' has {self.parts[k].dims[0]} rows for a batch of {n_rows}: "
                               f"the first dimension of every output must be the batch")
        return 1

    cdef int put_rows(self, mp_out *out, int k, Py_ssize_t first, Py_ssize_t rows, bint as_tensor,
                 const uint8_t *missing) except -1:
        """Encode rows [first, first + rows) of array k. missing: a byte per row, not 0 for nil; NULL: no row is nil."""
        cdef array_part part = self.parts[k]
        cdef Py_ssize_t row_bytes
        part.dims[0] = rows
        if part.code == ELEMENT_OBJECT:
            row_bytes = part_elements(&part, 1) * sizeof(PyObject *)
            part.data += first * row_bytes
            _put_objects(out, &part, 0, &part.data, self.stop_at)
            if out.size > self.stop_at:
                raise _reply_too_long()
            return 0
        row_bytes = part_elements(&part, 1) * element_bytes(part.code)
        part.data += first * row_bytes
        if out.size + (rows * row_bytes if as_tensor else part_list_bytes(&part)) > self.stop_at:
            raise _reply_too_long()
        if as_tensor:
            if put_tensor(out, &part) < 0:
                raise MemoryError
            return 0
        _reserve(out, part_list_bytes(&part))
        if missing is NULL:
            put_lists(out, &part, 0, &part.data)
        else:
            put_lists_or_nil(out, &part, missing)
        return 0


cdef object _prepare(array, array_part *s):
    """Describe a NumPy array in `s`. Returns the array, or a copy that is contiguous and has a type that is sent."""
    cdef int k
    cdef int code = _element_code(array)
    if code == 0:
        kind, size = array.dtype.kind, array.dtype.itemsize
        if kind == "f" and size == 2:
            array = array.astype(np.float32)
        elif kind == "i" or (kind == "u" and size < 8):
            array = array.astype(np.int64)
        elif kind == "U":
            array = array.astype(object)
        else:
            raise Internal(f"values of type {array.dtype} cannot be sent: cast them in the model")
        code = _element_code(array)
    if not cnp.PyArray_IS_C_CONTIGUOUS(array):
        array = np.ascontiguousarray(array)
    s.code = code
    s.n_dims = cnp.PyArray_NDIM(array)
    if not 1 <= s.n_dims <= TENSOR_MAX_DIMS:
        raise Internal(f"an array of {s.n_dims} dimensions cannot be sent; 1 to {TENSOR_MAX_DIMS} can")
    for k in range(s.n_dims):
        s.dims[k] = cnp.PyArray_DIM(array, k)
    s.data = <const uint8_t *>cnp.PyArray_DATA(array)
    return array


cdef int _element_code(cnp.ndarray array) noexcept:
    """Return the element code of the array's dtype, or 0 if arrays of this dtype are not sent."""
    cdef int number = cnp.PyArray_TYPE(array)
    if number == cnp.NPY_FLOAT32:
        return ELEMENT_F32
    if number == cnp.NPY_FLOAT64:
        return ELEMENT_F64
    if number == cnp.NPY_INT64:
        return ELEMENT_I64
    if number == cnp.NPY_INT32:
        return ELEMENT_I32
    if number == cnp.NPY_BOOL:
        return ELEMENT_BOOL
    if number == cnp.NPY_UINT8:
        return ELEMENT_U8
    if number == cnp.NPY_OBJECT:
        return ELEMENT_OBJECT
    return 0


cdef object _reply_too_long():
    return ResourceExhausted(f"an answer of more than {REPLY_BYTES} bytes; ask for fewer rows")


cdef int _put_objects(mp_out *out, const array_part *s, int dim, const uint8_t **data, size_t stop_at) except -1:
    """Encode strings, and None as nil. Tensors have no strings, so this is a list in both encodings."""
    cdef int64_t i
    if dim < s.n_dims:
        _reserve(out, 5)
        mp_put_array(out, s.dims[dim])
        for i in range(s.dims[dim]):
            _put_objects(out, s, dim + 1, data, stop_at)
        return 0
    if out.size > stop_at:
        raise _reply_too_long()
    item = <object>(<PyObject **>data[0])[0]
    data[0] += sizeof(PyObject *)
    if item is None:
        _reserve(out, 1)
        mp_put_byte(out, 0xC0)
    elif isinstance(item, str):
        _put_text(out, item)
    elif isinstance(item, bytes):
        _put_text(out, item.decode("utf-8", "replace"))
    else:
        raise Internal(f"a value of type {type(item).__name__} cannot be sent as a string")
    return 0


cdef enum:  # the form of errors: ERROR_FORMS of server/settings.py
    ERROR_MAP = 0       # {"code": code, "message": message}
    ERROR_STRING = 1    # "CODE: message"
    ERROR_LIST = 2      # [number of the code in gRPC, "CODE: message"]

cdef dict _GRPC = {
    "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5, "PERMISSION_DENIED": 7, "RESOURCE_EXHAUSTED": 8,
    "INTERNAL": 13, "UNAVAILABLE": 14, "UNAUTHENTICATED": 16,
}


cdef bytes _packed_error(str code, str message, int form):
    """Encode an error in one of the forms above."""
    error = {"code": code, "message": message}
    if form == ERROR_STRING:
        error = f"{code}: {message}"
    elif form == ERROR_LIST:
        error = [_GRPC.get(code, 2), f"{code}: {message}"]
    return msgpack.packb(error, unicode_errors="replace")
