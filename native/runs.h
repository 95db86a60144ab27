/* What runs.pyx keeps for each thread, and a note of the run that a thread was in when a signal such as SIGSEGV ends the
 * process.
 *
 * The kernel delivers such a signal to the thread that caused it. The handler writes the number of that thread's run
 * into memory that the supervisor maps, and returns; the instruction then fails again and ends the process, because the
 * handler is installed for one signal only. It calls nothing that is unsafe in a handler. */
#ifndef SHORTTAIL_RUNS_H
#define SHORTTAIL_RUNS_H

#include <signal.h>
#include <stdint.h>
#include <string.h>

static __thread int64_t crash_slot;      /* 1 + the slot of the run that this thread is in; 0: none */
static __thread int64_t thread_limit_ns; /* a limit for every run of this thread; 0: none */
static volatile int64_t *crash_word;

static void crash_note(int number) {
    (void)number;
    if (crash_word && crash_slot) *crash_word = crash_slot;
}

static int crash_watch(int64_t *word) {
    static const int numbers[] = {SIGSEGV, SIGFPE, SIGBUS, SIGILL, SIGABRT};
    struct sigaction action;
    crash_word = word;
    memset(&action, 0, sizeof action);
    action.sa_handler = crash_note;
    action.sa_flags = SA_RESETHAND | SA_ONSTACK;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (sigaction(numbers[i], &action, NULL)) return -1;
    return 0;
}

#endif
