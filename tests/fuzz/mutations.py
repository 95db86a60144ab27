"""Valid messages with damage as networks and attackers cause it. A seed determines all of it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgpack

COLUMNS = {"user_id": [1, 2, 3], "amount": 0.5}
FRAMES = [
    msgpack.packb(message)
    for message in (
        [0, 1, "ping", []],
        [0, 2, "predict", ["total", COLUMNS]],
        [0, 3, "predict", ["total", COLUMNS, {"deadline_ms": 100, "encoding": "tensor", "priority": 2}]],
        [
            0,
            4,
            "get_online_features",
            [["stats:age", "stats:tier", "stats:taste"], {"user_id": [3, 2]}, {"as_of": 10**15}],
        ],
        [0, 5, "push", ["stats", {"user_id": [9], "age": [None], "visits": [1], "tier": ["x"], "taste": [[1, 2]]}]],
        [0, 6, "delete", ["stats", {"user_id": [9]}]],
        [
            0,
            7,
            "predict",
            ["total", {"user_id": msgpack.ExtType(1, b"\x03\x01\x01\x00\x00\x00" + bytes(8)), "amount": 1}],
        ],
        [0, 8, "models", []],
        [0, 9, "auth", ["token"]],
        [2, "predict", ["total", COLUMNS]],
    )
]
HUGE = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\x7f\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\x00\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
]
EDGES = [b"\xc1", b"\xc0", b"\x7f", b"\xff", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7), b"\xcb\x7f\xf8" + bytes(6)]


def mutate(rng: random.Random, frame: bytes) -> bytes:
    """Return a message with damage in one to three places."""
    data = bytearray(frame)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.choice(HUGE)
        elif kind == 3:
            data[at:at] = rng.choice([b"\x91", b"\x81\x01", b"\xdc\x00\x01"]) * rng.choice([1, 7, 8, 40, 2000])
        elif kind == 4:
            data[at:at] = rng.choice([b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80", b"\xa1\x80", b"\xa4\xf4\x90\x80\x80"])
        elif kind == 5:
            data[at : at + 1] = rng.choice(EDGES)
        elif kind == 6:
            other = rng.choice(FRAMES)
            data[at:] = other[rng.randrange(len(other)) :]
        else:
            data[at : at + rng.randint(1, 4)] = rng.randbytes(rng.randint(0, 4))
    return bytes(data)


def streams(seed: int, count: int) -> Iterator[bytes]:
    """Return `count` damaged messages, some after valid ones, as a connection would send them."""
    rng = random.Random(seed)
    for _ in range(count):
        before = b"".join(rng.choice(FRAMES) for _ in range(rng.choice([0, 0, 1, 3])))
        yield before + mutate(rng, rng.choice(FRAMES))
