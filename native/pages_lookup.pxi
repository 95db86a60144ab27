# Lookup and lookup(). Part of pages.pyx.

cdef dict _SOURCE_DTYPES = {1: np.bool_, 2: np.int32, 3: np.int64, 4: np.float32, 5: np.float64, 7: np.int64,
                            8: np.float32, 9: np.float64}


cdef int _output_type(cnp.ndarray array) except -1:
    cdef int number = cnp.PyArray_TYPE(array)
    if number == cnp.NPY_FLOAT32:
        return ST_OUT_FLOAT32
    if number == cnp.NPY_FLOAT64:
        return ST_OUT_FLOAT64
    if number == cnp.NPY_BOOL:
        return ST_OUT_BOOL
    if number == cnp.NPY_OBJECT:
        return ST_OUT_OBJECT
    if cnp.PyArray_ISSIGNED(array) and cnp.PyArray_ISINTEGER(array):
        if cnp.PyArray_ITEMSIZE(array) == 8:
            return ST_OUT_INT64
        if cnp.PyArray_ITEMSIZE(array) == 4:
            return ST_OUT_INT32
    raise TypeError(f"an output must be float32, float64, int64, int32, bool or object, not {array.dtype}")


cdef class Lookup:
    """Lookup(layout, key_columns, ops, ttl_us): which features of one view a batch copies, and where to.

    key_columns: per key of the view, the index of its column in the request. ops: per feature to copy, (feature index,
    output index, column in the output, default or None; a default in bytes is in the output's type). ttl_us: a row older than this many microseconds is STALE; 0
    means no limit. Not thread-safe: it caches a plan for the types of the last outputs. Raises ValueError for indices
    that do not exist.
    """
    cdef readonly Layout layout
    cdef readonly tuple key_columns
    cdef readonly tuple ops
    cdef readonly int64_t ttl_us
    cdef st_plan plan
    cdef int c_key_columns[ST_KEYS_MAX]
    cdef readonly int n_strings
    cdef int n_outputs_used
    # The outputs that the plan was made for: (index, type, elements per row) each.
    cdef int *used
    cdef bint compiled

    def __cinit__(self, Layout layout not None, key_columns, ops, ttl_us=0):
        memset(&self.plan, 0, sizeof(st_plan))
        self.layout = layout
        self.key_columns = tuple(key_columns)
        self.ops = tuple((int(f), int(o), int(c), default) for f, o, c, default in ops)
        self.ttl_us = ttl_us
        if len(self.key_columns) != layout.c.n_keys:
            raise ValueError(f"the table has {layout.c.n_keys} key columns, not {len(self.key_columns)}")
        for k, column in enumerate(self.key_columns):
            self.c_key_columns[k] = column
        for f, _, _, _ in self.ops:
            if not 0 <= f < <Py_ssize_t>layout.c.n_features:
                raise ValueError(f"the table has no feature number {f}")
            if layout.c.features[f].code == ST_BLOB:
                raise ValueError(f"feature number {f} is a blob, which no lookup reads")
            self.n_strings += layout.c.features[f].code == ST_STRING
        self.used = <int *>PyMem_Malloc(max(1, 3 * len(self.ops)) * sizeof(int))
        if self.used is NULL:
            raise MemoryError
        for o in sorted({op[1] for op in self.ops}):
            self.used[3 * self.n_outputs_used] = o
            self.n_outputs_used += 1

    def __dealloc__(self):
        self._forget()
        PyMem_Free(self.used)

    cdef void _forget(self) noexcept:
        PyMem_Free(self.plan.runs)
        PyMem_Free(self.plan.ops)
        PyMem_Free(self.plan.null_words)
        PyMem_Free(self.plan.fill)
        memset(&self.plan, 0, sizeof(st_plan))
        self.compiled = False

    cdef int prepare(self, outputs) except -1:
        """Make the plan, unless the present plan was made for outputs with the same types and widths."""
        cdef int u, n_outputs = len(outputs), kind, width
        cdef bint same = self.compiled
        cdef int *used = self.used
        for u in range(self.n_outputs_used):
            if not 0 <= used[3 * u] < n_outputs:
                raise ValueError(f"there is no output number {used[3 * u]}")
            array = <cnp.ndarray>outputs[used[3 * u]]
            kind = _output_type(array)
            width = cnp.PyArray_DIM(array, 1) if cnp.PyArray_NDIM(array) == 2 else 1
            if kind != used[3 * u + 1] or width != used[3 * u + 2]:
                same = False
            used[3 * u + 1] = kind
            used[3 * u + 2] = width
        if not same:
            self._compile({used[3 * u]: (used[3 * u + 1], used[3 * u + 2]) for u in range(self.n_outputs_used)})
        return 0

    cdef int _compile(self, dict types) except -1:
        self._forget()
        cdef const st_layout *c = &self.layout.c
        cdef uint32_t n = len(self.ops), o, n_words = (c.null_bytes + 7) // 8, w
        cdef st_op *op
        cdef st_field *field
        cdef uint64_t mask
        cdef bytes fill = b""
        self.plan.n_ops = n
        self.plan.ops = <st_op *>PyMem_Malloc(max(1, n) * sizeof(st_op))
        self.plan.runs = <st_run *>PyMem_Malloc(max(1, n) * sizeof(st_run))
        self.plan.null_words = <st_null_word *>PyMem_Malloc(max(1, n_words) * sizeof(st_null_word))
        if self.plan.ops is NULL or self.plan.runs is NULL or self.plan.null_words is NULL:
            raise MemoryError
        strings = 0
        used = bytearray(8 * n_words)
        for o in range(n):
            f, output, column, _ = self.ops[o]
            kind, width = types[output]
            field = &c.features[f]
            op = &self.plan.ops[o]
            if (field.code == ST_STRING) != (kind == ST_OUT_OBJECT):
                raise TypeError("string features go to object outputs, and other features to numeric ones")
            if not 0 <= column <= width - <int>field.width:
                raise ValueError(f"feature number {f} does not fit output {output} at column {column}")
            op.null_byte = c.null_offset + f // 8
            op.null_bit = 1 << (f % 8)
            op.row_offset = field.offset
            op.output = output
            op.column_offset = column * st_output_bytes(kind)
            op.bytes = 0 if kind == ST_OUT_OBJECT else field.width * st_output_bytes(kind)
            op.string_index = strings
            strings += field.code == ST_STRING
            # The words end where the bitmap ends, so that reading the last word never passes the end of the row.
            used[8 * n_words - c.null_bytes + f // 8] |= 1 << (f % 8)
        for w in range(n_words):
            mask = int.from_bytes(used[8 * w:8 * w + 8], "little")
            if mask:
                self.plan.null_words[self.plan.n_null_words].mask = mask
                self.plan.null_words[self.plan.n_null_words].null_offset = (
                    c.null_offset + c.null_bytes - 8 * (n_words - w))
                self.plan.n_null_words += 1
        # Runs are made in the order of the output, so that neighbours can be joined. Statuses keep the order of the
        # ops.
        for o in sorted(range(n), key=lambda i: self.ops[i][1:3]):
            op = &self.plan.ops[o]
            if op.bytes:
                op.fill_offset = len(fill)
                fill += self._fill_of(o, types[op.output][0])
                self._add_run(op, self.ops[o][0], types[op.output][0])
        self.plan.fill = <uint8_t *>PyMem_Malloc(max(1, len(fill)))
        if self.plan.fill is NULL:
            raise MemoryError
        memcpy(self.plan.fill, PyBytes_AS_STRING(fill), len(fill))
        self.compiled = True
        return 0

    cdef bytes _fill_of(self, o, uint32_t kind):
        """Return the default of an op in the bytes of its output (it may be such bytes); without one NaN or 0."""
        f, _, _, default = self.ops[o]
        cdef st_field *field = &self.layout.c.features[f]
        cdef st_convert convert = st_conversion(field.code, kind)
        cdef bytes to = bytes(field.width * st_output_bytes(kind))
        if default is None:
            if kind == ST_OUT_FLOAT32 or kind == ST_OUT_FLOAT64:
                return np.full(field.width, np.nan, np.float32 if kind == ST_OUT_FLOAT32 else np.float64).tobytes()
            return to
        if isinstance(default, bytes):
            if len(default) != len(to):
                raise ValueError(f"a default of {len(default)} bytes for an output of {len(to)}")
            return default
        values = np.empty(field.width, _SOURCE_DTYPES[field.code])
        values[:] = default
        cdef bytes source = values.tobytes()
        if convert is NULL:
            return source
        convert(<const uint8_t *>PyBytes_AS_STRING(source), <uint8_t *>PyBytes_AS_STRING(to), field.width)
        return to

    cdef void _add_run(self, const st_op *op, uint32_t f, uint32_t kind) noexcept:
        cdef st_field *field = &self.layout.c.features[f]
        cdef st_convert convert = st_conversion(field.code, kind)
        cdef st_run *run
        if self.plan.n_runs:
            run = &self.plan.runs[self.plan.n_runs - 1]
            # fill_offset needs no comparison: fill values are in the same order.
            if (run.convert == convert and run.output == op.output and
                    run.column_offset + run.bytes == op.column_offset and
                    run.row_offset + run.count * (field.bytes // field.width) == op.row_offset and
                    run.bytes // run.count == op.bytes // field.width):
                run.count += field.width
                run.bytes += op.bytes
                return
        run = &self.plan.runs[self.plan.n_runs]
        self.plan.n_runs += 1
        run.convert = convert
        run.row_offset = op.row_offset
        run.output = op.output
        run.column_offset = op.column_offset
        run.count = field.width
        run.bytes = op.bytes
        run.fill_offset = op.fill_offset


cdef int _check_output(cnp.ndarray array, Py_ssize_t n) except -1:
    if (not cnp.PyArray_IS_C_CONTIGUOUS(array) or not 1 <= cnp.PyArray_NDIM(array) <= 2 or
            cnp.PyArray_DIM(array, 0) != n or not cnp.PyArray_ISWRITEABLE(array)):
        raise ValueError(f"an output must be a C-contiguous, writeable array of {n} rows with 1 or 2 dimensions, "
                         f"not of shape {np.shape(array)}")
    return 0


cdef uint8_t *_status_rows(cnp.ndarray array, Py_ssize_t rows, Py_ssize_t n) except NULL:
    if (cnp.PyArray_TYPE(array) != cnp.NPY_UINT8 or cnp.PyArray_NDIM(array) != 2 or cnp.PyArray_DIM(array, 0) != rows
            or cnp.PyArray_DIM(array, 1) != n or not cnp.PyArray_IS_C_CONTIGUOUS(array)):
        raise ValueError(f"statuses must be a C-contiguous uint8 array of shape ({rows}, {n})")
    return <uint8_t *>cnp.PyArray_DATA(array)


cdef int _check_same_columns(Layout a, Layout b) except -1:
    if a is not b and (a.features != b.features or a.key_codes != b.key_codes):
        raise ValueError("the lookup was made for a table with other columns")
    return 0


cdef int _set_keys(Lookup look, Columns columns, st_view *view) except -1:
    cdef uint32_t k
    cdef int c
    cdef column_t *column
    for k in range(look.layout.c.n_keys):
        c = look.c_key_columns[k]
        if not 0 <= c < columns.n_columns:
            raise ValueError(f"the request has no column number {c}")
        column = &columns.col[c]
        if column.kind != (KIND_STR if look.layout.c.key_is_string[k] else KIND_I64):
            raise TypeError(f"column {columns.names[c]!r} does not have the type of the key")
        view.keys[k].data = <const uint8_t *>column.data
        view.keys[k].ends = column.ends if column.kind == KIND_STR else NULL
        view.keys[k].nulls = column.nulls if column.has_nulls else NULL
    return 0


cdef int _set_strings(Lookup look, const st_view *view, tuple outputs, Py_ssize_t n) except -1:
    """Make Python strings of the strings that st_lookup found, and put them into their object arrays."""
    cdef Py_ssize_t i
    cdef uint32_t o
    cdef st_op *op
    cdef st_string *found
    cdef const st_output *out
    cdef PyObject **slot
    for o in range(look.plan.n_ops):
        op = &look.plan.ops[o]
        if op.bytes:
            continue
        found = view.strings + op.string_index * n
        out = &view.outputs[op.output]
        default = look.ops[o][3]
        for i in range(n):
            value = default
            if found[i].data is not NULL:
                value = PyUnicode_DecodeUTF8(<const char *>found[i].data, found[i].length, "replace")
            slot = <PyObject **>(out.data + i * out.stride + op.column_offset)
            Py_INCREF(value)
            old = slot[0]
            slot[0] = <PyObject *>value
            if old is not NULL:
                Py_DECREF(<object>old)
    return 0


def lookup(directories, lookups, Columns columns not None, outputs, cnp.ndarray view_statuses not None, int64_t now_us,
           cnp.ndarray feature_statuses=None):
    """Look up all n rows of `columns` in all views. Releases the GIL once, or not at all for a few rows.

    directories: per lookup a Directory, or None for an empty table, whose rows are all NOT_FOUND. lookups: a Lookup per
    view. outputs: C-contiguous arrays [n] or [n, width] of float32, float64, int64, int32, bool, or object (strings); a
    vector of width w fills w columns. view_statuses: uint8 [len(lookups), n], written. feature_statuses: uint8 [ops of
    all lookups, n], written, or None. now_us: the present time in microseconds since 1970, for TTLs. A row of `columns`
    that has a moment (Columns.judge_at) is judged at that moment, and a stored row that is newer is NOT_FOUND.

    Where the status is not PRESENT, the output gets the feature's default, or without a default NaN, 0, False or None.
    Numbers out of the range of an integer output saturate; NaN becomes 0. The read transaction of the directories must
    be open. Raises ValueError and TypeError for arguments that do not fit each other.
    """
    cdef st_view few_views[STACK_VIEWS]
    cdef st_output few_outputs[STACK_VIEWS]
    cdef tuple all_outputs = tuple(outputs)
    cdef tuple all_lookups = tuple(lookups)
    cdef tuple all_directories = tuple(directories)
    cdef Py_ssize_t n = columns.n_rows, n_views = len(all_lookups), n_outputs = len(all_outputs), v, k, n_ops = 0
    cdef st_view *views = few_views
    cdef st_output *outs = few_outputs
    cdef st_string *strings = NULL
    cdef Lookup look
    cdef Directory directory
    cdef cnp.ndarray array
    cdef const int64_t *as_of = NULL
    cdef Py_ssize_t n_strings = 0
    if len(all_directories) != n_views:
        raise ValueError("there must be one directory for each lookup")
    cdef uint8_t *status = _status_rows(view_statuses, n_views, n)
    cdef uint8_t *feature_status = NULL
    for v in range(n_views):
        look = <Lookup?>all_lookups[v]
        n_ops += len(look.ops)
        n_strings += look.n_strings
    if feature_statuses is not None:
        feature_status = _status_rows(feature_statuses, n_ops, n)
    try:
        if n_views > STACK_VIEWS:
            views = <st_view *>PyMem_Malloc(n_views * sizeof(st_view))
        if n_outputs > STACK_VIEWS:
            outs = <st_output *>PyMem_Malloc(n_outputs * sizeof(st_output))
        if n_strings:
            strings = <st_string *>PyMem_Malloc(max(1, n * n_strings) * sizeof(st_string))
            if strings is not NULL:
                memset(strings, 0, n * n_strings * sizeof(st_string))
        if views is NULL or outs is NULL or (n_strings and strings is NULL):
            raise MemoryError
        for k in range(n_outputs):
            array = <cnp.ndarray?>all_outputs[k]
            _check_output(array, n)
            outs[k].data = <uint8_t *>cnp.PyArray_DATA(array)
            outs[k].stride = cnp.PyArray_ITEMSIZE(array) * (cnp.PyArray_DIM(array, 1) if array.ndim == 2 else 1)
        columns.moments(&as_of)
        n_strings = 0
        n_ops = 0
        for v in range(n_views):
            look = <Lookup>all_lookups[v]
            look.prepare(all_outputs)
            views[v].plan = &look.plan
            views[v].layout = &look.layout.c
            views[v].pages = NULL
            views[v].depth = 0
            if all_directories[v] is not None:
                directory = <Directory?>all_directories[v]
                _check_same_columns(look.layout, directory.layout)
                views[v].layout = &directory.layout.c
                views[v].pages = <const uint8_t *const *>directory.c.pages
                views[v].depth = directory.c.depth
            views[v].oldest_us = INT64_MIN
            if look.ttl_us > 0 and now_us >= INT64_MIN + look.ttl_us:
                views[v].oldest_us = now_us - look.ttl_us
            views[v].ttl_us = max(look.ttl_us, 0)
            views[v].as_of = as_of
            _set_keys(look, columns, &views[v])
            views[v].outputs = outs
            views[v].status = status + v * n
            views[v].feature_status = feature_status + n_ops * n if feature_status is not NULL else NULL
            views[v].strings = strings + n_strings * n if look.n_strings else NULL
            n_ops += look.plan.n_ops
            n_strings += look.n_strings
        if n * n_views <= HELD_GIL_LOOKUPS:
            st_lookup(views, n_views, n)
        else:
            with nogil:
                st_lookup(views, n_views, n)
        for v in range(n_views):
            if views[v].strings is not NULL:
                _set_strings(<Lookup>all_lookups[v], &views[v], all_outputs, n)
    finally:
        PyMem_Free(strings)
        if views is not few_views:
            PyMem_Free(views)
        if outs is not few_outputs:
            PyMem_Free(outs)
