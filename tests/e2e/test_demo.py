"""The model of the demo, served: every client returns what ONNX Runtime computes on features joined with pandas."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import shorttail as st

DEMO = Path(__file__).resolve().parents[2] / "demo"
sys.path.insert(0, str(DEMO))

import flights as data  # noqa: E402
import run  # noqa: E402
import train  # noqa: E402

SEED = int(os.environ.get("SHORTTAIL_TEST_SEED") or random.SystemRandom().randrange(2**32))
TOLERANCE = 1e-6


@dataclass
class Demo:
    store: Path
    training: pd.DataFrame
    sample: pd.DataFrame  # 1,000 flights that are not in the training data
    matrix: np.ndarray
    expected: np.ndarray
    sources: dict[str, pd.DataFrame]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The data of the demo and a smaller model, in a store that the commands have made."""
    home = tmp_path_factory.mktemp("demo")
    definitions = Path(shutil.copy(DEMO / "definitions.py", home))
    out, store = home / "out", home / "store"
    training, held_out = data.load()
    data.write_sources(training, out)
    columns = list(run.model.columns)
    features = data.matrix(training, data.training_sources(training, out), columns)
    train.write_onnx(train.train(features, training["late"].to_numpy(), trees=30), out / "late.onnx")
    for arguments in (["apply", str(definitions), "--create"], ["materialize"]):
        subprocess.run([*run.SHORTTAIL, *arguments, "--store", str(store)], check=True, timeout=120)

    print(f"sample drawn with SHORTTAIL_TEST_SEED={SEED}")
    sample = held_out.sample(1_000, random_state=SEED)
    sources = data.read_sources(out)
    matrix = data.matrix(sample, sources, columns)
    return Demo(store, training, sample, matrix, train.run_onnx(out / "late.onnx", matrix), sources)


@pytest.fixture(scope="session")
def addresses(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("serve")
    with run.serve(demo.store, folder / "s.sock", folder / "log") as (server, tcp):
        yield {"tcp": tcp, "unix": f"unix:{folder / 's.sock'}"}
        run.stop(server)  # with status 0


@pytest.fixture(params=["tcp", "unix", "embedded"])
def way(request: pytest.FixtureRequest, demo: Demo) -> Iterator[st.Client | st.Engine]:
    if request.param == "embedded":
        with st.Engine.open(demo.store) as engine:
            yield engine
    else:
        with st.Client(request.getfixturevalue("addresses")[request.param]) as client:
            yield client


def test_the_sample_has_missing_rows_and_nulls(demo: Demo) -> None:
    """It has planes without a row in the store, and rows with nulls."""
    columns = list(run.model.columns)
    assert np.isnan(demo.matrix[:, columns.index("plane:seats")]).any(), f"seed {SEED}"
    assert np.isnan(demo.matrix[:, columns.index("weather:wind_dir")]).any(), f"seed {SEED}"


@pytest.mark.parametrize("rows", [1, 7, 1_000])
def test_predictions_equal_onnx_on_pandas(demo: Demo, way: st.Client | st.Engine, rows: int) -> None:
    answers = []
    for start in range(0, 100 if rows == 1 else len(demo.sample), rows):
        prediction = way.predict("late", run.request(demo.sample[start : start + rows]))
        answers.append(prediction.outputs["probabilities"])
    probabilities = np.concatenate(answers)
    assert probabilities.shape == (100 if rows == 1 else 1_000, 2)
    worst = np.abs(probabilities[:, 1] - demo.expected[: len(probabilities)]).max()
    assert worst <= TOLERANCE, f"seed {SEED}"


def test_features_equal_pandas(demo: Demo, way: st.Client | st.Engine) -> None:
    names = ["plane:manufacturer", "plane:seats", "plane:jet", "weather:wind_dir", "carrier:late_by_part"]
    keys = {name: demo.sample[name].tolist() for name in ("tailnum", "origin", "hour_utc", "carrier")}
    served = way.get_online_features(names, keys).to_dict()
    for name in names:
        view, feature = name.split(":")
        joined = demo.sample.merge(demo.sources[view], on=data.KEYS[view], how="left")[feature]
        for got, expected in zip(served[name], joined, strict=True):
            if isinstance(expected, np.ndarray):
                assert np.array_equal(np.float32(got), expected, equal_nan=True), f"{name}, seed {SEED}"
            elif pd.isna(expected):
                assert got is None, f"{name}, seed {SEED}"
            else:
                assert got == expected, f"{name}, seed {SEED}"


def test_history_counts_only_flights_of_earlier_days(demo: Demo) -> None:
    training = demo.training
    days = pd.date_range(training["day"].min(), training["day"].max())
    history = data.history(training, ["carrier"], days).set_index(["carrier", "day"])
    for _, flight in training.sample(50, random_state=SEED).iterrows():
        earlier = training[(training["carrier"] == flight["carrier"]) & (training["landed"] < flight["day"])]
        known = history.loc[(flight["carrier"], flight["day"])]
        assert known["flights"] == len(earlier), f"seed {SEED}"
        np.testing.assert_allclose(known["late_share"], earlier["late"].mean(), rtol=1e-6)
        np.testing.assert_allclose(known["mean_delay"], earlier["delay"].mean(), rtol=1e-5, atol=1e-6)
        by_part = earlier.groupby(earlier["hour"] // data.HOURS_OF_PART)["late"].mean().reindex(range(4))
        np.testing.assert_allclose(known["late_by_part"], by_part, rtol=1e-6)


def test_auc_counts_ties_as_half() -> None:
    late = np.array([True, False, True, False])
    assert train.auc(late, np.array([0.9, 0.1, 0.5, 0.5])) == 0.875
