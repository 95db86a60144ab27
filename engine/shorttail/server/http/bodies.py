"""Reads the bodies of HTTP requests, under limits that hold while they arrive.

A body that the event loop would parse for too long raises TooLarge, and the bulk worker answers the request instead.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Final

from aiohttp import web

from shorttail.config import LIMITS
from shorttail.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from shorttail.server.http.parsed import TooLarge

HEADER_BYTES: Final = "Inference-Header-Content-Length"  # of a body of tensors: the bytes of JSON at its begin
WINDOW_BITS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 47}  # of zlib.decompressobj; 47 takes gzip and zlib
RAW_DEFLATE: Final = -15  # some clients leave out the header of zlib
PIECE_BYTES: Final = 64 << 10  # what follows a member is copied, so it is given piece by piece
MEMBERS_MAX: Final = 1024  # of a body of gzip; block compressors make one for each 64 KiB


RECEIVED: Final = "body"  # under this name a request keeps what was read of its body, as it came


class BodyTooLarge(ResourceExhausted):
    """A body is larger than any that is taken."""

    http_status: Final = 413

    def __init__(self) -> None:
        super().__init__(f"a body of more than {LIMITS.frame_bytes} bytes; send it in parts")


class Bodies:
    """Reads bodies. on_loop: a body that would hold up the event loop raises TooLarge."""

    def __init__(self, on_loop: bool):
        self.on_loop = on_loop
        self.timed_out = 0  # bodies that did not arrive in time
        self.reading_bytes = 0  # of all bodies that are being read, as far as they have arrived

    async def read(self, request: web.Request) -> bytes:
        """Read the body of a request, and decompress it.

        Raises TooLarge; BodyTooLarge; ResourceExhausted if all bodies that are being read exceed
        LIMITS.http_body_bytes; DeadlineExceeded after LIMITS.http_read_s; InvalidArgument if the connection ends, or
        the body is not compressed as its header says.
        """
        most = loop_bytes(request) if self.on_loop else LIMITS.frame_bytes
        encoding = request.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in ("", "identity", *WINDOW_BITS):
            raise web.HTTPUnsupportedMediaType(reason="Content-Encoding must be gzip or deflate")
        if request.content_length is not None:
            if request.content_length > LIMITS.frame_bytes:
                raise BodyTooLarge
            if request.content_length > most:
                raise TooLarge
        try:
            async with asyncio.timeout(LIMITS.http_read_s):
                body = await self._receive(request, most)
        except TimeoutError:
            self.timed_out += 1
            raise DeadlineExceeded(f"the body did not arrive within {LIMITS.http_read_s:g} s") from None
        except ConnectionError:
            raise InvalidArgument("the connection ended within the body") from None
        if encoding in WINDOW_BITS:
            return self._inflate(body, encoding, most)
        return body

    async def _receive(self, request: web.Request, most: int) -> bytes:
        body = bytearray()
        try:
            while chunk := await request.content.readany():
                body += chunk
                self.reading_bytes += len(chunk)
                if len(body) > most:
                    raise self._too_large()
                if self.reading_bytes > LIMITS.http_body_bytes:
                    raise ResourceExhausted("too many bytes of HTTP requests are in flight; send it again later")
            return bytes(body)
        finally:
            self.reading_bytes -= len(body)
            request[RECEIVED] = bytes(body)

    def _inflate(self, body: bytes, encoding: str, most: int) -> bytes:
        try:
            found = inflated(body, WINDOW_BITS[encoding], most)
        except zlib.error:
            if encoding != "deflate":
                raise InvalidArgument(f"the body is not compressed with {encoding}, as its header says") from None
            try:
                found = inflated(body, RAW_DEFLATE, most)
            except zlib.error:
                raise InvalidArgument(f"the body is not compressed with {encoding}, as its header says") from None
        if found is None:
            raise self._too_large()
        return found

    def _too_large(self) -> Exception:
        return TooLarge() if self.on_loop else BodyTooLarge()


def inflated(body: bytes, window_bits: int, most: int) -> bytes | None:
    """Decompress a body; None if the result has more than `most` bytes. Raises zlib.error.

    Never more than `most` bytes are decompressed, however small the body is. A body of gzip may have several members.
    """
    parts, room, at = [], most, 0
    for _ in range(MEMBERS_MAX):
        stream = zlib.decompressobj(window_bits)
        while not stream.eof:
            piece = body[at : at + PIECE_BYTES]
            if not piece:
                raise zlib.error("the stream is not complete")
            parts.append(stream.decompress(piece, room + 1))
            room -= len(parts[-1])
            if room < 0:
                return None
            at += len(piece) - len(stream.unused_data)
        if at == len(body):
            return b"".join(parts)
    raise zlib.error("too many members")


def loop_bytes(request: web.Request) -> int:
    """Return how large a body the event loop parses itself: it depends on what a byte of it costs."""
    if "csv" in request.content_type:
        return LIMITS.loop_csv_bytes
    json_bytes = request.headers.get(HEADER_BYTES, "")
    if json_bytes.isascii() and json_bytes.isdigit() and len(json_bytes) < 10:
        return LIMITS.loop_bytes if int(json_bytes) <= LIMITS.loop_text_bytes else 0
    return LIMITS.loop_text_bytes
