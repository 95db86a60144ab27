/* Finds the request of each answer, and reads its outcome. */
#include <inttypes.h>
#include <stdio.h>

#include "loadtest.h"

static const struct mp_limits reply_limits = {
    .frame_bytes = 256u << 20, .nesting_depth = MP_MAX_DEPTH, .declared_elements = 1u << 26};

static uint32_t index_of(const struct lt_generator *g, const struct lt_connection *c)
{
    return (uint32_t)(c - g->connections);
}

static void finish_answered(struct lt_generator *g, struct lt_connection *c, struct lt_slot *slot,
                            enum lt_outcome outcome, const uint8_t *reply, size_t size, uint64_t now)
{
    c->backoff_ns = 0;
    if (slot->capture && outcome == LT_GOOD) {
        struct mp_out *kept = &g->captures[slot->capture - 1].reply;
        if (mp_reserve(kept, size) == 0)
            mp_put_raw(kept, reply, size);
    }
    lt_finish(g, slot, outcome, now);
}

/* -- MessagePack-RPC ---------------------------------------------------------------------------------------- */

static void fail_on_unknown_id(struct lt_generator *g, const struct lt_connection *c, uint64_t msgid)
{
    const struct lt_slot *slot = &g->slots[msgid & g->slot_mask];
    const char *reason = "which was never sent";
    g->n_bad++;
    if (msgid <= UINT32_MAX && (msgid & g->slot_mask) < g->n_slots) {
        uint32_t uses = (slot->nonce - (uint32_t)msgid) / (g->slot_mask + 1);
        if (slot->connection != index_of(g, c))
            reason = slot->nonce == msgid && slot->state != LT_FREE ? "which another connection sent" : reason;
        else if (uses < 1u << 8) /* a recent id of this slot */
            reason = "which was answered before";
    }
    lt_fail(g, "wrong answer: connection %" PRIu32 " received an answer to message id %" PRIu64 ", %s", index_of(g, c),
            msgid, reason);
}

/* Count an RPC error that is a string: "CODE: message" (`serve --rpc-errors string`), or a text of another server. */
static void count_rpc_text(struct lt_generator *g, const char *text, size_t size)
{
    size_t end = 0;
    while (end < size && ((text[end] >= 'A' && text[end] <= 'Z') || text[end] == '_'))
        end++;
    if (end && end + 1 < size && text[end] == ':' && text[end + 1] == ' ')
        lt_count_error(g, text, end, text + end + 2, size - end - 2);
    else
        lt_count_error(g, "ERROR", 5, text, size);
}

/* Count an RPC error: a map {"code": ..., "message": ...}, a string, [number, string], or any other value. */
static void count_rpc_error(struct lt_generator *g, const uint8_t *p)
{
    struct mp_value v, item, code = {.kind = MP_NIL}, message = {.kind = MP_NIL};
    const uint8_t *next = mp_read(p, &v);
    if (v.kind == MP_ARRAY && v.size == 2 && mp_read(next, &item) && item.kind == MP_INT)
        mp_read(mp_skip(next), &v);
    if (v.kind == MP_STR) {
        count_rpc_text(g, (const char *)v.body, v.size);
        return;
    }
    for (uint32_t i = 0; v.kind == MP_MAP && i < v.size; i++) {
        next = mp_read(next, &item);
        if (item.kind == MP_STR && item.size == 4 && memcmp(item.body, "code", 4) == 0)
            mp_read(next, &code);
        else if (item.kind == MP_STR && item.size == 7 && memcmp(item.body, "message", 7) == 0)
            mp_read(next, &message);
        else if (item.kind == MP_ARRAY || item.kind == MP_MAP)
            break; /* no server sends such a key, and its items are not skipped here */
        next = mp_skip(next);
    }
    int known = code.kind == MP_STR;
    lt_count_error(g, known ? (const char *)code.body : "ERROR", known ? code.size : 5,
                   message.kind == MP_STR ? (const char *)message.body : "", message.kind == MP_STR ? message.size : 0);
}

static void read_rpc(struct lt_generator *g, struct lt_connection *c, const uint8_t *reply, size_t size, uint64_t now)
{
    struct mp_value head, type, msgid, error;
    const uint8_t *p = mp_read(reply, &head);
    if (head.kind != MP_ARRAY || head.size != 4 || (p = mp_read(p, &type), type.kind != MP_INT) || type.number.i != 1) {
        lt_fail(g, "the server sent a message that is not a MessagePack-RPC response [1, msgid, error, result]");
        return;
    }
    p = mp_read(p, &msgid);
    mp_read(p, &error);
    if (msgid.kind == MP_NIL && error.kind != MP_NIL) { /* an error of the connection, which the server closes then */
        count_rpc_error(g, p);
        return;
    }
    if (msgid.kind != MP_INT || msgid.number.i < 0) {
        lt_fail(g, "the server sent a response with a message id that is not an unsigned integer");
        return;
    }
    struct lt_slot *slot = &g->slots[msgid.number.u & g->slot_mask];
    if ((msgid.number.u & g->slot_mask) >= g->n_slots || slot->state == LT_FREE || slot->nonce != msgid.number.u ||
        slot->connection != index_of(g, c)) {
        fail_on_unknown_id(g, c, msgid.number.u);
    } else if (slot->state == LT_LATE) {
        g->n_late_answers++;
        c->n_late--;
        lt_release(g, slot);
    } else {
        if (error.kind != MP_NIL && slot->intended_ns >= g->warm_ns)
            count_rpc_error(g, p);
        finish_answered(g, c, slot, error.kind == MP_NIL ? LT_GOOD : LT_ERROR, reply, size, now);
    }
}

static size_t take_rpc(struct lt_generator *g, struct lt_connection *c, uint64_t now)
{
    size_t start = 0;
    while (!g->fatal[0]) {
        enum mp_scan_result result = mp_scan(&c->scan, c->in + start, c->in_size - start, &reply_limits);
        if (result == MP_MORE)
            break;
        if (result == MP_WHOLE)
            read_rpc(g, c, c->in + start, c->scan.position, now);
        else
            lt_fail(g, result == MP_NOT_MSGPACK ? "the server sent bytes that are not MessagePack"
                                                : "the server sent an answer of more than 256 MiB or 32 levels");
        start += c->scan.position;
        mp_scan_reset(&c->scan);
    }
    return start;
}

/* -- protocols that answer in order ------------------------------------------------------------------------- */

static struct lt_slot *next_in_order(struct lt_generator *g, struct lt_connection *c, int is_surplus)
{
    if (c->order_count == 0 || is_surplus) {
        g->n_bad++;
        lt_fail(g, "wrong answer: connection %" PRIu32 " received more answers than it sent requests", index_of(g, c));
        return NULL;
    }
    struct lt_slot *slot = &g->slots[c->order[c->order_start]];
    c->order_start = c->order_start + 1 < g->pipeline ? c->order_start + 1 : 0;
    c->order_count--;
    return slot;
}

static size_t take_raw(struct lt_generator *g, struct lt_connection *c, uint64_t now)
{
    size_t start = 0;
    while (!g->fatal[0] && c->in_size - start >= g->raw_reply_bytes) {
        struct lt_slot *slot = next_in_order(g, c, 0);
        if (slot == NULL)
            break;
        finish_answered(g, c, slot, LT_GOOD, c->in + start, g->raw_reply_bytes, now);
        start += g->raw_reply_bytes;
    }
    return start;
}

static int has_nonce_piece(const struct lt_template *template)
{
    for (uint32_t i = 0; i < template->n_pieces; i++)
        if (template->pieces[i].kind == LT_NONCE)
            return 1;
    return 0;
}

/* The answer to a request with {{nonce}} must contain the digits of its number. */
static int lacks_nonce(const struct lt_generator *g, const struct lt_slot *slot, const uint8_t *reply, size_t size)
{
    char digits[16];
    if (!has_nonce_piece(&g->templates[slot->template]))
        return 0;
    int n = snprintf(digits, sizeof digits, "%" PRIu32, slot->nonce);
    for (size_t i = 0; i + (size_t)n <= size; i++)
        if (memcmp(reply + i, digits, (size_t)n) == 0)
            return 0;
    return 1;
}

static void read_http(struct lt_generator *g, struct lt_connection *c, const uint8_t *reply, size_t size, uint64_t now)
{
    struct lt_slot *slot = next_in_order(g, c, 0);
    int good = c->http.status >= 200 && c->http.status < 300;
    if (slot == NULL)
        return;
    if (good && lacks_nonce(g, slot, reply, size)) {
        g->n_bad++;
        lt_fail(g, "wrong answer: a request with nonce %" PRIu32 " was answered without it", slot->nonce);
        return;
    }
    if (!good && slot->intended_ns >= g->warm_ns) {
        char code[16];
        int n = snprintf(code, sizeof code, "HTTP %d", c->http.status);
        uint64_t begin = c->http.body_begin;
        lt_count_error(g, code, (size_t)n, (const char *)reply + begin, size - begin);
    }
    finish_answered(g, c, slot, good ? LT_GOOD : LT_ERROR, reply, size, now);
}

/* Processes at most one answer, because only one request is in flight. If the server closes after it, bytes behind the
 * answer are ignored. */
static size_t take_http(struct lt_generator *g, struct lt_connection *c, uint64_t now, int at_end)
{
    if (c->in_size == 0)
        return 0;
    enum lt_http_result result = lt_http_read(&c->http, c->in, c->in_size, at_end);
    if (result == LT_HTTP_INVALID)
        lt_fail(g, "the server sent bytes that are not HTTP/1.1");
    if (result != LT_HTTP_WHOLE)
        return 0;
    size_t end = c->http.position;
    int closes = c->http.close;
    if (closes) /* set now, before finishing the answer can give this connection the next request */
        c->link = LT_DOWN;
    read_http(g, c, c->in, lt_http_join(&c->http, c->in), now);
    lt_http_start(&c->http);
    if (c->in_size > end && !closes)
        next_in_order(g, c, 1);
    return end;
}

size_t lt_take_answers(struct lt_generator *g, struct lt_connection *c, uint64_t now, int at_end)
{
    if (g->protocol == LT_MSGPACK)
        return take_rpc(g, c, now);
    return g->protocol == LT_HTTP ? take_http(g, c, now, at_end) : take_raw(g, c, now);
}
