"""The OpenAPI 3.1 document of the HTTP API, made of the operations that routes.py serves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from shorttail.config import VERSION
from shorttail.server.http.media import JSON
from shorttail.server.http.operations import Operation, Schema
from shorttail.server.http.schemas import HEADERS, IN_PATHS, SCHEMAS, TEXT, ref

ERROR: Final = ref("Error")
WHEN: Final = {  # status -> when it is answered
    400: "The request is wrong: INVALID_ARGUMENT.",
    401: "No token, where the server asks for one: UNAUTHENTICATED.",
    403: "An unknown token: PERMISSION_DENIED.",
    404: "No such model or version: NOT_FOUND.",
    406: "Accept excludes every media type of the answer.",
    413: "The body is too large.",
    415: "The media type or the charset of the body is not one of those that are taken.",
    429: "Overload, or a request above a limit: RESOURCE_EXHAUSTED.",
    500: "A fault of the server or the model: INTERNAL.",
    503: "The server or the model is not ready: UNAVAILABLE.",
    504: "The deadline has passed: DEADLINE_EXCEEDED.",
}
HEADERS_OF: Final = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """Describe these operations."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "shorttail", "version": VERSION, "description": "Online serving of models over HTTP."},
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    named = re.findall(r"{(\w+)}", operation.path)
    parameters = [_parameter("path", name, *IN_PATHS[name], required=True) for name in named]
    parameters += [_parameter("header", name, *HEADERS[name]) for name in _headers(operation)]
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{operation.method.lower()}{operation.path}").strip("_"),
        "summary": operation.summary,
        "responses": {str(status): _response(operation, status) for status in _statuses(operation)},
    }
    if parameters:
        described["parameters"] = parameters
    if operation.takes:
        described["requestBody"] = {"required": True, "content": _content(operation.takes)}
    if not operation.is_probe:
        described["security"] = [{"token": []}, {}]  # {}: a server without --token-file asks for none
    return described


def _headers(operation: Operation) -> list[str]:
    common = [] if operation.is_probe else ["X-Deadline-Ms", "X-Request-Id", "traceparent"]
    return [*operation.headers, *common]


def _statuses(operation: Operation) -> list[int]:
    found = {200, *operation.fails}
    if not operation.is_probe:
        found |= {400, 401, 403}
        found |= {406} if operation.gives else set()
    return sorted(found)


def _response(operation: Operation, status: int) -> dict[str, Any]:
    if status == 200:
        response: dict[str, Any] = {"description": "The answer."}
        if operation.gives:
            response["content"] = _content(operation.gives)
        headers = {name: {"schema": HEADERS[name][1]} for name in operation.response_headers}
        return response | ({"headers": headers} if headers else {})
    response = {"description": WHEN[status]}
    if operation.failure is None or status != 503:
        response["content"] = _content({JSON: ERROR})
    elif operation.failure:
        response["content"] = _content(operation.failure)
    if status in HEADERS_OF and not operation.is_probe:
        response["headers"] = {HEADERS_OF[status]: {"schema": TEXT}}
    return response


def _content(schemas: Any) -> dict[str, Any]:
    return {media: {"schema": schema} for media, schema in schemas.items()}


def _parameter(where: str, name: str, description: str, schema: Schema, *, required: bool = False) -> dict[str, Any]:
    found = {"name": name, "in": where, "description": description, "schema": schema}
    return found | ({"required": True} if required else {})
