"""The scoring code of all Python model servers among the peers, so that they differ only in the server.

Redis has one packed value per row of a view ("view:KEY" -> float32s), so a request costs one MGET for all views and no
parsing, which is the fastest read that Redis offers. The model is one ONNX Runtime session. Needs numpy, onnxruntime
and redis[hiredis]; `load`, which compare.py runs once, also needs pyarrow.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

LOAD_BATCH = 2000


class View:
    """A view, with the position of each feature in the packed row."""

    def __init__(self, name: str, described: Mapping[str, Any]):
        self.prefix = f"{name}:"
        self.key: str = described["entity"]
        self.slices: dict[str, slice | int] = {}
        at = 0
        for feature in described["features"]:
            width = described["widths"].get(feature)
            self.slices[feature] = slice(at, at + width) if width else at
            at += width or 1
        self.width = at


class Scorer:
    """Scores requests of a scenario's data folder. It is not thread-safe; each worker has one."""

    def __init__(self, folder: str | Path, redis_url: str, threads: int = 1):
        import onnxruntime
        import redis

        folder = Path(folder)
        described = json.loads((folder / "scenario.json").read_text())
        self.views = {name: View(name, view) for name, view in described["views"].items()}
        self.inputs: list[str] = described["inputs"]
        self.on_demand: dict[str, list[str]] = described["on_demand"]
        self.column: int | None = described["column"]
        self.outputs = [described["output"]]
        self.transforms = import_file(folder / "transforms.py")
        self.redis = redis.Redis.from_url(redis_url)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
        self.input_name = self.session.get_inputs()[0].name

    def score(self, columns: Mapping[str, Any]) -> list[float]:
        """Return the scores of one request. columns: {column: value or values}."""
        return self.score_many([columns])[0]

    def score_many(self, requests: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """Return the scores of several requests, with one MGET and one run of the model."""
        counts = [max(len(value) if is_many(value) else 1 for value in request.values()) for request in requests]
        values = self.look_up(requests, counts)
        columns = [np.asarray(self.value(reference, requests, counts, values)) for reference in self.inputs]
        matrix = np.empty(
            (sum(counts), sum(1 if column.ndim == 1 else column.shape[1] for column in columns)), np.float32
        )
        at = 0
        for column in columns:
            width = 1 if column.ndim == 1 else column.shape[1]
            matrix[:, at : at + width] = column.reshape(-1, width)
            at += width
        (scores,) = self.session.run(self.outputs, {self.input_name: matrix})
        flat = (scores if self.column is None else scores[:, self.column]).ravel().tolist()
        ends = np.cumsum(counts).tolist()
        return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def look_up(self, requests: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, np.ndarray]:
        """Return {view: float32 [rows, width]}. A key that all rows of a request share is read once."""
        names: list[str] = []
        for view in self.views.values():
            for request in requests:
                keys = request[view.key]
                names += [view.prefix + str(key) for key in (keys if is_many(keys) else (keys,))]
        found = self.redis.mget(names)
        rows: dict[str, np.ndarray] = {}
        at = 0
        for name, view in self.views.items():
            parts = []
            for request, count in zip(requests, counts, strict=True):
                keys = request[view.key]
                n = len(keys) if is_many(keys) else 1
                part = np.frombuffer(b"".join(found[at : at + n]), np.float32).reshape(n, view.width)
                parts.append(part if n == count else np.broadcast_to(part, (count, view.width)))
                at += n
            rows[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return rows

    def value(
        self,
        reference: str,
        requests: Sequence[Mapping[str, Any]],
        counts: Sequence[int],
        rows: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        """Return one column of the model's matrix, [rows] or [rows, width]."""
        kind, _, name = reference.partition(":")
        if kind == "request":
            parts = [
                np.asarray(request[name], np.float64)
                if is_many(request[name])
                else np.full(count, request[name], np.float64)
                for request, count in zip(requests, counts, strict=True)
            ]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        if kind == "on_demand":
            arguments = [self.value(argument, requests, counts, rows) for argument in self.on_demand[name]]
            result: np.ndarray = getattr(self.transforms, name)(*arguments)
            return result
        return rows[kind][:, self.views[kind].slices[name]]


def is_many(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def load(folder: str | Path, redis_url: str) -> None:
    """Fill Redis with the rows of the scenario's views."""
    import pyarrow.parquet as parquet
    import redis

    folder, client = Path(folder), redis.Redis.from_url(redis_url)
    for name, described in json.loads((folder / "scenario.json").read_text())["views"].items():
        table = parquet.read_table(folder / f"{name}.parquet")
        view = View(name, described)
        packed = np.empty((len(table), view.width), np.float32)
        for feature, where in view.slices.items():
            column = table[feature].combine_chunks()
            values = column.flatten() if feature in described["widths"] else column
            packed[:, where] = values.to_numpy().reshape(packed[:, where].shape)
        keys, data = table[view.key].to_pylist(), packed.tobytes()
        size = packed.itemsize * view.width
        for start in range(0, len(keys), LOAD_BATCH):
            part = range(start, min(start + LOAD_BATCH, len(keys)))
            client.mset({view.prefix + str(keys[i]): data[i * size : (i + 1) * size] for i in part})


def import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
