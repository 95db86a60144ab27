/* Preloaded into processes under test: writes a line to the file $OUTWARD_LOG for each name that is looked up and each
 * connection to an address of another machine.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *name)
{
    char line[512];
    const char *path = getenv("OUTWARD_LOG");
    int fd = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    int length = snprintf(line, sizeof line, "%s %s\n", what, name);
    if (fd >= 0) {
        if (write(fd, line, (size_t)length) != length)
            abort();
        close(fd);
    }
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **result)
{
    static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    unsigned char address[16];
    if (!real)
        real = (int (*)(const char *, const char *, const struct addrinfo *, struct addrinfo **))dlsym(RTLD_NEXT, "getaddrinfo");
    if (node && inet_pton(AF_INET, node, address) != 1 && inet_pton(AF_INET6, node, address) != 1 && strcmp(node, "localhost"))
        note("getaddrinfo", node);
    return real(node, service, hints, result);
}

int connect(int fd, const struct sockaddr *to, socklen_t size)
{
    static int (*real)(int, const struct sockaddr *, socklen_t);
    char text[INET6_ADDRSTRLEN];
    if (!real)
        real = (int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "connect");
    if (to->sa_family == AF_INET || to->sa_family == AF_INET6) {
        const void *address = to->sa_family == AF_INET ? (const void *)&((const struct sockaddr_in *)to)->sin_addr
                                                       : (const void *)&((const struct sockaddr_in6 *)to)->sin6_addr;
        if (inet_ntop(to->sa_family, address, text, sizeof text) && strncmp(text, "127.", 4) && strcmp(text, "::1"))
            note("connect", text);
    }
    return real(fd, to, size);
}
