"""CRC-32C compared with a simple implementation, at lengths around those where the native code changes its method."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shorttail._native.pages import crc32c

STRETCH_BYTES = 1352  # the native code processes three stretches of this size at once
TABLE = [0] * 256
for byte in range(256):
    value = byte
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    TABLE[byte] = value


def expected(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def test_checksums_are_those_of_the_standard() -> None:
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("times", [1, 2, 3, 6, 9])
def test_lengths_around_stretches(times: int) -> None:
    data = np.random.default_rng(times).bytes(times * STRETCH_BYTES + 9)
    for length in (times * STRETCH_BYTES + by for by in (-9, -8, -1, 0, 1, 8, 9)):
        assert crc32c(data[:length]) == expected(data[:length]), length


@given(st.binary(max_size=64), st.integers(0, 3 * STRETCH_BYTES))
def test_any_bytes_anywhere(part: bytes, before: int) -> None:
    data = bytes(before) + part
    assert crc32c(data) == expected(data)
