/* The loop: sends requests that are due, receives answers, times requests out, and sleeps until the next event. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "loadtest.h"

/* Counters have a single writer, this thread; other threads read them during the run. */
#define ADD(counter, n) __atomic_store_n(&(counter), (counter) + (n), __ATOMIC_RELAXED)

enum { EVENTS = 128, SEND_AT_ONCE = 32 };
static const uint64_t connect_ns = 5000000000u, never_ns = UINT64_MAX;

static uint64_t read_clock(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t lt_now(void) { return read_clock(CLOCK_MONOTONIC); }

void lt_fail(struct lt_generator *g, const char *format, ...)
{
    va_list arguments;
    if (g->fatal[0])
        return;
    va_start(arguments, format);
    vsnprintf(g->fatal, sizeof g->fatal, format, arguments);
    va_end(arguments);
}

/* Copy a text from the server; characters that are not printable ASCII become spaces. */
static void keep_text(char *to, size_t capacity, const char *text, size_t size)
{
    size_t n = size < capacity - 1 ? size : capacity - 1;
    for (size_t i = 0; i < n; i++)
        to[i] = text[i] >= 32 && text[i] < 127 ? text[i] : ' ';
    to[n] = 0;
}

/* Each error code has an entry; the last entry, OTHER, counts all codes for which no entry was left. */
void lt_count_error(struct lt_generator *g, const char *code, size_t code_size, const char *message, size_t size)
{
    char name[sizeof g->errors->code];
    uint32_t i;
    keep_text(name, sizeof name, code, code_size);
    for (i = 0; i < LT_ERROR_CODES - 1; i++)
        if (g->errors[i].count == 0 || strcmp(g->errors[i].code, name) == 0)
            break;
    struct lt_error *error = &g->errors[i];
    if (error->count++ == 0) {
        strcpy(error->code, i < LT_ERROR_CODES - 1 ? name : "OTHER");
        keep_text(error->message, sizeof error->message, message, size);
    }
}

/* -- states of a request ------------------------------------------------------------------------------------ */

static struct lt_interval *interval_of(struct lt_generator *g, uint64_t intended_ns)
{
    uint64_t i = (intended_ns - g->warm_ns) / g->interval_ns;
    return &g->intervals[i < g->n_intervals ? i : g->n_intervals - 1];
}

static uint32_t choose_template(struct lt_generator *g)
{
    double at = g->n_templates > 1 ? lt_uniform(&g->random) : 0;
    uint32_t i = 0;
    while (i + 1 < g->n_templates && at >= g->templates[i].weight_to)
        i++;
    return i;
}

static void note_sending(struct lt_generator *g, struct lt_connection *c, struct lt_slot *slot, size_t begin)
{
    ADD(g->n_sent, 1);
    if (!g->is_closed_loop) {
        /* The wait while all connections were full is caused by the server; only the rest is the generator's lag. */
        uint64_t ready = slot->intended_ns > g->unblocked_ns ? slot->intended_ns : g->unblocked_ns;
        uint64_t lag = slot->sent_ns > ready ? slot->sent_ns - ready : 0;
        struct lt_interval *interval = interval_of(g, slot->intended_ns);
        g->n_blocked += slot->intended_ns < g->unblocked_ns;
        lt_record(&g->lag, lag);
        if (lag > interval->lag_max)
            interval->lag_max = lag;
    }
    if (g->n_captures < g->n_captures_max && g->n_sent % g->capture_every == 0) {
        struct mp_out *kept = &g->captures[g->n_captures].request;
        if (mp_reserve(kept, c->out.size - begin) == 0) {
            mp_put_raw(kept, c->out.data + begin, c->out.size - begin);
            slot->capture = ++g->n_captures;
        }
    }
}

void lt_issue(struct lt_generator *g, struct lt_connection *c, uint64_t intended_ns)
{
    uint32_t number = c->free_slots[--c->n_free];
    struct lt_slot *slot = &g->slots[number];
    size_t begin = c->out.size;
    slot->nonce += g->slot_mask + 1;
    slot->template = (uint16_t)choose_template(g);
    slot->capture = 0;
    if (lt_encode(g, slot->template, slot->nonce, &c->out) < 0) {
        lt_fail(g, "out of memory");
        return;
    }
    slot->intended_ns = intended_ns;
    slot->sent_ns = lt_now();
    slot->state = LT_IN_FLIGHT;
    slot->older = g->newest;
    slot->newer = LT_NONE;
    if (g->newest == LT_NONE)
        g->oldest = number;
    else
        g->slots[g->newest].newer = number;
    g->newest = number;
    ADD(g->n_in_flight, 1);
    if (g->protocol != LT_MSGPACK) {
        uint32_t at = c->order_start + c->order_count++;
        c->order[at < g->pipeline ? at : at - g->pipeline] = number;
    }
    if (!c->is_dirty) {
        c->is_dirty = 1;
        g->dirty[g->n_dirty++] = (uint32_t)(c - g->connections);
    }
    if (intended_ns >= g->warm_ns)
        note_sending(g, c, slot, begin);
}

void lt_offer(struct lt_generator *g, struct lt_connection *c)
{
    if (c->link != LT_UP)
        return;
    if (g->is_closed_loop) {
        while (c->n_free > 0 && g->is_running && !g->fatal[0]) {
            uint64_t now = lt_now();
            if (now >= __atomic_load_n(&g->end_ns, __ATOMIC_RELAXED))
                return;
            if (now >= g->warm_ns)
                ADD(g->n_due, 1);
            lt_issue(g, c, now);
        }
    } else if (c->n_free > 0 && !c->is_available) {
        uint32_t at = g->available_start + g->n_available++;
        g->available[at < g->n_connections ? at : at - g->n_connections] = (uint32_t)(c - g->connections);
        c->is_available = 1;
        if (g->is_blocked) {
            g->is_blocked = 0;
            g->unblocked_ns = lt_now();
        }
    }
}

void lt_release(struct lt_generator *g, struct lt_slot *slot)
{
    struct lt_connection *c = &g->connections[slot->connection];
    slot->state = LT_FREE;
    c->free_slots[c->n_free++] = (uint32_t)(slot - g->slots);
    lt_offer(g, c);
}

static void note_outcome(struct lt_generator *g, const struct lt_slot *slot, enum lt_outcome outcome, uint64_t now)
{
    struct lt_interval *interval = interval_of(g, slot->intended_ns);
    uint64_t latency = now - slot->intended_ns;
    ADD(g->n_done[outcome], 1);
    ADD(interval->outcomes[outcome], 1);
    if (outcome == LT_GOOD || outcome == LT_TIMEOUT) { /* a request that timed out took at least this long */
        lt_record(&interval->latency, latency);
        lt_record(&g->by_template[slot->template], latency);
    }
    if (outcome == LT_GOOD) {
        lt_record(&g->service, now - slot->sent_ns);
        g->last_done_ns = now;
    }
    if (outcome == LT_ERROR)
        lt_record(&g->error_latency, latency);
    if (g->n_events < g->n_events_max)
        g->events[g->n_events++] =
            (struct lt_event){slot->intended_ns, slot->sent_ns, now, slot->template, (uint32_t)outcome};
}

void lt_finish(struct lt_generator *g, struct lt_slot *slot, enum lt_outcome outcome, uint64_t now)
{
    if (slot->older == LT_NONE)
        g->oldest = slot->newer;
    else
        g->slots[slot->older].newer = slot->newer;
    if (slot->newer == LT_NONE)
        g->newest = slot->older;
    else
        g->slots[slot->newer].older = slot->older;
    __atomic_store_n(&g->n_in_flight, g->n_in_flight - 1, __ATOMIC_RELAXED);
    if (slot->intended_ns >= g->warm_ns)
        note_outcome(g, slot, outcome, now);
    if (outcome == LT_TIMEOUT) {
        slot->state = LT_LATE; /* its id is not reused before its answer arrives or the connection ends */
        g->connections[slot->connection].n_late++;
    } else {
        lt_release(g, slot);
    }
}

/* -- the loop ----------------------------------------------------------------------------------------------- */

static uint64_t next_due(struct lt_generator *g)
{
    double seconds = lt_next_arrival(&g->arrivals, &g->times);
    return seconds < 1e9 ? g->start_ns + (uint64_t)(seconds * 1e9) : never_ns;
}

static struct lt_connection *take_available(struct lt_generator *g)
{
    while (g->n_available > 0) {
        struct lt_connection *c = &g->connections[g->available[g->available_start]];
        g->available_start = g->available_start + 1 < g->n_connections ? g->available_start + 1 : 0;
        g->n_available--;
        c->is_available = 0;
        if (c->link == LT_UP && c->n_free > 0)
            return c;
    }
    return NULL;
}

static void flush_dirty(struct lt_generator *g)
{
    uint32_t n = g->n_dirty;
    g->n_dirty = 0; /* connections that become dirty during the flush (closed loop) are flushed in the next turn */
    for (uint32_t i = 0; i < n; i++) {
        struct lt_connection *c = &g->connections[g->dirty[i]];
        c->is_dirty = 0;
        lt_flush(g, c);
    }
}

/* Count a request that could not be sent before its timeout. */
static void give_up_unsent(struct lt_generator *g, uint64_t now)
{
    struct lt_slot slot = {.intended_ns = g->next_ns, .sent_ns = now, .template = (uint16_t)choose_template(g)};
    if (g->next_ns >= g->warm_ns) {
        g->n_unsent++;
        note_outcome(g, &slot, LT_TIMEOUT, now);
    }
}

static void send_due(struct lt_generator *g, uint64_t now)
{
    uint32_t n = 0;
    while (g->next_ns <= now && g->next_ns < g->end_ns && !g->fatal[0]) {
        if (g->next_ns + g->timeout_ns <= now) {
            give_up_unsent(g, now);
        } else {
            struct lt_connection *c = take_available(g);
            if (c == NULL) {
                g->is_blocked = 1;
                return;
            }
            lt_issue(g, c, g->next_ns);
            lt_offer(g, c);
            if (++n % SEND_AT_ONCE == 0)
                flush_dirty(g);
        }
        if (g->next_ns >= g->warm_ns)
            ADD(g->n_due, 1);
        g->next_ns = next_due(g);
        now = lt_now();
    }
}

static void expire(struct lt_generator *g, uint64_t now)
{
    while (g->oldest != LT_NONE && g->slots[g->oldest].intended_ns + g->timeout_ns <= now) {
        struct lt_slot *slot = &g->slots[g->oldest];
        struct lt_connection *c = &g->connections[slot->connection];
        lt_finish(g, slot, LT_TIMEOUT, now);
        /* In-order protocols cannot skip an answer; MessagePack-RPC goes on until all its ids are late. */
        if (g->protocol != LT_MSGPACK || c->n_late == g->pipeline)
            lt_drop(g, c, "closed by the generator: a request on it timed out", now);
    }
}

static uint64_t connect_again(struct lt_generator *g, uint64_t now)
{
    uint64_t next = never_ns;
    for (uint32_t i = 0; i < g->n_connections && g->n_connected < g->n_connections; i++) {
        struct lt_connection *c = &g->connections[i];
        if (c->link == LT_DOWN && c->retry_ns <= now)
            lt_connect(g, c, now);
        if (c->link == LT_DOWN && c->retry_ns < next)
            next = c->retry_ns;
    }
    return next;
}

/* Wait for events until `until`. A sleeping thread wakes some tens of microseconds late, so the last `spin_ns` are
 * polled. The timerfd is needed because epoll's own timeout has a resolution of milliseconds. */
static int wait_for(struct lt_generator *g, struct epoll_event *events, uint64_t until)
{
    uint64_t now = lt_now();
    if (until <= now + g->spin_ns)
        return epoll_wait(g->epoll, events, EVENTS, 0);
    until = until == never_ns ? 0 /* disarms the timer */ : until - g->spin_ns;
    struct itimerspec when = {
        .it_value = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)}};
    timerfd_settime(g->timer, TFD_TIMER_ABSTIME, &when, NULL); /* also clears an expired timer */
    return epoll_wait(g->epoll, events, EVENTS, 100); /* at most 100 ms, to see `stop` */
}

static void on_event(struct lt_generator *g, const struct epoll_event *event)
{
    struct lt_connection *c = event->data.ptr;
    if (c == NULL || c->link == LT_DOWN) /* the timer, or a connection that was closed earlier in this turn */
        return;
    if (c->link == LT_CONNECTING) {
        lt_finish_connect(g, c);
        return;
    }
    if (event->events & ~(uint32_t)EPOLLOUT)
        lt_receive(g, c);
    if (c->link == LT_UP && c->out_start < c->out.size)
        lt_flush(g, c);
}

/* Returns the time of the next event that the loop must not miss. */
static uint64_t next_wake_up(struct lt_generator *g, uint64_t retry_ns)
{
    uint64_t until = retry_ns;
    if (!g->is_closed_loop && !g->is_blocked && g->next_ns < g->end_ns && g->next_ns < until)
        until = g->next_ns;
    if (!g->is_closed_loop && g->is_blocked && g->next_ns + g->timeout_ns < until)
        until = g->next_ns + g->timeout_ns;
    if (g->oldest != LT_NONE && g->slots[g->oldest].intended_ns + g->timeout_ns < until)
        until = g->slots[g->oldest].intended_ns + g->timeout_ns;
    if (g->is_closed_loop && g->end_ns < until && g->n_in_flight == 0)
        until = g->end_ns;
    return until;
}

/* A turn of the loop. Returns 0 at the end of the run. */
static int turn(struct lt_generator *g)
{
    struct epoll_event events[EVENTS];
    uint64_t now = lt_now(), retry_ns;
    int n, stop = __atomic_load_n(&g->stop, __ATOMIC_RELAXED);
    if (stop == 2)
        return 0;
    if (stop == 1 && now < g->end_ns)
        __atomic_store_n(&g->end_ns, now, __ATOMIC_RELAXED);
    if (!g->is_closed_loop)
        send_due(g, now);
    flush_dirty(g);
    expire(g, now);
    retry_ns = connect_again(g, now);
    if (g->n_in_flight == 0 && (g->is_closed_loop ? now : g->next_ns) >= g->end_ns)
        return 0;
    n = wait_for(g, events, next_wake_up(g, retry_ns));
    if (n < 0 && errno != EINTR)
        lt_fail(g, "epoll: %s", strerror(errno));
    for (int i = 0; i < n && !g->fatal[0]; i++) {
        on_event(g, &events[i]);
        if (!g->is_closed_loop && (now = lt_now()) >= g->next_ns) /* answers must not delay requests that are due */
            send_due(g, now);
        flush_dirty(g);
    }
    return !g->fatal[0];
}

static void connect_all(struct lt_generator *g)
{
    struct epoll_event events[EVENTS];
    uint64_t begin = lt_now();
    while (g->n_connected < g->n_connections && !g->fatal[0] && !__atomic_load_n(&g->stop, __ATOMIC_RELAXED)) {
        uint64_t now = lt_now(), retry_ns = connect_again(g, now);
        if (now - begin > connect_ns) {
            lt_fail(g, "the server accepted %llu of %u connections within %llu s", (unsigned long long)g->n_connected,
                    g->n_connections, (unsigned long long)(connect_ns / 1000000000u));
            return;
        }
        int n = wait_for(g, events, retry_ns < now + connect_ns ? retry_ns : now + connect_ns);
        for (int i = 0; i < n; i++)
            on_event(g, &events[i]);
    }
}

void lt_run(struct lt_generator *g)
{
    prctl(PR_SET_TIMERSLACK, 1ul, 0ul, 0ul, 0ul);
    connect_all(g);
    if (g->fatal[0])
        return;
    uint64_t cpu_ns = read_clock(CLOCK_THREAD_CPUTIME_ID);
    g->start_ns = lt_now();
    g->warm_ns = g->start_ns + g->warmup_ns;
    __atomic_store_n(&g->end_ns, g->warm_ns + g->duration_ns, __ATOMIC_RELAXED);
    __atomic_store_n(&g->is_running, 1, __ATOMIC_RELEASE);
    g->next_ns = next_due(g);
    for (uint32_t i = 0; i < g->n_connections; i++)
        lt_offer(g, &g->connections[i]);
    while (turn(g))
        ;
    uint64_t now = lt_now();
    if (now < g->end_ns) /* the run failed or was stopped */
        __atomic_store_n(&g->end_ns, now, __ATOMIC_RELAXED);
    g->cpu_ns = read_clock(CLOCK_THREAD_CPUTIME_ID) - cpu_ns;
    __atomic_store_n(&g->is_running, 0, __ATOMIC_RELEASE);
}
