# secret_hashes, for the list of erased keys. Part of pages.pyx; see secret_hash.h.

def secret_hashes(bytes secret not None, columns, size_t n):
    """Return the keyed hashes of n keys, 16 bytes each.

    secret: 16 bytes. columns: (values, offsets, None) per key column, as in RowPartitions.add(). Strings must have
    passed first_bad_string(). Releases the GIL. Raises ValueError if a buffer has a wrong length.
    """
    cdef _Sources sources = _Sources()
    cdef size_t i, n_keys = len(columns)
    cdef st_source *source
    cdef Py_buffer *view
    cdef const uint8_t *key = secret
    cdef uint8_t *out
    if len(secret) != 16:
        raise ValueError(f"a secret of {len(secret)} bytes")
    sources.hold(columns)
    for i, (values, offsets, _) in enumerate(columns):
        source = &sources.sources[i]
        view = sources.view(values)
        source.values = <const uint8_t *>view.buf
        if offsets is None:
            if <size_t>view.len != 8 * n:
                raise ValueError(f"column {i}: values of {view.len} bytes")
        else:
            view = sources.view(offsets)
            source.offsets = view.buf
            source.offset_bytes = <uint32_t>(view.len // (n + 1))
            if <size_t>view.len != (n + 1) * source.offset_bytes or source.offset_bytes not in (4, 8):
                raise ValueError(f"column {i}: offsets of {view.len} bytes")
    hashes = PyBytes_FromStringAndSize(NULL, 16 * n)
    out = <uint8_t *>PyBytes_AS_STRING(hashes)
    with nogil:
        st_secret_hashes(key, sources.sources, n_keys, n, out)
    return hashes
