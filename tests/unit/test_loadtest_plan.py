"""Load tests: random draws, arrival times, histograms, the requests that are sent, and the parsing of options."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import MODELS, USERS, VIEWS, load_on, predict, reply, rpc_server, with_load
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader

from shorttail._native import loadtest as native
from shorttail.errors import InvalidArgument, NotFound, ShorttailError
from shorttail.loadtest import rates, target
from shorttail.loadtest.histogram import HIGHEST, Histogram, write_log
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import find_capacity
from shorttail.loadtest.templates import EncodedColumn, Group, Template
from shorttail.loadtest.traffic import Workload, plan_rpc


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(2**31)
    print("seed", chosen)
    return chosen


# -- random draws and arrival times ------------------------------------------------------------------------------------


def test_poisson_arrivals_have_exponential_gaps(seed: int) -> None:
    times = native.arrival_times(100_000, poisson=True, rate_from=500.0, rate_to=500.0, seed=seed)
    gaps = np.diff(times, prepend=0.0) * 500.0
    # The mean and the standard deviation are 1, within five standard errors.
    assert gaps.mean() == pytest.approx(1, abs=5 / 100_000**0.5)
    assert gaps.std() == pytest.approx(1, abs=5 * (2 / 100_000) ** 0.5)
    assert (gaps > 2).mean() == pytest.approx(np.exp(-2), abs=0.006)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.02


def test_constant_arrivals_and_their_phase() -> None:
    times = native.arrival_times(1000, poisson=False, rate_from=100.0, rate_to=100.0, phase=0.5)
    assert np.allclose(times, (np.arange(1000) + 0.5) / 100)


@pytest.mark.parametrize("poisson", [False, True])
def test_a_ramp_goes_from_one_rate_to_the_other(poisson: bool, seed: int) -> None:
    """1,000/s for 1 s, then a ramp to 9,000/s over 4 s: by time t of the ramp 1000 t + 1000 t^2 requests are due."""
    times = native.arrival_times(
        21_000, poisson=poisson, rate_from=1000.0, rate_to=9000.0, hold_s=1.0, ramp_s=4.0, seed=seed
    )
    assert (np.diff(times) >= 0).all()
    for t in (0.5, 1.0, 2.0, 3.0, 4.5):
        ramp = max(t - 1, 0)
        expected = 1000 * min(t, 1) + 1000 * ramp + 1000 * ramp**2
        assert (times < t).sum() == pytest.approx(expected, abs=5 * expected**0.5 if poisson else 2), t
    downwards = native.arrival_times(3000, poisson=False, rate_from=1000.0, rate_to=0.0, ramp_s=2.0)
    assert np.isinf(downwards[1001:]).all()
    assert downwards[999] < 2


@pytest.mark.parametrize("exponent", [0.5, 0.99, 1.0, 1.5])
def test_zipf_draws_have_zipf_frequencies(exponent: float, seed: int) -> None:
    n, count = 1000, 200_000
    rows = native.draw_rows("zipf", n, exponent, count, seed).astype(int)
    weights = np.arange(1, n + 1) ** -exponent
    expected = weights / weights.sum() * count
    found = np.bincount(rows, minlength=n)
    assert len(found) == n
    # With 1,000 rows and five standard deviations, correct draws fail in at most one of 1,000 runs.
    assert (np.abs(found - expected) < 5.5 * expected**0.5 + 1).all()
    assert native.draw_rows("zipf", 1, exponent, 10).tolist() == [0] * 10
    assert native.draw_rows("zipf", 10**9, exponent, 1000, seed).max() < 10**9


def test_uniform_and_in_turn_draws(seed: int) -> None:
    found = np.bincount(native.draw_rows("uniform", 50, 1.0, 100_000, seed).astype(int), minlength=50)
    assert (np.abs(found - 2000) < 6 * 2000**0.5).all()
    assert native.draw_rows("in-turn", 3, 1.0, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


# -- histograms --------------------------------------------------------------------------------------------------------


def test_buckets_are_those_of_hdrhistogram(seed: int) -> None:
    values = sorted({int(v) for v in np.exp(np.random.default_rng(seed).uniform(0, np.log(3.5e12), 3000))})
    library = HdrHistogram(1, 3_600_000_000_000, 3)
    counts = np.zeros(native.COUNTS, np.uint64)
    for value in values:
        library.record_value(value)
        # The bucket of a value is the first bucket whose highest value is at least the value.
        counts[np.searchsorted(HIGHEST, value)] += 1
    assert np.array_equal(np.frombuffer(library.counts, np.uint64), counts)
    ours = Histogram(counts, max(values), float(sum(values)))
    for percentile in (0, 1, 50, 90, 99, 99.9, 100):
        theirs = min(library.get_value_at_percentile(percentile or 1e-9), max(values))
        assert ours.percentile(percentile) == theirs, percentile
    assert HdrHistogram.decode(ours.encoded()).get_total_count() == len(values)
    again = Histogram.decoded(ours.encoded(), ours.max_ns, ours.mean_ns)
    assert np.array_equal(again.counts, counts)
    assert again.sum_ns == pytest.approx(ours.sum_ns)


def test_percentiles_are_shown_only_with_enough_samples() -> None:
    def shown(count: int) -> list[str]:
        counts = np.zeros(native.COUNTS, np.uint64)
        counts[1000] = count
        return list(Histogram(counts, 1000).shown())

    assert shown(199) == []
    assert shown(200) == ["50"]
    assert shown(9_999) == ["50", "90"]
    assert shown(100_000) == ["50", "90", "99", "99.9"]
    assert shown(1_000_000) == ["50", "90", "99", "99.9", "99.99"]


def test_the_log_is_read_by_the_library(tmp_path: Path) -> None:
    part = Histogram.empty()
    part.counts[1500] = np.uint64(7)
    part.max_ns = int(HIGHEST[1500])
    write_log(str(tmp_path / "log"), 1_700_000_000.0, [("", 0.0, 0.5, part), ("", 0.5, 0.5, part)])
    reader = HistogramLogReader(str(tmp_path / "log"), HdrHistogram(1, 3_600_000_000_000, 3))
    try:
        first, second = reader.get_next_interval_histogram(), reader.get_next_interval_histogram()
        assert reader.get_next_interval_histogram() is None
    finally:
        reader.close()
    assert first.get_total_count() == second.get_total_count() == 7
    assert first.get_max_value() == HIGHEST[1500]
    assert second.get_start_time_stamp() - first.get_start_time_stamp() == pytest.approx(500, abs=1)


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["tensor", "list"])
@pytest.mark.parametrize("rows", [1, 7])
def test_requests_have_the_chosen_columns(encoding: str, rows: int) -> None:
    models = [{"name": "m", "columns": {
        "user_id": "Int64", "item": "String", "amount": "Float64", "flag": "Bool", "at": "Timestamp", "n": "Int32",
        "taste": "Vector(3)", "one": "Int64"}}]  # fmt: skip
    views = [{"name": "v", "keys": {"user_id": "Int64"}, "features": {}}]
    work = Workload(
        predict="m", rows=rows, encoding=encoding, shared=["one"],
        keys=["user_id=uniform:5:9", "item=uniform:1:3:i{}"], values=["amount=uniform:2:3", "n=choice:4,6", "one=77"],
    )  # fmt: skip
    with rpc_server() as fake:
        load_on(fake.address, plan=plan_rpc(work, models, views))
    assert len(fake.requests) > 200
    for _, _, method, params in fake.requests:
        assert (method, params[0], len(params)) == ("predict", "m", 3 if encoding == "tensor" else 2)
        columns = params[1]
        assert list(columns) == list(models[0]["columns"])
        assert columns["one"] == 77
        for name, allowed in {"user_id": range(5, 10), "item": ["i1", "i2", "i3"], "n": [4, 6], "flag": [0, 1]}.items():
            values = [columns[name]] if rows == 1 else list(columns[name])
            assert len(values) == rows
            assert all(value in allowed for value in values)
        assert ((np.asarray(columns["amount"]) >= 2) & (np.asarray(columns["amount"]) < 3)).all()
        assert np.shape(columns["taste"]) == (rows, 3)
        if rows > 1:
            assert isinstance(columns["user_id"], np.ndarray if encoding == "tensor" else list)
    assert len({repr(request[3]) for request in fake.requests}) > 100


def test_every_request_carries_its_deadline() -> None:
    models = [{"name": "m", "columns": {"user_id": "Int64"}}]
    views = [{"name": "v", "keys": {"user_id": "Int64"}, "features": {"a": "Int64"}}]
    work = Workload(predict="m", features=["v:a"], push="v", keys=["user_id=uniform:1:9"], deadline_ms=12.5)
    with rpc_server() as fake:
        load_on(fake.address, plan=plan_rpc(work, models, views))
    options = {method: params[2] for _, _, method, params in fake.requests}
    asked = {"encoding": "tensor", "deadline_ms": 12.5}
    assert options == {"predict": asked, "get_online_features": asked, "push": {"deadline_ms": 12.5}}


def test_the_same_seed_sends_the_same_requests() -> None:
    sent = []
    for seed in (1, 1, 2):
        with rpc_server() as fake:
            load_on(fake.address, with_load(seed=seed, connections=1, warmup_s=0.0))
        sent.append([request[3] for request in fake.requests])
    n = min(map(len, sent))
    assert n > 50
    assert sent[0][:n] == sent[1][:n]
    assert sent[0][:n] != sent[2][:n]


def test_a_mix_is_sent_by_its_weights() -> None:
    work = predict(features=["v:age", "v:tier"], push="v", mix={"predict": 6, "features": 3, "push": 1}, push_rows=2)
    with rpc_server(lambda request: reply(request[1], {})) as fake:
        step = load_on(fake.address, rate=5000.0, plan=plan_rpc(work, MODELS, VIEWS))
    kinds = Counter(request[2] for request in fake.requests)
    total = sum(kinds.values())
    for method, share in {"predict": 0.6, "get_online_features": 0.3, "push": 0.1}.items():
        assert kinds[method] / total == pytest.approx(share, abs=5 * (share / total) ** 0.5)
    lookup = next(request for request in fake.requests if request[2] == "get_online_features")
    assert lookup[3][0] == ["v:age", "v:tier"]
    push = next(request for request in fake.requests if request[2] == "push")
    assert [len(column) for column in push[3][1].values()] == [2, 2, 2]
    assert list(step.by_kind) == ["predict", "features", "push"]
    assert sum(histogram.total for histogram in step.by_kind.values()) == step.latency.total == step.outcomes["good"]


@pytest.mark.parametrize("encoding", ["tensor", "list"])
def test_pushes_have_keys_of_their_own(encoding: str) -> None:
    """The parts of a composite key fit together, and lookups use the keys that the user gives."""
    views = [{"name": "v", "keys": {"user_id": "Int64", "shop": "String"}, "features": {"age": "Float32"}}]
    sent: dict[int, set[tuple[int, str]]] = {}
    for seed in (1, 2):
        work = predict(features=["v:age"], push="v", push_rows=3, seed=seed, encoding=encoding)
        work = replace(work, keys=["user_id=uniform:1:9", "shop=uniform:1:9:shop-{}"])
        with rpc_server(lambda request: reply(request[1], {})) as fake:
            plan = plan_rpc(work, MODELS, views)
            load_on(fake.address, plan=plan)
        asked = [columns for _, _, method, (_, columns, *_) in fake.requests if method != "push"]
        assert {int(columns["user_id"]) for columns in asked} == set(range(1, 10))
        pushed = [columns for _, _, method, (_, columns, *_) in fake.requests if method == "push"]
        assert {tuple(columns) for columns in pushed} == {("user_id", "shop", "age")}
        sent[seed] = {
            (int(user), shop)
            for columns in pushed
            for user, shop in zip(columns["user_id"], columns["shop"], strict=True)
        }
        assert len(sent[seed]) > 50
        assert all(shop == f"shorttail-bench-{user}" for user, shop in sent[seed])
        assert all(-(2**62) <= user < -(2**61) for user, _ in sent[seed])
        assert plan.describes["user_id"] == "uniform:1:9"
        assert plan.describes["user_id of pushes"] == "keys that no row had"
    assert sent[1].isdisjoint(sent[2])


def test_pushes_overwrite_rows_if_they_are_told_to() -> None:
    work = Workload(push="v", keys=["user_id=uniform:1:9"], overwrite=True)
    with rpc_server(lambda request: reply(request[1], {})) as fake:
        load_on(fake.address, plan=plan_rpc(work, MODELS, VIEWS))
    assert {int(user) for *_, (_, columns, *_) in fake.requests for user in columns["user_id"]} == set(range(1, 10))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_keys_of_a_file_stay_together(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.table({"user_id": [10, 20, 30], "amount": [1.0, 2.0, 3.0], "other": ["x", "y", "z"]})
    path = tmp_path / f"keys.{kind}"
    pyarrow.csv.write_csv(table, path) if kind == "csv" else pyarrow.parquet.write_table(table, path)
    work = predict(keys=[f"file:{path}"], rows=2, draw="in-turn")
    with rpc_server() as fake:
        load_on(fake.address, with_load(connections=1), plan=plan_rpc(work, MODELS, VIEWS))
    sent = [user for request in fake.requests for user in request[3][1]["user_id"].tolist()]
    assert sent[:7] == [10, 20, 30, 10, 20, 30, 10]
    for request in fake.requests:
        columns = request[3][1]
        assert (columns["user_id"] == 10 * columns["amount"]).all()


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ({"predict": "n"}, "no model 'n'"),
        ({"predict": None}, "say what to ask for"),
        ({"keys": []}, "column 'user_id' is a key: say where its values come from"),
        ({"keys": ["user_id=1:2"]}, "is not understood; write COLUMN=uniform"),
        ({"keys": ["user_id=uniform:9:1"]}, "1 is less than 9"),
        ({"keys": [USERS, "visitor=uniform:1:2"]}, "no request has a column 'visitor'"),
        ({"keys": ["file:/none.csv"]}, "file:/none.csv: there is no such file"),
        ({"keys": ["store:/none"]}, "/none"),
        ({"values": ["amont=1"]}, "no request has a column 'amont'; did you mean 'amount'"),
        ({"values": ["amount=x"]}, "column 'amount' takes Float64; got 'x' (text)"),
        ({"values": ["user_id=1"]}, "values from --keys and from --value"),
        ({"predict": None, "features": ["v:ages"]}, "has no feature 'ages'; did you mean 'age'"),
        ({"predict": None, "features": ["w:age"]}, "no feature view 'w'"),
        ({"push": "w"}, "no feature view 'w'"),
        ({"mix": {"push": 1.0}}, "--mix push: give --push too"),
        ({"draw": "zip"}, "draw 'zip' is not understood"),
    ],
)
def test_an_invalid_workload_is_one_line(work: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidArgument, NotFound)) as caught:
        plan_rpc(predict(**work), MODELS, VIEWS)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


# -- parsing of options ------------------------------------------------------------------------------------------------


def test_rates_are_parsed() -> None:
    assert [r.start for r in rates.parse_rates("1k:8k:x2")] == [1000, 2000, 4000, 8000]
    assert [r.start for r in rates.parse_rates("1k:2k:+250")] == [1000, 1250, 1500, 1750, 2000]
    assert [r.start for r in rates.parse_rates("500,1.5k,.2M")] == [500, 1500, 200_000]
    assert rates.parse_rates("1k..10k") == [Rate(1000.0, 10_000.0)]
    assert rates.parse_objective("p99.9=5ms") == rates.Objective(99.9, 0.005)
    assert rates.parse_objective("P50<=2s").samples == 200
    assert [rates.parse_seconds(text, "x") for text in ("10", "1.5s", "20ms", "2m")] == [10, 1.5, 0.02, 120]


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-1k", "1k:2k", "1k:50k:1.5", "50k:1k:x2", "1k:2k:x1", "1:1M:+1", "1e3"]
)
def test_invalid_rates_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        rates.parse_rates(text)
    assert f"'{text}'" in caught.value.message


@pytest.mark.parametrize("text", ["99=5ms", "p99", "p100=1ms", "p99=5 parsecs", "p0=1s"])
def test_invalid_objectives_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        rates.parse_objective(text)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no server at 127.0.0.1:1: connection refused"),
        ("unix:/none", "no server at unix:/none: no such file or directory"),
        ("https://x/", "does not support TLS"),
        ("http://:80/", "is not understood"),
        ("unix:" + "x" * 108, "107 bytes"),
    ],
)
def test_addresses_without_a_server(address: str, message: str) -> None:
    with pytest.raises(ShorttailError) as caught:
        target.find(address)
    assert message in caught.value.message


def test_find_capacity_uses_steps_that_are_long_enough() -> None:
    """A function replaces the server: it meets the P90 up to 7,000/s."""
    tried: list[tuple[float, float]] = []

    def run(rate: Rate, seconds: float) -> Step:
        tried.append((rate.start, seconds))
        latency = Histogram.empty()
        slow = rate.start > 7000
        latency.counts[np.searchsorted(HIGHEST, 20_000_000 if slow else 1_000_000)] = np.uint64(10_000)
        latency.max_ns = 20_000_000 if slow else 1_000_000
        due = int(rate.start * seconds)
        empty = Histogram.empty()
        counts = dict.fromkeys(("blocked", "unsent", "late_answers", "reconnects", "wrong_answers"), 0)
        return Step(
            rate, seconds, seconds, {"good": due, "error": 0, "timeout": 0, "lost": 0}, due, {}, latency, empty, empty,
            empty, {}, [], counts, 0.1,
        )  # fmt: skip

    objective = rates.parse_objective("p90=5ms")
    capacity, steps = find_capacity(run, objective, 100.0, 0.5)
    assert 7000 / 1.06 <= capacity.rate_per_s <= 7000
    assert len(steps) == len(tried)
    assert all(rate * seconds >= objective.samples for rate, seconds in tried)
    assert tried[-1] == (capacity.rate_per_s, 1.0), "a longer step must confirm the result"


@pytest.mark.parametrize(
    "broken",
    [
        {"pieces": [("literal", 0, 0, 0, 99)]},
        {"pieces": [("values", 5, 1, 0, 0), ("nonce", 0, 0, 0, 0)]},
        {"pieces": [("literal", 0, 0, 0, 1)]},
        {"columns": [EncodedColumn("table", "msgpack", -1, table=b"ab", offsets=np.array([0, 9], np.uint64))]},
        {"columns": [EncodedColumn("table", "msgpack", -1, table=b"ab", offsets=np.array([2, 0], np.uint64))]},
        {"columns": [EncodedColumn("int", "msgpack", 3)]},
        {"columns": [EncodedColumn("int", "msgpack", -1, span=0)]},
        {"columns": [EncodedColumn("table", "msgpack", 0, table=b"a", offsets=np.array([0, 1], np.uint64))]},
        {"groups": [Group("uniform", 0)]},
        {"pipeline": 1 << 20, "connections": 2},
        {"sockaddr": bytes(200)},
    ],
)
def test_plans_that_point_outside_of_their_memory_are_refused(broken: dict[str, Any]) -> None:
    template = Template("t", 1.0)
    template.literal(b"\x94\x00")
    template.nonce()
    template.pieces = [type(template.pieces[0])(*piece) for piece in broken.pop("pieces", template.pieces)]
    given = {"protocol": "msgpack", "sockaddr": bytes(16), "groups": [Group("uniform", 2)], **broken}
    with pytest.raises(ValueError, match=r".+"):
        native.Generator(templates=[template], **given)
