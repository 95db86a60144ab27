"""The operations of the HTTP server, in one table: from it come the routes, and the OpenAPI document (openapi.py).

docs/http.md has the same list for users.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Final

from aiohttp import web

from shorttail.errors import InvalidArgument
from shorttail.server.http import openapi, platform_routes, v2, v2_routes
from shorttail.server.http.app import HttpCall, HttpServer
from shorttail.server.http.exposition import CONTENT_TYPE, exposition
from shorttail.server.http.json import json_response
from shorttail.server.http.media import CSV, JSON, JSON_LINES, OCTETS
from shorttail.server.http.operations import NAMES, RUNS, Operation, answer_type_for
from shorttail.server.http.schemas import TEXT, Schema, ref

PLAIN: Final = "text/plain"
MODEL_PATHS: Final = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
BYTES: Final[Schema] = {"type": "string", "format": "binary"}
LINES: Final = {CSV: TEXT, **dict.fromkeys(JSON_LINES, TEXT)}


async def livez(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    # The event loop that serves answers this, so an answer shows that it turns.
    return web.Response(text="ok\n")


async def readyz(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    reason = server.not_ready
    # A model that cannot answer has a probe of its own; the others serve.
    lines = [reason or "ok", *(f"not loaded: {name}" for name in server.engine.unavailable())]
    return web.Response(text="\n".join(lines) + "\n", status=503 if reason else 200)


async def metrics(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    text = exposition(server.memory, server.engine)
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


async def describe(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return json_response(openapi.document(operations()))


def operations() -> list[Operation]:
    """Return all operations of a server with the present environment. Raises InvalidArgument."""
    found = [*OPERATIONS, *_of_models()]
    taken = {(operation.method, operation.path) for operation in found}
    asked = [("AIP_HEALTH_ROUTE", _ping), ("AIP_PREDICT_ROUTE", _invocations)]
    for operation in [make(path) for variable, make in asked if (path := _path_of(variable))]:
        if (operation.method, operation.path) not in taken:
            found.append(operation)
    return found


def _path_of(variable: str) -> str:
    """Return the path in a variable of the environment; "" without one. Raises InvalidArgument."""
    path = os.environ.get(variable, "")
    if path and (not path.startswith("/") or "{" in path or "}" in path):
        raise InvalidArgument(f"the environment's {variable} is {path!r:.60}, which is not a path such as /health")
    return path


def _ping(path: str) -> Operation:
    return Operation("GET", path, platform_routes.ping, "Readiness.", fails=(503,), failure={}, is_probe=True)


def _invocations(path: str) -> Operation:
    return Operation(
        "POST",
        path,
        platform_routes.invoke,
        "Predictions, in the formats of SageMaker, Vertex AI and MLflow.",
        gives={JSON: ref("Predictions"), **LINES},
        takes={JSON: ref("Invocation"), **LINES},
        fails=RUNS,
        headers=(platform_routes.TARGET_MODEL,),
    )


def _of_models() -> Iterator[Operation]:
    for path in MODEL_PATHS:
        yield Operation("GET", path, v2_routes.model, "A model.", {JSON: ref("Model")}, fails=NAMES)
        yield Operation(
            "GET",
            f"{path}/ready",
            v2_routes.model_ready,
            "Readiness of a model.",
            {JSON: ref("ModelReady")},
            fails=(*NAMES, 503),
            failure={JSON: ref("NotReady")},
        )
        yield Operation(
            "GET", f"{path}/config", v2_routes.config, "Configuration.", {JSON: ref("ModelConfig")}, fails=NAMES
        )
        yield Operation(
            "GET", f"{path}/stats", v2_routes.model_statistics, "Statistics.", {JSON: ref("Statistics")}, fails=NAMES
        )
        yield Operation(
            "POST",
            f"{path}/infer",
            v2_routes.infer,
            "Inference.",
            gives={JSON: ref("InferResponse"), OCTETS: BYTES},
            takes={JSON: ref("InferRequest"), OCTETS: BYTES},
            fails=RUNS,
            headers=(v2.HEADER_BYTES,),
            response_headers=(v2.HEADER_BYTES,),
        )


OPERATIONS: Final = (
    Operation("GET", "/livez", livez, "Liveness.", {PLAIN: TEXT}, is_probe=True),
    Operation(
        "GET", "/readyz", readyz, "Readiness.", {PLAIN: TEXT}, fails=(503,), failure={PLAIN: TEXT}, is_probe=True
    ),
    Operation("GET", "/metrics", metrics, "Metrics for Prometheus.", {PLAIN: TEXT}, fails=(500,), in_reserve=True),
    Operation("GET", "/openapi.json", describe, "This document.", {JSON: {"type": "object"}}, fails=(500,)),
    Operation("GET", "/v2", v2_routes.metadata, "The server.", {JSON: ref("Server")}, fails=(500,)),
    Operation("GET", "/v2/health/live", v2_routes.live, "Liveness.", {JSON: ref("Live")}, is_probe=True),
    Operation(
        "GET",
        "/v2/health/ready",
        v2_routes.ready,
        "Readiness.",
        {JSON: ref("Ready")},
        fails=(503,),
        failure={JSON: ref("NotReady")},
        is_probe=True,
    ),
    Operation(
        "GET",
        "/v2/models/stats",
        v2_routes.statistics,
        "Statistics of all models.",
        {JSON: ref("Statistics")},
        fails=(500,),
    ),
    Operation("POST", "/v2/repository/index", v2_routes.index, "All models.", {JSON: ref("Index")}, fails=(500,)),
    Operation("GET", "/v1/models", platform_routes.models, "All models.", {JSON: ref("Models")}, fails=(500,)),
    Operation(
        "GET",
        "/v1/models/{model}",
        platform_routes.model,
        "Readiness of a model.",
        {JSON: ref("ModelReady")},
        fails=(*NAMES, 503),
        failure={JSON: ref("NotReady")},
    ),
    Operation(
        "POST",
        "/v1/models/{model}:predict",
        platform_routes.predict,
        "Predictions.",
        {JSON: ref("Predictions")},
        takes={JSON: ref("Invocation")},
        fails=RUNS,
    ),
    _ping("/ping"),
    _ping("/health"),
    Operation("GET", "/version", platform_routes.version, "The server's version.", {PLAIN: TEXT}, is_probe=True),
    _invocations("/invocations"),
)


def add_routes(app: web.Application, server: HttpServer) -> None:
    """Add all operations to an application of aiohttp. A path with a slash at its end is the same path."""
    app.middlewares.append(_json_errors)
    for operation in operations():
        answer = partial(_answer, operation, server)
        handler = server.endpoint(answer, open_to_all=operation.is_probe, in_reserve=operation.in_reserve)
        pattern = operation.path.replace("{model}", "{model:[^/:{}]+}")  # no name has a colon
        for path in (pattern, f"{pattern}/"):
            app.router.add_route(operation.method, path, handler)
            if operation.method == "GET":
                app.router.add_route("HEAD", path, handler)


async def _answer(operation: Operation, server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    if operation.gives and not operation.takes and not operation.is_probe:
        answer_type_for(request, list(operation.gives))
    return await operation.handler(server, request, call)


@web.middleware
async def _json_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer a path or a method that no operation has, which aiohttp answers with a page of text."""
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        text = f"{request.method} is not allowed for {request.path!r:.100}; it takes {allowed}"
        return json_response({"error": text}, status=405, headers={"Allow": allowed})
    except web.HTTPNotFound:
        return json_response({"error": f"no route {request.path!r:.100}; GET /openapi.json lists them"}, status=404)
