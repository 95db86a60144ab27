"""The handlers of the Open Inference Protocol, version 2 (v2.py, v2_documents.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from shorttail.config import VERSION
from shorttail.errors import ShorttailError
from shorttail.server.http import v2, v2_documents
from shorttail.server.http.app import HttpCall, HttpServer
from shorttail.server.http.json import json_response
from shorttail.server.http.media import JSON, OCTETS
from shorttail.server.http.operations import answer_type_for, body_type_of, check_work, finder, one_header, written

if TYPE_CHECKING:
    from shorttail.define.catalog import Catalog


async def live(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return json_response({"live": True})


async def ready(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    # The text of the protocol has "live" here, and its servers answer "ready".
    return _readiness({"live": True}, server.not_ready)


def model_readiness(server: HttpServer, name: str, version: int | None = None) -> web.Response:
    """Answer whether a model can be asked. Raises NotFound."""
    entry = _catalog(server).model(name)
    entry.version(version)
    reason = server.not_ready
    if not reason and version in (None, entry.current):
        try:
            serves = server.engine.plan_for_model(name).version
        except ShorttailError as error:
            reason = error.message
        else:
            if version not in (None, serves):
                reason = f"model '{name}' version {version} is not loaded; version {serves} serves"
    return _readiness({"name": name}, reason)


def _readiness(document: dict[str, object], reason: str) -> web.Response:
    """Return the document with whether there is no reason against it."""
    if reason:
        return json_response(document | {"ready": False, "error": reason}, status=503, headers={"Retry-After": "1"})
    return json_response(document | {"ready": True})


async def metadata(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return json_response(v2_documents.server_metadata(VERSION))


async def index(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    catalog, unavailable = _catalog(server), server.engine.unavailable()
    return json_response(v2_documents.repository_index(catalog, unavailable, server.not_ready))


async def model(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return json_response(v2_documents.model_metadata(_catalog(server), *_asked(request)))


async def model_ready(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return model_readiness(server, *_asked(request))


async def config(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return json_response(v2_documents.model_config(_catalog(server), *_asked(request)))


async def statistics(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    return json_response(v2_documents.statistics(_catalog(server).models, server.memory.slots()))


async def model_statistics(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    name, version = _asked(request)
    entry = _catalog(server).model(name)
    entry.version(version)
    return json_response(v2_documents.statistics({name: entry}, server.memory.slots()))


async def infer(server: HttpServer, request: web.Request, call: HttpCall) -> web.Response:
    call.predicts()
    body_type_of(request, (JSON, OCTETS))
    name, version = _asked(request)
    find_model = finder(server, call, lambda: name, version)
    find_model(None, None)  # an unknown model is reported before the body is read
    body = await server.body(request)
    asked = v2.parse_infer(body, one_header(request, v2.HEADER_BYTES), find_model, server.on_loop)
    call.note_id(asked.wanted.id or "")
    call.within(asked.timeout_us)
    answer_type_for(request, [OCTETS if asked.wanted.has_bytes else JSON])
    plan = server.engine.plan_for_model(name, asked.version)
    if asked.are_tensors:
        answer = await server.batches.infer(plan, asked.values, call.deadline_ns, call.sender)
    else:
        check_work(server, plan, asked.values)
        answer = await server.batches.predict(plan, asked.values, asked.moment_us, call.deadline_ns, call.sender)
    return written(server, call, answer, v2.write_answer, asked.wanted)


def _catalog(server: HttpServer) -> Catalog:
    server.engine.refresh()
    return server.engine.store.catalog


def _asked(request: web.Request) -> tuple[str, int | None]:
    """Return the model name and the version (None: the current one) in the path."""
    return request.match_info["model"], v2_documents.version_number(request.match_info.get("version"))
