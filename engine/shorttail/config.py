"""Every limit in one place. The unit stands last in the name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Limits:
    # One request.
    frame_bytes: int = 16 << 20  # a MessagePack message, header to end
    nesting_depth: int = 8  # [0, id, method, [model, {column: [[...]]}, {...}]] needs 6
    declared_elements: int = 4_000_000  # array items and map pairs announced by one message
    rows_per_request: int = 16_384
    string_bytes: int = 65_535  # one string value in a request or a row

    # One turn of the loop.
    batch_rows: int = 16_384  # a batch that is full runs, and the next one starts

    # One connection.
    output_high_water_bytes: int = 4 << 20  # above this its requests are no longer read
    output_low_water_bytes: int = 1 << 20

    # Caches.
    feature_plans_cached: int = 256  # distinct lists of feature references
    feature_list_bytes: int = 65_536  # one such list on the wire; what a cached plan's key may weigh

    # The store.
    map_bytes: int = 256 << 30  # address space, not disk: LMDB grows the file as it is written
    readers: int = 1024
    views: int = 4096
    change_log_commits: int = 4096  # a reader further behind than this rebuilds its directories
    change_log_bytes: int = 64 << 20  # the log is kept to so much, whatever the number of commits
    drop_commit_pages: int = 16_384  # a table that is not needed any more is deleted so many pages a commit
    load_commit_bytes: int = 128 << 20  # a bulk load commits this much at a time
    idle_refresh_ms: int = 100  # an idle worker moves its snapshot forward this often

    # The server.
    stop_grace_s: float = 10.0  # from SIGTERM until connections with work in flight are cut
    start_timeout_s: float = 120.0
    restart_backoff_min_s: float = 0.1
    restart_backoff_max_s: float = 10.0


LIMITS: Final = Limits()

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 7711
