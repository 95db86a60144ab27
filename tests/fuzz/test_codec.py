"""The check of coverage-guided fuzzing (fuzz_codec.py) on its seeds and on damaged seeds."""

import random

import codec
import msgpack
import pytest
from mutations import mutate
from seeds import inputs, messages

SEED = 20260101


@pytest.mark.parametrize("message", list(messages()))
def test_the_seeds_are_valid_requests(message):
    answers = codec.replies(msgpack.packb(message), access=2, cut=1)
    assert [answer[2] for answer in answers] == [None] * (message[0] == 0)


def test_damaged_seeds_are_read_or_refused():
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for data in [*inputs()] * 20:
        codec.check(data)
        codec.check(data[:2] + mutate(rng, data[2:]))


def test_the_check_detects_an_answer_that_depends_on_how_the_bytes_were_split(monkeypatch):
    """A check that cannot fail finds nothing."""
    honest = codec.replies
    monkeypatch.setattr(codec, "replies", lambda stream, access, cut: honest(stream[: cut // 8 * 8], access, cut))
    with pytest.raises(AssertionError, match="answered otherwise"):
        codec.check(b"\2\7" + msgpack.packb([0, 1, "ping", []]) * 2)
