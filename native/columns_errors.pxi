# What is wrong with a request: the same words for embedded calls and for the wire.


def unknown_column(Columns columns, name):
    return InvalidArgument(f"unknown column {str(name)!r}; columns: {', '.join(columns.names)}")


def empty_column(Columns columns, int c):
    return InvalidArgument(f"column {columns.names[c]!r} is empty: send at least one value")


def string_too_long(Columns columns, int c, Py_ssize_t length):
    return InvalidArgument(f"column {columns.names[c]!r}: a string of {length} bytes; at most {STRING_BYTES} are taken")


def too_many_rows(Py_ssize_t n):
    return InvalidArgument(f"{n} rows in one request; at most {REQUEST_ROWS} are taken: send it in parts")


def wrong_type(Columns columns, int c, value, Py_ssize_t row=-1):
    shown = repr(value)
    if len(shown) > 40:
        shown = shown[:37] + "..."
    where = f" at row {row}" if row >= 0 else ""
    return InvalidArgument(
        f"column {columns.names[c]!r} takes {columns.dtypes[c]}; got {shown} ({type(value).__name__}){where}")


def finish_error(Columns columns, Py_ssize_t result):
    """The error for a negative result of Columns.finish(); call it before rollback()."""
    cdef Py_ssize_t n = 1
    cdef int c
    if result == NO_MEMORY:
        return ResourceExhausted("no memory for this batch; send fewer rows")
    if result <= -2001:
        c = <int>(-result - 2001)
        return InvalidArgument(f"column {columns.names[c]!r} takes Int32; got a value outside -2147483648..2147483647")
    if result <= -1001:
        missing = columns.names[-result - 1001]
        return InvalidArgument(f"missing column {missing!r}; columns: {', '.join(columns.names)}")
    for c in range(columns.n_columns):
        n = max(n, columns.col[c].filled - columns.n_rows)
    short = -result - 1
    given = columns.col[short].filled - columns.n_rows
    return InvalidArgument(f"column {columns.names[short]!r} has {given} values where others have {n}: "
                           f"send one value, or as many as the others")
