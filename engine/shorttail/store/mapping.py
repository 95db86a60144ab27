"""The size of LMDB's memory map: address space, reserved when a store is opened, into which the file can grow."""

from __future__ import annotations

import mmap
import os
import resource
from pathlib import Path
from typing import Any

from shorttail.config import LIMITS
from shorttail.define.sizes import exact_size
from shorttail.errors import InvalidArgument, ResourceExhausted
from shorttail.store.lmdb_file import PAGE_BYTES

PAGE_HEADER_BYTES = 16
INLINE_BYTES = 2038 - 8 - 9  # longest log entry that LMDB keeps in its tree: the longest node less its header and key
MAP_VARIABLE = "SHORTTAIL_MAP_GIB"
GROWTH_BYTES_MIN = 1 << 20  # a map in which the file can grow by less is refused
RESERVE_PAGES_MIN = 512  # pages reserved for deletes, at least
RESERVE_DIVISOR = 64  # one page of this many is reserved for deletes and for pages that the last commits freed


def plan_map(path: Path, map_size: int | None = None) -> int:
    """Return the size of the map of a store in bytes. The file cannot grow beyond it until the store is reopened.

    The size is $SHORTTAIL_MAP_GIB if set, otherwise the largest of LIMITS.map_bytes, twice the file size, and the
    store's setting map_size. If the process has a limit on its address space (RLIMIT_AS), the size is at most half
    of the space that is left. Raises InvalidArgument (the variable) and ResourceExhausted (too little address space
    for the present file).
    """
    try:
        file_bytes = (path / "data.mdb").stat().st_size
    except FileNotFoundError:
        file_bytes = 0
    wanted = _bytes_from_variable() or max(LIMITS.map_bytes, 2 * file_bytes, map_size or 0)
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        room = (allowed - used) // 2  # the other half stays for the process itself
        if room < file_bytes + GROWTH_BYTES_MIN:
            raise ResourceExhausted(
                f"store '{path}' has {size_text(file_bytes)}, and this process has {size_text(max(room, 0))} of "
                f"address space to map it; raise its limit of {size_text(allowed)} (ulimit -v)"
            )
        wanted = min(wanted, room)
    return wanted // PAGE_BYTES * PAGE_BYTES


def _bytes_from_variable() -> int:
    """Return the map size in $SHORTTAIL_MAP_GIB in bytes; 0 if it is not set."""
    text = os.environ.get(MAP_VARIABLE, "")
    if not text:
        return 0
    try:
        asked = int(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        asked = 0
    if not GROWTH_BYTES_MIN <= asked < 1 << 47:
        raise InvalidArgument(f"{MAP_VARIABLE}={text} is not a valid map size; give a number of GiB, such as 512")
    return asked


def usable_pages(map_bytes: int, map_size: int | None = None) -> int:
    """Return how many pages of the map, or of the store's setting map_size if that is less, rows may use.

    The other pages are reserved for deletes: a delete needs free pages for the pages that it changes, so without a
    reserve a full store could not be emptied.
    """
    pages = min(map_bytes, map_size or map_bytes) // PAGE_BYTES
    return pages - min(max(RESERVE_PAGES_MIN, pages // RESERVE_DIVISOR), pages // 4)


def value_pages(value: Any) -> int:
    """Return the number of overflow pages that LMDB uses for the value of a log entry."""
    return 0 if len(value) <= INLINE_BYTES else (len(value) + PAGE_HEADER_BYTES + PAGE_BYTES - 1) // PAGE_BYTES


def map_full_error(path: Path, map_size: int | None = None) -> ResourceExhausted:
    if map_size is not None:
        return ResourceExhausted(
            f"store '{path}' has reached its map_size of {exact_size(map_size)}; delete rows, some hundreds at a time, "
            f"or give it more: shorttail settings set map_size SIZE --store {path}"
        )
    return ResourceExhausted(
        f"store '{path}' has filled its map; delete rows, some hundreds at a time, or open it with a larger map "
        f"({MAP_VARIABLE}; ulimit -v)"
    )


def size_text(n_bytes: int) -> str:
    """Return a number of bytes as text for people, such as "3.2 GiB"."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 1 << shift:
            return f"{n_bytes / (1 << shift):.1f} {unit}"
    return f"{n_bytes} bytes"
