"""Media types of HTTP: what a body is (Content-Type), and what the client takes (Accept)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from shorttail.errors import InvalidArgument

JSON: Final = "application/json"
OCTETS: Final = "application/octet-stream"
CSV: Final = "text/csv"
# Names of one format, which has no registered one: a JSON value a line.
JSON_LINES: Final = ("application/jsonlines", "application/x-jsonlines", "application/x-ndjson", "application/jsonl")
FORM: Final = "application/x-www-form-urlencoded"  # what curl -d sends if nobody says what the body is

QUALITY: Final = re.compile(r"(0(\.[0-9]{0,3})?|1(\.0{0,3})?)")
UTF_8: Final = ("utf-8", "utf8", "us-ascii", "ascii")
HEADER_CHARS: Final = 4096


class UnsupportedMedia(InvalidArgument):
    """The media type of a body is not one that the route takes."""

    http_status = 415


class NotAcceptable(InvalidArgument):
    """The client takes no media type in which the route can answer."""

    http_status = 406


def body_type(content_type: str | None, takes: Sequence[str]) -> str:
    """Return the media type of a body, one of `takes`. Raises UnsupportedMedia.

    content_type: the header; without one, and for forms, the body is of the first type of `takes`. Texts are UTF-8.
    """
    name, *parameters = (part.strip() for part in (content_type or takes[0]).split(";"))
    name = name.lower()
    if name == FORM:
        name = takes[0]
    if name not in takes:
        raise UnsupportedMedia(f"Content-Type {name!r:.60} is not taken here; send {' or '.join(takes)}")
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "charset" and value.strip(' "').lower() not in UTF_8:
            raise UnsupportedMedia(f"the charset {value!r:.40} is not taken; send UTF-8")
    return name


def answer_type(accept: str | None, gives: Sequence[str]) -> str:
    """Return the media type that the client likes best among `gives`, whose first is the server's choice.

    accept: the header; without one, everything is taken. Raises NotAcceptable if it takes none of them.
    """
    if not accept or not accept.strip():
        return gives[0]
    if len(accept) > HEADER_CHARS:
        raise NotAcceptable(f"an Accept header of {len(accept)} characters; at most {HEADER_CHARS} are read")
    ranges = [_range(part) for part in accept.split(",")]
    qualities = [_quality(media, ranges) for media in gives]
    if not any(qualities):
        raise NotAcceptable(f"Accept {accept!r:.60}: the answer can be {' or '.join(dict.fromkeys(gives))}")
    return gives[qualities.index(max(qualities))]


def _quality(media: str, ranges: Sequence[tuple[str, float]]) -> float:
    """Return how much the client likes a media type: the quality of the range that names it most exactly; 0: not."""
    exactness, quality = max((_exactness(name, media), quality) for name, quality in ranges)
    return quality if exactness else 0.0


def _range(part: str) -> tuple[str, float]:
    """Return the media range of a part of Accept, and its quality. Other parameters do not matter."""
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q" and QUALITY.fullmatch(value.strip()):
            return name, float(value)
    return name, 1.0


def _exactness(name: str, media: str) -> int:
    """Return how exactly a media range names a type: 3 by its name, 1 by */*, 0 not at all."""
    if name == media:
        return 3
    if name == f"{media.partition('/')[0]}/*":
        return 2
    return 1 if name in ("*/*", "*") else 0
