from collections.abc import Callable
from typing import Any, Final

WORDS: Final[int]
SLOTS: Final[int]
SLOTS_AT: Final[int]
BANNED: Final[int]
BANNED_AT: Final[int]
LOADS: Final[int]
LOADS_AT: Final[int]

class RunTooLong(Exception): ...

def share(fd: int) -> None: ...
def limit_thread(limit_s: float) -> None: ...
def banned() -> frozenset[int]: ...
def begin_load(key: int) -> int: ...
def end_load(place: int) -> None: ...
def run(
    call: Callable[..., list[Any]],
    names: list[str],
    feeds: dict[str, Any],
    key: int,
    limit_ns: int,
    new_options: Callable[[], Any],
) -> list[Any]: ...
