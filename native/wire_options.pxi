# The options of a request: the last param, a map.

cdef enum:  # the options that a method takes besides deadline_ms and traceparent
    DELETE_OPTIONS = 0      # none
    FEATURES_OPTIONS = 1    # as_of, encoding, priority
    PUSH_OPTIONS = 2        # partial
    PREDICT_OPTIONS = 3     # as_of, encoding, priority, statuses, version


cdef uint32_t SHOWN_BYTES = 256     # of a value in an error message
cdef uint32_t TRACEPARENT_BYTES_MIN = 55
cdef uint32_t TRACEPARENT_BYTES = LIMITS.traceparent_bytes


cdef str _text(const mp_value *v):
    return v.body[:v.size].decode("utf-8", "replace")


cdef str _short_text(const mp_value *v):
    """Return the begin of a string, for a message."""
    return v.body[:min(v.size, SHOWN_BYTES)].decode("utf-8", "replace")


cdef object _shown(const uint8_t *p, const uint8_t *end):
    """Return the value at p for a message, or how long it is."""
    return repr(_as_python(p)) if end - p <= SHOWN_BYTES else f"a value of {end - p} bytes"


cdef bint _is(const mp_value *v, const char *text, uint32_t size) noexcept:
    return v.size == size and memcmp(v.body, text, size) == 0


cdef int _default_options(options_t *options, int flags, Router router) except -1:
    """Set the options to those of a request without options."""
    options.flags = flags
    options.priority = 1
    options.arrived_ns = router.arrived_ns
    options.deadline_ns = 0
    options.version = -1
    options.as_of_us = AT_LOOKUP
    options.trace = NULL
    return 0


cdef int _read_options(const uint8_t *p, int takes, options_t *options) except -1:
    """Read the map of options at p. takes: one of the *_OPTIONS. Raises InvalidArgument, DeadlineExceeded."""
    cdef mp_value v, name
    cdef uint32_t k
    cdef const uint8_t *value
    p = mp_read(p, &v)
    if v.kind == MP_NIL:
        return 0
    if v.kind != MP_MAP:
        raise InvalidArgument("options must be a map")
    for k in range(v.size):
        value = mp_read(p, &name)
        if name.kind != MP_STR:
            raise InvalidArgument(f"unknown option {_shown(p, mp_skip(p))}: the name of an option is a string")
        p = _read_option(&name, value, takes, options)
    return 0


cdef const uint8_t *_read_option(const mp_value *name, const uint8_t *p, int takes, options_t *options) except NULL:
    """Read the option `name`, whose value is at p, and return the byte after the value."""
    cdef mp_value v
    cdef const uint8_t *end = mp_skip(p)
    cdef double milliseconds
    mp_read(p, &v)
    if _is(name, b"deadline_ms", 11):
        if v.kind != MP_INT and v.kind != MP_FLOAT or v.kind == MP_FLOAT and v.number.f != v.number.f:
            raise InvalidArgument(f"option 'deadline_ms' must be a number of milliseconds; got {_shown(p, end)}")
        milliseconds = v.number.f if v.kind == MP_FLOAT else <double>v.number.i
        if milliseconds <= 0:
            raise DeadlineExceeded(f"deadline_ms {milliseconds:g}: the deadline had passed when the request came")
        options.deadline_ns = options.arrived_ns + <int64_t>(min(milliseconds, 1e9) * 1e6)
    elif _is(name, b"priority", 8) and takes & FEATURES_OPTIONS:
        if v.kind != MP_INT or not 0 <= v.number.i <= 2:
            raise InvalidArgument(f"option 'priority' must be 0, 1 or 2; got {_shown(p, end)}")
        options.priority = <int>v.number.i
    elif _is(name, b"encoding", 8) and takes & FEATURES_OPTIONS:
        if v.kind == MP_STR and _is(&v, b"tensor", 6):
            options.flags |= AS_TENSORS
        elif v.kind != MP_STR or not _is(&v, b"list", 4):
            raise InvalidArgument(f"option 'encoding' must be 'list' or 'tensor'; got {_shown(p, end)}")
    elif _is(name, b"version", 7) and takes == PREDICT_OPTIONS:
        if v.kind != MP_INT or v.number.i < 1:
            raise InvalidArgument(f"option 'version' must be a whole number from 1; got {_shown(p, end)}")
        options.version = v.number.i
    elif _is(name, b"as_of", 5) and takes & FEATURES_OPTIONS:
        options.as_of_us = as_of_us(_as_python(p), "option 'as_of'")
    elif _is(name, b"statuses", 8) and takes == PREDICT_OPTIONS:
        if v.kind != MP_BOOL:
            raise InvalidArgument(f"option 'statuses' must be true or false; got {_shown(p, end)}")
        if v.number.i:
            options.flags |= WANTS_STATUSES
    elif _is(name, b"traceparent", 11):
        if v.kind != MP_STR and v.kind != MP_NIL:
            raise InvalidArgument(f"option 'traceparent' must be a string; got {_shown(p, end)}")
        if v.kind == MP_STR and TRACEPARENT_BYTES_MIN <= v.size <= TRACEPARENT_BYTES:
            options.trace = v.body
            options.trace_bytes = v.size
    elif _is(name, b"partial", 7) and takes == PUSH_OPTIONS:
        if v.kind != MP_BOOL:  # the writer reads it
            raise InvalidArgument(f"option 'partial' must be true or false; got {_shown(p, end)}")
    else:
        known = ["", "encoding, priority, ", "partial, ", "encoding, priority, statuses, version, "][takes]
        known = f"{'as_of, ' if takes & FEATURES_OPTIONS else ''}deadline_ms, {known}traceparent"
        raise InvalidArgument(f"unknown option {_short_text(name)!r}; options: {known}")
    return end


cdef bytes _traceparent_in(const uint8_t *params):
    """Return the traceparent of a request that failed before its options were read. params: passed by the scanner."""
    cdef mp_value v, name
    cdef uint32_t k
    cdef const uint8_t *p = mp_read(params, &v)
    if v.kind != MP_ARRAY or v.size != 3:
        return None
    p = mp_read(mp_skip(mp_skip(p)), &v)
    if v.kind != MP_MAP:
        return None
    for k in range(v.size):
        mp_read(p, &name)
        if name.kind == MP_STR and _is(&name, b"traceparent", 11):
            mp_read(mp_skip(p), &v)
            if v.kind == MP_STR and TRACEPARENT_BYTES_MIN <= v.size <= TRACEPARENT_BYTES:
                return v.body[:v.size]
        p = mp_skip(mp_skip(p))
    return None


cdef bytes _traceparent(const options_t *options):
    """Return the traceparent of a request, or None."""
    return None if options.trace is NULL else options.trace[:options.trace_bytes]
