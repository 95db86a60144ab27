"""Python interface of the load generator. loadtest.h describes it; this module checks arguments and copies results.

`run` blocks without the GIL, so call it in a thread of its own. Other threads may call `progress` and `stop` meanwhile;
read the results after it. Wrong arguments raise ValueError; shorttail.loadtest never passes any.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import numpy as np
cimport numpy as cnp

cnp.import_array()

cdef extern from "loadtest.h" nogil:
    enum: LT_MSGPACK, LT_HTTP, LT_RAW
    enum: LT_TABLE, LT_INT, LT_FLOAT
    enum: LT_AS_MSGPACK, LT_AS_JSON, LT_AS_RAW
    enum: LT_LITERAL, LT_VALUES, LT_NONCE, LT_BODY
    enum: LT_UNIFORM, LT_ZIPF, LT_IN_TURN
    enum: LT_ERROR_CODES, LT_COUNTS
    ctypedef int lt_kind "enum lt_kind"
    ctypedef int lt_form "enum lt_form"
    ctypedef int lt_piece_kind "enum lt_piece_kind"
    ctypedef int lt_draw "enum lt_draw"
    ctypedef int lt_protocol "enum lt_protocol"
    ctypedef struct sockaddr_storage "struct sockaddr_storage":
        pass
    ctypedef struct mp_out "struct mp_out":
        uint8_t *data
        size_t size
    ctypedef struct lt_random "struct lt_random":
        pass
    ctypedef struct lt_column "struct lt_column":
        lt_kind kind
        lt_form form
        int group
        int64_t low
        uint64_t span, n
        double begin "from"
        double to
        const uint8_t *bytes
        const uint64_t *offsets
    ctypedef struct lt_piece "struct lt_piece":
        lt_piece_kind kind
        uint32_t column, count
        uint64_t begin, end
    ctypedef struct lt_template "struct lt_template":
        const uint8_t *bytes
        const lt_piece *pieces
        uint32_t n_pieces
        uint64_t bytes_max
        double weight_to
        uint32_t *rows
    ctypedef struct lt_rows "struct lt_rows":
        pass
    ctypedef struct lt_arrivals "struct lt_arrivals":
        int poisson
        double rate_from, rate_to, hold_s, ramp_s, expected
    ctypedef struct lt_histogram "struct lt_histogram":
        uint64_t *counts
        uint64_t total, max
        double sum
    ctypedef struct lt_interval "struct lt_interval":
        lt_histogram latency
        uint64_t outcomes[4]
        uint64_t lag_max
    ctypedef struct lt_error "struct lt_error":
        char code[48]
        char message[240]
        uint64_t count
    ctypedef struct lt_event "struct lt_event":
        uint64_t intended_ns
    ctypedef struct lt_capture "struct lt_capture":
        mp_out request, reply
    ctypedef struct lt_generator "struct lt_generator":
        lt_protocol protocol
        sockaddr_storage address
        uint32_t address_size
        uint32_t n_connections, pipeline, n_templates, n_columns, n_groups, n_intervals
        int is_closed_loop, stop, is_running, epoll, timer
        uint64_t timeout_ns, warmup_ns, duration_ns, interval_ns, spin_ns, raw_reply_bytes
        lt_arrivals arrivals
        lt_random random, times
        lt_template *templates
        lt_column *columns
        lt_rows *groups
        uint64_t capture_every
        uint32_t n_captures_max
        uint64_t n_events_max
        uint64_t start_ns, warm_ns, end_ns
        uint64_t n_due, n_sent, n_in_flight, n_connected
        uint64_t n_done[4]
        lt_histogram service, lag, error_latency
        lt_histogram *by_template
        lt_interval *intervals
        uint64_t n_blocked, n_unsent, n_late_answers, n_reconnects, n_bad, bytes_out, bytes_in, cpu_ns, last_done_ns
        lt_error errors[32]
        char fatal[240]
        lt_capture *captures
        uint32_t n_captures
        lt_event *events
        uint64_t n_events
    ctypedef struct lt_hiccups "struct lt_hiccups":
        uint64_t period_ns, slice_ns, n_slices
        int stop
        uint64_t start_ns
        lt_histogram delays
        uint32_t *slice_max_us
    int lt_open(lt_generator *)
    void lt_run(lt_generator *)
    void lt_close(lt_generator *)
    void lt_watch_hiccups(lt_hiccups *)
    void lt_seed(lt_random *, uint64_t)
    void lt_rows_init(lt_rows *, lt_draw, uint64_t, double)
    uint64_t lt_draw_row(lt_rows *, lt_random *)
    double lt_next_arrival(lt_arrivals *, lt_random *)

cdef extern from * nogil:
    """
    #define LT_LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
    #define LT_STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELAXED)
    """
    uint64_t LT_LOAD(uint64_t)
    int LT_LOAD_INT "LT_LOAD"(int)
    void LT_STORE(int, int)

COUNTS = LT_COUNTS
PROTOCOLS = {"msgpack": LT_MSGPACK, "http": LT_HTTP, "raw": LT_RAW}
KINDS = {"table": LT_TABLE, "int": LT_INT, "float": LT_FLOAT}
FORMS = {"msgpack": LT_AS_MSGPACK, "json": LT_AS_JSON, "raw": LT_AS_RAW}
PIECES = {"literal": LT_LITERAL, "values": LT_VALUES, "nonce": LT_NONCE, "body": LT_BODY}
DRAWS = {"uniform": LT_UNIFORM, "zipf": LT_ZIPF, "in-turn": LT_IN_TURN}
EVENT = np.dtype([("intended_ns", "<u8"), ("sent_ns", "<u8"), ("done_ns", "<u8"), ("request", "<u4"), ("outcome", "<u4")])
OUTCOMES = ("good", "error", "timeout", "lost")

cdef uint64_t SLOTS_MAX = 1 << 20
NUMBER_BYTES = 32  # room for a number in any form


cdef object copy_counts(const lt_histogram *h):
    """Return (counts uint64 [COUNTS], exact largest value, sum of the values)."""
    counts = np.empty(LT_COUNTS, np.uint64)
    memcpy(cnp.PyArray_DATA(<cnp.ndarray>counts), h.counts, LT_COUNTS * sizeof(uint64_t))
    return counts, h.max, h.sum


cdef int fill_column(lt_column *c, object column, int n_groups, list sizes, list kept) except -1:
    """Fill a C column from a templates.Column. sizes: rows of each group. kept: objects that the C struct points to."""
    c.kind, c.form, c.group = KINDS[column.kind], FORMS[column.form], column.group
    c.low, c.span, c.begin, c.to = column.low, column.span, column.from_, column.to
    if c.group < -1 or c.group >= n_groups:
        raise ValueError(f"no group {column.group}")
    if c.kind == LT_TABLE:
        offsets = np.ascontiguousarray(column.offsets, np.uint64)
        data = bytes(column.table)
        if len(offsets) < 2 or offsets.max() > len(data) or (np.diff(offsets.astype(np.int64)) < 0).any():
            raise ValueError("the offsets of a table do not ascend, or lie outside of it")
        c.n = len(offsets) - 1
        if c.group >= 0 and sizes[c.group] > c.n:
            raise ValueError("a group has more rows than one of its tables")
        kept += [offsets, data]
        c.offsets = <const uint64_t *> cnp.PyArray_DATA(<cnp.ndarray>offsets)
        c.bytes = <const uint8_t *> <const char *> data
    elif c.kind == LT_INT and c.group < 0 and c.span == 0:
        raise ValueError("an int column without a group needs a span above 0")
    return 0


cdef int fill_template(lt_template *t, object template, lt_generator *g, list longest, list kept) except -1:
    """Fill a C template from a templates.Template. longest: bytes of each column's longest value. kept: as above."""
    cdef lt_piece *pieces
    cdef const lt_piece *p
    data = bytes(template.data)
    table = np.zeros(len(template.pieces) * sizeof(lt_piece) + 1, np.uint8)
    rows = np.zeros(g.n_groups + 1, np.uint32)
    kept += [data, table, rows]
    t.bytes = <const uint8_t *> <const char *> data
    t.n_pieces = len(template.pieces)
    pieces = <lt_piece *> cnp.PyArray_DATA(<cnp.ndarray>table)
    t.pieces = pieces
    t.rows = <uint32_t *> cnp.PyArray_DATA(<cnp.ndarray>rows)
    size, has_nonce = 16, False
    for i, (kind, column, count, begin, end) in enumerate(template.pieces):
        pieces[i].kind, pieces[i].column, pieces[i].count = PIECES[kind], column, count
        pieces[i].begin, pieces[i].end = begin, end
        p = &pieces[i]
        has_nonce |= p.kind == LT_NONCE
        if p.kind == LT_VALUES:
            if p.column >= g.n_columns:
                raise ValueError(f"no column {column}")
            size += count * (longest[column] + 1)
            group = g.columns[p.column].group
            if group >= 0:
                rows[group] = max(int(rows[group]), count)
        elif p.kind == LT_LITERAL:
            if p.begin > p.end or p.end > <uint64_t> len(data):
                raise ValueError("a literal lies outside its template")
            size += end - begin
        elif p.kind == LT_BODY and size < 16 + 12:
            raise ValueError("a body without a head")
        elif p.kind == LT_NONCE:
            size += 16
    if g.protocol == LT_MSGPACK and not has_nonce:
        raise ValueError("a MessagePack-RPC request without a message id")
    t.bytes_max = size
    return 0


cdef class Generator:
    """The load of a thread on an address. Times are in ns, rates in requests/s; templates.py describes the rest.

    phase: shift of the arrival times, as a fraction of the time between two requests. seed: of all random numbers.
    raw_reply_bytes: size of an answer, for protocol "raw". captures: how many pairs of request and reply to keep, of
    every `capture_every`th request. events: how many requests to record one by one.
    """

    cdef lt_generator *g
    cdef list kept  # objects that the C structs point to

    def __dealloc__(self):
        if self.g is not NULL:
            lt_close(self.g)
            free(self.g.templates)
            free(self.g.columns)
            free(self.g.groups)
            free(self.g)

    def __cinit__(
        self,
        *,
        str protocol,
        bytes sockaddr,
        templates,
        columns=(),
        groups=(),
        uint32_t connections=1,
        uint32_t pipeline=1,
        bint closed_loop=False,
        bint poisson=True,
        double rate_from=1.0,
        double rate_to=1.0,
        double phase=0.0,
        uint64_t warmup_ns=0,
        uint64_t duration_ns=1_000_000_000,
        uint64_t timeout_ns=5_000_000_000,
        uint32_t intervals=1,
        uint64_t spin_ns=0,
        uint64_t seed=0,
        uint64_t raw_reply_bytes=0,
        uint64_t capture_every=0,
        uint32_t captures=0,
        uint64_t events=0,
    ):
        cdef lt_generator *g = <lt_generator *> calloc(1, sizeof(lt_generator))
        if g is NULL:
            raise MemoryError
        g.epoll = g.timer = -1
        self.g, self.kept = g, []
        if not templates or <size_t> len(sockaddr) > sizeof(sockaddr_storage) or not connections or not pipeline or not intervals:
            raise ValueError("templates, connections, pipeline and intervals must not be empty or 0")
        if <uint64_t> connections * pipeline > SLOTS_MAX or not (rate_from > 0 and rate_to >= 0) or not duration_ns:
            raise ValueError("connections times pipeline exceeds 2**20, or a rate or the duration is 0")
        g.protocol = PROTOCOLS[protocol]
        if g.protocol == LT_RAW and not raw_reply_bytes or g.protocol == LT_HTTP and pipeline != 1:
            raise ValueError("protocol raw needs raw_reply_bytes, and protocol http a pipeline of 1")
        memcpy(&g.address, <const char *> sockaddr, len(sockaddr))
        g.address_size = len(sockaddr)
        g.n_connections, g.pipeline, g.is_closed_loop = connections, pipeline, closed_loop
        g.n_intervals, g.interval_ns = intervals, (duration_ns + intervals - 1) // intervals
        g.timeout_ns, g.warmup_ns, g.duration_ns, g.spin_ns = timeout_ns, warmup_ns, duration_ns, spin_ns
        g.raw_reply_bytes, g.n_events_max = raw_reply_bytes, events
        g.capture_every, g.n_captures_max = capture_every or 1, captures
        g.arrivals.poisson, g.arrivals.rate_from, g.arrivals.rate_to = poisson, rate_from, rate_to
        g.arrivals.hold_s, g.arrivals.ramp_s, g.arrivals.expected = warmup_ns / 1e9, duration_ns / 1e9, phase
        # Arrival times have a random stream of their own, so that they do not depend on the requests' contents.
        lt_seed(&g.random, seed)
        lt_seed(&g.times, seed ^ 0x5DEECE66D)
        self._fill(templates, columns, groups)
        opened = lt_open(g)
        if opened == -1:
            raise MemoryError
        if opened < 0:
            raise OSError(g.fatal.decode())

    def _fill(self, templates, columns, groups):
        cdef lt_generator *g = self.g
        cdef int i
        g.templates = <lt_template *> calloc(len(templates), sizeof(lt_template))
        g.columns = <lt_column *> calloc(len(columns) + 1, sizeof(lt_column))
        g.groups = <lt_rows *> calloc(len(groups) + 1, sizeof(lt_rows))
        if g.templates is NULL or g.columns is NULL or g.groups is NULL:
            raise MemoryError
        for i, group in enumerate(groups):
            if group.n < 1 or (group.draw == "zipf" and not group.exponent > 0):
                raise ValueError(f"nothing to draw from: {group}")
            lt_rows_init(&g.groups[i], DRAWS[group.draw], group.n, group.exponent)
        g.n_groups, g.n_columns, g.n_templates = len(groups), len(columns), len(templates)
        sizes, longest = [group.n for group in groups], []
        for i, column in enumerate(columns):
            fill_column(&g.columns[i], column, g.n_groups, sizes, self.kept)
            longest.append(int(np.diff(column.offsets).max()) if g.columns[i].kind == LT_TABLE else NUMBER_BYTES)
        total, so_far = sum(template.weight for template in templates), 0.0
        for i, template in enumerate(templates):
            fill_template(&g.templates[i], template, g, longest, self.kept)
            so_far += template.weight
            g.templates[i].weight_to = so_far / total

    def run(self):
        """Connect, send, and wait for the last answers. Returns at the end, after `stop`, or if the run failed."""
        with nogil:
            lt_run(self.g)

    def stop(self, bint at_once=False):
        """Send no new requests, and wait for those in flight unless `at_once`."""
        LT_STORE(self.g.stop, 2 if at_once else 1)

    def progress(self):
        """Return the counters since the end of the warm-up, and times (CLOCK_MONOTONIC, ns). Callable during a run."""
        cdef lt_generator *g = self.g
        return {
            "running": bool(LT_LOAD_INT(g.is_running)),
            "failed": g.fatal[0] != 0,
            "warm_ns": LT_LOAD(g.warm_ns),
            "end_ns": LT_LOAD(g.end_ns),
            "due": LT_LOAD(g.n_due),
            "sent": LT_LOAD(g.n_sent),
            "in_flight": LT_LOAD(g.n_in_flight),
            "connected": LT_LOAD(g.n_connected),
            **{name: LT_LOAD(g.n_done[i]) for i, name in enumerate(OUTCOMES)},
        }

    def interval_latency(self, uint32_t i):
        """Return (counts, max ns, sum ns) of the latencies of slice i: good answers and timeouts."""
        if i >= self.g.n_intervals:
            raise ValueError(f"no interval {i}")
        return copy_counts(&self.g.intervals[i].latency)

    def template_latency(self, uint32_t i):
        """Return (counts, max ns, sum ns) of the latencies of template i: good answers and timeouts."""
        if i >= self.g.n_templates:
            raise ValueError(f"no template {i}")
        return copy_counts(&self.g.by_template[i])

    def results(self):
        """Return all results except the latencies by interval and by template."""
        cdef lt_generator *g = self.g
        cdef uint32_t i, j
        outcomes = np.array([[g.intervals[i].outcomes[j] for j in range(<uint32_t> 4)] for i in range(g.n_intervals)])
        return {
            **self.progress(),
            "start_ns": g.start_ns,
            "last_done_ns": g.last_done_ns,
            "interval_ns": g.interval_ns,
            "blocked": g.n_blocked,
            "unsent": g.n_unsent,
            "late_answers": g.n_late_answers,
            "reconnects": g.n_reconnects,
            "wrong_answers": g.n_bad,
            "bytes_out": g.bytes_out,
            "bytes_in": g.bytes_in,
            "cpu_ns": g.cpu_ns,
            "fatal": g.fatal.decode("ascii", "replace"),
            "errors": [
                (error.code.decode(), error.message.decode(), error.count) for error in g.errors if error.count
            ],
            "service": copy_counts(&g.service),
            "lag": copy_counts(&g.lag),
            "error_latency": copy_counts(&g.error_latency),
            "interval_outcomes": outcomes,
            "interval_lag_max_ns": np.array([g.intervals[i].lag_max for i in range(g.n_intervals)], np.uint64),
        }

    def captures(self):
        """Return sampled (request, reply) pairs of bytes, for requests with a good answer."""
        cdef lt_capture *c
        pairs = []
        for i in range(self.g.n_captures):
            c = &self.g.captures[i]
            if c.reply.size:
                request = PyBytes_FromStringAndSize(<const char *> c.request.data, c.request.size)
                pairs.append((request, PyBytes_FromStringAndSize(<const char *> c.reply.data, c.reply.size)))
        return pairs

    def events(self):
        """Return the first `events` requests that ended, as EVENT [n]. `outcome` is an index into OUTCOMES."""
        array = np.empty(self.g.n_events, EVENT)
        memcpy(cnp.PyArray_DATA(<cnp.ndarray>array), self.g.events, self.g.n_events * sizeof(lt_event))
        return array


cdef class Hiccups:
    """Measures how late the machine wakes a sleeping thread. This noise is not the server's."""

    cdef lt_hiccups h

    def __cinit__(self, uint64_t period_ns=1_000_000, uint64_t slice_ns=100_000_000, uint64_t slices=1):
        if not period_ns or not slice_ns:
            raise ValueError("the period and the slice must be above 0")
        self.h.period_ns, self.h.slice_ns, self.h.n_slices = period_ns, slice_ns, slices
        self.h.delays.counts = <uint64_t *> calloc(LT_COUNTS, sizeof(uint64_t))
        self.h.slice_max_us = <uint32_t *> calloc(slices + 1, sizeof(uint32_t))
        if self.h.delays.counts is NULL or self.h.slice_max_us is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.h.delays.counts)
        free(self.h.slice_max_us)

    def run(self):
        """Measure until `stop` is called."""
        with nogil:
            lt_watch_hiccups(&self.h)

    def stop(self):
        LT_STORE(self.h.stop, 1)

    def results(self):
        """Return (delays, start ns, largest delay of each slice in us, uint32). delays: (counts, max ns, sum ns)."""
        worst = np.empty(self.h.n_slices, np.uint32)
        memcpy(cnp.PyArray_DATA(<cnp.ndarray>worst), self.h.slice_max_us, self.h.n_slices * sizeof(uint32_t))
        return copy_counts(&self.h.delays), self.h.start_ns, worst


def draw_rows(str draw, uint64_t n, double exponent, uint64_t count, uint64_t seed=0):
    """Return `count` rows as a run would draw them, uint64 [count]."""
    cdef lt_rows rows
    cdef lt_random random
    cdef uint64_t i
    lt_seed(&random, seed)
    lt_rows_init(&rows, DRAWS[draw], n, exponent)
    out = np.empty(count, np.uint64)
    cdef uint64_t[::1] view = out
    for i in range(count):
        view[i] = lt_draw_row(&rows, &random)
    return out


def arrival_times(uint64_t count, *, bint poisson, double rate_from, double rate_to, double hold_s=0.0, double ramp_s=1.0,
                  double phase=0.0, uint64_t seed=0):
    """Return the first `count` intended times of a run, in seconds, float64 [count]."""
    cdef lt_arrivals arrivals
    cdef lt_random random
    cdef uint64_t i
    arrivals.poisson, arrivals.rate_from, arrivals.rate_to = poisson, rate_from, rate_to
    arrivals.hold_s, arrivals.ramp_s, arrivals.expected = hold_s, ramp_s, phase
    lt_seed(&random, seed ^ 0x5DEECE66D)
    out = np.empty(count)
    cdef double[::1] view = out
    for i in range(count):
        view[i] = lt_next_arrival(&arrivals, &random)
    return out
