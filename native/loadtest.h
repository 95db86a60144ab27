/* The load generator: one thread, one epoll, open or closed loop.
 *
 * A request is due at an intended time that does not depend on the server. Latency is measured from that time, so a
 * stall counts for every request that became due while it lasted ("coordinated omission", Gil Tene). The service time,
 * since the request was really sent, is recorded too. Every answer must match a request in flight on its connection.
 *
 * loadtest_stream.h draws random numbers and records histograms, loadtest_encode.c fills templates, loadtest_answer.c
 * matches answers, loadtest_http.c parses HTTP, loadtest_connection.c handles sockets, loadtest_run.c is the loop.
 */
#ifndef SHORTTAIL_LOADTEST_H
#define SHORTTAIL_LOADTEST_H

#include <sys/socket.h>

#include "loadtest_stream.h"
#include "msgpack.h"

enum lt_protocol {
    LT_MSGPACK, /* MessagePack-RPC: answers in any order */
    LT_HTTP,    /* HTTP/1.1 keep-alive, one request in flight on each connection */
    LT_RAW,     /* an answer is any `raw_reply_bytes` bytes, in the order of the requests */
};

/* -- requests ----------------------------------------------------------------------------------------------- */

enum lt_kind { LT_TABLE, LT_INT, LT_FLOAT };
enum lt_form { LT_AS_MSGPACK, LT_AS_JSON, LT_AS_RAW /* little-endian, eight bytes: inside a tensor */ };

struct lt_column {
    enum lt_kind kind;
    enum lt_form form;
    int group;               /* the group whose row gives the value; -1: each value is drawn for itself */
    int64_t low;             /* LT_INT: the value of row 0 */
    uint64_t span;           /* LT_INT without a group: values low .. low + span - 1 */
    double from, to;         /* LT_FLOAT */
    const uint8_t *bytes;    /* LT_TABLE: the encoded values, */
    const uint64_t *offsets; /* value i is bytes[offsets[i]] to bytes[offsets[i + 1]] */
    uint64_t n;              /* values in the table */
};

enum lt_piece_kind { LT_LITERAL, LT_VALUES, LT_NONCE, LT_BODY };

/* LT_LITERAL: bytes [begin, end) of the template. LT_VALUES: `count` values of a column. LT_NONCE: the request's number.
 * LT_BODY: an HTTP body begins here; its length is written into the eight digits before the CR LF CR LF before it. */
struct lt_piece { enum lt_piece_kind kind; uint32_t column, count; uint64_t begin, end; };

struct lt_template {
    const uint8_t *bytes;
    const struct lt_piece *pieces;
    uint32_t n_pieces;
    uint64_t bytes_max;   /* the most bytes of a request */
    double weight_to;     /* the weights of the templates up to this one, added; the last is 1 */
    uint32_t *rows;       /* the rows that a request draws from each group */
};

/* -- results ------------------------------------------------------------------------------------------------ */

enum lt_outcome { LT_GOOD, LT_ERROR, LT_TIMEOUT, LT_LOST, LT_OUTCOMES };
enum { LT_ERROR_CODES = 32, LT_TEXT = 240 };

struct lt_error { char code[48], message[LT_TEXT]; uint64_t count; };

/* A slice of the run: the requests whose intended time lies in it. */
struct lt_interval { struct lt_histogram latency; uint64_t outcomes[LT_OUTCOMES]; uint64_t lag_max; };

struct lt_event { uint64_t intended_ns, sent_ns, done_ns; uint32_t request, outcome; };

struct lt_capture { struct mp_out request, reply; };

/* -- connections -------------------------------------------------------------------------------------------- */

enum lt_state { LT_FREE, LT_IN_FLIGHT, LT_LATE /* timed out; its answer may still arrive */ };

struct lt_slot {
    uint64_t intended_ns, sent_ns;
    uint32_t nonce;         /* low bits: the slot's number; high bits: how often the slot was used */
    uint32_t older, newer;  /* list of the slots in flight, in the order of sending */
    uint32_t connection;
    uint32_t capture;       /* 1 + index of the capture, 0: none */
    uint16_t template;
    uint8_t state;
};

struct lt_http {
    uint64_t position, body_begin, body_end;
    int status, phase, close;
    int framing; /* how the body ends: 1: Content-Length, 2: chunked, 0: neither, so the server closes */
};

enum lt_link { LT_DOWN, LT_CONNECTING, LT_UP };

struct lt_connection {
    int fd, watches_output, is_available, is_dirty;
    enum lt_link link;
    uint32_t first_slot, n_free, n_late;
    uint32_t *free_slots, *order; /* order: ring of the slots in flight, for protocols that answer in order */
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
    uint64_t **drawn;       /* for each group: the rows drawn for the current request */
    uint64_t capture_every;
    uint32_t n_captures_max;
    uint64_t n_events_max;

    /* Other threads read these during the run, and set `stop`. */
    int stop;               /* 1: send no new requests; 2: end at once */
    int is_running;
    uint64_t start_ns, warm_ns, end_ns;
    uint64_t n_due, n_sent, n_done[LT_OUTCOMES], n_in_flight, n_connected;

    /* Read after the run. n_* count requests that were due after the warm-up; connections and bytes count all. */
    struct lt_histogram service, lag, error_latency, *by_template;
    struct lt_interval *intervals;
    uint64_t n_blocked, n_unsent, n_late_answers, n_reconnects, n_bad, bytes_out, bytes_in, cpu_ns, last_done_ns;
    struct lt_error errors[LT_ERROR_CODES];
    char fatal[LT_TEXT];
    struct lt_capture *captures;
    uint32_t n_captures;
    struct lt_event *events;
    uint64_t n_events;

    /* Used by the loop alone. */
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
int lt_open(struct lt_generator *g);  /* 0: done; -1: out of memory; -2: `fatal` has the reason */
void lt_run(struct lt_generator *g);
void lt_close(struct lt_generator *g);
__attribute__((format(printf, 2, 3))) void lt_fail(struct lt_generator *g, const char *format, ...);

/* loadtest_encode.c: append a request to `out`. Returns -1 if memory runs out. */
int lt_encode(struct lt_generator *g, uint32_t request, uint32_t nonce, struct mp_out *out);

/* loadtest_connection.c */
void lt_connect(struct lt_generator *g, struct lt_connection *c, uint64_t now);
void lt_finish_connect(struct lt_generator *g, struct lt_connection *c);
void lt_drop(struct lt_generator *g, struct lt_connection *c, const char *reason, uint64_t now);
void lt_flush(struct lt_generator *g, struct lt_connection *c);
void lt_receive(struct lt_generator *g, struct lt_connection *c);

/* loadtest_run.c: states of a request. */
void lt_issue(struct lt_generator *g, struct lt_connection *c, uint64_t intended_ns);
void lt_finish(struct lt_generator *g, struct lt_slot *slot, enum lt_outcome outcome, uint64_t now);
void lt_release(struct lt_generator *g, struct lt_slot *slot);
void lt_offer(struct lt_generator *g, struct lt_connection *c); /* the connection can take requests again */
void lt_count_error(struct lt_generator *g, const char *code, size_t code_size, const char *message, size_t size);

/* loadtest_answer.c: process the complete answers at the front of c->in. Returns their bytes. */
size_t lt_take_answers(struct lt_generator *g, struct lt_connection *c, uint64_t now, int at_end);

/* loadtest_http.c */
enum lt_http_result { LT_HTTP_WHOLE, LT_HTTP_MORE, LT_HTTP_INVALID };
void lt_http_start(struct lt_http *h);
/* Continue to parse an answer that starts at `data`. WHOLE: it ends at h->position. at_end: the server has closed. */
enum lt_http_result lt_http_read(struct lt_http *h, const uint8_t *data, uint64_t size, int at_end);
/* Move the chunks of a complete answer's body together. Returns the end of the joined body. */
uint64_t lt_http_join(const struct lt_http *h, uint8_t *data);

/* Measures the noise of the machine: wakes every `period_ns` on a fixed schedule and records how late it wakes. */
struct lt_hiccups {
    uint64_t period_ns, slice_ns, n_slices;
    int stop;
    uint64_t start_ns;
    struct lt_histogram delays;
    uint32_t *slice_max_us; /* the largest delay of each slice */
};
void lt_watch_hiccups(struct lt_hiccups *h);

#endif
