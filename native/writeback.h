/* Having dirty pages of a file written while more are being made.
 *
 * A commit of LMDB hands its pages to the kernel one by one and then waits for the disk (fdatasync), which is idle until
 * then. A thread that meanwhile asks for what is there to be written lets both go on at once. It promises nothing about
 * durability: that is fdatasync's, which then finds less to do. PostgreSQL (backend_flush_after) and RocksDB
 * (bytes_per_sync) do the same, by the same call. */
#ifndef SHORTTAIL_WRITEBACK_H
#define SHORTTAIL_WRITEBACK_H

#include <pthread.h>

typedef struct {
    int fd;
    int stopped;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t stop;
} st_writeback;

/* 0, or -1: file or thread could not be had, and there is nothing to stop. Where the system has no such call nothing is
 * done. The file is opened anew: a failed write is reported once to each who has it open, and LMDB must hear of it. */
int st_writeback_start(st_writeback *w, const char *path);
void st_writeback_stop(st_writeback *w);

#endif
