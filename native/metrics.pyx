"""Metrics counters of one process, in memory that all processes of a server share.

The memory is an array of 64-bit words with one region per process. Each region has a single writer, so an increment
needs neither a lock nor an atomic operation, and readers never see half a word. A region outlives its process: the next
process that claims it continues its counters. The constants below define the layout; shorttail.observe.memory makes and
reads the memory.

    region: HEADER_WORDS words (gauges and counters of the process), then SLOTS slots
    slot:   the counters of one method with one model: used flag, method, length of the name, name, rows,
            requests[protocol][code], batches by number of rows, then a histogram per stage: buckets, sum in nanoseconds
"""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef enum:
    C_HEADER = 64
    C_SLOTS = 256
    C_SLOT = 216
    C_CODES = 9
    C_NAME_BYTES = 256      # room for LIMITS.name_bytes
    C_BOUNDS = 22
    C_ROW_BOUNDS = 15
    C_STAGES = 6
    AT_METHOD = 1
    AT_LENGTH = 2
    AT_NAME = 3
    AT_ROWS = 35
    AT_REQUESTS = 36        # 2 protocols with 9 codes each
    AT_BATCHES = 54         # buckets of up to 1, 2, 4 ... 16384 rows, and of more
    AT_STAGES = 72
    C_STAGE = 24            # 22 buckets, one for longer times, the sum

HEADER_WORDS = C_HEADER
SLOTS = C_SLOTS
SLOT_WORDS = C_SLOT
REGION_WORDS = C_HEADER + C_SLOTS * C_SLOT
NAME_BYTES = C_NAME_BYTES
ROWS_AT = AT_ROWS
REQUESTS_AT = AT_REQUESTS
BATCHES_AT = AT_BATCHES
STAGES_AT = AT_STAGES
STAGE_WORDS = C_STAGE

METHODS = ("predict", "get_online_features", "push", "delete", "other")
PROTOCOLS = ("rpc", "http")
CODES = ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED",
         "PERMISSION_DENIED", "UNAVAILABLE", "INTERNAL")
STAGES = ("queue", "lookup", "transform", "infer", "encode", "total")
BOUNDS_NS = tuple(digit * 10**exponent for exponent in range(3, 11) for digit in (1, 2, 5))[:C_BOUNDS]
ROW_BOUNDS = tuple(1 << power for power in range(C_ROW_BOUNDS))

cdef int64_t[C_BOUNDS] BOUND
for _i in range(C_BOUNDS):
    BOUND[_i] = BOUNDS_NS[_i]
cdef dict _CODE = {name: number for number, name in enumerate(CODES)}
cdef int _INTERNAL = _CODE["INTERNAL"]

UNKNOWN = "unknown"     # stands for models that do not exist, and for models that get no slot any more


cdef inline void _observe(uint64_t *histogram, int64_t ns) noexcept nogil:
    cdef int i = 0
    if ns < 0:
        ns = 0
    while i < C_BOUNDS and ns > BOUND[i]:
        i += 1
    histogram[i] += 1
    histogram[C_STAGE - 1] += ns


cdef class Recorder:
    """Recorder(words, region): writes one region. words: the whole memory, a writable buffer of uint64.

    Raises ValueError if the memory has no such region.
    """

    cdef uint64_t[::1] _words
    cdef uint64_t *_word
    cdef list _slots        # per method: dict of model name -> slot
    cdef int _used

    def __cinit__(self, words, Py_ssize_t region):
        self._words = words
        if region < 0 or (region + 1) * REGION_WORDS > self._words.shape[0]:
            raise ValueError(f"region {region} lies beyond the memory")
        self._word = &self._words[region * REGION_WORDS]
        self._slots = [{} for _ in METHODS]
        self._used = 0
        cdef uint64_t *slot
        while self._used < C_SLOTS:     # continue the slots of the process that had the region before
            slot = self._slot(self._used)
            if not slot[0]:
                break
            name = (<char *>&slot[AT_NAME])[:min(<Py_ssize_t>slot[AT_LENGTH], C_NAME_BYTES)].decode("utf-8", "replace")
            self._slots[<int>slot[AT_METHOD] % len(METHODS)][name] = self._used
            self._used += 1

    cdef inline uint64_t *_slot(self, int number) noexcept nogil:
        return self._word + C_HEADER + <Py_ssize_t>number * C_SLOT

    def slot(self, int method, str name not None):
        """Return the slot of a method (index in METHODS) and a model's name; make it if necessary.

        name: an existing model, UNKNOWN or "" (arbitrary names from clients would use up the slots). If only the
        reserved slots are left, returns the slot of UNKNOWN. Raises ValueError for a wrong method.
        """
        return self._find(method, name)

    cdef int _find(self, int method, str name) except -1:
        if not 0 <= method < len(METHODS):
            raise ValueError("no such method")
        found = (<dict>self._slots[method]).get(name)
        return self._new_slot(method, name) if found is None else <int>found

    cdef int _new_slot(self, int method, str name) except -1:
        cdef bytes text = name.encode("utf-8", "replace")[:C_NAME_BYTES]
        cdef uint64_t *slot
        if self._used >= C_SLOTS - 2 * len(METHODS) and name not in (UNKNOWN, ""):
            return self._find(method, UNKNOWN)   # the last slots are reserved for UNKNOWN and ""
        if self._used == C_SLOTS:
            return C_SLOTS - 1
        slot = self._slot(self._used)
        slot[AT_METHOD] = method
        slot[AT_LENGTH] = len(text)
        memcpy(&slot[AT_NAME], <const char *>text, len(text))
        slot[0] = 1
        (<dict>self._slots[method])[name] = self._used
        self._used += 1
        return self._used - 1

    cpdef batch(self, int slot, int protocol, uint64_t requests, uint64_t rows, int64_t opened_ns, int64_t start_ns,
              int64_t looked_up_ns, int64_t prepared_ns, int64_t inferred_ns, int64_t end_ns):
        """Count a batch that was answered.

        Times are of time.perf_counter_ns(). A time of 0 means that the stage did not run, or that stage() counts it.
        """
        cdef uint64_t *at
        cdef uint64_t *stage
        cdef int i = 0
        if not 0 <= slot < C_SLOTS or not 0 <= protocol < 2:
            raise ValueError("no such slot")
        at = self._slot(slot)
        at[AT_REQUESTS + protocol * C_CODES] += requests
        at[AT_ROWS] += rows
        while i < C_ROW_BOUNDS and rows > (<uint64_t>1 << i):
            i += 1
        at[AT_BATCHES + i] += 1
        stage = at + AT_STAGES
        _observe(stage, start_ns - opened_ns)
        if looked_up_ns:
            _observe(stage + C_STAGE, looked_up_ns - start_ns)
            _observe(stage + 2 * C_STAGE, prepared_ns - looked_up_ns)
        if inferred_ns:
            _observe(stage + 3 * C_STAGE, inferred_ns - prepared_ns)
        if end_ns:
            _observe(stage + 4 * C_STAGE, end_ns - (inferred_ns if inferred_ns else prepared_ns))
            _observe(stage + 5 * C_STAGE, end_ns - opened_ns)

    def answered(self, int method, str name not None, int protocol, uint64_t requests, uint64_t rows, int64_t opened_ns,
                 int64_t start_ns, int64_t looked_up_ns, int64_t prepared_ns, int64_t inferred_ns):
        """Call batch() with the present time as its end. Return the nanoseconds since opened_ns.

        requests: 0 for HTTP, whose requests and encoding times are counted where responses are made.
        """
        cdef timespec now
        cdef int64_t end_ns
        clock_gettime(CLOCK_MONOTONIC, &now)
        end_ns = <int64_t>now.tv_sec * 1_000_000_000 + now.tv_nsec
        self.batch(self._find(method, name), protocol, requests, rows, opened_ns, start_ns, looked_up_ns, prepared_ns,
                   inferred_ns, 0 if protocol else end_ns)
        return end_ns - opened_ns

    def stage(self, int slot, int stage, int64_t ns):
        """Count one time of a stage. stage: index in STAGES."""
        if not 0 <= slot < C_SLOTS or not 0 <= stage < C_STAGES:
            raise ValueError("no such stage")
        _observe(self._slot(slot) + AT_STAGES + stage * C_STAGE, ns)

    def requests(self, int slot, int protocol, str code, uint64_t n=1):
        """Count n requests that ended with a code. A code that is not in CODES counts as INTERNAL."""
        cdef int number = _CODE.get(code, _INTERNAL)
        if not 0 <= slot < C_SLOTS or not 0 <= protocol < 2:
            raise ValueError("no such slot")
        self._slot(slot)[AT_REQUESTS + protocol * C_CODES + number] += n

    def add(self, int word, uint64_t n):
        """Add n to a word of the header."""
        if not 0 <= word < C_HEADER:
            raise ValueError("no such word")
        self._word[word] += n

    def put(self, int word, uint64_t value):
        """Set a word of the header."""
        if not 0 <= word < C_HEADER:
            raise ValueError("no such word")
        self._word[word] = value
