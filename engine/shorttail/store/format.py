"""The format of a store: which one this shorttail writes, and which older ones it still reads. See docs/format.md."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from shorttail.errors import InvalidArgument
from shorttail.store.opening import damaged_store

FORMAT_VERSION: Final = 3
OLDEST_FORMAT: Final = 2  # stores of formats before FORMAT_VERSION are read, and written only by `shorttail migrate`

_thread = threading.local()  # `migrates` is True in a thread that may write stores of older formats


def read_format(path: Path, value: Any) -> int:
    """Return the format of the store at path. value: of the key "format", or None if it is missing.

    Raises InvalidArgument for a format that this shorttail does not read, and for a damaged store.
    """
    text = b"" if value is None else bytes(value)
    if not text.isdigit():
        raise damaged_store(path, f"its format is {None if value is None else text!r}")
    version = int(text)
    if not OLDEST_FORMAT <= version <= FORMAT_VERSION:
        newer = version > FORMAT_VERSION
        remedy = "upgrade shorttail" if newer else "make a new store, by apply and materialize"
        raise InvalidArgument(
            f"store '{path}' has format {version}, and this shorttail reads {OLDEST_FORMAT} and {FORMAT_VERSION}; "
            f"{remedy}"
        )
    return version


def check_writable(path: Path, value: Any) -> None:
    """Raise InvalidArgument unless this thread may write a store of this format. value: as for read_format()."""
    version = read_format(path, value)
    if version < FORMAT_VERSION and not getattr(_thread, "migrates", False):
        raise InvalidArgument(
            f"store '{path}' has format {version}, which this shorttail only reads; run `shorttail migrate --store "
            f"{path}`"
        )


@contextmanager
def migrating() -> Iterator[None]:
    """Let this thread write stores of older formats during the `with` block, to migrate one."""
    _thread.migrates = True
    try:
        yield
    finally:
        _thread.migrates = False
