/* Closed-loop load: C connections with D requests in flight on each; a reply is answered by the next request.
 *
 *     loadgen --address HOST:PORT|unix:PATH --payload FILE [--connections 1] [--pipeline 1]
 *             [--warmup-s 0.5] [--duration-s 5] [--raw --reply-bytes M [--per-s R [--awake]]]
 *
 * With --per-s it is an open loop: R requests a second at even distances, of each connection in turn, and a latency counts
 * from when its request was due. One that finds D in flight on its connection waits, and those behind it. --awake: it
 * never sleeps in between.
 *
 * FILE holds requests to send in turn, each a u32 little-endian length and that many bytes: a MessagePack-RPC request
 * that starts 94 00 ce and four bytes of message id. Each request gets an id of its own, and each reply must carry the
 * id of a request that is in flight on the connection it came by: a server that crosses replies is caught. With --raw
 * replies are M bytes of anything, for measuring against echo.c.
 *
 * One thread and an epoll_wait that blocks, so a latency includes the wake-ups that any client has. Every request
 * sent from the end of the warm-up to the end of the run counts once, as one of: requests (answered), errors (answered
 * by an error), bad_nonce (the reply to something else), unanswered (no reply within 2 s of the end). Prints one JSON
 * object; anything that stops the run (refused, closed by the server, not MessagePack) is one line on stderr, exit 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "histogram.h"
#include "msgpack_scan.h"
#include "net.h"

#define NAME "loadgen"

enum { EVENTS = 256, FIRST_RECEIVE_BYTES = 64 << 10 };
static const size_t reply_bytes_max = 256u << 20;
static const uint64_t send_bytes_max = 1ull << 30; /* all connections together, every request in flight unsent */
static const uint64_t drain_ns = 2000000000ull;

struct slot { /* one request in flight */
    uint64_t sent_ns;
    uint32_t nonce; /* its low bits are the slot's number, the rest counts up with each use */
    int busy;
};

struct connection {
    int fd, watches_output;
    uint32_t first_slot, oldest; /* slots [first_slot, first_slot + pipeline); replies in --raw come in order */
    uint32_t next;               /* the slot for its next request, in an open loop */
    uint8_t *out;                /* holds `pipeline` of the longest request: what is in flight can never be more */
    size_t out_start, out_end;
    uint8_t *in;
    size_t in_size, in_capacity;
    struct scan scan;
};

static struct {
    const char *address, *payload;
    uint32_t connections, pipeline;
    double warmup_s, duration_s;
    uint64_t per_s;
    int raw, awake;
    uint64_t reply_bytes;
} options = {.connections = 1, .pipeline = 1, .warmup_s = 0.5, .duration_s = 5};

static struct {
    const uint8_t **at;
    uint32_t *bytes;
    size_t n, next, longest;
} requests;

static struct slot *slots;
static uint32_t slot_mask;
static struct histogram latency;
static uint64_t warm_ns, end_ns, last_reply_ns, in_flight;
static uint64_t n_sent, n_errors, n_bad_nonce, n_answered;
static char first_error[200];

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void *allocate(size_t count, size_t size)
{
    void *p = calloc(count, size);
    if (p == NULL)
        die(NAME, "out of memory");
    return p;
}

static uint32_t read_u32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void load_requests(void)
{
    FILE *file = fopen(options.payload, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) < 0)
        die(NAME, "cannot read %s: %s", options.payload, strerror(errno));
    size_t size = (size_t)ftell(file);
    uint8_t *bytes = allocate(size + 1, 1);
    rewind(file);
    if (fread(bytes, 1, size, file) != size)
        die(NAME, "cannot read %s: %s", options.payload, strerror(errno));
    fclose(file);

    requests.at = allocate(size / 5 + 1, sizeof *requests.at);
    requests.bytes = allocate(size / 5 + 1, sizeof *requests.bytes);
    for (size_t at = 0; at < size;) {
        uint32_t length = size - at >= 4 ? read_u32(bytes + at) : UINT32_MAX;
        if (length == 0 || length > size - at - 4)
            die(NAME, "%s: request %zu is cut short", options.payload, requests.n);
        const uint8_t *request = bytes + at + 4;
        if (!options.raw && (length < 7 || memcmp(request, "\x94\x00\xce", 3) != 0))
            die(NAME, "%s: request %zu does not start 94 00 ce", options.payload, requests.n);
        requests.at[requests.n] = request;
        requests.bytes[requests.n++] = length;
        if (length > requests.longest)
            requests.longest = length;
        at += 4 + (size_t)length;
    }
    if (requests.n == 0)
        die(NAME, "%s holds no request", options.payload);
}

static void watch(int epoll, struct connection *c, int output, int operation)
{
    struct epoll_event event = {.events = EPOLLIN | (output ? EPOLLOUT : 0), .data.ptr = c};
    c->watches_output = output;
    if (epoll_ctl(epoll, operation, c->fd, &event) < 0)
        die(NAME, "epoll: %s", strerror(errno));
}

/* Put the next request into the send buffer, under a fresh nonce. */
static void queue_request(struct connection *c, uint32_t slot_number, uint64_t now)
{
    struct slot *slot = &slots[slot_number];
    size_t bytes = requests.bytes[requests.next];
    if (c->out_start > 0) {
        memmove(c->out, c->out + c->out_start, c->out_end - c->out_start);
        c->out_end -= c->out_start;
        c->out_start = 0;
    }
    uint8_t *to = c->out + c->out_end;
    memcpy(to, requests.at[requests.next], bytes);
    if (++requests.next == requests.n)
        requests.next = 0;
    c->out_end += bytes;

    slot->nonce += slot_mask + 1;
    slot->sent_ns = now;
    slot->busy = 1;
    in_flight++;
    n_sent += now >= warm_ns;
    if (!options.raw)
        for (int i = 0; i < 4; i++)
            to[3 + i] = (uint8_t)(slot->nonce >> (24 - 8 * i));
}

static void send_queued(int epoll, struct connection *c)
{
    while (c->out_start < c->out_end) {
        ssize_t n = send(c->fd, c->out + c->out_start, c->out_end - c->out_start, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0)
            die(NAME, "%s: %s while sending", options.address, strerror(errno));
        c->out_start += (size_t)n;
    }
    int left = c->out_start < c->out_end;
    if (!left)
        c->out_start = c->out_end = 0;
    if (left != c->watches_output)
        watch(epoll, c, left, EPOLL_CTL_MOD);
}

static void keep_first_error(const uint8_t *text, size_t size)
{
    if (first_error[0])
        return;
    size_t n = size < sizeof first_error - 1 ? size : sizeof first_error - 1;
    for (size_t i = 0; i < n; i++) /* what is readable of it, safe inside JSON quotes */
        first_error[i] = text[i] >= 32 && text[i] < 127 && text[i] != '"' && text[i] != '\\' ? (char)text[i] : ' ';
}

/* The slot that a reply answers. A nonce that is not in flight here is counted, and taken for the connection's oldest. */
static uint32_t find_slot(struct connection *c, uint64_t msgid, int *is_bad)
{
    uint32_t number = (uint32_t)msgid & slot_mask;
    int is_ours = number - c->first_slot < options.pipeline && slots[number].busy && slots[number].nonce == msgid;
    *is_bad = !is_ours;
    if (is_ours)
        return number;
    number = c->first_slot;
    for (uint32_t i = 0; i < options.pipeline; i++) {
        struct slot *other = &slots[c->first_slot + i];
        if (other->busy && (!slots[number].busy || other->sent_ns < slots[number].sent_ns))
            number = c->first_slot + i;
    }
    if (!slots[number].busy)
        die(NAME, "%s: a reply to nothing (message id %" PRIu64 ")", options.address, msgid);
    return number;
}

__attribute__((noreturn)) static void give_up_on(const uint8_t *reply, size_t size)
{
    if (size < 5 || memcmp(reply, "\x94\x01\xc0", 3) != 0)
        die(NAME, "%s: not a MessagePack-RPC response [1, msgid, error, result]", options.address);
    keep_first_error(reply + 3, size - 3); /* without a message id it is about the connection */
    die(NAME, "%s refused the connection: %s", options.address, first_error);
}

static uint32_t finish_request(struct connection *c, const uint8_t *reply, size_t size, uint64_t now)
{
    struct reply_head head = {0};
    uint32_t number;
    int is_bad = 0;
    if (options.raw) {
        number = c->first_slot + c->oldest;
        c->oldest = c->oldest + 1 < options.pipeline ? c->oldest + 1 : 0;
        if (!slots[number].busy)
            die(NAME, "%s: more bytes than were asked for", options.address);
    } else {
        if (read_reply_head(reply, size, &head) < 0)
            give_up_on(reply, size);
        number = find_slot(c, head.msgid, &is_bad);
    }
    struct slot *slot = &slots[number];
    slot->busy = 0;
    in_flight--;
    if (slot->sent_ns < warm_ns)
        return number;
    last_reply_ns = now;
    if (is_bad) {
        n_bad_nonce++;
    } else if (head.is_error) {
        n_errors++;
        keep_first_error(reply + head.error_at, size - head.error_at);
    } else {
        n_answered++;
        histogram_record(&latency, now - slot->sent_ns);
    }
    return number;
}

/* Take every whole reply out of the buffer and queue a request for each, until the end of the run. */
static void take_replies(struct connection *c, uint64_t now)
{
    size_t start = 0;
    for (;;) {
        if (options.raw) {
            if (c->in_size - start < options.reply_bytes)
                break;
            c->scan.position = start + options.reply_bytes;
        } else {
            enum scan_result result = scan_message(&c->scan, c->in, c->in_size);
            if (result == SCAN_INVALID)
                die(NAME, "%s: the reply is not MessagePack", options.address);
            if (result == SCAN_MORE)
                break;
        }
        size_t end = c->scan.position;
        uint32_t number = finish_request(c, c->in + start, end - start, now);
        start = end;
        scan_start(&c->scan, start);
        if (options.per_s)
            continue;
        uint64_t send_time = now_ns();
        if (send_time < end_ns)
            queue_request(c, number, send_time);
    }
    if (start > 0) {
        memmove(c->in, c->in + start, c->in_size - start);
        c->in_size -= start;
        c->scan.position -= start;
    }
}

static void receive(struct connection *c)
{
    if (c->in_size == c->in_capacity) {
        if (c->in_capacity >= reply_bytes_max)
            die(NAME, "%s: a reply is longer than %zu bytes", options.address, reply_bytes_max);
        c->in_capacity *= 2;
        c->in = realloc(c->in, c->in_capacity);
        if (c->in == NULL)
            die(NAME, "out of memory");
    }
    ssize_t n = recv(c->fd, c->in + c->in_size, c->in_capacity - c->in_size, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0)
        die(NAME, "%s: %s", options.address, n == 0 ? "the server closed a connection" : strerror(errno));
    c->in_size += (size_t)n;
    take_replies(c, now_ns());
}

static void open_connections(int epoll, struct connection *all)
{
    uint32_t n_slots = options.connections * options.pipeline;
    if ((uint64_t)n_slots * requests.longest > send_bytes_max)
        die(NAME, "%" PRIu32 " requests of up to %zu bytes in flight are more than %" PRIu64 " bytes", n_slots,
            requests.longest, send_bytes_max);
    for (slot_mask = 1; slot_mask < n_slots; slot_mask *= 2)
        ;
    slots = allocate(slot_mask--, sizeof *slots);
    for (uint32_t i = 0; i < n_slots; i++)
        slots[i].nonce = i;
    for (uint32_t i = 0; i < options.connections; i++) {
        struct connection *c = &all[i];
        c->fd = net_connect(NAME, options.address);
        if (fcntl(c->fd, F_SETFL, O_NONBLOCK) < 0)
            die(NAME, "fcntl: %s", strerror(errno));
        c->first_slot = i * options.pipeline;
        c->out = allocate(options.pipeline, requests.longest);
        c->in = allocate(1, c->in_capacity = FIRST_RECEIVE_BYTES);
        scan_start(&c->scan, 0);
        watch(epoll, c, 0, EPOLL_CTL_ADD);
    }
}

/* Take what comes within timeout_ms, and send what is queued. */
static void handle_events(int epoll, int timeout_ms)
{
    struct epoll_event events[EVENTS];
    int n = epoll_wait(epoll, events, EVENTS, timeout_ms);
    for (int i = 0; i < n; i++) {
        struct connection *c = events[i].data.ptr;
        if (events[i].events & ~(uint32_t)EPOLLOUT)
            receive(c);
        if (c->out_start < c->out_end)
            send_queued(epoll, c);
    }
}

static void run_closed_loop(int epoll, struct connection *all)
{
    for (uint32_t i = 0; i < options.connections; i++) {
        for (uint32_t d = 0; d < options.pipeline; d++)
            queue_request(&all[i], all[i].first_slot + d, now_ns());
        send_queued(epoll, &all[i]);
    }
    uint64_t stop = end_ns + drain_ns;
    for (uint64_t now = now_ns(); in_flight > 0 && now < stop; now = now_ns())
        handle_events(epoll, (int)((stop - now) / 1000000) + 1);
}

static void run_open_loop(int epoll, struct connection *all, uint64_t start)
{
    uint64_t n = 0, due = start, stop = end_ns + drain_ns;
    (void)prctl(PR_SET_TIMERSLACK, 1ul); /* or the kernel wakes us up to 50 us late */
    for (uint64_t now = now_ns(); (due < end_ns || in_flight > 0) && now < stop; now = now_ns()) {
        while (due < end_ns && due <= now) {
            struct connection *c = &all[n % options.connections];
            if (slots[c->first_slot + c->next].busy)
                break; /* its reply wakes us */
            queue_request(c, c->first_slot + c->next, due);
            send_queued(epoll, c);
            c->next = c->next + 1 < options.pipeline ? c->next + 1 : 0;
            due = start + (uint64_t)((double)++n * 1e9 / (double)options.per_s);
        }
        uint64_t wait_ns = (due < end_ns && due > now ? due : stop) - now;
        struct timespec timeout = {.tv_sec = (time_t)(wait_ns / 1000000000), .tv_nsec = (long)(wait_ns % 1000000000)};
        struct pollfd waiting = {.fd = epoll, .events = POLLIN};
        if (options.awake || ppoll(&waiting, 1, &timeout, NULL) > 0) /* epoll_wait counts in milliseconds */
            handle_events(epoll, 0);
    }
}

static void run_load(int epoll, struct connection *all)
{
    uint64_t start = now_ns();
    warm_ns = start + (uint64_t)(options.warmup_s * 1e9);
    end_ns = warm_ns + (uint64_t)(options.duration_s * 1e9);
    last_reply_ns = warm_ns;
    if (options.per_s)
        run_open_loop(epoll, all, start);
    else
        run_closed_loop(epoll, all);
}

static void print_result(void)
{
    double seconds = (double)(last_reply_ns - warm_ns) / 1e9;
    printf("{\"requests\": %" PRIu64 ", \"errors\": %" PRIu64 ", \"bad_nonce\": %" PRIu64 ", \"unanswered\": %" PRIu64,
           n_answered, n_errors, n_bad_nonce, n_sent - n_answered - n_errors - n_bad_nonce);
    printf(", \"connections\": %" PRIu32 ", \"pipeline\": %" PRIu32, options.connections, options.pipeline);
    printf(", \"seconds\": %.6f, \"requests_per_s\": %.1f", seconds, seconds > 0 ? (double)n_answered / seconds : 0);
    const struct {
        const char *name;
        double quantile;
    } figures[] = {{"p50_us", 0.5}, {"p90_us", 0.9}, {"p99_us", 0.99}, {"p999_us", 0.999}};
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++)
        printf(", \"%s\": %.3f", figures[i].name, histogram_quantile(&latency, figures[i].quantile) / 1e3);
    printf(", \"max_us\": %.3f", (double)latency.max / 1e3);
    if (first_error[0])
        printf(", \"first_error\": \"%s\"", first_error);
    printf("}\n");
}

static void parse_options(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--raw") == 0) {
            options.raw = 1;
            continue;
        }
        if (strcmp(argv[i], "--awake") == 0) {
            options.awake = 1;
            continue;
        }
        const char *name = argv[i], *value = option_value(NAME, argc, argv, i++);
        if (strcmp(name, "--address") == 0)
            options.address = value;
        else if (strcmp(name, "--payload") == 0)
            options.payload = value;
        else if (strcmp(name, "--connections") == 0)
            options.connections = (uint32_t)parse_whole(NAME, name, value, 1, 65536);
        else if (strcmp(name, "--pipeline") == 0)
            options.pipeline = (uint32_t)parse_whole(NAME, name, value, 1, 4096);
        else if (strcmp(name, "--warmup-s") == 0)
            options.warmup_s = parse_seconds(NAME, name, value);
        else if (strcmp(name, "--duration-s") == 0)
            options.duration_s = parse_seconds(NAME, name, value);
        else if (strcmp(name, "--per-s") == 0)
            options.per_s = (uint64_t)parse_whole(NAME, name, value, 1, 10000000);
        else if (strcmp(name, "--reply-bytes") == 0)
            options.reply_bytes = (uint64_t)parse_whole(NAME, name, value, 1, (long long)reply_bytes_max);
        else
            die(NAME, "unknown option %s", name);
    }
    if (options.address == NULL || options.payload == NULL)
        die(NAME, "--address and --payload are needed");
    if (options.raw != (options.reply_bytes > 0))
        die(NAME, "--raw and --reply-bytes go together");
    if (options.per_s && !options.raw)
        die(NAME, "--per-s needs --raw");
    if ((uint64_t)options.connections * options.pipeline > 1u << 22)
        die(NAME, "connections times pipeline is more than %u", 1u << 22);
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    load_requests();
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        die(NAME, "epoll: %s", strerror(errno));
    struct connection *all = allocate(options.connections, sizeof *all);
    open_connections(epoll, all);
    run_load(epoll, all);
    print_result();
    return 0;
}
