"""The server's time by stage, from its own metrics: the arithmetic, cases without times, and the findings."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import http_server, load_on, rpc_server
from numpy.typing import NDArray

from shorttail._native.metrics import BOUNDS_NS, METHODS, Recorder
from shorttail.errors import InvalidArgument, ShorttailError, Unavailable
from shorttail.loadtest import stages
from shorttail.loadtest.findings import server
from shorttail.loadtest.result import Step
from shorttail.loadtest.target import Target
from shorttail.observe.memory import MetricsMemory
from shorttail.server.http.exposition import exposition

NO_MODELS: Any = SimpleNamespace(store=SimpleNamespace(catalog=SimpleNamespace(models={})))
PREDICT, FEATURES = METHODS.index("predict"), METHODS.index("get_online_features")


@pytest.fixture
def memory() -> MetricsMemory:
    return MetricsMemory.create(1)


@pytest.fixture
def recorder(memory: MetricsMemory) -> Recorder:
    return memory.claim()


def text(memory: MetricsMemory) -> str:
    return exposition(memory, NO_MODELS).decode()


def serve(recorder: Recorder, took_ns: NDArray[np.int64], method: int = PREDICT) -> None:
    """Record batches of two requests. took_ns: [batches, 5], or [batches, 4] without inference."""
    slot = recorder.slot(method, "m" if method == PREDICT else "")
    for row in took_ns.tolist():
        ends = np.cumsum([1000, *row]).tolist()
        opened, start, looked_up, prepared = ends[:4]
        inferred, end = (ends[4], ends[5]) if len(row) == 5 else (0, ends[4])
        recorder.batch(slot, 0, 2, 6, opened, start, looked_up, prepared, inferred, end)


def drawn(generator: np.random.Generator, n: int, stages_n: int = 5) -> NDArray[np.int64]:
    return np.rint(np.exp(generator.normal(10.0, 1.0, (n, stages_n)))).astype(np.int64) + 1


def test_a_step_has_the_difference_of_two_readings(memory: MetricsMemory, recorder: Recorder) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    generator = np.random.default_rng(seed)
    serve(recorder, drawn(generator, 3000))  # of the step before
    before = stages.parse(text(memory))
    predictions, lookups = drawn(generator, 12_000), drawn(generator, 500, 4)
    serve(recorder, predictions)
    serve(recorder, lookups, FEATURES)
    found = stages.between(before, stages.parse(text(memory)), good=25_000)
    batches = len(predictions) + len(lookups)
    assert (found["batches"], found["requests"], found["rows"]) == (batches, 2 * batches, 6 * batches)
    seen = {name: np.concatenate([predictions[:, i], lookups[:, i]]) for i, name in enumerate(stages.STAGES[:3])}
    seen["infer"] = predictions[:, 3]
    seen["encode"] = np.concatenate([predictions[:, 4], lookups[:, 3]])
    seen["total"] = np.concatenate([predictions.sum(axis=1), lookups.sum(axis=1)])
    for name, took_ns in seen.items():
        part = found["total"] if name == "total" else found["stages"][name]
        assert part["mean_us"] == pytest.approx(took_ns.sum() / batches / 1e3, abs=0.001)
        assert part["share"] == pytest.approx(took_ns.sum() / seen["total"].sum(), abs=1e-4)
        for percentile in (50, 99):
            # Interpolation is only exact to a bucket.
            exact_ns = np.percentile(took_ns, percentile, method="inverted_cdf")
            bucket = np.searchsorted(BOUNDS_NS, exact_ns)
            low_ns = BOUNDS_NS[bucket - 1] if bucket else 0
            assert low_ns / 1e3 <= part[f"p{percentile}_us"] <= BOUNDS_NS[bucket] / 1e3
    assert sum(part["mean_us"] for part in found["stages"].values()) == pytest.approx(
        found["total"]["mean_us"], abs=0.01
    )
    assert found["workers"] == 1


def test_percentiles_need_enough_observations_and_end_at_the_last_bucket() -> None:
    inf = float("inf")
    assert stages.quantile_us({1e-6: 199, inf: 199}, 50) is None
    assert stages.quantile_us({1e-6: 0, 2e-6: 200, inf: 200}, 50) == 1.5
    assert stages.quantile_us({1e-6: 100, 2e-6: 300, inf: 300}, 50) == 1.25
    assert stages.quantile_us({1e-6: 1, 10.0: 2, inf: 200}, 50) == 10e6
    assert stages.quantile_us({}, 50) is None


def test_counts_of_another_server_or_step_are_refused(memory: MetricsMemory, recorder: Recorder) -> None:
    serve(recorder, np.full((50, 5), 2000))
    before = stages.parse(text(memory))
    with pytest.raises(Unavailable, match="counted 0 requests where 10 were answered: it is another server"):
        stages.between(before, stages.parse(text(memory)), good=10)
    with pytest.raises(Unavailable, match="counted no batches"):
        stages.between(before, stages.parse(text(memory)), good=0)
    fresh = MetricsMemory.create(1)
    serve(fresh.claim(), np.full((20, 5), 2000))
    with pytest.raises(Unavailable, match="restarted during the step"):
        stages.between(before, stages.parse(text(fresh)), good=10)


def test_worker_cpu_is_that_of_workers_in_both_readings(memory: MetricsMemory, recorder: Recorder) -> None:
    before = stages.parse(text(memory))
    serve(recorder, np.full((20, 5), 2000))
    after = stages.parse(text(memory))
    after.at_s = before.at_s + 2.0
    before.cpu_s, after.cpu_s = {"1": 10.0, "2": 4.0, "3": 7.0}, {"1": 11.8, "2": 5.4, "4": 1.0}
    assert stages.between(before, after, 40)["worker_cpu"] == pytest.approx(0.8)
    after.cpu_s["2"] = 0.1  # a worker that was restarted under its number
    assert stages.between(before, after, 40)["worker_cpu"] is None


def response(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (response(b"", "404 Not Found"), "HTTP 404"),
        (response(b"up 1\n"), "not a shorttail server"),
        (response(b"<html>"), "not Prometheus text"),
        (response(b"shorttail_build_info{"), "not Prometheus text"),
        (response(b"\xff\xfe"), "not Prometheus text"),
        (b"nonsense\r\n\r\n<close>", "does not speak HTTP"),
        (b"<close>", "does not speak HTTP"),
        (response(b"# much\n" * 100), "more than 256 bytes"),
    ],
)
def test_an_answer_that_is_not_metrics_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, why: str
) -> None:
    monkeypatch.setattr(stages, "LIMITS", SimpleNamespace(bench_metrics_bytes=256))
    with http_server(lambda head, body: answer) as fake:
        watch = stages.StageWatch(f"http://{fake.address}/metrics")
        done: Any = SimpleNamespace(server=None, outcomes={"good": 1})
        assert watch.around(lambda: done).server is None
        assert why in watch.note
        assert watch.note.startswith(f"no times by stage from {watch.url}: ")
        assert watch.note.endswith("; give the server's URL with --metrics")
        assert "\n" not in watch.note
        target = Target("127.0.0.1:7711", "msgpack", b"")
        with pytest.raises(Unavailable, match=f"^--metrics http://{fake.address}: .*prints its HTTP address$"):
            stages.find(f"http://{fake.address}", target)


def test_metrics_are_read_before_and_after_a_step_and_not_during(memory: MetricsMemory, recorder: Recorder) -> None:
    order: list[str] = []

    def answer(head: bytes, body: bytes) -> bytes:
        order.append("asked")
        assert head.startswith(b"GET /metrics ")
        return response(text(memory).encode())

    def run() -> Step:
        order.append("step begins")
        with rpc_server() as fake:
            step = load_on(fake.address)
        serve(recorder, np.full((step.due, 5), 2000))
        order.append("step has ended")
        return step

    with http_server(answer) as fake:
        watch = stages.find(f"http://{fake.address}", Target("127.0.0.1:7711", "msgpack", b""))
        assert watch is not None
        order.clear()
        step = watch.around(run)
    assert order == ["asked", "step begins", "step has ended", "asked"]
    assert step.server is not None
    assert watch.note == ""
    assert step.server["stages"]["infer"]["mean_us"] == 2.0
    assert step.to_dict()["server"] == step.server


@pytest.mark.parametrize(
    ("text", "path", "url"),
    [
        ("127.0.0.1:9", "", "http://127.0.0.1:7712/metrics"),
        (":9", "", "http://127.0.0.1:7712/metrics"),
        ("localhost", "", "http://localhost:7712/metrics"),
        ("[::1]:9", "", "http://[::1]:7712/metrics"),
        ("unix:/run/s.sock", "", "http://127.0.0.1:7712/metrics"),
        ("10.1.2.3:9", "", ""),
        ("features.example:9", "", ""),
        ("http://127.0.0.1:8000/v2/models/m/infer", "/v2/models/m/infer", "http://127.0.0.1:8000/metrics"),
        ("http://127.0.0.1:8000/predict", "/predict", ""),
        ("http://10.1.2.3/v2/models/m/infer", "/v2/models/m/infer", ""),
    ],
)
def test_the_default_url_of_the_metrics(text: str, path: str, url: str) -> None:
    target = Target(text, "http" if text.startswith("http") else "msgpack", b"", path=path)
    assert stages.default_url(target) == url
    watch = stages.find(None, target)
    assert (watch.url if watch else "") == url
    assert stages.find("off", target) is None


@pytest.mark.parametrize("option", ["127.0.0.1:7712", "ftp://x/metrics", "http://", "metrics"])
def test_an_invalid_metrics_address_is_refused(option: str) -> None:
    with pytest.raises(InvalidArgument, match="is not understood; write http://HOST:7712/metrics"):
        stages.find(option, Target("127.0.0.1:7711", "msgpack", b""))


def test_without_prometheus_client_the_note_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, memory: MetricsMemory
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client.parser", None)
    with (
        http_server(lambda head, body: response(text(memory).encode())) as fake,
        pytest.raises(ShorttailError, match=r"pip install 'shorttail\[bench\]'"),
    ):
        stages.fetch(f"http://{fake.address}/metrics")


# -- the sentence about the stages -------------------------------------------------------------------------------------


def step_of(offered: float, kept_up: bool = True, cpu: float | None = 0.3, workers: int = 1, **mean_us: float) -> Any:
    total = sum(mean_us.values())
    parts = {name: {"mean_us": value, "share": value / total} for name, value in mean_us.items()}
    found = {"stages": parts, "total": {"mean_us": total}, "worker_cpu": cpu, "workers": workers}
    achieved = offered if kept_up else offered / 2
    return {"offered_per_s": offered, "achieved_per_s": achieved, "server": found}


IDLE = {"queue": 5.0, "lookup": 10.0, "transform": 1.0, "infer": 70.0, "encode": 14.0}
FULL = {"queue": 120.0, "lookup": 42.0, "transform": 4.0, "infer": 8.0, "encode": 6.0}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([step_of(1000, **IDLE)], "5.00 us (5%) are queue: it is not saturated (its worker uses 30% of a core)"),
        ([step_of(1000, **IDLE)], "Of the other 95.0 us, infer takes 74%; to reduce it: shorttail tune"),
        (
            [step_of(1000, **IDLE), step_of(9000, False, 0.99, **FULL)],
            "Of 180 us that a batch takes in the server at 9,",
        ),
        ([step_of(1000, **IDLE), step_of(9000, False, 0.99, **FULL)], "120 us (67%) are queue: it is saturated (its"),
        ([step_of(9000, cpu=0.95, workers=4, **IDLE)], "near its limit (each of its 4 workers uses 95% of a core)"),
        ([step_of(9000, cpu=0.4, **FULL)], "requests wait although its worker uses 40% of a core"),
        ([step_of(9000, False, None, **FULL)], "are queue: it is saturated. Of the other 60.0 us, lookup takes 70%"),
        (
            [step_of(9000, **{**IDLE, "transform": 99.0})],
            "transform takes 51%; to reduce it: fewer or cheaper on-demand",
        ),
        ([step_of(9000, queue=1.0, lookup=2.0, encode=9.0)], "encode takes 82%; to reduce it: smaller answers"),
    ],
)
def test_the_sentence_names_the_stage_that_limits(steps: list[Any], expected: str) -> None:
    assert expected in server(steps)


def test_there_is_no_sentence_without_figures() -> None:
    assert server([{"offered_per_s": 1.0, "achieved_per_s": 1.0}]) == ""
    assert server([{"offered_per_s": 1.0, "achieved_per_s": 1.0, "server": None}]) == ""
