"""The settings of a store that its catalog does not have: its largest size, the length of its log, and durability.

They are under the key `settings`: a CRC-32C, little-endian, and a JSON object of those that were set. All processes
follow them: `durability` and a larger map from the next opening on, the rest from the next commit on.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Final

from shorttail._native.pages import crc32c
from shorttail.config import LIMITS
from shorttail.define.sizes import exact_size, parse_size
from shorttail.errors import InvalidArgument
from shorttail.store.lmdb_file import SETTINGS_KEY

DURABILITY: Final = ("commit", "system")
MAP_BYTES_MIN, MAP_BYTES_MAX = 1 << 20, 1 << 46
LOG_BYTES_MIN, LOG_BYTES_MAX = 4096, 1 << 40
LOG_COMMITS_MAX: Final = 1_000_000
_SUM: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The settings of a store; None: the default.

    map_size: how many bytes of pages may be in use, at most. log_bytes, log_commits: of the change log. durability:
    "commit", the default: each commit is on disk when it returns. "system": a crash of the machine may undo the last
    commit, because the system writes LMDB's meta page when it likes; LMDB still flushes all other pages before.
    """

    map_size: int | None = None
    log_bytes: int | None = None
    log_commits: int | None = None
    durability: str | None = None

    @classmethod
    def of(cls, txn: Any) -> StoreSettings:
        """Return the settings as of a transaction of LMDB; the default if they are damaged, which `verify` finds."""
        value = txn.get(SETTINGS_KEY)
        return cls() if value is None else decode(bytes(value)) or cls()

    def encode(self) -> bytes:
        text = json.dumps({name: value for name, value in asdict(self).items() if value is not None}).encode()
        return _SUM.pack(crc32c(text)) + text

    def with_value(self, name: str, text: str) -> StoreSettings:
        """Return the settings with one changed as a user wrote it; "default" unsets it. Raises InvalidArgument."""
        return replace(self, **{name: None if text == "default" else _PARSE[name](text)})

    def shown(self) -> dict[str, str]:
        """Return {setting: value as text}, with the defaults."""
        return {
            "map_size": "default" if self.map_size is None else exact_size(self.map_size),
            "log_bytes": exact_size(self.log_bytes or LIMITS.change_log_bytes),
            "log_commits": str(self.log_commits or LIMITS.change_log_commits),
            "durability": self.durability or DURABILITY[0],
        }


@lru_cache(maxsize=8)  # every commit reads the same few bytes
def decode(value: bytes) -> StoreSettings | None:
    """Return the settings of a value in LMDB; None if it is damaged. Settings of later versions are left out."""
    if len(value) < _SUM.size or _SUM.unpack_from(value)[0] != crc32c(value[_SUM.size :]):
        return None
    found = json.loads(value[_SUM.size :])
    return StoreSettings(**{name: found[name] for name in _PARSE if name in found})


def _map_size(text: str) -> int:
    return parse_size(text, "map_size", MAP_BYTES_MIN, MAP_BYTES_MAX)


def _log_bytes(text: str) -> int:
    return parse_size(text, "log_bytes", LOG_BYTES_MIN, LOG_BYTES_MAX)


def _log_commits(text: str) -> int:
    if not (text.isdecimal() and text.isascii() and len(text) < 10 and 1 <= int(text) <= LOG_COMMITS_MAX):
        raise InvalidArgument(f"log_commits {text!r} is not a number from 1 to {LOG_COMMITS_MAX:,}; write 4096")
    return int(text)


def _durability(text: str) -> str:
    if text not in DURABILITY:
        raise InvalidArgument(f"durability {text!r} is neither 'commit' nor 'system'")
    return text


_PARSE: Final[dict[str, Callable[[str], Any]]] = {
    "map_size": _map_size,
    "log_bytes": _log_bytes,
    "log_commits": _log_commits,
    "durability": _durability,
}
