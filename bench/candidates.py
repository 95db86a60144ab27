"""Make the store, the model and the requests of bench/serve.py with one user and 500 items, scored by 100 trees."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from micro import forest as forests

import shorttail as st
from shorttail import protocol
from shorttail.client import columns as client_columns

MODEL = "ranker"
CANDIDATES = 500
USERS, ITEMS = 100_000, 50_000
USER_FEATURES = forests.WIDTH // 2  # the other half of the model's columns are features of the item
REQUESTS = 2000


def make_store(path: Path) -> None:
    model_path = path.parent / "ranker.onnx"
    forests.training_rows = forests.QUICK_TRAINING_ROWS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_path.write_bytes(forests.MODELS["lightgbm-100x31"]())
    random = np.random.default_rng(0)
    views, inputs = [], []
    for name, key, width in (
        ("user", "user_id", USER_FEATURES),
        ("item", "item_id", forests.WIDTH - USER_FEATURES),
    ):
        entity = st.Entity(name, keys={key: st.Int64})
        features = [st.Feature(f"f{i}", st.Float32) for i in range(width)]
        views.append(st.FeatureView(name, entity=entity, features=features))
        inputs += [f"{name}:f{i}" for i in range(width)]
    model = st.Model(MODEL, str(model_path), inputs, outputs=["probabilities"])
    with st.Engine.open(path, create=True) as engine:
        engine.apply([*views, model])
        for view, n in zip(views, (USERS, ITEMS), strict=True):
            columns = {f"f{i}": random.normal(size=n).astype(np.float32) for i in range(len(view.features))}
            engine.push(view.name, {f"{view.name}_id": np.arange(n), **columns})


def requests() -> list[bytes]:
    """Return requests with random users and items, with arrays as tensors, as st.Client sends them."""
    random = np.random.default_rng(1)
    packed = []
    for _ in range(REQUESTS):
        row = {"user_id": int(random.integers(USERS)), "item_id": random.integers(0, ITEMS, CANDIDATES)}
        params = [MODEL, client_columns.encode_columns(row), {"encoding": "tensor"}]
        packed.append(client_columns.pack_request(protocol.MSGID_LIMIT - 1, "predict", params))
    return packed
