"""The handlers of the routes of SageMaker, Vertex AI, MLflow, and version 1 of KServe's protocol (invocations.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web

from shorttail.config import LIMITS, VERSION
from shorttail.errors import InvalidArgument, NotFound
from shorttail.server.http import invocations, predictions
from shorttail.server.http.app import HttpCall, HttpServer
from shorttail.server.http.json import json_response
from shorttail.server.http.media import CSV, JSON, JSON_LINES
from shorttail.server.http.operations import answer_type_for, body_type_of, check_work, finder, one_header, written
from shorttail.server.http.parsed import Answer, FindModel, ResponseBody, TooLarge
from shorttail.server.http.v2_routes import model_readiness

TARGET_MODEL: Final = "X-Amzn-SageMaker-Target-Model"
FORMATS: Final = (JSON, CSV, *JSON_LINES)
PARSERS: Final[dict[str, Callable[[bytes, FindModel], invocations.Invocation]]] = {
    JSON: invocations.parse_json_body,
    CSV: invocations.parse_csv,
    **dict.fromkeys(JSON_LINES, invocations.parse_json_lines),
}
WRITERS: Final[dict[str, Callable[[Any, Answer], ResponseBody]]] = {
    JSON: predictions.write_predictions,
    CSV: predictions.write_csv,
    **dict.fromkeys(JSON_LINES, predictions.write_json_lines),
}


async def ping(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return web.Response(status=503 if server.not_ready else 200)


async def version(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return web.Response(text=VERSION)


async def invoke(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    call.predicts()
    return await _predict(server, request, call, finder(server, call, lambda: _default_model(server, request)), FORMATS)


async def models(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    server.engine.refresh()
    return json_response({"models": list(server.engine.store.catalog.models)})


async def model(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return model_readiness(server, request.match_info["model"])


async def predict(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    call.predicts()
    name = request.match_info["model"]
    find_model = finder(server, call, lambda: name, is_fixed=True)
    find_model(None, None)  # an unknown model is reported before the body is read
    return await _predict(server, request, call, find_model, (JSON,))


async def _predict(
    server: HttpServer, request: web.Request, call: HttpCall, find_model: FindModel, formats: tuple[str, ...]
) -> web.Response:
    takes = body_type_of(request, formats)
    gives = answer_type_for(request, [takes, *formats])
    body = await server.body(request)
    if takes == CSV and server.on_loop and body.count(b",") + body.count(b"\n") > LIMITS.loop_csv_fields:
        raise TooLarge
    asked = PARSERS[takes](body, find_model)
    plan = server.engine.plan_for_model(asked.model, asked.version)
    check_work(server, plan, asked.columns)
    answer = await server.batches.predict(plan, asked.columns, asked.moment_us, call.deadline_ns, call.sender)
    response = written(server, call, answer, WRITERS[gives], asked.outputs)
    if gives in JSON_LINES:
        response.content_type = gives  # the name that the client uses
    return response


def _default_model(server: HttpServer, request: web.Request) -> str:
    """Return the model if the request names none: by header, by SHORTTAIL_MODEL, or the store's only model."""
    named = one_header(request, TARGET_MODEL) or os.environ.get("SHORTTAIL_MODEL")
    if named:
        return unquote(named.strip("/"))  # a header holds only ASCII for sure, and a name any letters
    names = list(server.engine.store.catalog.models)
    if len(names) == 1:
        return names[0]
    if not names:
        raise NotFound("the store has no model")
    raise InvalidArgument(
        f"the request names no model, and the store has several: {', '.join(names)}; give the parameter model, or "
        "start the server with SHORTTAIL_MODEL set"
    )
