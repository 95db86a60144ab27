"""The routes of the HTTP server. docs/http.md has the same list for users."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from aiohttp import web

from shorttail.config import VERSION
from shorttail.errors import InvalidArgument, NotFound, Unavailable
from shorttail.server.http import instances, v2
from shorttail.server.http.app import HttpCall, HttpServer
from shorttail.server.http.exposition import CONTENT_TYPE, exposition
from shorttail.server.http.json import JSON, json_response

if TYPE_CHECKING:
    from shorttail.pipeline import Plan
    from shorttail.server.http.batches import Answer

HEADER_BYTES: Final = "Inference-Header-Content-Length"
CSV: Final = "text/csv"
MODEL_ROUTES: Final = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


def add_routes(app: web.Application, server: HttpServer) -> None:
    """Add all routes to an application of aiohttp."""
    for group in (Probes(server), OpenInference(server), Platforms(server)):
        group.add_to(app.router)


class Probes:
    """Liveness, readiness and metrics."""

    def __init__(self, server: HttpServer):
        self.server = server

    def add_to(self, router: web.UrlDispatcher) -> None:
        endpoint = self.server.endpoint
        router.add_get("/livez", endpoint(self.live, open_to_all=True))
        router.add_get("/readyz", endpoint(self.ready, open_to_all=True))
        router.add_get("/metrics", endpoint(self.metrics))

    async def live(self, request: web.Request, call: HttpCall) -> web.Response:
        # The event loop that serves answers this, so an answer shows that it turns.
        return web.Response(text="ok\n")

    async def ready(self, request: web.Request, call: HttpCall) -> web.Response:
        reason = self.server.not_ready
        return web.Response(text=f"{reason or 'ok'}\n", status=503 if reason else 200)

    async def metrics(self, request: web.Request, call: HttpCall) -> web.Response:
        text = exposition(self.server.memory, self.server.engine)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


class OpenInference:
    """The Open Inference Protocol, version 2 (server/http/v2.py)."""

    def __init__(self, server: HttpServer):
        self.server = server

    def add_to(self, router: web.UrlDispatcher) -> None:
        endpoint = self.server.endpoint
        router.add_get("/v2/health/live", endpoint(self.live, open_to_all=True))
        router.add_get("/v2/health/ready", endpoint(self.ready, open_to_all=True))
        router.add_get("/v2", endpoint(self.metadata))
        router.add_get("/v2/models/stats", endpoint(self.stats))
        router.add_post("/v2/repository/index", endpoint(self.index))
        for route in MODEL_ROUTES:
            router.add_get(route, endpoint(self.model))
            router.add_get(f"{route}/ready", endpoint(self.model_ready))
            router.add_get(f"{route}/config", endpoint(self.config))
            router.add_get(f"{route}/stats", endpoint(self.stats))
            router.add_post(f"{route}/infer", endpoint(self.infer))

    async def live(self, request: web.Request, call: HttpCall) -> web.Response:
        return web.Response()

    async def ready(self, request: web.Request, call: HttpCall) -> web.Response:
        return web.Response(status=503 if self.server.not_ready else 200)

    async def metadata(self, request: web.Request, call: HttpCall) -> web.Response:
        return json_response(v2.server_metadata(VERSION))

    async def index(self, request: web.Request, call: HttpCall) -> web.Response:
        return json_response(v2.repository_index(self._catalog(), not self.server.not_ready))

    async def model(self, request: web.Request, call: HttpCall) -> web.Response:
        return json_response(v2.model_metadata(self._catalog(), *_asked(request)))

    async def model_ready(self, request: web.Request, call: HttpCall) -> web.Response:
        name, version = _asked(request)
        self._catalog().model(name).version(version)
        if self.server.not_ready:
            raise Unavailable(self.server.not_ready)
        return web.Response()

    async def config(self, request: web.Request, call: HttpCall) -> web.Response:
        return json_response(v2.model_config(self._catalog(), *_asked(request)))

    async def stats(self, request: web.Request, call: HttpCall) -> web.Response:
        catalog = self._catalog()
        entries = dict(catalog.models)
        if "model" in request.match_info:
            name, version = _asked(request)
            catalog.model(name).version(version)
            entries = {name: catalog.model(name)}
        return json_response(v2.statistics(entries, self.server.memory.slots()))

    async def infer(self, request: web.Request, call: HttpCall) -> web.Response:
        server = self.server
        name, version = _asked(request)
        plan = _plan(server, call, name, version)
        asked = v2.parse_infer(await server.body(request), request.headers.get(HEADER_BYTES))
        call.note_id(asked.id)
        call.within(asked.timeout_us)
        if v2.is_raw(plan, asked.inputs):
            answer = await server.batches.infer(plan, asked.inputs, call.deadline_ns, call.sender)
        else:
            answer = await server.batches.predict(
                plan, v2.as_columns(plan, asked.inputs), call.deadline_ns, call.sender
            )
        start_ns = time.perf_counter_ns()
        body, header_bytes = v2.response(asked, name, answer)
        response = web.Response(body=body, content_type=JSON)
        if header_bytes is not None:
            response.content_type = "application/octet-stream"
            response.headers[HEADER_BYTES] = str(header_bytes)
        call.note_rows(answer.rows)
        server.encoded(call, start_ns)
        return response

    def _catalog(self) -> Any:
        self.server.engine.refresh()
        return self.server.engine.store.catalog


class Platforms:
    """The routes that SageMaker and Vertex AI call (server/http/instances.py)."""

    def __init__(self, server: HttpServer):
        self.server = server

    def add_to(self, router: web.UrlDispatcher) -> None:
        endpoint = self.server.endpoint
        router.add_get("/ping", endpoint(self.ping, open_to_all=True))
        router.add_post("/invocations", endpoint(self.invoke))
        taken = {route.resource.canonical for route in router.routes() if route.resource is not None}
        health, predict = os.environ.get("AIP_HEALTH_ROUTE"), os.environ.get("AIP_PREDICT_ROUTE")
        if health and health not in taken:
            router.add_get(health, endpoint(self.ping, open_to_all=True))
        if predict and predict not in taken:
            router.add_post(predict, endpoint(self.invoke))

    async def ping(self, request: web.Request, call: HttpCall) -> web.Response:
        return web.Response(status=503 if self.server.not_ready else 200)

    async def invoke(self, request: web.Request, call: HttpCall) -> web.Response:
        call.predicts()
        server = self.server
        body = await server.body(request)
        as_csv = request.content_type == CSV
        asked = instances.Instances([]) if as_csv else instances.parse_instances(body)
        name = asked.option("model", str) or self._model(request)
        plan = _plan(server, call, name, asked.option("version", int))
        if as_csv:
            columns = instances.csv_columns(body, plan.names, plan.dtypes)
        else:
            columns = instances.instance_columns(asked.rows, plan.names)
        answer = await server.batches.predict(plan, columns, call.deadline_ns, call.sender)
        start_ns = time.perf_counter_ns()
        response = _predictions(request, asked, answer, as_csv)
        call.note_rows(answer.rows)
        server.encoded(call, start_ns)
        return response

    def _model(self, request: web.Request) -> str:
        """Return the model if the request names none: by header, by SHORTTAIL_MODEL, or the store's only model."""
        named = request.headers.get("X-Amzn-SageMaker-Target-Model") or os.environ.get("SHORTTAIL_MODEL")
        if named:
            return unquote(named.strip("/"))  # a header holds only ASCII for sure, and a name any letters
        names = list(self.server.engine.store.catalog.models)
        if len(names) == 1:
            return names[0]
        if not names:
            raise NotFound("the store has no model")
        raise InvalidArgument(
            f"the request names no model, and the store has several: {', '.join(names)}; give the parameter model, or "
            "start the server with SHORTTAIL_MODEL set"
        )


def _predictions(request: web.Request, asked: instances.Instances, answer: Answer, as_csv: bool) -> web.Response:
    """Make the response in the format that the Accept header names: CSV or JSON; else in the format of the request."""
    accepted = request.headers.get("Accept", "*/*")
    if CSV in accepted or (as_csv and JSON not in accepted):
        return web.Response(body=instances.predictions_csv(answer), content_type=CSV, charset="utf-8")
    rows = instances.predictions(answer, asked.parameters.get("outputs"))
    return web.Response(body=instances.predictions_json(rows, answer), content_type=JSON)


def _asked(request: web.Request) -> tuple[str, int | None]:
    """Return the model name and the version (None: the current one) in the path."""
    return request.match_info["model"], v2.version_number(request.match_info.get("version"))


def _plan(server: HttpServer, call: HttpCall, name: str, version: int | None) -> Plan:
    """Return the plan of a model, and note the model in the call. Raises NotFound."""
    call.predicts()
    plan = server.engine.plan_for_model(name, version)
    call.predicts(name)
    return plan
