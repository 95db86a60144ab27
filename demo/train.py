"""Train the model of definitions.py on the flights of January to September, and write it as ONNX."""

from __future__ import annotations

import re
from pathlib import Path

import lightgbm
import numpy as np
import onnxruntime
from onnxmltools import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType

PARAMETERS = {
    "objective": "binary",
    "num_leaves": 31,
    "seed": 2013,
    "num_threads": 1,  # takes 3 s; two threads take 2 s on idle cores, but spin for half a minute on busy ones
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}


def train(features: np.ndarray, late: np.ndarray, trees: int = 100) -> lightgbm.Booster:
    """Train a gradient-boosted forest on float32 [rows, width]. NaN is unknown; each split learns a side for it."""
    data = lightgbm.Dataset(features, late.astype(np.float32))
    return with_float32_thresholds(lightgbm.train(PARAMETERS, data, num_boost_round=trees))


def with_float32_thresholds(booster: lightgbm.Booster) -> lightgbm.Booster:
    """Round each threshold of the forest down to a float32, the type of thresholds in ONNX.

    For every float32 x, the result of x <= threshold stays the same. The converter rounds to the nearest float32, which
    can change it.
    """

    def round_down(line: re.Match[str]) -> str:
        limit = float(np.finfo(np.float32).max)
        exact = np.array(line[1].split(), np.float64).clip(-limit, limit)
        near = exact.astype(np.float32)
        down = np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
        return "threshold=" + " ".join(repr(float(value)) for value in down)

    text = re.sub(r"^threshold=(.+)$", round_down, booster.model_to_string(), flags=re.MULTILINE)
    text = re.sub(r"^tree_sizes=.*\n", "", text, flags=re.MULTILINE)  # sizes of the text in bytes, which has changed
    return lightgbm.Booster(model_str=text)


def write_onnx(booster: lightgbm.Booster, path: Path) -> None:
    """Write the model: input float32 [rows, width]; outputs `label` and `probabilities`, float32 [rows, 2]."""
    shape = FloatTensorType([None, booster.num_feature()])
    # With zipmap, the probabilities of each row would be a dict.
    model = convert_lightgbm(booster, path.stem, initial_types=[("features", shape)], zipmap=False)
    path.write_bytes(model.SerializeToString())


def run_onnx(path: Path, features: np.ndarray) -> np.ndarray:
    """Return the probability of being late, float32 [rows], computed by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"features": features})[0][:, 1]


def auc(late: np.ndarray, score: np.ndarray) -> float:
    """Return the area under the ROC curve: how often a late flight scores above an on-time flight; a tie is half."""
    _, position, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[position]
    n_late, n_on_time = late.sum(), (~late).sum()
    return float((rank[late].sum() - n_late * (n_late + 1) / 2) / (n_late * n_on_time))
