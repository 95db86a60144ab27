from collections.abc import Sequence
from typing import Any, Final, Self

from numpy import float64, uint32, uint64, void
from numpy.typing import NDArray

from shorttail.loadtest.templates import EncodedColumn, Group, Template

_Histogram = tuple[NDArray[uint64], int, float]

COUNTS: Final[int]
PROTOCOLS: Final[dict[str, int]]
KINDS: Final[dict[str, int]]
FORMS: Final[dict[str, int]]
PIECES: Final[dict[str, int]]
DRAWS: Final[dict[str, int]]
OUTCOMES: Final[tuple[str, ...]]
NUMBER_BYTES: Final[int]
EVENT: Any

class Generator:
    def __new__(
        cls,
        *,
        protocol: str,
        sockaddr: bytes,
        templates: Sequence[Template],
        columns: Sequence[EncodedColumn] = ...,
        groups: Sequence[Group] = ...,
        connections: int = ...,
        pipeline: int = ...,
        closed_loop: bool = ...,
        poisson: bool = ...,
        rate_from: float = ...,
        rate_to: float = ...,
        phase: float = ...,
        warmup_ns: int = ...,
        duration_ns: int = ...,
        timeout_ns: int = ...,
        intervals: int = ...,
        spin_ns: int = ...,
        seed: int = ...,
        raw_reply_bytes: int = ...,
        capture_every: int = ...,
        captures: int = ...,
        events: int = ...,
    ) -> Self: ...
    def run(self) -> None: ...
    def stop(self, at_once: bool = ...) -> None: ...
    def progress(self) -> dict[str, Any]: ...
    def interval_latency(self, i: int) -> _Histogram: ...
    def template_latency(self, i: int) -> _Histogram: ...
    def results(self) -> dict[str, Any]: ...
    def captures(self) -> list[tuple[bytes, bytes]]: ...
    def events(self) -> NDArray[void]: ...

class Hiccups:
    def __new__(cls, period_ns: int = ..., slice_ns: int = ..., slices: int = ...) -> Self: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...
    def results(self) -> tuple[_Histogram, int, NDArray[uint32]]: ...

def draw_rows(draw: str, n: int, exponent: float, count: int, seed: int = ...) -> NDArray[uint64]: ...
def arrival_times(
    count: int,
    *,
    poisson: bool,
    rate_from: float,
    rate_to: float,
    hold_s: float = ...,
    ramp_s: float = ...,
    phase: float = ...,
    seed: int = ...,
) -> NDArray[float64]: ...
