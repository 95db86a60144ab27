"""The history of a store: what was changed, by whom, when and from what. It only grows.

An event is written in the commit of its change, so that there is never one without the other. The key is `h` and the
number of the event, big-endian; the value is a CRC-32C, little-endian, and the event as JSON.
"""

from __future__ import annotations

import getpass
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from shorttail._native.pages import crc32c
from shorttail.define import clock
from shorttail.define.catalog import Catalog
from shorttail.errors import Internal
from shorttail.store.lmdb_handle import Transaction

Json = dict[str, Any]

PREFIX: Final = b"h"
BACKED_UP: Final = "backed up"  # the action of the event of a backup, whose detail has its path and its commit
_NUMBER: Final = struct.Struct(">Q")
_SUM: Final = struct.Struct("<I")


@dataclass(frozen=True)
class Event:
    """A change of a store.

    action: a verb in the past ("applied", "deployed", "promoted", "loaded"). subject: what was changed, "view stats" or
    "model fraud"; "" for several. who: a label or a login name. detail: what else is known, such as rows or the hash of
    a file. answers: what answers from then on, of each model and view that the change concerns (`answers_of`); None
    for one that is gone.
    """

    action: str
    subject: str = ""
    who: str = ""
    time_us: int = 0
    detail: Json = field(default_factory=dict)
    answers: dict[str, Json | None] = field(default_factory=dict)
    number: int = 0

    def encode(self) -> bytes:
        document = {
            "action": self.action,
            "subject": self.subject,
            "who": self.who,
            "time_us": self.time_us,
            "detail": self.detail,
            "answers": self.answers,
        }
        text = json.dumps(document, separators=(",", ":")).encode()
        return _SUM.pack(crc32c(text)) + text

    @classmethod
    def decode(cls, key: bytes, value: bytes | memoryview) -> Event:
        """Return an event of its key and value. Raises ValueError if it is damaged."""
        text = bytes(value[_SUM.size :])
        if len(key) != 1 + _NUMBER.size or len(value) < _SUM.size or _SUM.unpack(value[: _SUM.size])[0] != crc32c(text):
            raise ValueError("its checksum is wrong")
        return cls(**json.loads(text), number=_NUMBER.unpack(key[1:])[0])


def key_of(number: int) -> bytes:
    return PREFIX + _NUMBER.pack(number)


def last_number(txn: Transaction) -> int:
    """Return the number of the last event, 0 if there is none."""
    cursor = txn.cursor()
    found = cursor.prev() if cursor.set_range(key_of(2**64 - 1)) else cursor.last()
    key = bytes(cursor.key()) if found else b""
    return _NUMBER.unpack(key[1:])[0] if key[:1] == PREFIX else 0


def events(txn: Transaction, first: int = 1) -> Iterator[tuple[bytes, memoryview]]:
    """Yield (key, value) of each event from number `first` on, oldest first."""
    cursor = txn.cursor()
    if cursor.set_range(key_of(first)):
        for key, value in cursor:
            if bytes(key[:1]) != PREFIX:
                return
            yield bytes(key), value


def answers_of(catalog: Catalog) -> dict[str, Json]:
    """Return what answers: for "model NAME" its versions, for "view NAME" its table."""
    found: dict[str, Json] = {}
    for name, entry in catalog.models.items():
        shares = {"canary": entry.canary, "shadow": entry.shadow}
        found[f"model {name}"] = {
            "version": entry.current,
            "sha256": entry.version().sha256,
            **{kind: share.to_json() for kind, share in shares.items() if share is not None},
        }
    for name in catalog.views:
        found[f"view {name}"] = {"table": catalog.tables[name].id}
    return found


def append(txn: Transaction, event: Event, before: Catalog, after: Catalog) -> None:
    """Write an event with what the change makes different. Its time is not before that of the last event."""
    number = last_number(txn)
    last_us = 0
    if number:
        try:
            last_us = Event.decode(key_of(number), txn.get(key_of(number))).time_us
        except ValueError:  # `verify` says so; a change must still be possible
            last_us = 0
    event = replace(
        event,
        who=event.who or login(),
        time_us=max(clock.now_us(), last_us),
        answers=changes(before, after),
    )
    txn.put(key_of(number + 1), event.encode())


def read(txn: Transaction) -> Iterator[Event]:
    """Yield all events, oldest first. Raises Internal for a damaged one."""
    for place, (key, value) in enumerate(events(txn), 1):
        try:
            yield Event.decode(key, value)
        except (ValueError, TypeError) as error:
            raise Internal(
                f"event {place} of the history is damaged ({error}); restore the store from a backup"
            ) from None


def changes(before: Catalog, after: Catalog) -> dict[str, Json | None]:
    """Return what of `answers_of` a change has made different; None for what is gone."""
    old, new = answers_of(before), answers_of(after)
    gone: dict[str, Json | None] = dict.fromkeys(name for name in old if name not in new)
    return gone | {name: state for name, state in new.items() if old.get(name) != state}


def login() -> str:
    """Return the name of the user that runs this process, or its number where it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
