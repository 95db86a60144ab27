"""Reads requests of the Open Inference Protocol, version 2, and writes the answers. docs/http.md has the routes.

See https://github.com/kserve/open-inference-protocol and Triton's extension of it for binary tensors, which
`tritonclient[http]` speaks. v2_documents.py describes the models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.define.names import quoted
from shorttail.errors import InvalidArgument
from shorttail.server.http.json import write_json
from shorttail.server.http.literals import parse_document
from shorttail.server.http.media import JSON, OCTETS
from shorttail.server.http.parsed import Answer, FindModel, ModelColumns, ResponseBody, TooLarge, parse_moment
from shorttail.server.http.tensors import BYTES, binary_output, column_values, json_output, read_tensor

Array = NDArray[Any]
HEADER_BYTES: Final = "Inference-Header-Content-Length"
ID_CHARS: Final = 256
TIMEOUT_MAX_US: Final = 86_400_000_000  # a longer timeout is none that a server keeps
STATUSES: Final = "statuses"  # a request parameter; it adds an output "statuses:LOOKUP" per lookup


@dataclass(frozen=True, slots=True)
class WantedOutputs:
    """What the answer to an inference request must hold.

    model: its name. id: None if the request has none. outputs: name -> whether it is sent as bytes; None asks for all
    outputs, as bytes if all_binary. statuses: also send the statuses of the lookup.
    """

    model: str
    id: str | None
    outputs: dict[str, bool] | None
    all_binary: bool
    statuses: bool

    @property
    def has_bytes(self) -> bool:
        """Whether an output is sent as bytes."""
        if self.outputs is not None and any(self.outputs.values()):
            return True
        return self.all_binary and (self.outputs is None or self.statuses)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """An inference request.

    version: as ModelColumns has it. values: name -> array or list; the inputs of the model's file if are_tensors, else
    request columns. moment_us: as parse_moment returns it. timeout_us: 0 if the request has none.
    """

    version: int | None
    values: dict[str, Any]
    are_tensors: bool
    moment_us: int | None
    timeout_us: int
    wanted: WantedOutputs


def parse_infer(body: bytes, header_bytes: str | None, find_model: FindModel, on_loop: bool = False) -> InferRequest:
    """Parse the body of an infer request. Raises InvalidArgument, and what find_model raises.

    header_bytes: the value of Inference-Header-Content-Length, the length of the JSON in bytes; None if the whole body
    is JSON. on_loop: raise TooLarge for more texts than the event loop may read.
    """
    model = find_model(None, None)
    view = memoryview(body)
    length = len(view)
    if header_bytes is not None:
        if not (re.fullmatch(r"[0-9]{1,9}", header_bytes) and int(header_bytes) <= len(view)):
            raise InvalidArgument(
                f"Inference-Header-Content-Length {header_bytes!r:.40} is not a length within the body"
            )
        length = int(header_bytes)
    document = parse_document(view[:length])
    if not isinstance(document, dict) or not isinstance(document.get("inputs"), list):
        raise InvalidArgument('the body must be {"inputs": [{"name", "shape", "datatype", "data"}, ...]}')
    inputs, raw = _inputs(model, document["inputs"], view[length:], on_loop)
    if len(raw):
        raise InvalidArgument(f"{len(raw)} bytes of tensor data are left over after the last input")
    parameters = _parameters("the request", document)
    for name in ("shared_memory_region", "sequence_id"):
        if parameters.get(name):
            raise InvalidArgument(f"the parameter {name} is not supported")
    identifier = document.get("id")
    if identifier is not None and not (isinstance(identifier, str) and len(identifier) <= ID_CHARS):
        raise InvalidArgument(f"id must be a string of at most {ID_CHARS} characters")
    all_binary = parameters.get("binary_data_output") is True
    outputs = _outputs(document.get("outputs"), all_binary)
    are_tensors = _are_tensors(model, inputs)
    values = inputs if are_tensors else _as_columns(model, inputs)
    wanted = WantedOutputs(model.model, identifier, outputs, all_binary, parameters.get(STATUSES) is True)
    return InferRequest(model.version, values, are_tensors, parse_moment(parameters), _timeout_us(parameters), wanted)


def _timeout_us(parameters: dict[str, Any]) -> int:
    """Return the parameter timeout in microseconds, at most a day; 0 is none. Raises InvalidArgument."""
    timeout_us = parameters.get("timeout") or 0
    if not isinstance(timeout_us, int) or isinstance(timeout_us, bool) or timeout_us < 0:
        raise InvalidArgument(f"the parameter timeout must be a number of microseconds; got {timeout_us!r:.40}")
    return min(timeout_us, TIMEOUT_MAX_US)


def _inputs(
    model: ModelColumns, entries: list[Any], raw: memoryview, on_loop: bool
) -> tuple[dict[str, Array], memoryview]:
    """Return the arrays of the inputs, and the bytes that no input has taken."""
    dtypes = dict(zip(model.names, model.dtypes, strict=True))
    inputs: dict[str, Array] = {}
    for entry in entries:
        name = _name("inputs", entry)
        if name in inputs:
            raise InvalidArgument(f"input '{name}' is given twice")
        shape, dtype = entry.get("shape"), dtypes.get(name)
        is_one_vector = dtype is not None and dtype.is_vector and isinstance(shape, list) and len(shape) == 1
        if not (model.takes_tensors or is_one_vector):
            _check_rows(shape)
        parameters = _parameters(f"input '{name}'", entry)
        if "shared_memory_region" in parameters:
            raise InvalidArgument(f"input '{name}': shared memory is not supported; send the tensor with the request")
        size = parameters.get("binary_data_size")
        if size is None:
            inputs[name] = read_tensor(name, entry, None)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(raw):
            raise InvalidArgument(f"input '{name}': binary_data_size {size!r:.40}, where {len(raw)} bytes are left")
        if on_loop and entry.get("datatype") == BYTES and size > LIMITS.loop_text_bytes:
            raise TooLarge
        inputs[name] = read_tensor(name, entry, raw[:size])
        raw = raw[size:]
    return inputs, raw


def _check_rows(shape: Any) -> None:
    """Check the first size of a shape before the data is read. Raises InvalidArgument."""
    if isinstance(shape, list) and shape and isinstance(shape[0], int) and shape[0] > LIMITS.rows_per_request:
        most = LIMITS.rows_per_request
        raise InvalidArgument(f"{shape[0]} rows in one request; at most {most} are taken: send it in parts")


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
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidArgument(f"{where}: parameters must be an object")
    return parameters


def _are_tensors(model: ModelColumns, inputs: Mapping[str, Array]) -> bool:
    """Return whether the inputs are the tensors of the model's file, not request columns.

    Where the columns and the tensors have the same names, the inputs are columns.
    """
    return model.takes_tensors or (inputs.keys() != set(model.names) and inputs.keys() == set(model.tensors))


def _as_columns(model: ModelColumns, inputs: Mapping[str, Array]) -> dict[str, Any]:
    """Return the inputs as request columns. Raises InvalidArgument for an input that is not a column.

    A missing column is found later, when the columns are read.
    """
    dtypes = dict(zip(model.names, model.dtypes, strict=True))
    values = {}
    for name, array in inputs.items():
        if name not in dtypes:
            takes = f"its columns: {', '.join(dtypes)}; or its tensors: {', '.join(model.tensors)}"
            raise InvalidArgument(f"model '{model.model}' has no input {quoted(name)}; {takes}")
        values[name] = column_values(name, dtypes[name], array)
    return values


def write_answer(wanted: WantedOutputs, answer: Answer) -> ResponseBody:
    """Write the response to a request. Raises InvalidArgument for an unknown output."""
    found = dict(zip(answer.names, answer.values, strict=True))
    if wanted.statuses:
        found |= {f"{STATUSES}:{view}": np.asarray(codes) for view, codes in answer.statuses.items()}
    asked = wanted.outputs
    if asked is None:
        asked = dict.fromkeys(found, wanted.all_binary)
    elif wanted.statuses:
        statuses = (name for name in found if name.startswith(f"{STATUSES}:"))
        asked = dict.fromkeys(statuses, wanted.all_binary) | asked
    outputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, binary in asked.items():
        if name not in found:
            has = ", ".join(found)
            raise InvalidArgument(f"model '{wanted.model}' has no output {quoted(name)}; its outputs: {has}")
        if binary:
            described, raw = binary_output(name, found[name])
            tail.append(raw)
            outputs.append(described)
        else:
            outputs.append(json_output(name, found[name]))
    document: dict[str, Any] = {"model_name": wanted.model, "model_version": str(answer.version), "outputs": outputs}
    if wanted.id is not None:
        document["id"] = wanted.id
    head = write_json(document)
    if not tail:
        return ResponseBody(head, JSON)
    return ResponseBody(b"".join((head, *tail)), OCTETS, {HEADER_BYTES: str(len(head))})
