"""The routes of the HTTP server. docs/http.md has the same list for users."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web

from shorttail.config import VERSION
from shorttail.errors import InvalidArgument, NotFound, Unavailable
from shorttail.server.http import instances, v2, v2_documents
from shorttail.server.http.app import HttpCall, HttpServer
from shorttail.server.http.exposition import CONTENT_TYPE, exposition
from shorttail.server.http.json import JSON, json_response
from shorttail.server.http.parsed import Answer, FindModel, ModelColumns, ResponseBody

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
        router.add_get("/metrics", endpoint(self.metrics, in_reserve=True))

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
        return json_response(v2_documents.server_metadata(VERSION))

    async def index(self, request: web.Request, call: HttpCall) -> web.Response:
        return json_response(v2_documents.repository_index(self._catalog(), not self.server.not_ready))

    async def model(self, request: web.Request, call: HttpCall) -> web.Response:
        return json_response(v2_documents.model_metadata(self._catalog(), *_asked(request)))

    async def model_ready(self, request: web.Request, call: HttpCall) -> web.Response:
        name, version = _asked(request)
        self._catalog().model(name).version(version)
        if self.server.not_ready:
            raise Unavailable(self.server.not_ready)
        return web.Response()

    async def config(self, request: web.Request, call: HttpCall) -> web.Response:
        return json_response(v2_documents.model_config(self._catalog(), *_asked(request)))

    async def stats(self, request: web.Request, call: HttpCall) -> web.Response:
        catalog = self._catalog()
        entries = dict(catalog.models)
        if "model" in request.match_info:
            name, version = _asked(request)
            catalog.model(name).version(version)
            entries = {name: catalog.model(name)}
        return json_response(v2_documents.statistics(entries, self.server.memory.slots()))

    async def infer(self, request: web.Request, call: HttpCall) -> web.Response:
        server = self.server
        name, version = _asked(request)
        call.predicts()
        find_model = _finder(server, call, lambda: name, version)
        find_model(None, None)  # an unknown model is reported before the body is read
        body = await server.body(request)
        asked = await server.parse(v2.parse_infer, body, request.headers.get(v2.HEADER_BYTES), find_model)
        call.note_id(asked.wanted.id)
        call.within(asked.timeout_us)
        run = server.batches.infer if asked.are_tensors else server.batches.predict
        plan = server.engine.plan_for_model(name, asked.version)
        answer = await run(plan, asked.values, call.deadline_ns, call.sender)
        return _written(server, call, answer, v2.write_answer, asked.wanted)

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
        as_csv = request.content_type == instances.CSV
        parser = instances.parse_csv if as_csv else instances.parse_instances
        find_model = _finder(server, call, lambda: self._model(request))
        asked = await server.parse(parser, await server.body(request), find_model)
        plan = server.engine.plan_for_model(asked.model, asked.version)
        answer = await server.batches.predict(plan, asked.columns, call.deadline_ns, call.sender)
        accepted = request.headers.get("Accept", "*/*")
        to_csv = instances.CSV in accepted or (as_csv and JSON not in accepted)
        write = instances.write_csv if to_csv else instances.write_predictions
        return _written(server, call, answer, write, asked.outputs)

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


def _asked(request: web.Request) -> tuple[str, int | None]:
    """Return the model name and the version (None: the current one) in the path."""
    return request.match_info["model"], v2_documents.version_number(request.match_info.get("version"))


def _finder(server: HttpServer, call: HttpCall, default: Callable[[], str], version: int | None = None) -> FindModel:
    """Return the function by which parsers find the model of a request; it notes the model in the call.

    default, version: the model and version if the body names none.
    """

    def find(name: str | None, asked_version: int | None) -> ModelColumns:
        name, number = name or default(), version if asked_version is None else asked_version
        plan = server.engine.plan_for_model(name, number)
        call.predicts(name)
        assert plan.runner is not None
        tensors = tuple(tensor.name for tensor in plan.runner.inputs)
        return ModelColumns(name, number, plan.names, plan.dtypes, tensors, plan.tensors is not None)

    return find


def _written(
    server: HttpServer, call: HttpCall, answer: Answer, write: Callable[[Any, Answer], ResponseBody], wanted: Any
) -> web.Response:
    """Return the response that `write` makes of an answer. wanted: what the request says of it."""
    start_ns = time.perf_counter_ns()
    body = write(wanted, answer)
    call.note_rows(answer.rows)
    server.encoded(call, start_ns)
    return web.Response(body=body.content, headers={"Content-Type": body.content_type, **body.headers})
