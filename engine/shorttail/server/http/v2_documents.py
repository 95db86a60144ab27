"""Writes the documents of the Open Inference Protocol, version 2, that describe the server and its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from shorttail._native.metrics import STAGES
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument
from shorttail.models.raw import RAW_TYPES
from shorttail.models.signature import request_columns
from shorttail.server.http.tensors import datatype

if TYPE_CHECKING:
    from shorttail.define.catalog import Catalog, ModelEntry, TensorInfo
    from shorttail.observe.memory import SlotCounts

EXTENSIONS: Final = ["binary_tensor_data", "model_configuration", "statistics", "model_repository(index)"]


def server_metadata(version: str) -> dict[str, Any]:
    """Describe the server. version: of shorttail."""
    return {"name": "shorttail", "version": version, "extensions": EXTENSIONS}


def model_metadata(catalog: Catalog, name: str, version: int | None) -> dict[str, Any]:
    """Describe a model. inputs: the request columns; tensors: the inputs of its file, which may be sent instead.

    The inputs of a model that takes tensors are those of its file.
    """
    entry = catalog.model(name)
    info = entry.version(version)
    is_raw = info.model.is_raw
    columns = request_columns(catalog.as_pinned(info), info.model, info.inputs)
    tensors = [_tensor(tensor, is_raw) for tensor in info.inputs]
    return {
        "name": name,
        "versions": [str(number) for number in sorted(entry.versions)],
        "platform": "onnx_onnxv1",
        "inputs": tensors
        if is_raw
        else [
            {"name": column, "datatype": datatype(dtype), "shape": [-1, dtype.width] if dtype.is_vector else [-1]}
            for column, dtype in columns.items()
        ],
        "outputs": [_tensor(tensor, is_raw) for tensor in info.outputs],
        "tensors": tensors,
    }


def _tensor(tensor: TensorInfo, is_raw: bool) -> dict[str, Any]:
    """Describe an input or output of a file. is_raw: the first axis need not be the rows. No shape is shown as [-1]."""
    shape = [-1 if size is None else size for size in tensor.shape]
    if tensor.any_rank or not is_raw:
        shape = [-1, *shape[1:]]
    return {"name": tensor.name, "datatype": datatype(RAW_TYPES[tensor.dtype]), "shape": shape}


def model_config(catalog: Catalog, name: str, version: int | None) -> dict[str, Any]:
    """Return the configuration of a model in Triton's form: `dims` leaves out the first axis.

    A model that takes tensors has the max_batch_size 0, and `dims` has all axes.
    """
    document = model_metadata(catalog, name, version)
    is_raw = catalog.model(name).version(version).model.is_raw

    def described(tensor: dict[str, Any]) -> dict[str, Any]:
        kind = "STRING" if tensor["datatype"] == "BYTES" else tensor["datatype"]
        dims = tensor["shape"] if is_raw else tensor["shape"][1:] or [1]
        return {"name": tensor["name"], "data_type": f"TYPE_{kind}", "dims": dims}

    return {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "shorttail",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0 if is_raw else LIMITS.rows_per_request,
        "input": [described(tensor) for tensor in document["inputs"]],
        "output": [described(tensor) for tensor in document["outputs"]],
    }


def repository_index(catalog: Catalog, unavailable: Mapping[str, str], not_ready: str) -> list[dict[str, Any]]:
    """Return an entry per model, with its current version and whether it can answer. unavailable: name -> why not."""
    reasons = {name: not_ready or unavailable.get(name, "") for name in catalog.models}
    return [
        {
            "name": name,
            "version": str(entry.current),
            "state": "UNAVAILABLE" if reasons[name] else "READY",
            "reason": reasons[name],
        }
        for name, entry in catalog.models.items()
    ]


def statistics(entries: Mapping[str, ModelEntry], counts: Mapping[tuple[str, str], SlotCounts]) -> dict[str, Any]:
    """Return the statistics of models since the server started: the sum of all versions, under the current version."""
    return {"model_stats": [_model_statistics(name, entry, counts) for name, entry in entries.items()]}


def _model_statistics(name: str, entry: ModelEntry, counts: Mapping[tuple[str, str], SlotCounts]) -> dict[str, Any]:
    found = counts.get(("predict", name))
    requests: Sequence[int] = found.requests if found else [0] * 18
    codes = len(requests) // 2
    succeeded = requests[0] + requests[codes]

    def stage(stage_name: str) -> dict[str, int]:
        words = found.stages[STAGES.index(stage_name)] if found else [0]
        return {"count": sum(words[:-1]), "ns": words[-1]}

    lookup, transform = stage("lookup"), stage("transform")
    compute = {"count": lookup["count"], "ns": lookup["ns"] + transform["ns"]}
    return {
        "name": name,
        "version": str(entry.current),
        "last_inference": 0,
        "inference_count": found.rows if found else 0,
        "execution_count": sum(found.batches) if found else 0,
        "inference_stats": {
            "success": {"count": succeeded, "ns": stage("total")["ns"]},
            "fail": {"count": sum(requests) - succeeded, "ns": 0},
            "queue": stage("queue"),
            "compute_input": compute,
            "compute_infer": stage("infer"),
            "compute_output": stage("encode"),
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
    }


def version_number(text: str | None) -> int | None:
    """Parse the version in a URL; None without a version. Raises InvalidArgument."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidArgument(f"version {text!r:.40} is not a whole number")
    return int(text)
