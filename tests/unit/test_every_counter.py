"""Every counter reaches /metrics: those of native code, of models and shadows, and of each process of a server."""

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import shorttail._native
from shorttail._native.metrics import METHODS, UNKNOWN
from shorttail.models.load import RunCounts
from shorttail.models.session import FAILED, ModelFailed, RowsRefused, RunTimedOut
from shorttail.observe.memory import BULK, GAUGES, HEADER, SUPERVISOR, WORD, WRITER, MetricsMemory
from shorttail.observe.tallies import ENTRIES, FUNCTIONS, KINDS, RUNS, SHADOWS, WRITES, float_bits
from shorttail.server.http.exposition import exposition
from shorttail.server.shadow import ShadowCounts
from shorttail.server.telemetry import ROUTER_COUNTERS, ROUTER_GAUGES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"

# Whole numbers of native objects -> the metric that shows them.
SHOWN = {
    "Router.accepted": "shorttail_connections_accepted_total",
    "Router.refused": "shorttail_connections_refused_total",
    "Router.timed_out": "shorttail_connections_cut_total",
    "Router.shed": "shorttail_requests_shed_total",
    "Router.received_bytes": "shorttail_received_bytes_total",
    "Router.sent_bytes": "shorttail_sent_bytes_total",
    "Router.in_flight": "shorttail_requests_in_flight",
    "Router.waiting_rows": "shorttail_waiting_rows",
    "Router.waiting_bytes": "shorttail_waiting_bytes",
    "TransformProgram.failed_rows": "shorttail_on_demand_failed_rows_total",
    "TransformProgram.wrong_lengths": "shorttail_on_demand_failed_rows_total",
}
# The others, and why an operator does not need them.
SETTING = "a setting, which never changes"
FORM = "the form of an object, fixed when it is made"
OF_ONE = "of one batch or connection, of which there are thousands; the sums are shown"
LOAD = "of a load, which no process of a server does; the command that loads prints it"
LOCK = "the state of a lock, which changes a million times per second"
NOT_SHOWN = {
    "Scan.image_bytes": OF_ONE,
    "Scan.pages": OF_ONE,
    "Scan.rows": OF_ONE,
    "Batch.n_requests": OF_ONE,
    "Batch.n_rows": OF_ONE,
    "Batch.opened_ns": OF_ONE,
    "Batch.started_ns": OF_ONE,
    "Batch.waiting": OF_ONE,
    "Columns.n_columns": FORM,
    "Columns.n_rows": OF_ONE,
    "Connection.access": OF_ONE,
    "Connection.in_flight": OF_ONE,
    "Directory.depth": FORM,
    "Directory.n_buckets": FORM,
    "Gate.generation": "shorttail_store_generation shows that of the store",
    "Gate.inside": LOCK,
    "Gate.sleeping": LOCK,
    "Gate.waiting": LOCK,
    "Layout.null_bytes": FORM,
    "Layout.null_offset": FORM,
    "Layout.page_bytes": FORM,
    "Layout.page_format": FORM,
    "Layout.row_bytes": FORM,
    "Layout.rows_per_page": FORM,
    "Layout.time_offset": FORM,
    "Lookup.n_strings": FORM,
    "Lookup.ttl_us": SETTING,
    "PageImages.rows": LOAD,
    "Router.access": SETTING,
    "Router.auth_deadline_s": SETTING,
    "Router.bulk": "a function",
    "Router.error_form": SETTING,
    "Router.deferred_bytes": "it is 0 between the turns of the event loop",
    "Router.frame_deadline_s": SETTING,
    "Router.idle_deadline_s": SETTING,
    "Router.last_turn_ns": "of one turn; shorttail_stage_duration_seconds shows how long batches take",
    "Router.max_connections": SETTING,
    "Router.max_peer_connections": SETTING,
    "Router.write_deadline_s": SETTING,
    "RowPartitions.file_bytes": LOAD,
    "RowPartitions.image_bytes": LOAD,
    "RowPartitions.memory_bytes": LOAD,
    "RowPartitions.older": LOAD,
    "Split.below": SETTING,
    "Split.n_columns": SETTING,
    "Split.salt": SETTING,
    "Split.version": SETTING,
    "Tree.map_bytes": FORM,
    "Trees.n_bitvector_trees": FORM,
    "Trees.n_features": FORM,
    "Trees.n_leaves": FORM,
    "Trees.n_nodes": FORM,
    "Trees.n_targets": FORM,
    "Trees.n_trees": FORM,
}
# Words of the header that identify a process and its clock.
NOT_COUNTED = {"pid", "started_ns", "heartbeat_ns"}


class OneModel:
    """The part of an engine that /metrics reads."""

    class store:
        class catalog:
            class Entry:
                current = 3

            models = {"fraud": Entry}  # noqa: RUF012


@pytest.fixture
def memory():
    return MetricsMemory.create(2)


def families(memory):
    return {family.name: family for family in text_string_to_metric_families(exposition(memory, OneModel()).decode())}


def samples(memory):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families(memory).values()
        for sample in family.samples
    }


def native_numbers():
    """Return "Class.attribute" of each attribute of native code that is a whole number, or that no stub describes."""
    found = set()
    for module in pkgutil.iter_modules(shorttail._native.__path__):
        loaded = importlib.import_module(f"shorttail._native.{module.name}")
        stub = ast.parse(Path(loaded.__file__).with_name(f"{module.name}.pyi").read_text())
        types = {
            (kind.name, item.target.id): ast.unparse(item.annotation)
            for kind in stub.body
            if isinstance(kind, ast.ClassDef)
            for item in kind.body
            if isinstance(item, ast.AnnAssign)
        } | {
            (kind.name, item.name): ast.unparse(item.returns)
            for kind in stub.body
            if isinstance(kind, ast.ClassDef)
            for item in kind.body
            if isinstance(item, ast.FunctionDef) and item.returns is not None
        }
        for name, kind in vars(loaded).items():
            if not isinstance(kind, type) or kind.__module__ != loaded.__name__:
                continue
            for attribute, value in vars(kind).items():
                is_data = type(value).__name__ in ("getset_descriptor", "member_descriptor")
                if is_data and not attribute.startswith("_") and types.get((name, attribute)) in ("int", None):
                    found.add(f"{name}.{attribute}")
    return found


def test_every_number_of_native_code_is_shown_or_has_a_reason_why_not(memory):
    assert native_numbers() == SHOWN.keys() | NOT_SHOWN.keys()
    assert not SHOWN.keys() & NOT_SHOWN.keys()
    assert {f"Router.{name}" for name in ROUTER_COUNTERS | ROUTER_GAUGES} == {
        name for name in SHOWN if name.startswith("Router.")
    }
    named = {f"{name}_total" if family.type == "counter" else name for name, family in families(memory).items()}
    assert set(SHOWN.values()) <= named


def test_every_count_of_a_model_and_a_shadow_has_a_place():
    counted = {field.name for field in dataclasses.fields(RunCounts)} - {"functions"}
    assert counted == set(RUNS.values)
    assert {field.name for field in dataclasses.fields(ShadowCounts)} - {"last_error"} == set(SHADOWS.values)


@pytest.mark.parametrize("word", sorted(set(HEADER) - NOT_COUNTED))
def test_every_word_of_a_process_is_shown(memory, word):
    """A number in that word changes a metric, and as much as it should."""
    recorder = memory.claim()
    memory.claim(SUPERVISOR)
    before = samples(memory)
    recorder.put(WORD[word], 7_000_000_000)
    after = samples(memory)
    changed = {key: value for key, value in after.items() if before.get(key) != value and "process" not in key[0]}
    changed = {key: value for key, value in changed.items() if "heartbeat" not in key[0]}
    [(key, value)] = changed.items()
    assert value in (7e9, 7e3, 7.0), key
    assert key[0].endswith("_total") == (word not in GAUGES and word not in ("generation", "reader_age_us"))


def test_every_labelled_count_is_shown(memory):
    memory.claim(WRITER)
    tallies = memory.tallies()
    before = set(samples(memory))
    shown = []
    for kind in KINDS:
        values = [1000 * (kind.number + 1) + i for i in range(len(kind.values))]
        if kind is SHADOWS:
            values[-1] = float_bits(0.125)
        tallies.add(kind, tuple(f"a {label}" for label in kind.labels), values)
        shown += [0.125 if value == float_bits(0.125) else value for value in values]
    found = samples(memory)
    new = {key: value for key, value in found.items() if key not in before}
    assert sorted(new.values()) == sorted(shown)
    assert found["shorttail_push_rows_total", ("outcome", "older"), ("view", "a view")] == 1001
    assert found["shorttail_shadow_largest_difference", ("model", "a model"), ("version", "a version")] == 0.125
    failed = ("function", "a function"), ("model", "a model"), ("reason", "error")
    assert found["shorttail_on_demand_failed_rows_total", *failed] == 2000


def test_labelled_counts_of_processes_are_added_up_and_outlive_them(memory):
    other = MetricsMemory.attach(memory.fd)
    memory.claim(BULK)
    first = memory.tallies()
    other.claim(WRITER)
    second = other.tallies()
    for tallies, largest in ((first, 2.0), (second, 0.5)):
        tallies.add(SHADOWS, ("m", "2"), [1, 10, 3, 0, 0])
        tallies.put(SHADOWS, ("m", "2"), 5, float_bits(largest))
    assert memory.tallied()[SHADOWS.number, ("m", "2")] == [2, 20, 6, 0, 0, float_bits(2.0)]
    again = memory.tallies()  # as a process that takes the region over
    again.add(SHADOWS, ("m", "2"), [1, 0, 0, 0, 0])
    again.add(WRITES, ("v",), [5, 0, 0, 0])
    assert memory.tallied()[SHADOWS.number, ("m", "2")][:2] == [3, 20]
    assert memory.tallied()[WRITES.number, ("v",)][0] == 5


def test_labels_beyond_the_table_are_counted_as_unknown(memory):
    memory.claim()
    tallies = memory.tallies()
    for number in range(2 * ENTRIES):
        tallies.add(FUNCTIONS, ("m", f"f{number}"), [1, 0])
        tallies.add(WRITES, (f"v{number}",), [1, 0, 0, 0])
    found = memory.tallied()
    assert len(found) <= ENTRIES
    for kind, unknown in ((FUNCTIONS, (UNKNOWN, UNKNOWN)), (WRITES, (UNKNOWN,))):
        assert sum(values[0] for (number, _), values in found.items() if number == kind.number) == 2 * ENTRIES
        assert found[kind.number, unknown][0] > ENTRIES
    long = "ä" * 127, "f" * 255
    other = MetricsMemory.create(1)
    other.claim()
    other.tallies().add(FUNCTIONS, long, [1, 2])
    assert other.tallied()[FUNCTIONS.number, long][:2] == [1, 2]


def test_a_process_that_is_no_worker_is_not_shown_as_one(memory):
    for region in (SUPERVISOR, WRITER, BULK):
        memory.claim(region).put(WORD["connections"], 5)
    memory.claim()
    found = samples(memory)
    assert found[("shorttail_workers",)] == 1
    workers = {dict(key[1:])["worker"] for key in found if "worker" in dict(key[1:])}
    assert workers == {"1", "bulk"}
    assert found["shorttail_connections", ("protocol", "rpc")] == 10  # the bulk worker's come from other workers


def test_runs_are_counted_by_how_they_failed():
    counts = RunCounts()
    counts.note(ModelFailed(f"{FAILED}no"))
    counts.note(RunTimedOut(f"{FAILED}too long"))
    counts.note(RowsRefused("a null"))
    assert (counts.failed, counts.timed_out) == (1, 1)


def test_the_document_lists_every_metric(memory):
    """docs/metrics.md and /metrics agree about names, types and labels."""
    fill(memory)
    shown = {}
    for family in families(memory).values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert family.samples, name
        shown[name] = (family.type, labels)
    documented = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0].startswith("`shorttail_"):
            labels = {label.strip() for label in cells[2].split(",") if label.strip()}
            documented[cells[0].strip("`")] = (cells[1], labels)
            assert len(cells[3]) > 10, line
    assert documented == shown


def fill(memory):
    """Count something of everything."""
    memory.claim(SUPERVISOR)
    memory.claim(WRITER).stage(memory.claim(BULK).slot(0, "fraud"), 5, 1000)
    recorder = memory.claim()
    recorder.put(WORD["heartbeat_ns"], 1)
    recorder.requests(recorder.slot(0, "fraud"), 0, "OK")
    recorder.batch(recorder.slot(0, "fraud"), 0, 1, 1, 0, 1_000, 2_000, 3_000, 4_000, 5_000)
    recorder.stage(recorder.slot(METHODS.index("push"), ""), 5, 1000)
    for kind in KINDS:
        memory.tallies().add(kind, tuple("x" for _ in kind.labels), [1] * len(kind.values))
