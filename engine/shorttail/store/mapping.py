"""How large a map LMDB gets: address space, reserved when a store is opened, that its file grows into."""

from __future__ import annotations

import mmap
import os
import resource
from pathlib import Path

from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, ResourceExhausted
from shorttail.store.lmdb_file import PAGE_BYTES

MAP_VARIABLE = "SHORTTAIL_MAP_GIB"
ROOM_BYTES = 1 << 20  # a map that leaves a store less than this to grow is refused
RESERVE_PAGES_MIN = 512
RESERVE_PART = 64  # of a map, kept for deletes and for the pages that the last commits freed


def plan_map(path: Path) -> int:
    """Bytes of the map of that store: what its file can grow to until it is opened again.

    LIMITS.map_bytes, or $SHORTTAIL_MAP_GIB, or twice the file if that is more; less where this process may not have so
    much address space. Raises InvalidArgument (the variable), ResourceExhausted (too little for the file there is).
    """
    try:
        file_bytes = (path / "data.mdb").stat().st_size
    except FileNotFoundError:
        file_bytes = 0
    wanted = _asked_bytes() or max(LIMITS.map_bytes, 2 * file_bytes)
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        room = (allowed - used) // 2  # the other half is for the process itself
        if room < file_bytes + ROOM_BYTES:
            raise ResourceExhausted(
                f"store '{path}' has {size_text(file_bytes)}, and this process has {size_text(max(room, 0))} of "
                f"address space to map it; raise its limit of {size_text(allowed)} (ulimit -v)"
            )
        wanted = min(wanted, room)
    return wanted // PAGE_BYTES * PAGE_BYTES


def _asked_bytes() -> int:
    text = os.environ.get(MAP_VARIABLE, "")
    if not text:
        return 0
    try:
        asked = int(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        asked = 0
    if not ROOM_BYTES <= asked < 1 << 47:
        raise InvalidArgument(f"{MAP_VARIABLE}={text} is no size of a map; give GiB, like 512")
    return asked


def pages_to_use(map_bytes: int) -> int:
    """How many of the map's pages rows may fill.

    A delete needs free pages too, for the pages that it changes; with none left a full store could not be emptied.
    """
    pages = map_bytes // PAGE_BYTES
    return pages - min(max(RESERVE_PAGES_MIN, pages // RESERVE_PART), pages // 4)


def map_full(path: Path) -> ResourceExhausted:
    return ResourceExhausted(
        f"store '{path}' has filled its map; delete rows, some hundreds at a time, or open it with a larger one "
        f"({MAP_VARIABLE}; ulimit -v)"
    )


def size_text(n_bytes: int) -> str:
    """ "3.2 GiB"."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 1 << shift:
            return f"{n_bytes / (1 << shift):.1f} {unit}"
    return f"{n_bytes} bytes"
