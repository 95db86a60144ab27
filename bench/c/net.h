/* What echo.c and loadgen.c share: options, addresses, sockets. Every failure is one line on stderr and exit 1. */
#ifndef SHORTTAIL_BENCH_NET_H
#define SHORTTAIL_BENCH_NET_H

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define UNUSED_OK __attribute__((unused))

__attribute__((noreturn, format(printf, 2, 3))) static void die(const char *program, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", program);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

UNUSED_OK static const char *option_value(const char *program, int argc, char **argv, int i)
{
    if (i + 1 >= argc)
        die(program, "option %s needs a value", argv[i]);
    return argv[i + 1];
}

UNUSED_OK static long long parse_whole(const char *program, const char *name, const char *text, long long low,
                                       long long high)
{
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (errno || end == text || *end || value < low || value > high)
        die(program, "%s %s: give a whole number from %lld to %lld", name, text, low, high);
    return value;
}

UNUSED_OK static double parse_seconds(const char *program, const char *name, const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= 0 && value <= 86400))
        die(program, "%s %s: give seconds from 0 to 86400", name, text);
    return value;
}

static void net_no_delay(int fd)
{
    int on = 1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* fails on a Unix socket, which has no Nagle */
}

/* "host:port" or "unix:PATH" -> the addresses to try. `unix_address` backs the result for a path. */
static struct addrinfo *net_resolve(const char *program, const char *address, struct sockaddr_un *unix_address,
                                    struct addrinfo *unix_info)
{
    if (strncmp(address, "unix:", 5) == 0) {
        const char *path = address + 5;
        if (strlen(path) >= sizeof unix_address->sun_path)
            die(program, "%s: the path is longer than a Unix socket allows", address);
        memset(unix_address, 0, sizeof *unix_address);
        unix_address->sun_family = AF_UNIX;
        memcpy(unix_address->sun_path, path, strlen(path));
        memset(unix_info, 0, sizeof *unix_info);
        unix_info->ai_family = AF_UNIX;
        unix_info->ai_socktype = SOCK_STREAM;
        unix_info->ai_addr = (struct sockaddr *)unix_address;
        unix_info->ai_addrlen = sizeof *unix_address;
        return unix_info;
    }
    const char *colon = strrchr(address, ':');
    char host[256];
    if (colon == NULL || (size_t)(colon - address) >= sizeof host)
        die(program, "%s: an address is HOST:PORT or unix:PATH", address);
    size_t length = (size_t)(colon - address);
    if (length >= 2 && address[0] == '[' && address[length - 1] == ']') { /* [::1]:7711 */
        address++;
        length -= 2;
    }
    memcpy(host, address, length);
    host[length] = 0;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int failed = getaddrinfo(length ? host : "127.0.0.1", colon + 1, &hints, &found);
    if (failed)
        die(program, "cannot resolve %s: %s", host, gai_strerror(failed));
    return found;
}

/* A connected blocking socket. */
UNUSED_OK static int net_connect(const char *program, const char *address)
{
    struct sockaddr_un unix_address;
    struct addrinfo unix_info, *info = net_resolve(program, address, &unix_address, &unix_info);
    int fd = -1, reason = 0;
    for (struct addrinfo *a = info; a != NULL && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0)
            break;
        reason = errno;
        if (fd >= 0)
            close(fd);
        fd = -1;
    }
    if (info != &unix_info)
        freeaddrinfo(info);
    if (fd < 0)
        die(program, "cannot connect to %s: %s", address, strerror(reason));
    net_no_delay(fd);
    return fd;
}

/* A listening non-blocking socket; prints the address that it has, with the real port for port 0. */
UNUSED_OK static int net_listen(const char *program, const char *address)
{
    struct sockaddr_un unix_address;
    struct addrinfo unix_info, *info = net_resolve(program, address, &unix_address, &unix_info);
    int on = 1, fd = socket(info->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die(program, "socket: %s", strerror(errno));
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, info->ai_addr, info->ai_addrlen) < 0 || listen(fd, 1024) < 0)
        die(program, "cannot listen on %s: %s", address, strerror(errno));

    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    char host[NI_MAXHOST], port[NI_MAXSERV];
    if (info->ai_family == AF_UNIX)
        printf("%s\n", address);
    else if (getsockname(fd, (struct sockaddr *)&bound, &size) == 0 &&
             getnameinfo((struct sockaddr *)&bound, size, host, sizeof host, port, sizeof port,
                         NI_NUMERICHOST | NI_NUMERICSERV) == 0)
        printf(strchr(host, ':') ? "[%s]:%s\n" : "%s:%s\n", host, port);
    fflush(stdout);
    if (info != &unix_info)
        freeaddrinfo(info);
    return fd;
}

#endif
