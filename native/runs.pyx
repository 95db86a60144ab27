"""The model runs and loads of this process: which model each thread runs or loads now, since when, how long it may.

Every run takes a slot of a page of memory that the supervisor can map too. So a run that takes too long can be ended,
and when a process dies the supervisor can tell which model it was running or loading.

A page is WORDS words of 8 bytes:

    0           1 + the slot of the run that a deadly signal hit, or 1 + SLOTS + the place of the load; 0: none (runs.h)
    1           how many models are banned
    2 ..        up to BANNED keys of banned models, which the supervisor writes
    SLOTS_AT .. SLOTS pairs: key of the model that runs (0: none), start of the run in ns of CLOCK_MONOTONIC
    LOADS_AT .. LOADS pairs: key of the model that is loaded (0: none), start of the load
"""

import mmap
import os
import threading

from libc.stdint cimport int64_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec


cdef extern from "runs.h" nogil:
    int64_t crash_slot
    int64_t thread_limit_ns
    int crash_watch(int64_t *word)


cdef extern from *:
    int __builtin_ctzll(unsigned long long x) nogil


cdef enum:
    N_SLOTS = 64        # runs at the same time that are watched; further ones run unwatched
    N_BANNED = 62
    SLOT_WORDS_AT = 2 + N_BANNED
    LOAD_WORDS_AT = SLOT_WORDS_AT + 2 * N_SLOTS
    N_LOADS = 8         # loads at the same time; further ones are not noted
    N_WORDS = LOAD_WORDS_AT + 2 * N_LOADS

WORDS, SLOTS, SLOTS_AT, BANNED, BANNED_AT = N_WORDS, N_SLOTS, SLOT_WORDS_AT, N_BANNED, 2
LOADS, LOADS_AT = N_LOADS, LOAD_WORDS_AT
cdef int64_t LOOK_NS = 10_000_000   # how often the watching thread looks for runs that take too long

cdef int64_t own_page[N_WORDS]
cdef int64_t *page = own_page
cdef int64_t[N_SLOTS] limits_ns     # of the run in each slot; 0: no limit
cdef bint[N_SLOTS] ended            # the run took too long and was told to end
cdef uint64_t free_slots = <uint64_t>-1
cdef list options = [None] * N_SLOTS    # the onnxruntime.RunOptions of each slot, made at its first run
cdef object watcher = None
cdef object shared_page = None      # keeps the supervisor's page mapped


class RunTooLong(Exception):
    """A run took longer than its limit, and was ended."""


cdef inline int64_t _now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec


def share(int fd):
    """Use the page in this file, which the supervisor maps too. Call it before the first run.

    From then on a deadly signal notes the run that it hits in the page.
    """
    global page, shared_page
    cdef int64_t[::1] words
    shared_page = mmap.mmap(fd, 8 * N_WORDS)
    words = memoryview(shared_page).cast("q")
    page = &words[0]
    if crash_watch(page):
        raise OSError("sigaction failed")


def limit_thread(double limit_s):
    """Limit every run of the calling thread, also where the run's own limit is longer. 0: only the run's own limit."""
    global thread_limit_ns
    thread_limit_ns = <int64_t>(limit_s * 1e9)


def banned():
    """Return the keys of the models that the supervisor has banned, as a frozenset of ints."""
    cdef int64_t i
    return frozenset([page[2 + i] for i in range(min(max(page[1], 0), N_BANNED))])


def begin_load(int64_t key):
    """Note that the calling thread begins to load a model. Returns the place of the note, for `end_load`.

    key: of the model, not 0.
    """
    global crash_slot
    cdef int place
    for place in range(N_LOADS):
        if page[LOAD_WORDS_AT + 2 * place] == 0:
            page[LOAD_WORDS_AT + 2 * place] = key
            page[LOAD_WORDS_AT + 2 * place + 1] = _now_ns()
            crash_slot = 1 + N_SLOTS + place
            return place
    return -1


def end_load(int place):
    """Take back the note of `begin_load`, in the same thread."""
    global crash_slot
    if 0 <= place < N_LOADS:
        page[LOAD_WORDS_AT + 2 * place] = page[LOAD_WORDS_AT + 2 * place + 1] = 0
        crash_slot = 0


def run(call, names, feeds, int64_t key, int64_t limit_ns, new_options):
    """Return `call(names, feeds, options)`, which runs a model.

    key: of the model, not 0. limit_ns: how long the run may take; 0: any time. new_options: makes an
    onnxruntime.RunOptions. Raises RunTooLong if the run was ended for its limit; passes on other exceptions.
    """
    global free_slots, crash_slot
    cdef int slot
    cdef int64_t outer = crash_slot
    if free_slots == 0:
        return call(names, feeds, None)
    slot = __builtin_ctzll(free_slots)
    run_options = options[slot]
    if run_options is None:
        run_options = options[slot] = new_options()
    if thread_limit_ns and (limit_ns == 0 or limit_ns > thread_limit_ns):
        limit_ns = thread_limit_ns
    if limit_ns and watcher is None:
        _start_watcher()
    free_slots &= ~(<uint64_t>1 << slot)
    limits_ns[slot] = limit_ns
    page[SLOT_WORDS_AT + 2 * slot] = key
    page[SLOT_WORDS_AT + 2 * slot + 1] = _now_ns()
    crash_slot = slot + 1
    try:
        return call(names, feeds, run_options)
    except Exception as error:
        if ended[slot]:
            raise RunTooLong from error
        raise
    finally:
        crash_slot = outer
        page[SLOT_WORDS_AT + 2 * slot] = page[SLOT_WORDS_AT + 2 * slot + 1] = 0
        if ended[slot]:
            ended[slot] = False
            run_options.terminate = False
        free_slots |= <uint64_t>1 << slot


def _start_watcher():
    """Start the thread that ends runs which take too long. It takes the GIL only to end one."""
    global watcher
    watcher = threading.Thread(target=_watch, name="run limits", daemon=True)
    watcher.start()


def _watch():
    cdef int slot
    while True:
        with nogil:
            slot = _next_overdue()
        # A run cannot leave its slot while this thread holds the GIL, but it may have left it before.
        if _overdue(slot, _now_ns()):
            ended[slot] = True
            options[slot].terminate = True


cdef int _next_overdue() noexcept nogil:
    """Wait until a run takes too long, and return its slot."""
    cdef timespec rest
    cdef int slot
    cdef int64_t now_ns
    rest.tv_sec = 0
    rest.tv_nsec = LOOK_NS
    while True:
        nanosleep(&rest, NULL)
        now_ns = _now_ns()
        for slot in range(N_SLOTS):
            if _overdue(slot, now_ns):
                return slot


cdef bint _overdue(int slot, int64_t now_ns) noexcept nogil:
    """Whether the run in a slot takes too long and was not told to end."""
    cdef int64_t start_ns = page[SLOT_WORDS_AT + 2 * slot + 1]
    return start_ns != 0 and limits_ns[slot] != 0 and now_ns - start_ns > limits_ns[slot] and not ended[slot]


def _after_fork():
    global watcher
    watcher = None  # a fork copies no thread


os.register_at_fork(after_in_child=_after_fork)
