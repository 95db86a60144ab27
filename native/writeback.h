/* A thread that starts disk writes of a file's dirty pages while a commit still produces more of them.
 *
 * A commit of LMDB gives its pages to the kernel one by one and then waits for the disk in fdatasync. Until then the
 * disk is idle. The thread calls sync_file_range meanwhile, so that writing to disk overlaps with the commit.
 * Durability still comes from fdatasync alone, which then has less to do. PostgreSQL (backend_flush_after) and RocksDB
 * (bytes_per_sync) do the same by the same call. */
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

/* Start the thread. Returns 0, or -1 if the file cannot be opened or no thread created; then do not call stop. On
 * systems without sync_file_range the thread does nothing. The file is opened separately, because the kernel reports a
 * failed write once per open file, and LMDB must get that report too. */
int st_writeback_start(st_writeback *w, const char *path);
void st_writeback_stop(st_writeback *w);

#endif
