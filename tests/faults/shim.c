/* Preloaded into a process under test: counts the calls that write below one directory, and makes one of them go wrong.
 *
 * fault_arm(root, mode, nth): the nth such call from then on goes wrong, or, where it says so, every one from the nth on:
 *   KILL       the process is killed before the call
 *   TEAR       the process is killed when half of what the call writes is in the file, cut at a page
 *   AFTER      the process is killed when the call is done
 *   FULL       ENOSPC, from the nth on
 *   FULL_ONCE  ENOSPC
 *   SHORT      half is written and the return value says so; ENOSPC from then on
 *   FAILING    EIO, from the nth on
 *   LOST       EIO, though it does what it should; and for the next call, by which LMDB takes a meta page back
 * It also watches the order of writes to data.mdb: see fault_unsynced() and fault_disorder().
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, KILL, TEAR, AFTER, FULL, FULL_ONCE, SHORT, FAILING, LOST };
enum { PAGE = 4096, META_BYTES = 2 * PAGE };

static char root[PATH_MAX];
static size_t root_bytes;
static atomic_int mode;
static atomic_long nth, calls, unsynced, disorder;

void fault_arm(const char *path, int new_mode, long n)
{
    root_bytes = (size_t)snprintf(root, sizeof root, "%s/", path);
    nth = n;
    calls = unsynced = disorder = 0;
    mode = new_mode;
}

void fault_disarm(void) { mode = OFF; }

/* Calls since it was armed. */
long fault_calls(void) { return calls; }

/* Writes to data.mdb that no fdatasync() has followed. */
long fault_unsynced(void) { return unsynced; }

/* Writes of a meta page of data.mdb that came before what it refers to was synced, or that are not synced themselves. */
long fault_disorder(void) { return disorder; }

static int below_root(const char *path) { return root_bytes && strncmp(path, root, root_bytes) == 0; }

static int path_of(int fd, char *path)
{
    char link[32];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    errno = saved;
    return below_root(path) || strncmp(path, root, root_bytes - 1) == 0; /* or the directory itself */
}

static _Noreturn void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* OFF: the call is to be made. AFTER: and then die(). LOST: and -1 returned. TEAR, SHORT: half of it. FULL: -1, with the errno that is set. */
static int fate(void)
{
    int now = mode;
    if (now == OFF) return OFF;
    long n = ++calls;
    if (n < nth || (n > nth && (now == KILL || now == TEAR || now == AFTER || now == FULL_ONCE)) || (n > nth + 1 && now == LOST))
        return OFF;
    if (now == KILL) die();
    if (n == nth && (now == TEAR || now == AFTER || now == SHORT || now == LOST)) return now;
    errno = now == FAILING || now == LOST ? EIO : ENOSPC;
    return FULL;
}

static int fate_of_fd(int fd)
{
    char path[PATH_MAX];
    return mode != OFF && path_of(fd, path) ? fate() : OFF;
}

static int fate_of_path(const char *path) { return mode != OFF && below_root(path) ? fate() : OFF; }

/* The same for calls that are not made in part, nor waited for. */
static int fails(int what)
{
    if (what == TEAR || what == AFTER) die();
    if (what == SHORT) errno = ENOSPC;
    if (what == LOST) errno = EIO;
    return what != OFF;
}

static void watch_write(int fd, off_t at)
{
    char path[PATH_MAX];
    if (mode == OFF || !path_of(fd, path) || !strstr(path, "/data.mdb")) return;
    int synced = fcntl(fd, F_GETFL) & O_DSYNC;
    if (at < META_BYTES) disorder += unsynced || !synced;
    if (!synced) unsynced++;
}

static void watch_sync(int fd)
{
    char path[PATH_MAX];
    if (mode != OFF && path_of(fd, path) && strstr(path, "/data.mdb")) unsynced = 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

/* Half of n bytes, in whole pages if there are several: the system copies page by page. */
static size_t half(size_t n) { return n > PAGE ? n / 2 / PAGE * PAGE : n / 2; }

static ssize_t write_half(int fd, const void *data, size_t n, off_t at, int what)
{
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    ssize_t written = real(fd, data, half(n), at);
    if (what == TEAR) die();
    return written;
}

static ssize_t do_pwrite(int fd, const void *data, size_t n, off_t at)
{
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    int what = fate_of_fd(fd);
    if (what == FULL) return -1;
    if (what == LOST || what == AFTER) {
        real(fd, data, n, at);
        if (what == AFTER) die();
        errno = EIO;
        return -1;
    }
    /* LMDB takes it that a meta page, which lies in one sector, is written whole or not at all. */
    if (what == TEAR && at < META_BYTES) die();
    if (what != OFF) return write_half(fd, data, n, at, what);
    watch_write(fd, at);
    return real(fd, data, n, at);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return do_pwrite(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) { return do_pwrite(fd, data, n, at); }

ssize_t write(int fd, const void *data, size_t n)
{
    REAL(ssize_t, write, int, const void *, size_t);
    int what = fate_of_fd(fd);
    if (what == FULL) return -1;
    if (what == OFF) return real(fd, data, n);
    ssize_t written = real(fd, data, what == AFTER ? n : half(n));
    if (what == TEAR || what == AFTER) die();
    return written;
}

ssize_t writev(int fd, const struct iovec *parts, int n)
{
    REAL(ssize_t, writev, int, const struct iovec *, int);
    int what = fate_of_fd(fd);
    if (what == FULL) return -1;
    if (what == OFF) {
        watch_write(fd, lseek(fd, 0, SEEK_CUR));
        return real(fd, parts, n);
    }
    ssize_t written = real(fd, parts, what == AFTER ? n : n / 2 ? n / 2 : 1);
    if (what == TEAR || what == AFTER) die();
    return written;
}

int fdatasync(int fd)
{
    REAL(int, fdatasync, int);
    if (fails(fate_of_fd(fd))) return -1;
    watch_sync(fd);
    return real(fd);
}

int fsync(int fd)
{
    REAL(int, fsync, int);
    if (fails(fate_of_fd(fd))) return -1;
    watch_sync(fd);
    return real(fd);
}

int ftruncate(int fd, off_t n)
{
    REAL(int, ftruncate, int, off_t);
    return fails(fate_of_fd(fd)) ? -1 : real(fd, n);
}

int ftruncate64(int fd, off_t n) { return ftruncate(fd, n); }

int posix_fallocate(int fd, off_t at, off_t n)
{
    REAL(int, posix_fallocate, int, off_t, off_t);
    return fails(fate_of_fd(fd)) ? errno : real(fd, at, n); /* which returns the error itself */
}

int posix_fallocate64(int fd, off_t at, off_t n) { return posix_fallocate(fd, at, n); }

int truncate(const char *path, off_t n)
{
    REAL(int, truncate, const char *, off_t);
    return n && fails(fate_of_path(path)) ? -1 : real(path, n); /* to 0 needs no room */
}

int truncate64(const char *path, off_t n) { return truncate(path, n); }

int mkdir(const char *path, mode_t permissions)
{
    REAL(int, mkdir, const char *, mode_t);
    return fails(fate_of_path(path)) ? -1 : real(path, permissions);
}

int rename(const char *from, const char *to)
{
    REAL(int, rename, const char *, const char *);
    return fails(fate_of_path(to)) ? -1 : real(from, to);
}

static int do_open(const char *path, int flags, mode_t permissions)
{
    REAL(int, open, const char *, int, ...);
    if (flags & O_CREAT && access(path, F_OK) && fails(fate_of_path(path))) return -1;
    return real(path, flags, permissions);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        va_list arguments; \
        va_start(arguments, flags); \
        mode_t permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0; \
        va_end(arguments); \
        return do_open(path, flags, permissions); \
    }

OPEN(open)
OPEN(open64)
