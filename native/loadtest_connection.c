/* Non-blocking sockets: connects, sends, receives, and connects again. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "loadtest.h"

enum { FIRST_RECEIVE_BYTES = 64 << 10 };
static const size_t reply_bytes_max = 257u << 20;
static const uint64_t backoff_min_ns = 10000000, backoff_max_ns = 1000000000;

static int watch_socket(struct lt_generator *g, struct lt_connection *c, int output, int operation)
{
    struct epoll_event event = {.events = EPOLLIN | (output ? EPOLLOUT : 0u), .data.ptr = c};
    c->watches_output = output;
    return epoll_ctl(g->epoll, operation, c->fd, &event);
}

static void retry_later(struct lt_generator *g, struct lt_connection *c, uint64_t now)
{
    (void)g;
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->link = LT_DOWN;
    c->retry_ns = now + c->backoff_ns;
    c->backoff_ns = c->backoff_ns == 0 ? backoff_min_ns : 2 * c->backoff_ns < backoff_max_ns ? 2 * c->backoff_ns : backoff_max_ns;
}

void lt_connect(struct lt_generator *g, struct lt_connection *c, uint64_t now)
{
    int on = 1;
    c->fd = socket(g->address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        lt_fail(g, "cannot open a socket: %s", strerror(errno));
        return;
    }
    (void)setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* fails on a Unix socket, which needs none */
    int result = connect(c->fd, (struct sockaddr *)&g->address, g->address_size);
    if ((result < 0 && errno != EINPROGRESS) || watch_socket(g, c, 1, EPOLL_CTL_ADD) < 0) {
        retry_later(g, c, now); /* refused, or a Unix socket whose queue is full */
        return;
    }
    c->link = LT_CONNECTING; /* a socket that is connected already is reported as writable at once */
}

void lt_finish_connect(struct lt_generator *g, struct lt_connection *c)
{
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0 || error != 0) {
        retry_later(g, c, lt_now());
        return;
    }
    c->link = LT_UP;
    c->out.size = c->out_start = c->in_size = 0;
    c->order_start = c->order_count = 0;
    mp_scan_reset(&c->scan);
    lt_http_start(&c->http);
    watch_socket(g, c, 0, EPOLL_CTL_MOD);
    __atomic_store_n(&g->n_connected, g->n_connected + 1, __ATOMIC_RELAXED);
    lt_offer(g, c);
}

/* Close the connection, count its requests in flight as lost, and connect again after a delay. */
void lt_drop(struct lt_generator *g, struct lt_connection *c, const char *reason, uint64_t now)
{
    c->link = LT_DOWN;
    for (uint32_t i = c->first_slot; i < c->first_slot + g->pipeline; i++) {
        struct lt_slot *slot = &g->slots[i];
        if (slot->state == LT_LATE) {
            lt_release(g, slot);
        } else if (slot->state == LT_IN_FLIGHT) {
            if (slot->intended_ns >= g->warm_ns)
                lt_count_error(g, "CONNECTION_LOST", 15, reason, strlen(reason));
            lt_finish(g, slot, LT_LOST, now);
        }
    }
    c->n_late = 0;
    g->n_reconnects++;
    __atomic_store_n(&g->n_connected, g->n_connected - 1, __ATOMIC_RELAXED);
    retry_later(g, c, now);
}

void lt_flush(struct lt_generator *g, struct lt_connection *c)
{
    while (c->link == LT_UP && c->out_start < c->out.size) {
        ssize_t n = send(c->fd, c->out.data + c->out_start, c->out.size - c->out_start, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0) {
            lt_drop(g, c, strerror(errno), lt_now());
            return;
        }
        c->out_start += (size_t)n;
        g->bytes_out += (uint64_t)n;
    }
    if (c->link != LT_UP)
        return;
    int left = c->out_start < c->out.size;
    if (!left) {
        c->out_start = c->out.size = 0;
    } else if (c->out_start > c->out.size / 2) {
        c->out.size -= c->out_start;
        memmove(c->out.data, c->out.data + c->out_start, c->out.size);
        c->out_start = 0;
    }
    if (left != c->watches_output)
        watch_socket(g, c, left, EPOLL_CTL_MOD);
}

static int make_room(struct lt_generator *g, struct lt_connection *c)
{
    if (c->in_size < c->in_capacity)
        return 0;
    size_t capacity = c->in_capacity ? 2 * c->in_capacity : FIRST_RECEIVE_BYTES;
    uint8_t *grown = capacity <= reply_bytes_max * 2 ? realloc(c->in, capacity) : NULL;
    if (grown == NULL) {
        lt_fail(g, capacity <= reply_bytes_max * 2 ? "out of memory"
                                                   : "the server sent an answer of more than 256 MiB");
        return -1;
    }
    c->in = grown;
    c->in_capacity = capacity;
    return 0;
}

void lt_receive(struct lt_generator *g, struct lt_connection *c)
{
    if (make_room(g, c) < 0)
        return;
    ssize_t n = recv(c->fd, c->in + c->in_size, c->in_capacity - c->in_size, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    const char *reason = n == 0 ? "the server closed the connection" : n < 0 ? strerror(errno) : NULL;
    uint64_t now = lt_now();
    if (n > 0) {
        c->in_size += (size_t)n;
        g->bytes_in += (uint64_t)n;
    }
    size_t taken = lt_take_answers(g, c, now, reason != NULL);
    if (reason != NULL || c->link != LT_UP) {
        lt_drop(g, c, reason ? reason : "the server closes after each answer", now);
        return;
    }
    if (taken > 0) {
        c->in_size -= taken;
        memmove(c->in, c->in + taken, c->in_size);
    }
}
