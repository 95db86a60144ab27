/* The load generator: one thread, one epoll, open or closed loop.
 *
 * A request is due at an intended time that does not depend on the server. Latency counts from there, so that a stall
 * is charged to every request that came due while it lasted ("coordinated omission", Gil Tene); the time from the actual
 * sending is kept beside it. Every answer must be to a request in flight on the connection it came by.
 *
 * loadtest_stream.h draws and records, loadtest_encode.c fills templates, loadtest_answer.c reads answers,
 * loadtest_http.c frames HTTP, loadtest_connection.c moves bytes, loadtest_run.c is the loop.
 */
#ifndef SHORTTAIL_LOADTEST_H
#define SHORTTAIL_LOADTEST_H

#include <sys/socket.h>

#include "loadtest_stream.h"
#include "msgpack.h"

enum lt_protocol {
    LT_MSGPACK, /* MessagePack-RPC: answers in any order */
    LT_HTTP,    /* HTTP/1.1 keep-alive, one request in flight a connection */
    LT_RAW,     /* answers are `raw_reply_bytes` of anything, in order */
};

/* -- requests ----------------------------------------------------------------------------------------------- */

enum lt_kind { LT_TABLE, LT_INT, LT_FLOAT };
enum lt_form { LT_AS_MSGPACK, LT_AS_JSON, LT_AS_RAW /* little-endian, eight bytes: inside a tensor */ };

struct lt_column {
    enum lt_kind kind;
    enum lt_form form;
    int group;               /* whose row it shows; -1: a draw of its own each time */
    int64_t low;             /* LT_INT: the value of row 0 */
    uint64_t span;           /* LT_INT without a group: values low .. low + span - 1 */
    double from, to;         /* LT_FLOAT */
    const uint8_t *bytes;    /* LT_TABLE: encoded values one after another, */
    const uint64_t *offsets; /* value i in [offsets[i], offsets[i + 1]) */
    uint64_t n;              /* values in the table */
};

enum lt_piece_kind { LT_LITERAL, LT_VALUES, LT_NONCE, LT_BODY };

/* LT_LITERAL: bytes of the template; LT_VALUES: `count` values of a column; LT_NONCE: the request's number; LT_BODY:
 * the blank line of an HTTP head: what follows is measured into the eight digits that end two bytes before. */
struct lt_piece { enum lt_piece_kind kind; uint32_t column, count; uint64_t begin, end; };

struct lt_template {
    const uint8_t *bytes;
    const struct lt_piece *pieces;
    uint32_t n_pieces;
    uint64_t bytes_max;   /* what a request can come to */
    double weight_to;     /* weights up to and with this template, of a sum of 1 */
    uint32_t *rows;       /* how many rows it draws of each group */
};

/* -- what happened ------------------------------------------------------------------------------------------ */

enum lt_outcome { LT_GOOD, LT_ERROR, LT_TIMEOUT, LT_LOST, LT_OUTCOMES };
enum { LT_ERROR_CODES = 32, LT_TEXT = 240 };

struct lt_error { char code[48], message[LT_TEXT]; uint64_t count; };

/* One slice of the run, by intended time. */
struct lt_interval { struct lt_histogram latency; uint64_t outcomes[LT_OUTCOMES]; uint64_t lag_max; };

struct lt_event { uint64_t intended_ns, sent_ns, done_ns; uint32_t request, outcome; };

struct lt_capture { struct mp_out request, reply; };

/* -- connections -------------------------------------------------------------------------------------------- */

enum lt_state { LT_FREE, LT_IN_FLIGHT, LT_LATE /* timed out, its answer may still come */ };

struct lt_slot {
    uint64_t intended_ns, sent_ns;
    uint32_t nonce;         /* low bits: the slot's number; the rest counts its uses */
    uint32_t older, newer;  /* slots in flight in the order of sending */
    uint32_t connection;
    uint32_t capture;       /* 1 + number, or 0 */
    uint16_t template;
    uint8_t state;
};

struct lt_http {
    uint64_t position, body_begin, body_end;
    int status, phase, close, keeps; /* keeps: the server said how long the body is */
};

enum lt_link { LT_DOWN, LT_CONNECTING, LT_UP };

struct lt_connection {
    int fd, watches_output, is_available, is_dirty;
    enum lt_link link;
    uint32_t first_slot, n_free, n_late;
    uint32_t *free_slots, *order; /* order: ring of slots, for protocols that answer in order */
    uint32_t order_start, order_count;
    struct mp_out out;
    size_t out_start;
    uint8_t *in;
    size_t in_size, in_capacity;
    struct mp_scan scan;
    struct lt_http http;
    uint64_t retry_ns, backoff_ns;
};

struct lt_generator {
    /* Set before the run. */
    enum lt_protocol protocol;
    struct sockaddr_storage address;
    socklen_t address_size;
    uint32_t n_connections, pipeline, n_templates, n_columns, n_groups, n_intervals;
    int is_closed_loop;
    uint64_t timeout_ns, warmup_ns, duration_ns, interval_ns, spin_ns, raw_reply_bytes;
    struct lt_arrivals arrivals;
    struct lt_random random, times;
    struct lt_template *templates;
    struct lt_column *columns;
    struct lt_rows *groups;
    uint64_t **drawn;       /* of each group the rows of the request being made */
    uint64_t capture_every;
    uint32_t n_captures_max;
    uint64_t n_events_max;

    /* Read while it runs. */
    int stop;               /* 1: no new requests; 2: end at once */
    int is_running;
    uint64_t start_ns, warm_ns, end_ns;
    uint64_t n_due, n_sent, n_done[LT_OUTCOMES], n_in_flight, n_connected;

    /* Read after it. n_* count what was due after the warm-up, but for connections and bytes. */
    struct lt_histogram service, lag, error_latency, *by_template;
    struct lt_interval *intervals;
    uint64_t n_blocked, n_unsent, n_late_answers, n_reconnects, n_bad, bytes_out, bytes_in, cpu_ns, last_done_ns;
    struct lt_error errors[LT_ERROR_CODES];
    char fatal[LT_TEXT];
    struct lt_capture *captures;
    uint32_t n_captures;
    struct lt_event *events;
    uint64_t n_events;

    /* Its own. */
    int epoll, timer;
    struct lt_slot *slots;
    uint32_t n_slots, slot_mask, oldest, newest;
    struct lt_connection *connections;
    uint32_t *available, available_start, n_available;
    uint32_t *dirty, n_dirty;
    uint64_t next_ns, unblocked_ns;
    int is_blocked;
};

enum { LT_NONE = 0xffffffff };

uint64_t lt_now(void);
int lt_open(struct lt_generator *g);  /* 0, -1: no memory; -2: fatal says why */
void lt_run(struct lt_generator *g);
void lt_close(struct lt_generator *g);
__attribute__((format(printf, 2, 3))) void lt_fail(struct lt_generator *g, const char *format, ...);

/* loadtest_encode.c: append a request to `out`. -1: no memory. */
int lt_encode(struct lt_generator *g, uint32_t request, uint32_t nonce, struct mp_out *out);

/* loadtest_connection.c */
void lt_connect(struct lt_generator *g, struct lt_connection *c, uint64_t now);
void lt_finish_connect(struct lt_generator *g, struct lt_connection *c);
void lt_drop(struct lt_generator *g, struct lt_connection *c, const char *reason, uint64_t now);
void lt_flush(struct lt_generator *g, struct lt_connection *c);
void lt_receive(struct lt_generator *g, struct lt_connection *c);

/* loadtest_run.c: a request's life. */
void lt_issue(struct lt_generator *g, struct lt_connection *c, uint64_t intended_ns);
void lt_finish(struct lt_generator *g, struct lt_slot *slot, enum lt_outcome outcome, uint64_t now);
void lt_release(struct lt_generator *g, struct lt_slot *slot);
void lt_offer(struct lt_generator *g, struct lt_connection *c); /* it may take requests again */
void lt_count_error(struct lt_generator *g, const char *code, size_t code_size, const char *message, size_t size);

/* loadtest_answer.c: take whole answers from the front of c->in; returns the bytes taken. */
size_t lt_take_answers(struct lt_generator *g, struct lt_connection *c, uint64_t now, int at_end);

/* loadtest_http.c */
enum lt_http_result { LT_HTTP_WHOLE, LT_HTTP_MORE, LT_HTTP_INVALID };
void lt_http_start(struct lt_http *h);
/* Read on; data starts with the answer. WHOLE: it ends at h->position. at_end: the server has closed. */
enum lt_http_result lt_http_read(struct lt_http *h, const uint8_t *data, uint64_t size, int at_end);
/* Of a whole answer: move the chunks of its body together. Returns where the body ends then. */
uint64_t lt_http_join(const struct lt_http *h, uint8_t *data);

/* The machine itself: wakes every `period_ns` on a fixed schedule and records how late it was. */
struct lt_hiccups {
    uint64_t period_ns, slice_ns, n_slices;
    int stop;
    uint64_t start_ns;
    struct lt_histogram delays;
    uint32_t *slice_max_us; /* the worst delay of each slice */
};
void lt_watch_hiccups(struct lt_hiccups *h);

#endif
