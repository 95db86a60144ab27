/* See writeback.h. */
#define _GNU_SOURCE
#include "writeback.h"

#include <fcntl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { PAUSE_NS = 500000 }; /* between two requests for write-back */

static void write_now(int fd)
{
#ifdef __linux__
    sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
#else
    (void)fd;
#endif
}

static void *run(void *argument)
{
    st_writeback *w = argument;
    struct timespec until;
    pthread_mutex_lock(&w->mutex);
    while (!w->stopped) {
        clock_gettime(CLOCK_MONOTONIC, &until); /* the system's time may be set back, and the pause would last as long */
        until.tv_nsec += PAUSE_NS;
        if (until.tv_nsec >= 1000000000) {
            until.tv_sec++;
            until.tv_nsec -= 1000000000;
        }
        pthread_cond_timedwait(&w->stop, &w->mutex, &until);
        if (w->stopped) break;
        pthread_mutex_unlock(&w->mutex);
        write_now(w->fd);
        pthread_mutex_lock(&w->mutex);
    }
    pthread_mutex_unlock(&w->mutex);
    return NULL;
}

static void destroy(st_writeback *w)
{
    pthread_cond_destroy(&w->stop);
    pthread_mutex_destroy(&w->mutex);
    close(w->fd);
}

int st_writeback_start(st_writeback *w, const char *path)
{
    sigset_t all, before;
    w->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (w->fd < 0) return -1;
    w->stopped = 0;
    pthread_mutex_init(&w->mutex, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&w->stop, &monotonic);
    pthread_condattr_destroy(&monotonic);
    sigfillset(&all); /* the new thread must not take signals that other threads handle */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&w->thread, NULL, run, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) destroy(w);
    return failed ? -1 : 0;
}

void st_writeback_stop(st_writeback *w)
{
    pthread_mutex_lock(&w->mutex);
    w->stopped = 1;
    pthread_cond_signal(&w->stop);
    pthread_mutex_unlock(&w->mutex);
    pthread_join(w->thread, NULL);
    destroy(w);
}
