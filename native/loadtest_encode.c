/* Makes requests from templates: literal bytes, and values that are drawn for each request. */
#include <stdio.h>

#include "loadtest.h"

static const char digits_of_length[] = "%8llu";

static void put_digits(struct mp_out *out, const char *format, double value)
{
    out->size += (size_t)snprintf((char *)out->data + out->size, 32, format, value);
}

static void put_int(struct mp_out *out, enum lt_form form, int64_t value)
{
    if (form == LT_AS_MSGPACK)
        mp_put_int(out, value);
    else if (form == LT_AS_RAW)
        mp_put_raw(out, &value, sizeof value);
    else
        out->size += (size_t)snprintf((char *)out->data + out->size, 32, "%lld", (long long)value);
}

static void put_float(struct mp_out *out, enum lt_form form, double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (form == LT_AS_MSGPACK)
        out->size = (size_t)(mp_store(out->data + out->size, 0xcb, bits, 8) - out->data);
    else if (form == LT_AS_RAW)
        mp_put_raw(out, &value, sizeof value);
    else
        put_digits(out, "%.9g", value);
}

static void put_value(struct lt_generator *g, const struct lt_column *column, uint32_t i, struct mp_out *out)
{
    uint64_t row;
    if (column->kind == LT_FLOAT) {
        put_float(out, column->form, column->from + (column->to - column->from) * lt_uniform(&g->random));
        return;
    }
    if (column->group >= 0)
        row = g->drawn[column->group][i];
    else
        row = lt_below(&g->random, column->kind == LT_INT ? column->span : column->n);
    if (column->kind == LT_INT)
        put_int(out, column->form, (int64_t)((uint64_t)column->low + row));
    else
        mp_put_raw(out, column->bytes + column->offsets[row], column->offsets[row + 1] - column->offsets[row]);
}

static void put_nonce(const struct lt_generator *g, uint32_t nonce, struct mp_out *out)
{
    if (g->protocol == LT_HTTP)
        out->size += (size_t)snprintf((char *)out->data + out->size, 16, "%u", nonce);
    else /* always five bytes, so that the size does not depend on the number */
        out->size = (size_t)(mp_store(out->data + out->size, 0xce, nonce, 4) - out->data);
}

static void put_values(struct lt_generator *g, const struct lt_piece *piece, struct mp_out *out)
{
    const struct lt_column *column = &g->columns[piece->column];
    for (uint32_t i = 0; i < piece->count; i++) {
        if (i > 0 && column->form == LT_AS_JSON)
            mp_put_byte(out, ',');
        put_value(g, column, i, out);
    }
}

int lt_encode(struct lt_generator *g, uint32_t request, uint32_t nonce, struct mp_out *out)
{
    const struct lt_template *template = &g->templates[request];
    size_t body = 0;
    if (mp_reserve(out, template->bytes_max) < 0)
        return -1;
    for (uint32_t group = 0; group < g->n_groups; group++)
        for (uint32_t i = 0; i < template->rows[group]; i++)
            g->drawn[group][i] = lt_draw_row(&g->groups[group], &g->random);
    for (uint32_t i = 0; i < template->n_pieces; i++) {
        const struct lt_piece *piece = &template->pieces[i];
        if (piece->kind == LT_LITERAL)
            mp_put_raw(out, template->bytes + piece->begin, piece->end - piece->begin);
        else if (piece->kind == LT_VALUES)
            put_values(g, piece, out);
        else if (piece->kind == LT_NONCE)
            put_nonce(g, nonce, out);
        else
            body = out->size;
    }
    if (body > 0) {
        char length[16];
        snprintf(length, sizeof length, digits_of_length, (unsigned long long)(out->size - body));
        memcpy(out->data + body - 12, length, 8); /* the digits stand before CR LF CR LF */
    }
    return 0;
}
