"""Reads requests of the Open Inference Protocol, version 2, and writes its documents. docs/http.md has the routes.

See https://github.com/kserve/open-inference-protocol and Triton's extensions of it (binary tensors, statistics, model
configuration), which `tritonclient[http]` speaks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail._native.metrics import STAGES
from shorttail.config import LIMITS
from shorttail.define.names import quoted
from shorttail.errors import InvalidArgument
from shorttail.models.raw import RAW_TYPES
from shorttail.models.signature import request_columns
from shorttail.server.http.batches import Answer
from shorttail.server.http.json import parse_json, write_json
from shorttail.server.http.tensors import binary_output, column_values, datatype, json_output, read_tensor

if TYPE_CHECKING:
    from shorttail.define.catalog import Catalog, ModelEntry, TensorInfo
    from shorttail.observe.memory import SlotCounts
    from shorttail.pipeline import Plan

Array = NDArray[Any]
STATUSES: Final = "statuses"  # a request parameter; it adds an output "statuses:VIEW" per view
EXTENSIONS: Final = ["binary_tensor_data", "model_configuration", "statistics", "model_repository(index)"]


@dataclass(slots=True)
class InferRequest:
    """An inference request.

    id: "" if the request has none. inputs: name -> array. outputs: name -> whether it is sent as bytes; None asks for
    all outputs, as bytes if all_binary. timeout_us: 0 if the request has none. statuses: also send the statuses of
    the lookup.
    """

    id: str
    inputs: dict[str, Array]
    outputs: dict[str, bool] | None
    all_binary: bool
    timeout_us: int = 0
    statuses: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)


def parse_infer(body: bytes, header_bytes: str | None) -> InferRequest:
    """Parse the body of an infer request. Raises InvalidArgument.

    header_bytes: the value of Inference-Header-Content-Length, the length of the JSON in bytes; None if the whole body
    is JSON.
    """
    view = memoryview(body)
    length = len(view)
    if header_bytes is not None:
        if not (re.fullmatch(r"[0-9]{1,9}", header_bytes) and int(header_bytes) <= len(view)):
            raise InvalidArgument(
                f"Inference-Header-Content-Length {header_bytes!r:.40} is not a length within the body"
            )
        length = int(header_bytes)
    document = parse_json(view[:length])
    if not isinstance(document, dict) or not isinstance(document.get("inputs"), list):
        raise InvalidArgument('the body must be {"inputs": [{"name", "shape", "datatype", "data"}, ...]}')
    inputs, raw = _inputs(document["inputs"], view[length:])
    if len(raw):
        raise InvalidArgument(f"{len(raw)} bytes of tensor data are left over after the last input")
    parameters = _parameters("the request", document)
    for name in ("shared_memory_region", "sequence_id"):
        if parameters.get(name):
            raise InvalidArgument(f"the parameter {name} is not supported")
    timeout_us = parameters.get("timeout", 0)
    if not isinstance(timeout_us, int) or timeout_us < 0:
        raise InvalidArgument(f"the parameter timeout must be a number of microseconds; got {timeout_us!r:.40}")
    identifier = document.get("id", "")
    if not isinstance(identifier, str) or len(identifier) > 256:
        raise InvalidArgument("id must be a string of at most 256 characters")
    all_binary = parameters.get("binary_data_output") is True
    outputs = _outputs(document.get("outputs"), all_binary)
    statuses = parameters.get(STATUSES) is True
    return InferRequest(identifier, inputs, outputs, all_binary, timeout_us, statuses, parameters)


def _inputs(entries: list[Any], raw: memoryview) -> tuple[dict[str, Array], memoryview]:
    inputs: dict[str, Array] = {}
    for entry in entries:
        name = _name("inputs", entry)
        if name in inputs:
            raise InvalidArgument(f"input '{name}' is given twice")
        parameters = _parameters(f"input '{name}'", entry)
        if "shared_memory_region" in parameters:
            raise InvalidArgument(f"input '{name}': shared memory is not supported; send the tensor with the request")
        size = parameters.get("binary_data_size")
        if size is None:
            inputs[name] = read_tensor(name, entry, None)
            continue
        if not isinstance(size, int) or not 0 <= size <= len(raw):
            raise InvalidArgument(f"input '{name}': binary_data_size {size!r:.40}, where {len(raw)} bytes are left")
        inputs[name] = read_tensor(name, entry, raw[:size])
        raw = raw[size:]
    return inputs, raw


def _outputs(entries: Any, all_binary: bool) -> dict[str, bool] | None:
    if not entries:
        return None
    if not isinstance(entries, list):
        raise InvalidArgument('outputs must be [{"name": ...}, ...]')
    outputs = {}
    for entry in entries:
        name = _name("outputs", entry)
        parameters = _parameters(f"output '{name}'", entry)
        if parameters.get("classification") or "shared_memory_region" in parameters:
            raise InvalidArgument(f"output '{name}': classification and shared memory are not supported")
        outputs[name] = parameters.get("binary_data", all_binary) is True
    return outputs


def _name(what: str, entry: Any) -> str:
    if isinstance(entry, dict) and isinstance(entry.get("name"), str):
        return str(entry["name"])
    raise InvalidArgument(f"an entry of {what} has no name")


def _parameters(where: str, entry: dict[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidArgument(f"{where}: parameters must be an object")
    return parameters


def is_raw(plan: Plan, inputs: Mapping[str, Array]) -> bool:
    """Return whether the inputs are the tensors of the model's file, not request columns.

    Where the columns and the tensors have the same names, the inputs are columns.
    """
    assert plan.runner is not None
    if plan.tensors is not None:
        return True
    return inputs.keys() != set(plan.names) and inputs.keys() == {tensor.name for tensor in plan.runner.inputs}


def as_columns(plan: Plan, inputs: Mapping[str, Array]) -> dict[str, Any]:
    """Return the inputs as request columns. Raises InvalidArgument for an input that is not a column.

    A missing column is found later, when the columns are read.
    """
    dtypes = dict(zip(plan.names, plan.dtypes, strict=True))
    assert plan.runner is not None
    values = {}
    for name, array in inputs.items():
        if name not in dtypes:
            tensors = ", ".join(tensor.name for tensor in plan.runner.inputs)
            takes = f"its columns: {', '.join(dtypes)}; or its tensors: {tensors}"
            raise InvalidArgument(f"model '{plan.model}' has no input {quoted(name)}; {takes}")
        values[name] = column_values(name, dtypes[name], array)
    return values


def response(request: InferRequest, model: str, answer: Answer) -> tuple[bytes, int | None]:
    """Return the body, and the length of its JSON in bytes if tensors follow it, else None.

    Raises InvalidArgument for an unknown output.
    """
    found = dict(zip(answer.names, answer.values, strict=True))
    if request.statuses:
        found |= {f"{STATUSES}:{view}": np.asarray(codes) for view, codes in answer.statuses.items()}
    wanted = request.outputs
    if wanted is None:
        wanted = dict.fromkeys(found, request.all_binary)
    elif request.statuses:
        statuses = (name for name in found if name.startswith(f"{STATUSES}:"))
        wanted = dict.fromkeys(statuses, request.all_binary) | wanted
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, binary in wanted.items():
        if name not in found:
            raise InvalidArgument(f"model '{model}' has no output {quoted(name)}; its outputs: {', '.join(found)}")
        if binary:
            described, raw = binary_output(name, found[name])
            tail.append(raw)
            outputs.append(described)
        else:
            outputs.append(json_output(name, found[name]))
    document: dict[str, Any] = {"model_name": model, "model_version": str(answer.version), "outputs": outputs}
    if request.id:
        document["id"] = request.id
    head = write_json(document)
    return (b"".join((head, *tail)), len(head)) if tail else (head, None)


# -- documents -------------------------------------------------------------------------------------------------


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
    columns = request_columns(catalog, info.model, info.inputs)
    tensors = [_tensor(tensor, is_raw) for tensor in info.inputs]
    return {
        "name": name,
        "versions": [str(number) for number in sorted(entry.versions)],
        "platform": "onnx",
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


def repository_index(catalog: Catalog, ready: bool) -> list[dict[str, Any]]:
    """Return an entry per model, with its current version and whether the server is ready."""
    state = "READY" if ready else "UNAVAILABLE"
    return [
        {"name": name, "version": str(entry.current), "state": state, "reason": ""}
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
