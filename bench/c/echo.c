/* The floor that the server is measured against: a bare epoll server that does nothing.
 *
 *     echo --request-bytes N --reply-bytes M [--address 127.0.0.1:0 | unix:PATH]
 *
 * For every N bytes received on a connection it sends M bytes, whatever they say: the same number of bytes each
 * way as the real server, with no work in between. One thread, TCP_NODELAY, epoll_wait that blocks and never spins,
 * one read and at most one write a connection and turn. Prints the address that it bound as its first line.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net.h"

enum { EVENTS = 256, READ_BYTES = 256 << 10, WRITE_BYTES = 256 << 10 };

struct connection {
    int fd;
    uint32_t events;   /* what epoll watches now */
    uint64_t received; /* bytes of a request that is not complete yet */
    uint64_t owed;     /* reply bytes still to send: a count, so a peer that does not read costs no memory */
};

static char read_buffer[READ_BYTES];
static char reply_bytes_source[WRITE_BYTES]; /* zeros: the client in --raw mode counts bytes only */

static void drop(struct connection *c)
{
    close(c->fd);
    free(c);
}

/* Send what is owed, as far as the socket takes it. 0, or -1 when the connection is gone. */
static int send_owed(struct connection *c)
{
    while (c->owed > 0) {
        size_t chunk = c->owed < WRITE_BYTES ? (size_t)c->owed : WRITE_BYTES;
        ssize_t sent = send(c->fd, reply_bytes_source, chunk, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return errno == EAGAIN ? 0 : -1;
        }
        c->owed -= (uint64_t)sent;
    }
    return 0;
}

static int serve(int epoll, struct connection *c, uint64_t request_bytes, uint64_t reply_bytes)
{
    if (c->owed == 0) {
        ssize_t n = recv(c->fd, read_buffer, sizeof read_buffer, 0);
        if (n == 0)
            return -1;
        if (n < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -1;
        c->received += (uint64_t)n;
        c->owed = c->received / request_bytes * reply_bytes;
        c->received %= request_bytes;
    }
    if (send_owed(c) < 0)
        return -1;
    /* A peer that does not read its replies is not read from either. */
    uint32_t wanted = c->owed > 0 ? EPOLLOUT : EPOLLIN;
    if (wanted != c->events) {
        struct epoll_event event = {.events = wanted, .data.ptr = c};
        c->events = wanted;
        return epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
    }
    return 0;
}

static void accept_one(int epoll, int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return;
    struct connection *c = calloc(1, sizeof *c);
    if (c == NULL)
        die("echo", "out of memory");
    net_no_delay(fd);
    c->fd = fd;
    c->events = EPOLLIN;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        drop(c);
}

int main(int argc, char **argv)
{
    const char *address = "127.0.0.1:0";
    uint64_t request_bytes = 0, reply_bytes = 0;
    for (int i = 1; i < argc; i += 2) {
        const char *value = option_value("echo", argc, argv, i);
        if (strcmp(argv[i], "--address") == 0)
            address = value;
        else if (strcmp(argv[i], "--request-bytes") == 0)
            request_bytes = (uint64_t)parse_whole("echo", argv[i], value, 1, 1 << 30);
        else if (strcmp(argv[i], "--reply-bytes") == 0)
            reply_bytes = (uint64_t)parse_whole("echo", argv[i], value, 1, 1 << 30);
        else
            die("echo", "unknown option %s", argv[i]);
    }
    if (request_bytes == 0 || reply_bytes == 0)
        die("echo", "--request-bytes and --reply-bytes are needed");

    signal(SIGPIPE, SIG_IGN);
    int listener = net_listen("echo", address);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event) < 0)
        die("echo", "epoll: %s", strerror(errno));

    struct epoll_event events[EVENTS];
    for (;;) {
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c == NULL)
                accept_one(epoll, listener);
            else if (serve(epoll, c, request_bytes, reply_bytes) < 0)
                drop(c);
        }
    }
}
