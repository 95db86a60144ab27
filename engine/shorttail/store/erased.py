"""The list of erased keys: what `delete-entity` deleted, so that loads and pushes do not bring it back.

The list has no keys, only their hashes. A secret of the store, which is made at the first deletion, keeps others from
telling whose hash it is. A deletion is one entry, which is never changed: the key is `e`, the name of the entity, a NUL
and the number of the deletion, big-endian; the value is a CRC-32C, the time of the deletion in microseconds since 1970
UTC, little-endian, and 16 bytes per key. The secret is under `e`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail._native.pages import crc32c, secret_hashes
from shorttail.errors import Internal
from shorttail.store.environment import Environment
from shorttail.store.lmdb_handle import Transaction
from shorttail.store.table import UNTIMED, Source

PREFIX: Final = b"e"  # also the key of the secret
SECRET_BYTES: Final = 16
HASH_BYTES: Final = 16
_NUMBER: Final = struct.Struct(">Q")
_SUM: Final = struct.Struct("<I")
_TIME: Final = struct.Struct("<Q")
_FILTER_BITS_MIN: Final = 10
_FILTER_SHARE: Final = 64  # slots of the filter per hash: it lets one of so many other keys through

Hashes = NDArray[np.uint64]  # [n, 2]


@dataclass(frozen=True, slots=True, eq=False)
class Erased:
    """The erased keys of an entity as of a commit. Immutable; threads may share it.

    entity: its name. deletions: how many there were. times_us: hash -> the time up to which the events of the key are
    erased.
    """

    entity: str
    deletions: int = 0
    secret: bytes = b""
    times_us: Mapping[bytes, int] = field(default_factory=dict)
    _filter: NDArray[np.bool_] | None = None  # by the top bits of the first word of a hash: whether it may be erased

    @classmethod
    def of(cls, txn: Transaction, entity: str, known: Erased | None = None) -> Erased:
        """Return the list as of a transaction. known: an older one, which saves to read its entries again.

        Costs one look-up if there is nothing new. Raises Internal if the list is damaged.
        """
        known = known or cls(entity)
        if known.is_current(txn):
            return known
        secret, times_us, number = _read_secret(txn), dict(known.times_us), known.deletions
        while (value := txn.get(_key(entity, number + 1))) is not None:
            number += 1
            time_us, hashes = _decode(value, entity, number)
            for at in range(0, len(hashes), HASH_BYTES):
                key = hashes[at : at + HASH_BYTES]
                times_us[key] = max(time_us, times_us.get(key, time_us))
        bits = max(_FILTER_BITS_MIN, (_FILTER_SHARE * len(times_us)).bit_length())
        marked = np.zeros(1 << bits, np.bool_)
        marked[_slots(_words(b"".join(times_us)), bits)] = True
        return cls(entity, number, secret, times_us, marked)

    @classmethod
    def newest(cls, environment: Environment, entity: str, known: Erased | None = None) -> Erased:
        """Return the list as of the last commit: see of()."""
        with environment.read() as txn:
            return cls.of(txn, entity, known)

    def is_current(self, txn: Transaction) -> bool:
        """Return whether nothing was added to the list as of a transaction."""
        return txn.get(_key(self.entity, self.deletions + 1)) is None

    @property
    def is_empty(self) -> bool:
        """Whether no key was erased."""
        return self._filter is None

    @property
    def last_us(self) -> int:
        """The time of the last deletion, 0 if there was none."""
        return max(self.times_us.values(), default=0)

    def mask(self, keys: Mapping[str, Source], event_time_us: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Return which of n rows are erased, as bool [n]; None if none is.

        keys: the key columns of the entity, as table.key_sources() returns them. event_time_us: int64 [n]. A row that
        is UNTIMED is not erased: its event is of now.
        """
        if self._filter is None:
            return None
        hashes = hash_keys(self.secret, keys, len(event_time_us))
        slots = _slots(hashes, len(self._filter).bit_length() - 1)
        maybe = np.flatnonzero(self._filter[slots] & (event_time_us != UNTIMED))
        found = [i for i in maybe.tolist() if event_time_us[i] <= self.times_us.get(hashes[i].tobytes(), UNTIMED)]
        if not found:
            return None
        mask = np.zeros(len(event_time_us), np.bool_)
        mask[found] = True
        return mask


def hash_keys(secret: bytes, keys: Mapping[str, Source], n: int) -> Hashes:
    """Return the hashes of n keys. Columns are hashed in the order of their names: views may have them in another."""
    return _words(secret_hashes(secret, [keys[name] for name in sorted(keys)], n))


def secret_of(txn: Transaction) -> bytes:
    """Return the secret of the store; a write transaction makes it if there is none. Raises Internal (damage)."""
    if txn.get(PREFIX) is None:
        secret = os.urandom(SECRET_BYTES)
        txn.put(PREFIX, _SUM.pack(crc32c(secret)) + secret)
    return _read_secret(txn)


def append(txn: Transaction, known: Erased, hashes: bytes, time_us: int) -> None:
    """Add a deletion to a list, which is that of the transaction. hashes: 16 bytes per key."""
    text = _TIME.pack(time_us) + hashes
    txn.put(_key(known.entity, known.deletions + 1), _SUM.pack(crc32c(text)) + text)


def problems(entries: Sequence[tuple[bytes, bytes]]) -> Iterator[str]:
    """Yield what is wrong with the entries of all lists, for `verify`. entries: (key, value), in the order of LMDB."""
    expected: dict[bytes, int] = {}
    if entries and entries[0][0] != PREFIX:
        yield "the secret of the lists of erased keys is missing"
    for key, value in entries:
        if key == PREFIX:
            if not _is_secret(value):
                yield "the secret of the lists of erased keys is damaged"
            continue
        name, number = key[1 : -1 - _NUMBER.size], int.from_bytes(key[-_NUMBER.size :])
        shown = name.decode(errors="replace")
        if key[-1 - _NUMBER.size : -_NUMBER.size] != b"\0" or not name:
            yield f"LMDB holds the unknown key {key!r}"
            continue
        expected[name] = expected.get(name, 0) + 1
        if number != expected[name]:
            yield f"the list of erased keys of entity '{shown}' lacks its deletion {expected[name]}"
            expected[name] = number
        try:
            _decode(value, shown, number)
        except Internal as error:
            yield error.message


def _key(entity: str, number: int) -> bytes:
    return PREFIX + entity.encode() + b"\0" + _NUMBER.pack(number)


def _is_secret(value: Any) -> bool:
    return len(value) == _SUM.size + SECRET_BYTES and _SUM.unpack_from(value)[0] == crc32c(value[_SUM.size :])


def _read_secret(txn: Transaction) -> bytes:
    value = txn.get(PREFIX)
    if value is None or not _is_secret(value):
        raise Internal("the secret of the lists of erased keys is missing or damaged; restore the store from a backup")
    return bytes(value[_SUM.size :])


def _decode(value: Any, entity: str, number: int) -> tuple[int, bytes]:
    """Return the time and the hashes of a deletion. Raises Internal if it is damaged."""
    start = _SUM.size + _TIME.size
    sound = len(value) >= start and (len(value) - start) % HASH_BYTES == 0
    if not sound or _SUM.unpack_from(value)[0] != crc32c(value[_SUM.size :]):
        raise Internal(
            f"deletion {number} in the list of erased keys of entity '{entity}' is damaged; restore the store from a "
            "backup"
        )
    return _TIME.unpack_from(value, _SUM.size)[0], bytes(value[start:])


def _words(hashes: bytes) -> Hashes:
    return np.frombuffer(hashes, np.dtype("<u8")).reshape(-1, 2)


def _slots(hashes: Hashes, bits: int) -> NDArray[np.uint64]:
    return hashes[:, 0] >> np.uint64(64 - bits)
