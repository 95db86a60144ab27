# Makes the errors for wrong request columns. Embedded calls and the server use the same words.


def unknown_column(Columns columns, name):
    return InvalidArgument(f"unknown column {quoted(name)}{decomposed(name, columns.names)}; "
                           f"columns: {', '.join(columns.names)}")


def empty_column(Columns columns, int c):
    return InvalidArgument(f"column {columns.names[c]!r} is empty: send at least one value")


def too_many_rows(Py_ssize_t n):
    return InvalidArgument(f"{n} rows in one request; at most {REQUEST_ROWS} are taken: send it in parts")


cdef object refusal(Columns columns, int c, error, Py_ssize_t row):
    """Return the error for a Refused. row: used if `error` has no row; -1 for a single value."""
    if error.row is None and row >= 0:
        error = Refused(error.got, row)
    return error.error(f"column '{columns.names[c]}'", columns.dtypes[c])


cdef object missing_value(Columns columns, int c, Py_ssize_t row):
    name, where = columns.names[c], f" at row {row}" if row >= 0 else ""
    return InvalidArgument(f"column '{name}' takes {columns.dtypes[c]}; got a missing value{where}: send a value, or "
                           f"let the model say what it takes instead: Model(..., missing={{'{name}': ...}})")


cdef object finish_error(Columns columns, finish_t outcome):
    """Return the error for an outcome of Columns.finish(). Call it before rollback(), which removes the lengths."""
    cdef Py_ssize_t n = 1
    cdef int c
    name = columns.names[columns.at_fault]
    if outcome == FINISH_NO_MEMORY:
        return ResourceExhausted("no memory for this batch; send fewer rows")
    if outcome == FINISH_NO_COLUMN:
        return InvalidArgument(f"missing column {name!r}; columns: {', '.join(columns.names)}")
    for c in range(columns.n_columns):
        n = max(n, columns.col[c].filled - columns.n_rows)
    given = columns.col[columns.at_fault].filled - columns.n_rows
    return InvalidArgument(f"column {name!r} has {given} values where others have {n}: "
                           f"send one value, or as many as the others")
