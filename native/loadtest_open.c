/* Allocates and frees the memory and descriptors of a generator, and measures the machine's noise. */
#define _GNU_SOURCE
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <errno.h>
#include <time.h>
#include <unistd.h>

#include "loadtest.h"

static int open_histogram(struct lt_histogram *h) { return (h->counts = calloc(LT_COUNTS, sizeof *h->counts)) ? 0 : -1; }

static int open_records(struct lt_generator *g)
{
    int failed = open_histogram(&g->service) | open_histogram(&g->lag) | open_histogram(&g->error_latency);
    g->by_template = calloc(g->n_templates, sizeof *g->by_template);
    g->intervals = calloc(g->n_intervals, sizeof *g->intervals);
    g->captures = calloc(g->n_captures_max + 1, sizeof *g->captures);
    g->events = calloc(g->n_events_max + 1, sizeof *g->events);
    if (failed || !g->by_template || !g->intervals || !g->captures || !g->events)
        return -1;
    /* Untouched pages of a histogram take no memory. */
    for (uint32_t i = 0; i < g->n_intervals; i++)
        failed |= open_histogram(&g->intervals[i].latency);
    for (uint32_t i = 0; i < g->n_templates; i++)
        failed |= open_histogram(&g->by_template[i]);
    return failed;
}

static int open_draws(struct lt_generator *g)
{
    g->drawn = calloc(g->n_groups + 1, sizeof *g->drawn);
    for (uint32_t group = 0; g->drawn && group < g->n_groups; group++) {
        uint32_t rows = 1;
        for (uint32_t i = 0; i < g->n_templates; i++)
            rows = g->templates[i].rows[group] > rows ? g->templates[i].rows[group] : rows;
        g->drawn[group] = calloc(rows, sizeof **g->drawn);
        if (g->drawn[group] == NULL)
            return -1;
    }
    return g->drawn ? 0 : -1;
}

static int open_connections(struct lt_generator *g)
{
    uint32_t first_use = (uint32_t)lt_next(&g->random); /* random, so that two runs use different message ids */
    g->n_slots = g->n_connections * g->pipeline;
    for (g->slot_mask = 1; g->slot_mask < g->n_slots; g->slot_mask *= 2)
        ;
    g->slot_mask--;
    g->slots = calloc(g->slot_mask + 1, sizeof *g->slots);
    g->connections = calloc(g->n_connections, sizeof *g->connections);
    g->available = calloc(g->n_connections, sizeof *g->available);
    g->dirty = calloc(g->n_connections, sizeof *g->dirty);
    uint32_t *free_slots = calloc(2 * (size_t)g->n_slots, sizeof *free_slots);
    if (!g->slots || !g->connections || !g->available || !g->dirty || !free_slots) {
        free(free_slots);
        return -1;
    }
    for (uint32_t i = 0; i < g->n_slots; i++) {
        g->slots[i].connection = i / g->pipeline;
        g->slots[i].nonce = (first_use & ~g->slot_mask) | i;
        free_slots[i] = i;
    }
    for (uint32_t i = 0; i < g->n_connections; i++) {
        struct lt_connection *c = &g->connections[i];
        c->fd = -1;
        c->first_slot = i * g->pipeline;
        c->n_free = g->pipeline;
        c->free_slots = free_slots + c->first_slot;
        c->order = free_slots + g->n_slots + c->first_slot;
    }
    return 0;
}

int lt_open(struct lt_generator *g)
{
    g->epoll = g->timer = -1;
    g->oldest = g->newest = LT_NONE;
    if (open_records(g) < 0 || open_draws(g) < 0 || open_connections(g) < 0)
        return -1;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    g->epoll = epoll_create1(EPOLL_CLOEXEC);
    g->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (g->epoll < 0 || g->timer < 0 || epoll_ctl(g->epoll, EPOLL_CTL_ADD, g->timer, &event) < 0) {
        lt_fail(g, "cannot open an epoll or a timer: %s", strerror(errno));
        return -2;
    }
    return 0;
}

void lt_close(struct lt_generator *g)
{
    for (uint32_t i = 0; g->connections && i < g->n_connections; i++) {
        struct lt_connection *c = &g->connections[i];
        if (c->fd >= 0)
            close(c->fd);
        free(c->in);
        free(c->out.data);
    }
    if (g->connections)
        free(g->connections[0].free_slots);
    for (uint32_t i = 0; g->captures && i <= g->n_captures_max; i++) {
        free(g->captures[i].request.data);
        free(g->captures[i].reply.data);
    }
    for (uint32_t i = 0; g->intervals && i < g->n_intervals; i++)
        free(g->intervals[i].latency.counts);
    for (uint32_t i = 0; g->by_template && i < g->n_templates; i++)
        free(g->by_template[i].counts);
    for (uint32_t i = 0; g->drawn && i < g->n_groups; i++)
        free(g->drawn[i]);
    if (g->epoll >= 0)
        close(g->epoll);
    if (g->timer >= 0)
        close(g->timer);
    free(g->service.counts);
    free(g->lag.counts);
    free(g->error_latency.counts);
    free(g->connections);
    free(g->captures);
    free(g->intervals);
    free(g->by_template);
    free(g->events);
    free(g->drawn);
    free(g->slots);
    free(g->available);
    free(g->dirty);
}

/* The schedule is fixed, so a pause of 50 ms is recorded by each wake-up that it delays. */
void lt_watch_hiccups(struct lt_hiccups *h)
{
    prctl(PR_SET_TIMERSLACK, 1ul, 0ul, 0ul, 0ul);
    uint64_t next = lt_now();
    __atomic_store_n(&h->start_ns, next, __ATOMIC_RELAXED);
    while (!__atomic_load_n(&h->stop, __ATOMIC_RELAXED)) {
        next += h->period_ns;
        struct timespec when = {.tv_sec = (time_t)(next / 1000000000u), .tv_nsec = (long)(next % 1000000000u)};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR)
            ;
        uint64_t now = lt_now(), late = now > next ? now - next : 0, slice = (next - h->start_ns) / h->slice_ns;
        uint32_t late_us = late < 4000000000000u ? (uint32_t)(late / 1000) : UINT32_MAX;
        lt_record(&h->delays, late);
        if (slice < h->n_slices && late_us > h->slice_max_us[slice])
            h->slice_max_us[slice] = late_us;
    }
}
