/* What runs.pyx keeps for each thread, and a note of the run or load that a thread was in when a signal such as SIGSEGV
 * ends the process.
 *
 * The kernel delivers such a signal to the thread that caused it. The handler writes the number of that thread's run or
 * load into memory that the supervisor maps, and raises the signal again for the handler that was there before, which
 * ends the process. It calls nothing that is unsafe in a handler. */
#ifndef SHORTTAIL_RUNS_H
#define SHORTTAIL_RUNS_H

#include <signal.h>
#include <stdint.h>
#include <string.h>

static __thread int64_t crash_slot;      /* 1 + the slot of the run that this thread is in, or of its load (runs.pyx) */
static __thread int64_t thread_limit_ns; /* a limit for every run of this thread; 0: none */
static volatile int64_t *crash_word;

static const int crash_signals[] = {SIGSEGV, SIGFPE, SIGBUS, SIGILL, SIGABRT};
static struct sigaction crash_before[sizeof crash_signals / sizeof *crash_signals]; /* such as Python's faulthandler */

static void crash_note(int number) {
    if (crash_word && crash_slot) *crash_word = crash_slot;
    for (size_t i = 0; i < sizeof crash_signals / sizeof *crash_signals; i++)
        if (crash_signals[i] == number) sigaction(number, &crash_before[i], NULL);
    raise(number);
}

static int crash_watch(int64_t *word) {
    struct sigaction action;
    crash_word = word;
    memset(&action, 0, sizeof action);
    action.sa_handler = crash_note;
    action.sa_flags = SA_ONSTACK;
    for (size_t i = 0; i < sizeof crash_signals / sizeof *crash_signals; i++)
        if (sigaction(crash_signals[i], &action, &crash_before[i])) return -1;
    return 0;
}

#endif
