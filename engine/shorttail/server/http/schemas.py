"""JSON schemas of the bodies of HTTP, and the parameters of requests, for the OpenAPI document (openapi.py)."""

from __future__ import annotations

from typing import Any, Final

from shorttail.server.http.tensors import BYTES, DATATYPES

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """Return a reference to a schema of SCHEMAS."""
    return {"$ref": f"#/components/schemas/{name}"}


def array_of(items: Schema, **more: Any) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items, **more}


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """Return the schema of an object with these fields; it may have others."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


TEXT: Final[Schema] = {"type": "string"}
WHOLE: Final[Schema] = {"type": "integer"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
BOOL: Final[Schema] = {"type": "boolean"}
MOMENT: Final[Schema] = {
    "type": ["string", "integer", "null"],
    "description": "ISO 8601, or microseconds since 1970; UTC.",
}
SCALAR: Final[Schema] = {
    "type": ["number", "string", "boolean", "null"],
    "description": 'null: missing. "Infinity", "-Infinity": the numbers that JSON does not have.',
}
PARAMETERS: Final[Schema] = {
    "type": ["object", "null"],
    "additionalProperties": {"type": ["number", "string", "boolean", "null"]},
}
DATATYPE: Final[Schema] = {"type": "string", "enum": [*DATATYPES, BYTES]}
SHAPE: Final[Schema] = array_of(COUNT, maxItems=64)
OPEN_SHAPE: Final[Schema] = array_of({"type": "integer", "minimum": -1})
COUNTER: Final[Schema] = record({"count": COUNT, "ns": COUNT})
CONFIGURED: Final[Schema] = record({"name": TEXT, "data_type": TEXT, "dims": OPEN_SHAPE})
STEPS: Final = (
    "success",
    "fail",
    "queue",
    "compute_input",
    "compute_infer",
    "compute_output",
    "cache_hit",
    "cache_miss",
)

INSTANCE: Final[Schema] = {
    "description": "One row: a map of columns, a list in the order of the columns, or the value of the only column.",
    "anyOf": [
        {"type": "object", "additionalProperties": ref("Value")},
        array_of(ref("Value")),
        ref("Value"),
    ],
}
OPTIONS: Final[Schema] = {
    "parameters": {
        "type": "object",
        "description": "The model, its version, the outputs that are wanted, and when TTLs are judged (docs/types.md).",
        "properties": {"model": TEXT, "version": WHOLE, "outputs": array_of(TEXT, minItems=1), "as_of": MOMENT},
    }
}
OPTIONS["params"] = OPTIONS["parameters"]

SCHEMAS: Final[dict[str, Schema]] = {
    "Error": record({"error": TEXT}),
    "NotReady": record({"ready": {"const": False}, "error": TEXT}, {"live": BOOL, "name": TEXT}),
    "Value": {"anyOf": [SCALAR, array_of(SCALAR)], "description": "A value of a column; a vector is a list."},
    "Live": record({"live": BOOL}),
    "Ready": record({"live": BOOL, "ready": BOOL}),
    "ModelReady": record({"name": TEXT, "ready": BOOL}),
    "Server": record({"name": TEXT, "version": TEXT, "extensions": array_of(TEXT)}),
    "Tensor": record({"name": TEXT, "datatype": DATATYPE, "shape": OPEN_SHAPE}),
    "Model": record(
        {
            "name": TEXT,
            "versions": array_of(TEXT),
            "platform": TEXT,
            "inputs": array_of(ref("Tensor")),
            "outputs": array_of(ref("Tensor")),
            "tensors": array_of(ref("Tensor")),
        }
    ),
    "ModelConfig": record(
        {
            "name": TEXT,
            "platform": TEXT,
            "backend": TEXT,
            "version_policy": {"type": "object"},
            "max_batch_size": COUNT,
            "input": array_of(CONFIGURED),
            "output": array_of(CONFIGURED),
        }
    ),
    "Index": array_of(
        record({"name": TEXT, "version": TEXT, "state": {"enum": ["READY", "UNAVAILABLE"]}, "reason": TEXT})
    ),
    "Statistics": record(
        {
            "model_stats": array_of(
                record(
                    {
                        "name": TEXT,
                        "version": TEXT,
                        "last_inference": COUNT,
                        "inference_count": COUNT,
                        "execution_count": COUNT,
                        "inference_stats": record(dict.fromkeys(STEPS, COUNTER)),
                        "batch_stats": {"type": "array"},
                    }
                )
            )
        }
    ),
    "TensorData": {
        "description": "Nested as the shape, or flat; for the shape [] also a single value.",
        "anyOf": [array_of(ref("TensorData")), SCALAR],
    },
    "InferRequest": record(
        {
            "inputs": array_of(
                record(
                    {"name": TEXT, "shape": SHAPE, "datatype": DATATYPE},
                    {"data": ref("TensorData"), "parameters": PARAMETERS},
                )
            )
        },
        {
            "id": {"type": ["string", "null"], "maxLength": 256},
            "parameters": PARAMETERS,
            "outputs": array_of(record({"name": TEXT}, {"parameters": PARAMETERS})),
        },
    ),
    "InferResponse": record(
        {
            "model_name": TEXT,
            "model_version": TEXT,
            "outputs": array_of(
                record(
                    {"name": TEXT, "shape": SHAPE, "datatype": DATATYPE},
                    {"data": array_of(SCALAR), "parameters": PARAMETERS},
                )
            ),
        },
        {"id": TEXT},
    ),
    "Instances": record({"instances": array_of(INSTANCE, minItems=1)}, OPTIONS),
    "DataframeSplit": record(
        {
            "dataframe_split": record(
                {"columns": array_of(TEXT), "data": array_of(array_of(ref("Value")), minItems=1)},
                {"index": {"type": "array"}},
            )
        },
        OPTIONS,
    ),
    "DataframeRecords": record(
        {"dataframe_records": array_of({"type": "object", "additionalProperties": ref("Value")}, minItems=1)}, OPTIONS
    ),
    "Inputs": record(
        {
            "inputs": {
                "anyOf": [
                    array_of(INSTANCE, minItems=1),
                    {"type": "object", "additionalProperties": {"anyOf": [array_of(ref("Value")), ref("Value")]}},
                ]
            }
        },
        OPTIONS,
    ),
    "Invocation": {
        "anyOf": [
            ref("Instances"),
            ref("DataframeSplit"),
            ref("DataframeRecords"),
            ref("Inputs"),
            array_of(INSTANCE, minItems=1),
        ]
    },
    "Predictions": record({"predictions": {"type": "array"}, "version": WHOLE}),
    "Models": record({"models": array_of(TEXT)}),
}

# Request headers, by name.
HEADERS: Final[dict[str, tuple[str, Schema]]] = {
    "X-Deadline-Ms": (
        "How long the caller waits, in milliseconds. Less than a second is taken too; a deadline that passes is 504.",
        {"type": "integer", "minimum": 1000, "maximum": 86_400_000},
    ),
    "X-Request-Id": ("Written to the log.", {"type": "string"}),
    "traceparent": ("The trace of the request (W3C Trace Context), written to the log.", {"type": "string"}),
    "Inference-Header-Content-Length": (
        "The length of the JSON in bytes, if the data of tensors follows it.",
        COUNT,
    ),
    "X-Amzn-SageMaker-Target-Model": ("The model, if the body names none.", {"type": "string"}),
}
# Parameters of paths, by name.
IN_PATHS: Final[dict[str, tuple[str, Schema]]] = {
    "model": ("The name of a model.", {"type": "string", "minLength": 1}),
    "version": ("The number of a version.", {"type": "string", "pattern": "^[0-9]{1,9}$"}),
}
