"""Metrics and the request log: shared memory, the text of /metrics, log lines and their rate limit."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shorttail._native.metrics import BOUNDS_NS, METHODS, ROW_BOUNDS, SLOTS, STAGES, UNKNOWN, Recorder
from shorttail.config import LIMITS
from shorttail.observe.logs import RequestLog, Seldom, format_line, trace_ids
from shorttail.observe.memory import WORD, MetricsMemory
from shorttail.server.accepting import Room
from shorttail.server.http.exposition import exposition

PREDICT = METHODS.index("predict")
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class NoModels:
    """The part of an engine that /metrics reads."""

    class Store:
        class Catalog:
            models: dict = {}  # noqa: RUF012

        catalog = Catalog()

    store = Store()


@pytest.fixture
def memory():
    return MetricsMemory.create(2)


def samples(memory):
    text = exposition(memory, NoModels()).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_batch_is_counted_in_every_stage(memory):
    recorder = memory.claim()
    slot = recorder.slot(PREDICT, "fraud")
    #                 requests, rows, opened, start, looked up, prepared, inferred, end
    recorder.batch(slot, 0, 3, 40, 1_000, 1_000 + 999, 3_999, 4_000, 2_004_000, 2_005_500)
    counts = memory.slots()["predict", "fraud"]
    assert counts.rows == 40
    assert counts.requests[0] == 3
    assert counts.batches[ROW_BOUNDS.index(64)] == 1
    took_ns = [999, 2_000, 1, 2_000_000, 1_500, 2_004_500]
    for name, words, ns in zip(STAGES, counts.stages, took_ns, strict=True):
        bucket = next(i for i, bound in enumerate(BOUNDS_NS) if ns <= bound)
        assert words[bucket] == 1, name
        assert sum(words[:-1]) == 1
        assert words[-1] == ns


@pytest.mark.parametrize("number", range(len(BOUNDS_NS)))
def test_bounds_of_buckets_are_inclusive(memory, number):
    recorder = memory.claim()
    slot = recorder.slot(PREDICT, "m")
    for ns in (BOUNDS_NS[number], BOUNDS_NS[number] + 1):
        recorder.stage(slot, 0, ns)
    words = memory.slots()["predict", "m"].stages[0]
    assert (words[number], words[number + 1]) == (1, 1)


def test_bucket_bounds_reach_from_a_microsecond_to_ten_seconds():
    assert BOUNDS_NS[0] == 1_000
    assert BOUNDS_NS[-1] == 10_000_000_000
    assert list(BOUNDS_NS) == sorted(BOUNDS_NS)


def test_counts_of_workers_are_added_up_and_outlive_their_processes(memory):
    """Each worker is a process that claims a region, counts and ends; SIGKILL ends one of them."""
    script = """
import os, sys
from shorttail.observe.memory import WORD, MetricsMemory
memory = MetricsMemory.attach(int(sys.argv[1]))
recorder = memory.claim()
recorder.requests(recorder.slot(0, "fraud"), 0, "OK", 5)
recorder.put(WORD["connections"], 7)
print(flush=True)
sys.stdin.readline()
"""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(memory.fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[memory.fd],
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout.readline() == b"\n"
    assert {process.header["pid"] for process in memory.processes()} == {worker.pid for worker in workers}
    found = samples(memory)
    labels = (("code", "OK"), ("method", "predict"), ("model", "fraud"), ("protocol", "rpc"))
    assert found["shorttail_requests_total", *labels] == 10
    assert found["shorttail_connections", ("protocol", "rpc")] == 14
    assert found[("shorttail_workers",)] == 2

    workers[0].send_signal(signal.SIGKILL)
    workers[1].communicate(b"\n")
    workers[0].communicate()
    found = samples(memory)
    assert found["shorttail_requests_total", *labels] == 10  # counters stay
    assert found["shorttail_connections", ("protocol", "rpc")] == 0  # gauges count living processes only

    recorder = memory.claim()  # takes the region of a process that ended
    assert memory.regions == 7
    assert len(memory.processes()) == 2
    recorder.requests(recorder.slot(PREDICT, "fraud"), 0, "OK")
    assert samples(memory)["shorttail_requests_total", *labels] == 11


def test_models_beyond_the_slots_are_counted_as_unknown(memory):
    recorder = memory.claim()
    for number in range(2 * SLOTS):
        recorder.requests(recorder.slot(PREDICT, f"model_{number}"), 0, "OK")
    slots = memory.slots()
    assert len(slots) <= SLOTS
    assert sum(counts.requests[0] for counts in slots.values()) == 2 * SLOTS
    assert slots["predict", UNKNOWN].requests[0] >= SLOTS
    for method in range(len(METHODS)):  # there is a slot for methods without a model
        recorder.slot(method, "")
    assert ("other", "") in memory.slots() or ("other", UNKNOWN) in memory.slots()


def test_a_recorder_stays_within_its_region(memory):
    with pytest.raises(ValueError, match="beyond the memory"):
        Recorder(memory.words, memory.regions)
    recorder = memory.claim()
    for wrong in (-1, SLOTS):
        with pytest.raises(ValueError, match="no such slot"):
            recorder.requests(wrong, 0, "OK")
    with pytest.raises(ValueError, match="no such word"):
        recorder.put(64, 1)


def test_an_unknown_code_is_counted_as_internal(memory):
    recorder = memory.claim()
    recorder.requests(recorder.slot(PREDICT, "m"), 1, "SOMETHING")
    labels = (("code", "INTERNAL"), ("method", "predict"), ("model", "m"), ("protocol", "http"))
    assert samples(memory)["shorttail_requests_total", *labels] == 1


def test_metrics_are_valid_prometheus_text_in_base_units(memory):
    recorder = memory.claim()
    recorder.batch(recorder.slot(PREDICT, "m"), 0, 1, 1, 0, 1_000, 2_000, 3_000, 4_000, 5_000)
    recorder.put(WORD["reader_age_us"], 2_500_000)
    families = {
        family.name: family for family in text_string_to_metric_families(exposition(memory, NoModels()).decode())
    }
    assert all(name.startswith("shorttail_") and family.documentation for name, family in families.items())
    for family in families.values():
        if family.type == "histogram":
            for count in (sample for sample in family.samples if sample.name.endswith("_count")):
                last = [sample.value for sample in family.samples if sample.labels == {**count.labels, "le": "+Inf"}]
                assert last == [count.value]
    age = families["shorttail_store_reader_age_seconds"].samples
    assert [sample.value for sample in age] == [2.5]
    usage = families["shorttail_process_resident_memory_bytes"].samples
    assert usage[0].value > 1 << 20
    assert usage[0].labels == {"worker": "1"}


@pytest.mark.parametrize(
    ("header", "ids"),
    [
        (TRACE, {"trace_id": TRACE[3:35], "parent_id": TRACE[36:52]}),
        (TRACE.replace("00-4", "01-4") + "-more", {"trace_id": TRACE[3:35], "parent_id": TRACE[36:52]}),
        (None, {}),
        ("", {}),
        (TRACE + "-more", {}),
        (TRACE.upper(), {}),
        ("ff" + TRACE[2:], {}),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", {}),
        (f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01", {}),
    ],
)
def test_trace_ids_are_read_from_a_valid_traceparent(header, ids):
    assert trace_ids(header) == ids


def test_log_lines_are_text_or_json():
    assert format_line("text", "warning", "request failed", {"model": "m", "error": "no x"}) == (
        'warning: request failed (model=m error="no x")'
    )
    document = json.loads(format_line("json", "error", "two\nlines", {"n": 1}, 0.5))
    assert document == {"time": "1970-01-01T00:00:00.500Z", "level": "error", "message": "two\nlines", "n": 1}


class Now:
    """An event loop whose executor runs functions at once."""

    def run_in_executor(self, executor, function, *args):
        function(*args)


def test_the_rate_of_log_lines_is_limited():
    stream = io.StringIO()
    log = RequestLog("json", failed=True, stream=stream)
    many = 10 * LIMITS.log_lines_per_s
    for number in range(many):
        log.note("warning", "request failed", number=number, model="", request_id=None)
    log.write(Now())
    lines = [json.loads(text) for text in stream.getvalue().splitlines()]
    assert LIMITS.log_lines_per_s <= len(lines) < many / 2
    assert lines[0].keys() == {"time", "level", "message", "number"}
    assert lines[-1]["message"] == "log lines left out"
    assert lines[-1]["lines"] == log.dropped_in_all == many - (len(lines) - 1)
    log.write(Now())  # nothing new, so nothing is written
    assert len(stream.getvalue().splitlines()) == len(lines)


def test_a_claimed_region_belongs_to_this_process(memory):
    memory.claim()
    (process,) = memory.processes()
    assert process.header["pid"] == os.getpid()
    assert process.living


def test_lines_of_one_kind_come_seldom_and_say_how_many_there_were(monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    seldom = Seldom()
    assert seldom.count(0) == 0
    assert seldom.count(2) == 2
    assert [seldom.count(1), seldom.count(5), seldom.count(0)] == [0, 0, 0]
    now_s += LIMITS.repeated_line_s
    assert seldom.count(0) == 6
    assert seldom.count(1) == 0


def test_a_connection_takes_one_place_while_it_is_accepted_and_after():
    connections: set = set()
    room = Room(connections, 3)
    assert [room.takes(name) for name in "abc"] == [True] * 3
    connections |= {"a", "b"}  # they are among the connections, and their tasks have not ended
    assert not room.takes("d")
    room.settled("c")  # its client has gone
    assert room.takes("e")
    room.settled("a")
    assert not room.takes("f")
    connections.discard("b")
    assert room.takes("g")
    assert room.refused == 2
