"""Passes large HTTP requests to the bulk worker (server/bulk.py), and its responses back to the clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

import aiohttp
from aiohttp import web

from shorttail.config import LIMITS
from shorttail.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from shorttail.server.bulk_link import REFUSED
from shorttail.server.http.bodies import RECEIVED

# Headers that concern one connection only (RFC 9110, 7.6.1), those that the bulk worker gets otherwise, and the token,
# which was checked.
NOT_PASSED: Final = frozenset(
    {
        "authorization",
        "connection",
        "date",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-deadline-ms",
    }
)
PIECE_BYTES: Final = 64 << 10  # of a body, written at once
DIED: Final = "the bulk worker died before it answered; send it again"


class BulkProxy:
    """The large HTTP requests of one worker that are in flight.

    path: of the bulk worker's socket; None if there is no bulk worker, and large requests are refused.
    """

    def __init__(self, path: str | None):
        self.path = path
        self.in_flight = 0
        self._session: aiohttp.ClientSession | None = None

    async def answer(self, request: web.Request, deadline_ns: int) -> web.StreamResponse:
        """Have the bulk worker answer a request.

        deadline_ns: of time.perf_counter_ns; 0: none.

        Raises ResourceExhausted, DeadlineExceeded, Unavailable, and InvalidArgument if the client's connection ends.
        """
        if self.path is None:
            raise ResourceExhausted(REFUSED)
        if self.in_flight >= LIMITS.http_requests:
            raise ResourceExhausted(f"{self.in_flight} large requests are in flight; send it again later")
        left_s = (deadline_ns - time.perf_counter_ns()) / 1e9 if deadline_ns else LIMITS.start_timeout_s
        if left_s <= 0:
            raise DeadlineExceeded("the deadline passed before the bulk worker was asked")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in NOT_PASSED}
        if deadline_ns:
            headers["X-Deadline-Ms"] = f"{1e3 * left_s:.3f}"
        self.in_flight += 1
        try:
            async with asyncio.timeout(left_s):
                answer = await self._asked().post(f"http://bulk{request.path_qs}", headers=headers, data=_body(request))
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the bulk worker answered") from None
        except (aiohttp.ClientError, OSError):
            if request.transport is None or request.transport.is_closing():
                raise InvalidArgument("the connection ended within the body") from None
            raise Unavailable(DIED) from None
        else:
            async with answer:
                return await _pass_back(request, answer)
        finally:
            self.in_flight -= 1

    def _asked(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self.path or "", limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


async def _body(request: web.Request) -> AsyncIterator[bytes]:
    """Yield the body as it came, in pieces. The bulk worker limits its size and its time."""
    if RECEIVED in request:
        yield request[RECEIVED]
    while chunk := await request.content.read(PIECE_BYTES):
        yield chunk
        await asyncio.sleep(0)  # others come first, also when the next piece is here


async def _pass_back(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    headers = {name: value for name, value in answer.headers.items() if name.lower() not in NOT_PASSED}
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_chunked(PIECE_BYTES):
            await response.write(piece)
            await asyncio.sleep(0)
    except aiohttp.ClientError:
        if request.transport is not None:
            request.transport.abort()  # type: ignore[attr-defined,unused-ignore]
        return response
    await response.write_eof()
    return response
