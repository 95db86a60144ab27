"""An operation of the HTTP API, and what the handlers of operations share."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from aiohttp import web

from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, ResourceExhausted
from shorttail.server.http.app import HttpCall, HttpServer
from shorttail.server.http.media import answer_type, body_type
from shorttail.server.http.parsed import Answer, FindModel, ModelColumns, ResponseBody, TooLarge

if TYPE_CHECKING:
    from shorttail.pipeline import Plan

Schema = dict[str, Any]
OperationHandler = Callable[[HttpServer, web.Request, HttpCall], Awaitable[web.Response]]

# The statuses of an answer whose request runs a model, and of one that only names a model.
RUNS: Final = (400, 404, 413, 415, 429, 500, 503, 504)
NAMES: Final = (400, 404, 500)


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a path: who answers it, and how openapi.py describes it.

    summary: one sentence. gives: media type -> schema of the answer of status 200; empty: it has no body. takes: as
    gives, of the body of a request. fails: the other statuses, besides those of tokens and of Accept. failure: the
    schema of their bodies, if it is not Error. headers: names of request headers that it reads. response_headers: of
    the answer. is_probe: it needs no token, is not counted, and ignores Accept. in_reserve: as for HttpServer.endpoint.
    """

    method: str
    path: str
    handler: OperationHandler
    summary: str
    gives: Mapping[str, Schema] = field(default_factory=dict)
    takes: Mapping[str, Schema] = field(default_factory=dict)
    fails: Sequence[int] = ()
    failure: Schema | None = None
    headers: Sequence[str] = ()
    response_headers: Sequence[str] = ()
    is_probe: bool = False
    in_reserve: bool = False


def one_header(request: web.Request, name: str) -> str | None:
    """Return a header, or None without it. Raises InvalidArgument if it is given several times with other values."""
    values = set(request.headers.getall(name, []))
    if len(values) > 1:
        raise InvalidArgument(f"the header {name} is given {len(values)} times with different values")
    return values.pop() if values else None


def body_type_of(request: web.Request, takes: Sequence[str]) -> str:
    """Return the media type of the body of a request. Raises UnsupportedMedia."""
    return body_type(one_header(request, "Content-Type"), takes)


def answer_type_for(request: web.Request, gives: Sequence[str]) -> str:
    """Return the media type in which to answer. Raises NotAcceptable."""
    return answer_type(",".join(request.headers.getall("Accept", [])), gives)


def finder(
    server: HttpServer,
    call: HttpCall,
    default: Callable[[], str],
    version: int | None = None,
    *,
    is_fixed: bool = False,
) -> FindModel:
    """Return the function by which parsers find the model of a request; it notes the model in the call.

    default, version: the model and the version if the body names none. is_fixed: the body may name no other model.
    """

    def find(name: str | None, asked_version: int | None) -> ModelColumns:
        if is_fixed and name not in (None, default()):
            raise InvalidArgument(f"the body names the model {name!r:.60}, and the path '{default()}'")
        name, number = name or default(), version if asked_version is None else asked_version
        plan = server.engine.plan_for_model(name, number)
        call.predicts(name)
        assert plan.runner is not None
        tensors = tuple(tensor.name for tensor in plan.runner.inputs)
        return ModelColumns(name, number, plan.names, plan.dtypes, tensors, plan.tensors is not None)

    return find


def check_work(server: HttpServer, plan: Plan, columns: Mapping[str, Any]) -> None:
    """Raise TooLarge if the event loop would take too long to look up and to compute so many rows."""
    rows = max((len(values) for values in columns.values() if isinstance(values, list | np.ndarray)), default=1)
    if server.on_loop and rows * plan.row_work > LIMITS.loop_values:
        raise TooLarge


def written(
    server: HttpServer, call: HttpCall, answer: Answer, write: Callable[[Any, Answer], ResponseBody], wanted: Any
) -> web.Response:
    """Return the response that `write` makes of an answer. wanted: what the request says of it.

    Raises ResourceExhausted for an answer that is too long, and TooLarge if the event loop would take too long for it.
    """
    values = sum(array.size for array in answer.values)
    if values > LIMITS.reply_values:
        raise ResourceExhausted(
            f"an answer of {values} values; at most {LIMITS.reply_values} are sent at once: send fewer rows"
        )
    most = LIMITS.loop_reply_tensor_values if getattr(wanted, "has_bytes", False) else LIMITS.loop_reply_values
    if server.on_loop and values > most:
        raise TooLarge
    start_ns = time.perf_counter_ns()
    body = write(wanted, answer)
    call.note_rows(answer.rows)
    server.encoded(call, start_ns)
    return web.Response(body=body.content, headers={"Content-Type": body.content_type, **body.headers})
