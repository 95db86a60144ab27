/* Computes one column of a block from the rows of a request. forest_run.c includes this file twice, with ST_ROW float
   and double; a column of doubles holds their ranks among the thresholds. all: the address of column 0; column `number`
   is at all + number * stride. */
static void ST_COLUMN_OF(const st_forest *f, const st_column *column, const ST_ROW *rows, size_t n, size_t width,
                         float *all, size_t number, size_t stride) {
    float *to = all + number * stride;
    const ST_ROW *from = rows + column->feature;
    switch (column->kind) {
    case ST_COLUMN_FEATURE:
    case ST_COLUMN_NAN_LOW:
#ifdef ST_WIDE
        for (size_t r = 0; r < n; r++, from += width) to[r] = rank(f, column, *from);
#else
        if (column->kind == ST_COLUMN_FEATURE)
            for (size_t r = 0; r < n; r++, from += width) to[r] = *from;
        else
            for (size_t r = 0; r < n; r++, from += width) to[r] = *from == *from ? *from : -INFINITY;
#endif
        break;
    case ST_COLUMN_SET:
        for (size_t r = 0; r < n; r++, from += width) to[r] = in_set(f, column, *from);
        break;
    case ST_COLUMN_BITS:
        bits_column(f, column, (const int32_t *)(all + column->index * stride), n, to);
        break;
    case ST_COLUMN_INDEX:
        for (size_t r = 0; r < n; r++, from += width) ((int32_t *)to)[r] = bit_number(column, *from);
        break;
    default:
        memset(to, 0, n * sizeof(float));
    }
}
