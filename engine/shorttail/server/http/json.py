"""Parses and writes JSON for HTTP. It uses orjson, because parsing blocks the event loop."""

from __future__ import annotations

from typing import Any, Final

import orjson
from aiohttp import web

from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, ResourceExhausted

JSON: Final = "application/json"


def parse_json(body: bytes | memoryview) -> Any:
    """Parse a body. Raises InvalidArgument, and ResourceExhausted for so many values that objects take much memory."""
    if len(body) > LIMITS.loop_text_bytes:
        _check_values(bytes(body))
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"the body is not JSON: {error}") from None


def _check_values(body: bytes) -> None:
    """Count the values of a body before each becomes an object of Python, which takes up to 250 bytes."""
    if body.count(b",") > LIMITS.declared_elements:
        raise ResourceExhausted(f"more than {LIMITS.declared_elements} values of JSON; send it in parts")
    if body.count(b"[") + body.count(b"{") > LIMITS.json_containers:
        raise ResourceExhausted(f"more than {LIMITS.json_containers} arrays and objects of JSON; send it in parts")


def write_json(document: Any) -> bytes:
    """Encode a document. NumPy arrays in it become nested lists; NaN and infinity become null."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def json_response(document: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return a response with the document as its body."""
    return web.Response(status=status, body=write_json(document), content_type=JSON, headers=headers)
