"""Parses and writes JSON for HTTP. It uses orjson, because parsing blocks the event loop."""

from __future__ import annotations

from typing import Any, Final

import orjson
from aiohttp import web

from shorttail.errors import InvalidArgument

JSON: Final = "application/json"


def parse_json(body: bytes | memoryview) -> Any:
    """Parse a body. Raises InvalidArgument."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"the body is not JSON: {error}") from None


def write_json(document: Any) -> bytes:
    """Encode a document. NumPy arrays in it become nested lists; NaN and infinity become null."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def json_response(document: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return a response with the document as its body."""
    return web.Response(status=status, body=write_json(document), content_type=JSON, headers=headers)
