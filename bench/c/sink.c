/* What receiving alone costs: requests come as those of an open-loop client do, and are read and forgotten.
 *
 *     sink --request-bytes N --per-s RATE --duration-s S [--cpu SERVER,CLIENT]
 *
 * A process sends RATE requests a second, one send each, over CONNECTIONS connections in turn; another reads all of them
 * every 2.5 ms, about as often as a worker in an overload, into one buffer. Prints the CPU nanoseconds a request of the
 * one that reads: whatever a server does with a request, and if it refuses it, that much it cannot avoid.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "net.h"

enum { CONNECTIONS = 8, READ_BYTES = 256 << 10, TURN_US = 2500 };

static char buffer[READ_BYTES];

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static double cpu_s(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
         + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void run_on(long cpu)
{
    cpu_set_t set;
    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void send_all(const struct sockaddr_in *address, size_t bytes, double per_s, double seconds)
{
    int fd[CONNECTIONS], on = 1;
    unsigned long sent = 0;
    for (int i = 0; i < CONNECTIONS; i++) {
        fd[i] = socket(AF_INET, SOCK_STREAM, 0);
        if (fd[i] < 0 || connect(fd[i], (const struct sockaddr *)address, sizeof *address) < 0)
            die("sink", "connect: %s", strerror(errno));
        setsockopt(fd[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    for (double start_s = now_s(), passed_s; (passed_s = now_s() - start_s) < seconds;)
        for (; (double)sent < passed_s * per_s; sent++)
            if (send(fd[sent % CONNECTIONS], buffer, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno != EAGAIN)
                die("sink", "send: %s", strerror(errno));
    _exit(0);
}

int main(int argc, char **argv)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    size_t bytes = 0;
    double per_s = 0, seconds = 0, used_s;
    long server_cpu = -1, client_cpu = -1;
    unsigned long long received = 0;
    int fd[CONNECTIONS], open = CONNECTIONS, listener;

    for (int i = 1; i < argc; i += 2) {
        const char *value = option_value("sink", argc, argv, i);
        if (!strcmp(argv[i], "--request-bytes"))
            bytes = strtoul(value, NULL, 10);
        else if (!strcmp(argv[i], "--per-s"))
            per_s = strtod(value, NULL);
        else if (!strcmp(argv[i], "--duration-s"))
            seconds = strtod(value, NULL);
        else if (!strcmp(argv[i], "--cpu") && sscanf(value, "%ld,%ld", &server_cpu, &client_cpu) == 2)
            continue;
        else
            die("sink", "unknown option %s", argv[i]);
    }
    if (bytes < 1 || bytes > READ_BYTES || per_s <= 0 || seconds <= 0)
        die("sink", "needs --request-bytes, --per-s and --duration-s");
    listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 64) < 0
        || getsockname(listener, (struct sockaddr *)&address, &size) < 0)
        die("sink", "listen: %s", strerror(errno));
    switch (fork()) {
    case -1:
        die("sink", "fork: %s", strerror(errno));
    case 0:
        run_on(client_cpu);
        send_all(&address, bytes, per_s, seconds);
    }
    run_on(server_cpu);
    for (int i = 0; i < CONNECTIONS; i++)
        if ((fd[i] = accept(listener, NULL, NULL)) < 0)
            die("sink", "accept: %s", strerror(errno));
    used_s = cpu_s();
    while (open) {
        usleep(TURN_US);
        for (int i = 0; i < CONNECTIONS; i++) {
            ssize_t n = fd[i] < 0 ? -1 : recv(fd[i], buffer, sizeof buffer, MSG_DONTWAIT);
            if (n > 0) {
                received += (unsigned long long)n;
            } else if (n == 0) {
                close(fd[i]);
                fd[i] = -1;
                open--;
            }
        }
    }
    used_s = cpu_s() - used_s;
    wait(NULL);
    if (received < bytes)
        die("sink", "nothing was received");
    printf("%.1f\n", used_s * 1e9 / ((double)received / (double)bytes));
    return 0;
}
