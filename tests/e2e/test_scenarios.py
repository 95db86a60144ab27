"""The workloads of bench/scenarios, served as a user would: the answers equal those of ONNX Runtime on a pandas join.

bench/compare.py checks peers against the same answers before it measures them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import shorttail as st

BENCH = Path(__file__).resolve().parents[2] / "bench"
DIVISOR = 200  # the tests use this fraction of the measured rows


@pytest.fixture(scope="module")
def scenarios() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        import scenarios
    finally:
        sys.path.remove(str(BENCH))
    return scenarios


@pytest.mark.parametrize("name", ["fraud", "ranking", "neural", "features-10x250"])
def test_every_answer_is_the_expected_one(name: str, scenarios: ModuleType, tmp_path: Path, start: Any) -> None:
    data = tmp_path / name
    scenarios.build(name, data, DIVISOR)
    described = json.loads((data / "scenario.json").read_text())
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply(data / "definitions.py")
        for view, about in described["views"].items():
            assert engine.materialize(view) == about["rows"]
    host, port = start(of=tmp_path / "store").address
    requests = json.loads((data / "requests.json").read_text())
    assert len(requests) == scenarios.data.CHECKED_REQUESTS
    with st.Client(f"{host}:{port}") as client:
        for request in requests:
            expected = np.array(request["scores"], np.float32)
            if described["kind"] == "features":
                columns = client.get_online_features(described["inputs"], request["columns"]).to_numpy()
                found = np.stack([columns[reference] for reference in described["inputs"]], axis=1).ravel()
                np.testing.assert_array_equal(found, expected)
                continue
            prediction = client.predict(name, request["columns"])
            scores = prediction.outputs[described["output"]]
            picked = scores if described["column"] is None else scores[:, described["column"]]
            np.testing.assert_allclose(picked.ravel(), expected, rtol=1e-5, atol=1e-6)
            assert len(expected) == described["rows"]
